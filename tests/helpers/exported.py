"""Run an export and look at the folder that it wrote."""

import hashlib
import json
from pathlib import Path

import export
from mlx_retrieval.exporters.job import Export


def run_export(output: Path, **flags) -> Path:
    flags.setdefault("skip_library_check", True)
    return export.export(
        Export(output=str(output), **{k: str(v) if isinstance(v, Path) else v for k, v in flags.items()})
    )


def read_json(folder: Path, file: str = "config.json") -> dict:
    return json.loads((folder / file).read_text(encoding="utf-8"))


def file_digests(folder: Path) -> dict[str, str]:
    """Return a digest of every file in a folder, by its path."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
