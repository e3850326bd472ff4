"""The folder of a run: its saved steps, the state that `--resume` needs, and what a run leaves behind.

A saved step, `best` and `final` hold:

adapters.safetensors, adapter_config.json   as `mlx_lm.load(adapter_path=...)` wants them
heads.safetensors                           weights that mlx-lm does not know, if a head has trained ones
retrieval_config.json                       pooling, prompts, lengths, base model
config.yaml                                 every setting of the run
trainer_state.json, optimizer.safetensors   the state that `--resume` needs

They are written by utils/files.py, so that a kill at any moment leaves the last complete one.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from mlx_retrieval.backend import mx

from mlx.utils import tree_flatten, tree_unflatten

from mlx_retrieval.backbones.hub import (
    check_fit,
    read_json,
    read_safetensors,
    save_tensors,
)
from mlx_retrieval.models.loading import ADAPTER_CONFIG, ADAPTERS, HEADS
from mlx_retrieval.training.optimizer import HALF
from mlx_retrieval.utils.errors import SettingError, UserError
from mlx_retrieval.utils.files import beside, tidy, write_file

STATE, OPTIMIZER = "trainer_state.json", "optimizer.safetensors"
# Of a run.
FILES = ("config.yaml", "contents.json", "metrics.jsonl", "curves.png", "results.json", "before.json", "best.json")
FILES += ("last.json", "report.html")
GUARDS = "guards"  # the folder of the guards' results
HELD_OUT = "held-out"  # the folder of the questions that a run has kept from training, in BEIR layout
ROUNDS = "rounds"  # the folder of the runs that a run of several rounds consists of


# --- the state of training ------------------------------------------------------------------------------------------


def recover(run: Path) -> None:
    """Repair what a kill interrupted: bring back a folder that was moved away, remove an incomplete one."""
    for path in [*run.glob(".*.old"), *run.glob(".*.new")]:
        if is_saved(folder := run / path.stem[1:]):
            tidy(folder)
    for name in FILES:
        for folder in (run, run / GUARDS):
            beside(folder / name, "new").unlink(missing_ok=True)


def save_training(folder: Path, optimizer, state: dict) -> None:
    """Write the state that `--resume` needs into `folder`."""
    save_tensors(folder / OPTIMIZER, dict(tree_flatten(optimizer.state)))
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def save_state(folder: Path, state: dict) -> None:
    """Replace the trainer's state in the folder of a saved step."""
    write_file(folder / STATE, json.dumps(state, indent=2) + "\n")


def load_training(folder: Path, optimizer) -> dict:
    """Load a saved state into an initialised optimizer, and return the trainer's. UserError if it does not fit."""
    saved = read_safetensors(folder / OPTIMIZER)
    check_fit(dict(tree_flatten(optimizer.state)), saved, folder / OPTIMIZER)
    optimizer.state = tree_unflatten(list(saved.items()))
    return read_json(folder / STATE)


def check_dtypes(folder: Path, weights: dict) -> None:
    """Raise UserError if the trained weights in `folder` have another half-precision dtype than `weights`, or none.

    The optimizer's state has float32 masters of such weights alone, so that no other dtype can continue exactly.
    """
    saved = [read_safetensors(folder / name) for name in (ADAPTERS, HEADS) if (folder / name).is_file()]
    there = {value.dtype for tensors in saved for value in tensors.values()}.intersection(HALF)
    here = {value.dtype for _, value in tree_flatten(weights)}.intersection(HALF)
    if there != here:
        there, here = (str(max(dtypes, key=str, default=mx.float32)).rpartition(".")[2] for dtypes in (there, here))
        raise SettingError(
            "{resume}: the weights in {folder} are trained in {there}, and here they would be in {here}. {dtype} "
            "{there} continues the run",
            folder=folder,
            there=there,
            here=here,
        )


# --- runs -----------------------------------------------------------------------------------------------------------


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of a run's saved step, such as `step-000500`."""
    return run / f"step-{step:06d}"


