"""Turn a trained backbone into weights that other libraries read: merged, dequantised, renamed, in shards.

trained = merge(backbone)                                    # adapters become part of the weights
write(folder, stored_tensors(base, backbone, trained), "pt")     # under the base model's names
write(folder, mlx_tensors(backbone, mx.bfloat16), "mlx")         # under mlx-lm's names
"""

import json
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval.backend import mx, nn

import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_retrieval.backbones import ENCODERS, Backbone, lora
from mlx_retrieval.backbones.hub import read_weights, save_tensors, tensor_table, weight_files
from mlx_retrieval.exporters.kept_layers import renumbered
from mlx_retrieval.utils.errors import UserError

SHOWN = 4  # tensors, and rows of one, that a message names
SHARD_BYTES = 5_000_000_000
GROUP_SIZES = (64, 32)  # quantised numbers that share a scale; the first that fits is used
FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}  # names in safetensors files
SWITCHES = ("SwitchLinear", "QuantizedSwitchLinear")  # mlx-lm's stacks of experts


def merge(backbone: Backbone) -> set[str]:
    """Merge adapters into the weights and dequantise quantised layers, in place, in float32.

    Returns the names of the parameters that training changed. Weights are computed when they are written or used.
    """
    from mlx_lm.utils import dequantize_model

    adapted = backbone.adapted
    trained = {f"{name}.weight" for name in lora.fuse(backbone)}
    if not trained:  # full training, or a base model
        trained = {name for name, _ in tree_flatten(adapted.trainable_parameters())}
    dequantize_model(adapted)
    adapted.freeze()
    return trained


def stored_dtype(folder: Path) -> mx.Dtype:
    """Return the dtype of most floating-point numbers of a checkpoint; for a quantised one, the dtype of its scales."""
    sizes: dict[str, int] = {}
    for file in weight_files(folder):
        for entry in tensor_table(file).values():
            if entry["dtype"] in FLOATS:
                sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + entry["data_offsets"][1]
                sizes[entry["dtype"]] -= entry["data_offsets"][0]
    return FLOATS[max(sizes, key=sizes.__getitem__)] if sizes else mx.float32


# --- under the base model's names -----------------------------------------------------------------------------------


def stored_tensors(
    folder: Path,
    backbone: Backbone,
    trained: set[str],
    dtype: mx.Dtype | None = None,
    drop: Sequence[str] = (),
    layers: Sequence[int] = (),
) -> dict[str, mx.array]:
    """Return the base checkpoint's tensors, with trained ones replaced and quantised ones dequantised.

    Args:
        folder: the base model's folder.
        backbone: the same model, after `merge`.
        trained: the names that `merge` returned.
        dtype: dtype of floating-point tensors; None = each keeps its own, and a quantised one gets that of its scales.
        drop: prefixes of tensors to leave out.
        layers: the blocks that the backbone was left with, by their numbers in the checkpoint; () = all.

    Raises UserError if a trained parameter is not a tensor of the checkpoint, so that only mlx could read the result.
    """
    merged = dict(tree_flatten(backbone.adapted.parameters()))
    tensors = renumbered(read_weights(folder), layers) if layers else read_weights(folder)
    _refuse_stacks(backbone, tensors)
    exported, placed = {}, set()
    for name, value in tensors.items():
        stem, _, kind = name.rpartition(".")
        scales = tensors.get(f"{stem}.scales")
        if name.startswith(tuple(drop)) or (scales is not None and kind in ("scales", "biases")):
            continue
        own = _parameter(backbone, name, merged)
        packed = scales is not None and kind == "weight"
        if packed and own is None:
            raise UserError(f"{folder}: {name} is quantised but not part of the model: use --format mlx")
        result = value
        if packed or (own in trained and merged[own].shape == value.shape):
            result = merged[own].astype(dtype or (scales.dtype if packed else value.dtype))  # rounded once
            placed.add(own)
        elif dtype is not None and mx.issubdtype(result.dtype, mx.floating):
            result = result.astype(dtype)
        exported[name] = result
    if lost := sorted(trained - placed):
        raise UserError(
            f"{len(lost)} trained parameters are not tensors of {folder} (mlx-lm stores them in another form): "
            f"{', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}. Use --format mlx"
        )
    return exported


def _parameter(backbone: Backbone, name: str, parameters: dict[str, mx.array]) -> str | None:
    """Return the backbone's name for the checkpoint's tensor `name`; None if it has no such parameter."""
    if encoder := ENCODERS.get(backbone.config["model_type"]):
        return next(iter(encoder.sanitize({name: None})), None)
    moved = name.replace("model.language_model.", "language_model.model.", 1)
    return next((n for n in (name, f"model.{name}", moved) if n in parameters), None)


