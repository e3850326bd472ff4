"""The folder of a run: which one, and that no other run, no file of somebody else and no input is lost there.

settings.output = choose(Settings())                # adapters, or adapters-2 if a run is there
check(settings.folder, settings)                    # before anything is loaded
with held(settings, chosen=True):                   # for as long as the run lasts
    ...
"""

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mlx_retrieval.training import checkpoint, setting_paths
from mlx_retrieval.training.config import OUTPUT, Settings
from mlx_retrieval.utils import files, locks, outputs
from mlx_retrieval.utils.errors import SettingError
from mlx_retrieval.utils.text import shell


def choose(settings: Settings) -> str:
    """Return the folder that the settings name, or by default the first of adapters, adapters-2 ... that is free."""
    if settings.output:
        return settings.output
    if settings.resume or settings.overwrite:
        return OUTPUT if settings.overwrite else str(to_resume({}))
    return next(name for name in _names() if _is_free(Path(name)))


def to_resume(given: dict) -> Path:
    """Return the folder of the run to resume: `output` of the given settings, or by default the one run that can be.

    That is the only run in adapters, adapters-2 ..., or the only one that is unfinished, unless a longer run is asked
    for. Raises UserError that lists the runs if there is a choice.
    """
    if given.get("output"):
        return Path(given["output"]).expanduser()
    runs = [Path(name) for name in _default_folders() if checkpoint.holds_run(Path(name))]
    unfinished = [run for run in runs if not checkpoint.is_finished(run)]
    if len(runs) > 1 and (len(unfinished) != 1 or {"steps", "epochs"} & given.keys()):
        listing = ", ".join(f"{run} ({_progress(run)})" for run in runs)
        raise SettingError("{resume}: there are several runs: {listing}. Name one with {output}", listing=listing)
    return next(iter(unfinished if len(runs) > 1 else runs), Path(OUTPUT))


def _names() -> Iterator[str]:
    yield OUTPUT
    yield from (f"{OUTPUT}-{number}" for number in itertools.count(2))


def _default_folders() -> list[str]:
    """Return the folders in the current one that have the name of a default folder, in the order of their numbers."""
    names = [path.name for path in Path().glob(f"{OUTPUT}*") if re.fullmatch(rf"{OUTPUT}(-[1-9]\d*)?", path.name)]
    return sorted(names, key=lambda name: (len(name), name))


def _is_free(folder: Path) -> bool:
    """Return whether a run can begin in a folder without removing anything."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return not (checkpoint.holds_run(folder) or _taken(folder) or (folder / "config.json").exists())


def _taken(folder: Path) -> list[str]:
    """Return the files in a folder that have the name of one of a run's."""
    names = (*checkpoint.FILES, checkpoint.HELD_OUT, checkpoint.ROUNDS)
    return [name for name in names if os.path.lexists(folder / name)]


def _progress(run: Path) -> str:
    if checkpoint.is_finished(run):
        return "finished"
    if rounds := [checkpoint.round_of(folder) for folder in (run / checkpoint.ROUNDS).glob("round-*")]:
        return f"in round {max(rounds)}"
    last = checkpoint.last_step(run)
    return f"at step {checkpoint.step_of(last):,}" if last else "no step saved"


def check(folder: Path, settings: Settings) -> None:
    """Raise UserError if the run could not write into the folder, or would replace what is not its own."""
    files.check_name(folder, "--output")
    if folder.exists() and not folder.is_dir():
        raise SettingError("{output} {folder}: this is a file", folder=folder)
    if settings.only_measures:
        return
    outputs.check_parent(folder / "config.yaml")
    if settings.resume:
        return
    if not settings.overwrite:
        check_free(folder)
    check_inputs(folder, setting_paths.inputs(settings))


@contextmanager
def held(settings: Settings, chosen: bool) -> Iterator[None]:
    """Keep other processes out of the run's folder, and check once more that no run is lost there.

    While this run was prepared another one may have begun in the folder, and ended. If `choose` chose it, the next
    free one takes its place in the settings; UserError for a folder that the user named.
    """
    names = itertools.dropwhile(lambda name: name != settings.output, _names()) if chosen else [settings.output]
    with ExitStack() as stack:
        for name in names:
            folder = Path(name or OUTPUT).expanduser()
            refusal = SettingError("{output} {folder}: another process is training there", folder=folder)
            try:
                check(folder, settings)  # before the lock, which makes the folder
                stack.enter_context(locks.only_one(folder / ".lock", refusal))
                check(folder, settings)
            except SettingError:
                if not chosen:
                    raise
                stack.close()
            else:
                settings.output = name
                break
        yield


def check_free(folder: Path) -> None:
    """Raise UserError if a run, or a file with the name of one of a run's, is in the folder."""
    if checkpoint.holds_run(folder):
        raise SettingError(
            "{output} {folder}: another run is in this folder. Continue it with {resume}, remove it with {overwrite}, "
            "or name another folder",
            folder=folder,
        )
    if taken := _taken(folder):
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


def continue_command(folder: Path) -> str:
    """Return the command that continues a run, or the run that it is a round of."""
    run = folder.parent.parent if checkpoint.round_of(folder) else folder
    return shell("python", "train.py", "--resume", "--output", run)


def _is_same(path: Path, source: Path) -> bool:
    try:
        return path.exists() and source.exists() and path.samefile(source)
    except OSError:  # a name that is too long for a path
        return False


def _is_inside(source: Path, folder: Path) -> bool:
    return folder.is_dir() and source.resolve().is_relative_to(folder.resolve())
