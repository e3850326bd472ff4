"""What a saved folder holds, and how it is written so that a kill at any moment leaves the last complete one.

adapters.safetensors, adapter_config.json   as `mlx_lm.load(adapter_path=...)` wants them
heads.safetensors                           what mlx-lm does not know (only where a head has weights that are trained)
retrieval_config.json                       pooling, prompts, lengths, base model
config.yaml                                 every setting of the run
trainer_state.json, optimizer.safetensors   what `--resume` needs
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from backend import UserError, mx, nn

from mlx.utils import tree_flatten, tree_unflatten

import retrieval_config
from heads import RetrievalModel
from models import Backbone, load_backbone, lora, resolve
from models.source import (
    check_fit,
    inside,
    load_strictly,
    read_json,
    read_safetensors,
    read_weights,
    toolkit_relative,
)
from retrieval_config import RetrievalConfig

ADAPTERS, ADAPTER_CONFIG, HEADS = "adapters.safetensors", "adapter_config.json", "heads.safetensors"
STATE, OPTIMIZER = "trainer_state.json", "optimizer.safetensors"
FILES = ("config.yaml", "metrics.jsonl", "curves.png", "results.json", "before.json")  # of a run


class SaveError(UserError):
    """Something could not be written, mostly for want of space. What was saved before is whole."""


# --- models ---------------------------------------------------------------------------------------------------------


def build(
    model: str, projection: int = 0, reranker: str | None = None, **flags
) -> tuple[RetrievalModel, RetrievalConfig, Path]:
    """An untrained retrieval model from a base model's name; `flags` (those not None) win over what it says itself.

    `projection`: give a late model a fresh layer that makes token vectors of so many dimensions; 0 = none.
    `reranker`: with task="rerank", the kind that it is to be; None = what it is by its files.

    Returns the model, frozen but for a fresh layer; its RetrievalConfig; and the base model's folder.
    """
    folder = resolve(model)
    backbone = load_backbone(folder, flags.pop("bidirectional", None))
    said = retrieval_config.of_base_model(folder, backbone.config, flags.get("task"), reranker)
    config = said.override(**flags)
    if said.dense and config.task != said.task:
        raise UserError(f"{model}: its layers are those of a model for --task {said.task}, not {config.task}")
    _fit_lengths(config, backbone.max_positions, flags)
    config.base_model = toolkit_relative(model)
    config.base_fingerprint = lora.fingerprint(backbone)
    config.bidirectional = backbone.bidirectional
    if projection:
        if config.task != "late" or config.dense:
            raise UserError("--projection-dim is for --task late, and for a model that has no projection of its own")
        size = {"in_features": backbone.hidden_size, "out_features": projection}
        config.dense = [{"path": "", **size, "bias": False, "activation": "Identity"}]
    if config.task != "rerank":
        config.dimensions = config.dense[-1]["out_features"] if config.dense else backbone.hidden_size
    return _assemble(backbone, config, folder), config, folder


def _assemble(backbone: Backbone, config: RetrievalConfig, folder: Path) -> RetrievalModel:
    """Backbone and head, with the dense layers that the base model's folder has; frozen but for those it has not."""
    if config.task == "rerank":
        from rerankers import layout

        return RetrievalModel(backbone, layout.head(config.reranker, backbone, folder))
    head = config.head()
    model = RetrievalModel(backbone, head)
    model.freeze()
    for layer, described in zip(head.dense, config.dense, strict=True):
        if not described["path"]:
            layer.unfreeze()
            continue
        path = inside(folder, described["path"], retrieval_config.FILE)
        weights = {name: value.astype(mx.float32) for name, value in read_weights(path).items()}
        load_strictly(layer, weights, path)
    return model


def _fit_lengths(config: RetrievalConfig, positions: int, flags: dict) -> None:
    """Limit lengths to the positions that the model has; UserError where a flag asked for more."""
    for name in ("max_length", "query_max_length"):
        if getattr(config, name) > positions:
            if flags.get(name):
                raise UserError(f"--{name.replace('_', '-')}: the model has {positions} positions")
            setattr(config, name, positions)


def open_model(model: str | None, adapter: str | None = None, **flags) -> tuple[RetrievalModel, RetrievalConfig, Path]:
    """A model ready for use: a base model, or an adapter folder on its base.

    Args:
        model: base model; None = the one that the adapter was trained on.
        adapter: a saved folder such as `adapters/final`.
        flags: fields of RetrievalConfig (max_length, ...) that win over what is saved.

    Returns as `build`. UserError where the adapter belongs to another base model or its tensors do not fit.
    """
    if adapter is None:
        return build(model, **flags)
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        raise UserError(f"{adapter}: no such adapter folder")
    config = RetrievalConfig.read(folder)
    config = config.override(**flags)
    base = resolve(model or config.base_model)
    backbone = load_backbone(base, config.bidirectional)
    _fit_lengths(config, backbone.max_positions, flags)
    if wrong := lora.differing(config.base_fingerprint, lora.fingerprint(backbone)):
        raise UserError(
            f"{adapter} was trained on {config.base_model}, and {model or config.base_model} is another model "
            f"(its {', '.join(wrong)} differ)"
        )
    loaded = _assemble(backbone, config, base)
    load_adapter(loaded, folder)
    return loaded, config, base


