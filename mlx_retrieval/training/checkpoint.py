"""What a saved folder holds, and how it is written so that a kill at any moment leaves the last complete one.

adapters.safetensors, adapter_config.json   as `mlx_lm.load(adapter_path=...)` wants them
heads.safetensors                           what mlx-lm does not know (only where a head has weights that are trained)
retrieval_config.json                       pooling, prompts, lengths, base model
config.yaml                                 every setting of the run
trainer_state.json, optimizer.safetensors   what `--resume` needs
"""

import json
import re
import shutil
from pathlib import Path

from mlx.utils import tree_flatten, tree_unflatten

from mlx_retrieval.backbones.hub import (
    check_fit,
    read_json,
    read_safetensors,
    save_tensors,
)
from mlx_retrieval.models.loading import ADAPTER_CONFIG, ADAPTERS
from mlx_retrieval.utils.files import _beside, _tidy

STATE, OPTIMIZER = "trainer_state.json", "optimizer.safetensors"
FILES = ("config.yaml", "metrics.jsonl", "curves.png", "results.json", "before.json")  # of a run


# --- models ---------------------------------------------------------------------------------------------------------


# --- writing --------------------------------------------------------------------------------------------------------


def recover(run: Path) -> None:
    """Finish what a kill interrupted: bring back a folder that was moved away, drop one that was not complete."""
    for path in [*run.glob(".*.old"), *run.glob(".*.new")]:
        if _is_saved(folder := run / path.stem[1:]):
            _tidy(folder)
    for name in FILES:
        _beside(run / name, "new").unlink(missing_ok=True)


def save_training(folder: Path, optimizer, state: dict) -> None:
    """Write what continuing needs into `folder`."""
    save_tensors(folder / OPTIMIZER, dict(tree_flatten(optimizer.state)))
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def load_training(folder: Path, optimizer) -> dict:
    """Put a saved state back into an initialised optimizer, which it has to fit, and return the trainer's."""
    saved = read_safetensors(folder / OPTIMIZER)
    check_fit(dict(tree_flatten(optimizer.state)), saved, folder / OPTIMIZER)
    optimizer.state = tree_unflatten(list(saved.items()))
    return read_json(folder / STATE)


# --- runs -----------------------------------------------------------------------------------------------------------


def step_folder(run: Path, step: int) -> Path:
    """`step-000500` of a run."""
    return run / f"step-{step:06d}"


def last_step(run: Path) -> Path | None:
    """The newest complete step folder of a run, which `--resume` continues from."""
    needed = (ADAPTERS, ADAPTER_CONFIG, OPTIMIZER, STATE)
    complete = [folder for folder in _steps(run) if all((folder / name).is_file() for name in needed)]
    return max(complete, key=lambda folder: int(folder.name.removeprefix("step-")), default=None)


def prune(run: Path, keep: int) -> None:
    """Remove all step folders but the newest `keep`; 0 = none is removed. `best` and `final` always stay."""
    steps = sorted(_steps(run), key=lambda folder: int(folder.name.removeprefix("step-")))
    for folder in steps[:-keep] if keep else ():
        shutil.rmtree(folder, ignore_errors=True)


def _is_saved(path: Path) -> bool:
    """Whether a path has the name of a folder that runs save."""
    return re.fullmatch(r"step-\d{6,}|best|final", path.name) is not None


def _steps(run: Path) -> list[Path]:
    return [folder for folder in run.glob("step-*") if _is_saved(folder)]


def holds_run(run: Path) -> bool:
    """Whether a run was begun in this folder."""
    return (run / "config.yaml").is_file() or any((run / n).is_dir() for n in ("best", "final")) or bool(_steps(run))


def remove_run(run: Path) -> None:
    """Remove a run's files and nothing else from its folder."""
    recover(run)  # what is beside the folders goes as well
    for folder in (run / "best", run / "final", *_steps(run)):
        shutil.rmtree(folder, ignore_errors=True)
    for name in FILES:
        (run / name).unlink(missing_ok=True)
