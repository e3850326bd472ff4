"""The keys of an adaptation's stages: a stage is done again when something that decides its result has changed.

values = decided(job)                    # setting -> what decides; of files and folders, what is read of them
keys = chained(values)                   # stage -> a hash of its settings, and of the stage that it builds on
"""

import os
from collections.abc import Iterable
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mlx_retrieval.adaptation import held
from mlx_retrieval.adaptation.costs import Costs
from mlx_retrieval.adaptation.job import Adaptation
from mlx_retrieval.backbones.finding import resolve
from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.documents.folder import document_files
from mlx_retrieval.dataset.source_code.file_tree import File
from mlx_retrieval.evaluation import pairs
from mlx_retrieval.mining.questions import local_model
from mlx_retrieval.mining.questions.base import digest
from mlx_retrieval.utils import toolkit

REPORT, ASKING, MEASURED = "report", "asking", "measured"
# The settings that decide a stage, besides the stage that it builds on.
DECIDING = {
    "read": ("documents", "chunk_size", "overlap", "max_file_size", "exclude"),
    "questions": ("generator", "count", "styles", "prompt", "seed", "budget"),
    "filter": ("model", "dtype", "found_among", "reranker", "holdout"),
    "negatives": ("negatives",),
    "train": ("training", "hold"),
    "export": ("guard", "guard_tolerance", "trained_share"),
    "evaluate": ("eval_tasks",),
    "index": (),
}
ALL = (*DECIDING, REPORT)
BUILDS_ON = dict(zip(ALL[1:], ALL, strict=False)) | {"index": "export", REPORT: "evaluate"}
TRAINED_BY = ("guide", "teacher_vectors")  # settings of --config that name a model or a file


def stages_before(name: str) -> list[str]:
    """Return the stages that a stage builds on, the first one first."""
    last = BUILDS_ON.get(name)
    return [*stages_before(last), last] if last else []


def keys_of(job: Adaptation) -> dict[str, str]:
    """Return the key of each stage: a hash of everything that decides its result."""
    return chained(decided(job))


def chained(values: dict[str, Any]) -> dict[str, str]:
    """Return the key of each stage, by the values of `decided`."""
    keys: dict[str, str] = {}
    for name, settings in DECIDING.items():
        keys[name] = digest(name, [values[setting] for setting in settings], keys.get(BUILDS_ON.get(name, ""), ""))
    return keys


def measuring(values: dict[str, Any]) -> dict[str, str]:
    """Return the keys of what a budget is planned by, whatever the budget is: ASKING a generator, and all MEASURED."""
    stages = chained(values | {"budget": None})
    return {
        ASKING: stages["questions"],
        MEASURED: digest(MEASURED, [field.name for field in fields(Costs)], *stages.values()),
    }


def decided(job: Adaptation) -> dict[str, Any]:
    """Return every setting as it decides a stage: with the files that it names, as far as sizes and times tell."""
    return {setting: _decided_by(job, setting) for settings in DECIDING.values() for setting in settings}


def _decided_by(job: Adaptation, setting: str) -> Any:
    value = getattr(job, setting)
    if setting == "documents":
        return _digest(document_files(value, job.exclude).files)
    if setting == "generator":
        return generator_of(job)
    if setting in ("model", "reranker") and value:
        return [value, _of_model(value)]
    if setting in ("guard", "eval_tasks"):
        return [[Path(task).name, _of_task(task)] for task in value]
    if setting == "hold":
        return [[Path(name).name, "" if name in toolkit.HELD else _of_files(held.files_of(name))] for name in value]
    if setting == "training":
        return [value, [_of_files(_inside(Path(value[name]))) for name in TRAINED_BY if value.get(name)]]
    if setting == "prompt":
        return value.read_text(encoding="utf-8-sig", errors="replace") if value else ""
    return list(value) if isinstance(value, tuple) else value


def generator_of(job: Adaptation) -> str | list[str]:
    """Return the generator's name; of a model, also a hash of its files: trained again, it asks other questions."""
    is_model = job.generator.startswith(local_model.PREFIX)
    return [job.generator, _of_model(job.generator.removeprefix(local_model.PREFIX))] if is_model else job.generator


# --- files ------------------------------------------------------------------------------------------------------------


def _of_model(name: str) -> str:
    """Return a hash of a model's files."""
    return _of_files(_inside(resolve(name)))


def _of_task(name: str) -> str:
    """Return a hash of the files of an evaluation folder or of scored pairs; of a task of the hub, of none."""
    if file := pairs.file_of(name := toolkit.find(name)):
        return _of_files([file])
    folder = Path(name).expanduser()
    return _of_files(beir.files_of(folder) if folder.is_dir() else ())


def _inside(path: Path) -> list[Path]:
    """Return the files of a folder that are not hidden, or the file; nothing if it is neither."""
    path = path.expanduser()
    if path.is_file():
        return [path]
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _of_files(paths: Iterable[Path]) -> str:
    """Return a hash of files by their names, sizes and times; those that are gone do not count."""
    files = [
        File(path.name, stat.st_size, stat.st_mtime_ns) for path in paths if path.is_file() and (stat := path.stat())
    ]
    return _digest(sorted(files))


def _digest(files: Iterable[File]) -> str:
    total = blake2b(digest_size=16)
    for file in files:
        total.update(f"{file.path}\0{file.size}\0{file.mtime}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()