def last_step(run: Path) -> Path | None:
    """Return the newest complete step folder of a run, or `final` or `best` if no step is as new; None = there is none.

    From there `--resume` continues.
    """
    needed = (ADAPTERS, ADAPTER_CONFIG, OPTIMIZER, STATE)
    complete = [f for f in (*_steps(run), run / "final", run / "best") if all((f / name).is_file() for name in needed)]
    return max(complete, key=lambda folder: (step_of(folder) or 0, folder.name), default=None)


def step_of(folder: Path) -> int | None:
    """Return the step at which a folder was saved; None if its files do not say."""
    if folder.name.startswith("step-"):
        return int(folder.name.removeprefix("step-"))
    return read_json(folder / STATE).get("step") if (folder / STATE).is_file() else None


def is_finished(run: Path) -> bool:
    """Return whether a run has a `final` of the end that it is to come to: it may be going on to a later one."""
    now, then = run_settings(run), run_settings(run / "final")
    ends = ("steps", "early_stopping", "rounds")
    return (run / "final").is_dir() and all(now.get(name) == then.get(name) for name in ends)


def round_folder(run: Path, number: int) -> Path:
    """Return the folder of a round, counted from 1, in the folder of a run of several rounds."""
    return run / ROUNDS / f"round-{number}"


def round_of(folder: Path) -> int:
    """Return which round, counted from 1, has this folder; 0 = it is the folder of no round."""
    match = re.fullmatch(r"round-([1-9]\d*)", folder.name)
    return int(match[1]) if match and folder.parent.name == ROUNDS else 0


def set_best_aside(run: Path, best_step: int) -> Path | None:
    """Keep no `best` but that of `best_step`: another becomes the saved step that it is. Return that step's folder.

    None = `best` is of that step, or there is none. It is another one's if that was the best of other evaluation data.
    """
    best = run / "best"
    if (step := step_of(best)) in (None, best_step):
        return None
    folder = step_folder(run, step)
    if folder.is_dir():
        shutil.rmtree(best)
    else:
        best.rename(folder)
    return folder


def prune(run: Path, keep: int) -> None:
    """Remove all step folders but the newest `keep`; 0 = remove none. `best` and `final` always stay."""
    steps = sorted(_steps(run), key=lambda folder: int(folder.name.removeprefix("step-")))
    for folder in steps[:-keep] if keep else ():
        shutil.rmtree(folder, ignore_errors=True)


def run_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run that saved `folder`, from there or the folder around it; {} if they are gone."""
    import yaml

    for path in (folder / "config.yaml", folder.parent / "config.yaml"):
        if path.is_file():
            try:
                values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
            except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
                raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
            return values if isinstance(values, dict) else {}
    return {}


def is_saved(path: Path) -> bool:
    """Return whether a path has the name of a folder that runs save."""
    return re.fullmatch(rf"step-\d{{6,}}|best|final|{HELD_OUT}", path.name) is not None


def _steps(run: Path) -> list[Path]:
    return [folder for folder in run.glob("step-*") if is_saved(folder)]


def holds_run(run: Path) -> bool:
    """Return whether a run was begun in this folder."""
    return (run / "config.yaml").is_file() or any((run / n).is_dir() for n in ("best", "final")) or bool(_steps(run))


def contents(run: Path) -> list[Path]:
    """Return the files and folders in `run` that a run there replaces or removes."""
    paths = [*(run / name for name in (*FILES, HELD_OUT, GUARDS, ROUNDS)), run / "best", run / "final", *_steps(run)]
    return [path for path in paths if path.exists()]


def remove_run(run: Path) -> None:
    """Remove a run's files and nothing else from its folder."""
    recover(run)  # also removes interrupted writes
    of_rounds = [run / ROUNDS] if run_settings(run).get("rounds") else []  # of no other run
    for folder in (run / "best", run / "final", run / HELD_OUT, run / GUARDS, *of_rounds, *_steps(run)):
        shutil.rmtree(folder, ignore_errors=True)
    for name in FILES:
        (run / name).unlink(missing_ok=True)
