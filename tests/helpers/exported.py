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


def refusal(capsys, *flags: str | Path) -> str:
    """Run the command with flags that it refuses, and return its one line."""
    capsys.readouterr()
    assert export.main([*map(str, flags)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("export.py: ") and error.count("\n") == 1, error
    return error


def read_json(folder: Path, file: str = "config.json") -> dict:
    return json.loads((folder / file).read_text(encoding="utf-8"))


def file_digests(folder: Path) -> dict[str, str]:
    """Return a digest of every file in a folder, by its path."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
