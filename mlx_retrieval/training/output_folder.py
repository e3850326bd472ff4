"""Check the folder of a run before anything is loaded: no other run, no file of somebody else, no input is lost.

output_folder.check(Path("adapters"), Settings())
"""

import os
from pathlib import Path

from mlx_retrieval.dataset.sources import names
from mlx_retrieval.training import checkpoint
from mlx_retrieval.training.config import Settings
from mlx_retrieval.utils import files, outputs
from mlx_retrieval.utils.errors import SettingError


def check(folder: Path, settings: Settings) -> None:
    """Raise UserError if the run could not write into the folder, or would replace what is not its own."""
    files.check_name(folder, "--output")
    if folder.exists() and not folder.is_dir():
        raise SettingError("{output} {folder}: this is a file", folder=folder)
    if settings.dry_run or settings.profile:
        return
    outputs.check_parent(folder / "config.yaml")
    if settings.resume:
        return
    if not settings.overwrite:
        check_free(folder)
    check_inputs(folder, [settings.model, *names(settings.data), *settings.eval_tasks])


def check_free(folder: Path) -> None:
    """Raise UserError if a run, or a file with the name of one of a run's, is in the folder."""
    if checkpoint.holds_run(folder):
        raise SettingError(
            "{output} {folder}: another run is in this folder. Continue it with {resume}, remove it with {overwrite}, "
            "or name another folder",
            folder=folder,
        )
    if taken := [name for name in checkpoint.FILES if os.path.lexists(folder / name)]:
        raise SettingError(
            "{output} {folder}: {taken} is there without a run. Name another folder, or replace it with {overwrite}",
            folder=folder,
            taken=" and ".join(taken),
        )


def check_inputs(folder: Path, inputs: list[str]) -> None:
    """Raise UserError if an input is among the files and folders that a run replaces or removes."""
    for path in checkpoint.contents(folder):
        for source in (Path(name).expanduser() for name in inputs):
            if _holds(path, source):
                raise SettingError(
                    "{output} {folder}: the run would replace {path}, and {source} is an input: name another folder",
                    folder=folder,
                    path=path.name,
                    source=source,
                )


def _holds(path: Path, source: Path) -> bool:
    """Return whether an existing path is the source, or a folder that the source is in."""
    try:
        if not source.exists():
            return False
        return path.samefile(source) or (path.is_dir() and source.resolve().is_relative_to(path.resolve()))
    except OSError:  # a name on the hub that is no path
        return False
