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
    """Raise UserError if a model is in the folder, or if the run would replace or remove an input."""
    if (folder / "config.json").is_file():
        raise SettingError("{output} {folder}: a model is in this folder; name another one", folder=folder)
    contents = checkpoint.contents(folder)
    for source in (Path(name).expanduser() for name in inputs):
        if _is_same(folder, source):
            raise SettingError("{output} {folder}: this folder is an input; name another one", folder=folder)
        if replaced := [path for path in contents if _is_same(path, source) or _is_inside(source, path)]:
            raise SettingError(
                "{output} {folder}: the run would replace {path}, and {source} is an input: name another folder",
                folder=folder,
                path=replaced[0].name,
                source=source,
            )


def _is_same(path: Path, source: Path) -> bool:
    try:
        return path.exists() and source.exists() and path.samefile(source)
    except OSError:  # a name that is too long for a path
        return False


def _is_inside(source: Path, folder: Path) -> bool:
    return folder.is_dir() and source.resolve().is_relative_to(folder.resolve())