def is_adapter(folder: Path) -> bool:
    """Whether this is a saved adapter's folder, perhaps a damaged one; exported models are none."""
    return any((folder / name).is_file() for name in (ADAPTERS, ADAPTER_CONFIG))


def load_adapter(model: RetrievalModel, folder: Path) -> dict:
    """Attach and load the adapter in `folder`; returns its adapter_config. All that does not fit is told at once."""
    adapter_config = read_json(folder / ADAPTER_CONFIG)
    try:
        lora.attach(model.backbone, adapter_config)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG}: not as this toolkit writes it ({error!r})") from error
    load_weights(model, folder)
    model.eval()
    return adapter_config


def load_weights(model: RetrievalModel, folder: Path) -> None:
    """Load a saved folder's tensors into the trainable parts of a model that has the same adapter attached."""
    load_trainable(model.backbone.adapted, read_safetensors(folder / ADAPTERS), folder)
    if (folder / HEADS).is_file():
        load_strictly(model.head, read_safetensors(folder / HEADS), folder)
    elif model.head.trainable_parameters() and tree_flatten(model.head.trainable_parameters()):
        raise UserError(f"{folder}: no {HEADS}, which holds the layers that this model has beside its base")


def load_trainable(module: nn.Module, weights: dict[str, mx.array], origin: Path) -> None:
    """`load_strictly`, for the trainable parameters alone, in the dtype that the module has on this device."""
    wanted = dict(tree_flatten(module.trainable_parameters()))
    check_fit(wanted, weights, origin)
    module.load_weights([(name, weights[name].astype(wanted[name].dtype)) for name in wanted], strict=False)


# --- writing --------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` with what `fill` writes into it: all or nothing, in the order that survives a loss of power.

    `fill` writes into a temporary folder beside it; files and folder are flushed to disk, then renamed. A folder that
    stands there already is replaced. Whatever goes wrong, what was there stays; a full disk is a SaveError.
    """
    temporary, old = _beside(folder, "new"), _beside(folder, "old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        temporary.mkdir()
        fill(temporary)
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        raise SaveError(
            f"could not save {folder}: {error.strerror or error}; what was saved before is whole"
        ) from error
    finally:
        _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove what an interrupted `write_folder` left beside a folder; bring the folder back if it was moved away."""
    old = _beside(folder, "old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    for leftover in (old, _beside(folder, "new")):
        shutil.rmtree(leftover, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a text file in one piece: readers see the old one or the new one, after a loss of power too.

    SaveError where the disk is full.
    """
    temporary = _beside(path, "new")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise SaveError(f"could not write {path}: {error.strerror}") from error


def make_folder(folder: Path) -> None:
    """Make a run's folder where it is missing, its name flushed to disk: its checkpoints are found through it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(PermissionError):  # the folder around it need not be ours to read
            _flush(folder.absolute().parent)
    except OSError as error:
        raise SaveError(f"{folder}: {error.strerror}") from error


def _beside(folder: Path, what: str) -> Path:
    return folder.parent / f".{folder.name}.{what}"


def recover(run: Path) -> None:
    """Finish what a kill interrupted: bring back a folder that was moved away, drop one that was not complete."""
    for path in [*run.glob(".*.old"), *run.glob(".*.new")]:
        if _is_saved(folder := run / path.stem[1:]):
            _tidy(folder)
    for name in FILES:
        _beside(run / name, "new").unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(path: Path, tensors: dict[str, mx.array], form: str = "mlx") -> None:
    """Write safetensors, and compare their size: whatever mlx notices of a full disk, a file cut short is an error.

    `form`: "mlx", or "pt" as transformers wants it.
    """
    tensors = dict(sorted(tensors.items()))  # equal states give equal bytes, whatever order they were made in
    mx.eval(tensors)
    try:
        mx.save_safetensors(str(path), tensors, metadata={"format": form})
    except RuntimeError as error:
        raise OSError(0, str(error)) from error
    with open(path, "rb") as handle:
        header = int.from_bytes(handle.read(8), "little")
    expected = 8 + header + sum(value.nbytes for value in tensors.values())
    if path.stat().st_size != expected:
        raise OSError(28, f"{path.name} is {path.stat().st_size} bytes, not {expected}: is the disk full?")


def save_model(folder: Path, model: RetrievalModel, adapter_config: dict, config: RetrievalConfig) -> None:
    """Write what use of the model needs into `folder`."""
    save_tensors(folder / ADAPTERS, dict(tree_flatten(model.backbone.adapted.trainable_parameters())))
    if heads := dict(tree_flatten(model.head.trainable_parameters())):
        save_tensors(folder / HEADS, heads)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(adapter_config, indent=2) + "\n", encoding="utf-8")
    config.write(folder)


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