def _refuse_stacks(backbone: Backbone, tensors: dict[str, mx.array]) -> None:
    """Raise UserError for a checkpoint whose experts mlx-lm stacked: no other library reads those."""
    for path, module in backbone.adapted.named_modules():
        if type(module).__name__ in SWITCHES and f"{path}.weight" in tensors:
            raise UserError(f"the base model's experts are stacked in mlx-lm's layout ({path}): use --format mlx")


# --- under mlx's names ----------------------------------------------------------------------------------------------


def cast(backbone: Backbone, dtype: mx.Dtype) -> None:
    """Cast floating-point parameters to `dtype`, except those that mlx-lm's model keeps at full precision."""
    may_cast = getattr(backbone.adapted, "cast_predicate", lambda _: True)

    def cast_one(name: str, value: mx.array) -> mx.array:
        return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) and may_cast(name) else value

    backbone.adapted.update(tree_map_with_path(cast_one, backbone.adapted.parameters()))


def quantise(backbone: Backbone, bits: int, settings: dict) -> str:
    """Quantise linear layers and embeddings in place, note it in the settings of config.json, and return it in words.

    Layers that mlx-lm's model protects stay unquantised or get more bits. Raises UserError if no group size divides the
    widths.
    """
    model = backbone.adapted
    predicate = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "to_quantized")}
    chosen = {name: predicate(name, module) for name, module in layers.items()}
    widths = {name: layers[name].weight.shape[-1] for name, how in chosen.items() if how is True}
    linear = {name: width for name, width in widths.items() if not isinstance(layers[name], nn.Embedding)}
    group = next((g for g in GROUP_SIZES if all(width % g == 0 for width in linear.values())), None)
    if group is None:
        name, width = next((name, width) for name, width in linear.items() if width % GROUP_SIZES[-1])
        raise UserError(f"--quantize {bits}: {name} has {width} inputs, not a multiple of {GROUP_SIZES[-1]}")
    # A narrow table, such as T5's position biases (one a head), stays unquantised.
    chosen |= {name: False for name, width in widths.items() if width % group}
    nn.quantize(model, group, bits, class_predicate=lambda path, _: chosen.get(path, False))
    entry = {"group_size": group, "bits": bits} | {n: how for n, how in chosen.items() if isinstance(how, dict)}
    settings |= {"quantization": entry, "quantization_config": entry}
    return f"{bits} bits in groups of {group}"


def mlx_tensors(backbone: Backbone) -> dict[str, mx.array]:
    """Return every parameter under the backbone's name for it."""
    return dict(tree_flatten(backbone.adapted.parameters()))


# --- writing --------------------------------------------------------------------------------------------------------


def write(folder: Path, tensors: dict[str, mx.array], form: str) -> int:
    """Write `tensors` as one file, or as shards with an index; return their size in bytes.

    `form` is that of `save_tensors`. The function empties `tensors`, so that only one shard at a time is in memory.

    Raises UserError for numbers that are not finite; see `check_finite`.
    """
    total = sum(value.nbytes for value in tensors.values())
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        if shards[-1] and filled + tensors[name].nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensors[name].nbytes
    index = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        shard = {name: tensors.pop(name) for name in names}
        check_finite(shard)
        save_tensors(folder / file, shard, form)
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        text = json.dumps(content, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return total


def check_finite(tensors: dict[str, mx.array]) -> None:
    """Raise UserError that names the tensors, and their rows, with numbers that are not finite.

    A comparison of vectors would miss them: the row of one token harms only texts with that token.
    """
    damaged = []
    for name, value in tensors.items():
        if not mx.issubdtype(value.dtype, mx.floating) or mx.isfinite(value).all().item():
            continue
        bad = ~np.array(mx.isfinite(value))
        rows = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1)).tolist() if bad.ndim > 1 else []
        listed = f"; row {', '.join(map(str, rows[:SHOWN]))}{', ...' if len(rows) > SHOWN else ''}" if rows else ""
        damaged.append(f"{name} ({int(bad.sum()):,} of {bad.size:,} numbers{listed})")
    if damaged:
        more = f" and {len(damaged) - SHOWN:,} more tensors" if len(damaged) > SHOWN else ""
        raise UserError(
            f"not finite in the exported weights: {', '.join(damaged[:SHOWN])}{more}: nothing was written. If the "
            "original's are finite, which embed.py --check or rerank.py --check tells, another --dtype has room for "
            "larger numbers (float16 ends at 65,504)"
        )
