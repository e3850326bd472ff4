"""Mix the weights of trained models: their mean (model soups, Wortsman et al. 2022, arXiv 2203.05482), or slerp of two.

mix(model, config, ["adapters/seed-1/best", "adapters/seed-2/best"])        # in place, the mean of three

Models that were trained apart from the same start, with other seeds, data or learning rates, are often better mixed
than each of them is.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_retrieval.backend import mx

from mlx.utils import tree_flatten

from mlx_retrieval.backbones import lora
from mlx_retrieval.models import kinds, loading
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.utils.errors import UserError

METHODS = ("linear", "slerp")
# What models must have in common, besides the shapes of their weights, for a mixture of them to be one of the same use.
ALIKE = ("task", "reranker", "pooling", "pool_special", "pool_prompt", "normalize", "append_eos", "lowercase")
ALIKE += ("bidirectional", "query_prompt", "document_prompt", "maxsim", "query_expansion", "instruction")
PARALLEL = 1e-6  # sine of an angle below which two vectors are taken for parallel

Weights = dict[str, mx.array]


# --- between two tensors ----------------------------------------------------------------------------------------------


def linear(one: mx.array, other: mx.array, share: float) -> mx.array:
    """Return one + share * (other - one), float32 of the tensors' shape."""
    one = one.astype(mx.float32)
    return one + share * (other.astype(mx.float32) - one)


def slerp(one: mx.array, other: mx.array, share: float) -> mx.array:
    """Return the spherical interpolation of two tensors, taken as vectors (Shoemake 1985): float32, of their shape.

    sin((1 - share) w) / sin w * one + sin(share w) / sin w * other, with the angle w between them; their `linear`
    interpolation where they are parallel, opposite to each other, or 0.
    """
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    lengths = [mx.linalg.norm(tensor.reshape(-1)) for tensor in (one, other)]
    if min(length.item() for length in lengths) == 0:
        return linear(one, other, share)
    units = [tensor / length for tensor, length in zip((one, other), lengths, strict=True)]
    # An angle from its cosine would be lost to rounding where it is small.
    apart, along = (mx.linalg.norm(mixed.reshape(-1)).item() for mixed in (units[0] - units[1], units[0] + units[1]))
    angle = 2 * math.atan2(apart, along)
    if math.sin(angle) < PARALLEL:
        return linear(one, other, share)
    return (math.sin((1 - share) * angle) * one + math.sin(share * angle) * other) / math.sin(angle)


def between(method: str) -> Callable[[mx.array, mx.array, float], mx.array]:
    """Return the function of one of METHODS: (one, other, share of the other) -> a tensor."""
    return {"linear": linear, "slerp": slerp}[method]


# --- of whole models --------------------------------------------------------------------------------------------------


def absorb(model: RetrievalModel) -> None:
    """Make an adapter part of the weights, in place and in float32; the weights that it changed become trainable."""
    adapted = model.backbone.adapted
    if fused := {f"{name}.weight" for name in lora.fuse(model.backbone)}:
        adapted.freeze()
        _unfreeze(model, fused)


def _unfreeze(model: RetrievalModel, names: set[str]) -> None:
    """Let weights of the backbone count as trained: see `weights.merge`."""
    for stem, module in model.backbone.adapted.named_modules():
        keys = [key for key in module.parameters() if (f"{stem}.{key}" if stem else key) in names]
        if keys:
            module.unfreeze(keys=keys, recurse=False)


def mix(model: RetrievalModel, config: RetrievalConfig, names: Sequence[str], method: str = "linear") -> None:
    """Mix a trained model with others, each with the same share, in place.

    Args:
        model, config: as `loading.open_model` returns them; the adapter becomes part of the weights.
        names: adapters or folders of whole models; one of them for the method "slerp".
        method: one of METHODS.

    Raises UserError if one of them is used otherwise than the model, or has other weights or shapes.
    """
    own = _weights(model)
    total = {name: value.astype(mx.float32) for name, value in own.items()}
    changed: set[str] = set()
    for count, name in enumerate(names, 2):
        others = _opened(name, config, own)
        for key, value in others.items():
            if not mx.array_equal(value.astype(mx.float32), own[key].astype(mx.float32)):
                changed.add(key)
        # The share of the newest in a mean of `count`; for slerp, half.
        total = {key: between(method)(value, others[key], 1 / count) for key, value in total.items()}
        mx.eval(total)
    mixed = {key: total[key] for key in changed}
    head = {key.removeprefix("head."): value for key, value in mixed.items() if key.startswith("head.")}
    trunk = {key.removeprefix("trunk."): value for key, value in mixed.items() if key.startswith("trunk.")}
    model.head.load_weights([*head.items()], strict=False)
    model.backbone.adapted.load_weights([*trunk.items()], strict=False)
    _unfreeze(model, {*trunk})


def _weights(model: RetrievalModel) -> Weights:
    """Return all weights, those of the backbone as trunk.NAME and those of the head as head.NAME."""
    from mlx_lm.utils import dequantize_model

    absorb(model)
    dequantize_model(model.backbone.adapted)
    parts = {"trunk": model.backbone.adapted, "head": model.head}
    return {
        f"{part}.{name}": value for part, module in parts.items() for name, value in tree_flatten(module.parameters())
    }


def _opened(name: str, config: RetrievalConfig, own: Weights) -> Weights:
    """Return the weights of another model. UserError if it cannot be mixed with the one of `config` and `own`."""
    is_adapter = kinds.is_adapter(Path(name).expanduser())
    task = {"task": config.task} if not is_adapter else {}
    model, other, _ = loading.open_model(*((None, name) if is_adapter else (name,)), dtype="float32", **task)
    others = _weights(model)
    if others.keys() != own.keys():
        missing = min(others.keys() ^ own.keys()).partition(".")[2]
        raise UserError(f"--merge-with {name}: another architecture: only one of the two models has {missing}")
    for key, value in own.items():
        if others[key].shape != value.shape:
            shapes = f"{key.partition('.')[2]} is {others[key].shape}, not {value.shape}"
            raise UserError(f"--merge-with {name}: weights of other shapes: {shapes}")
    for field in ALIKE:
        if getattr(other, field) != getattr(config, field):
            values = f"{getattr(other, field)!r}, and the model it is mixed with {getattr(config, field)!r}"
            raise UserError(f"--merge-with {name}: has {field} {values}; only models of one use can be mixed")
    return others
