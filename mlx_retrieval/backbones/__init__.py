"""Backbones: from token ids to token states. `load_backbone` chooses the class by a folder's config.json."""

from collections.abc import Callable
from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx.utils import tree_flatten, tree_map_with_path

from mlx_retrieval import backend
from mlx_retrieval.backbones import (
    bert,
    deberta,
    decoder,
    dequantized,
    distilbert,
    eurobert,
    gte,
    modernbert,
    mpnet,
    nomic_bert,
    t5,
)
from mlx_retrieval.backbones.base import Backbone
from mlx_retrieval.backbones.finding import resolve
from mlx_retrieval.backbones.hub import read_config, read_weights
from mlx_retrieval.utils.errors import SettingError, UserError, near_miss

__all__ = ["ENCODERS", "Backbone", "load_backbone", "resolve"]

SLOW = ", which is slow on CPUs (--dtype float32 is not)"
# The modules that load what is not a decoder, by model_type: each has `load` and `sanitize`, and perhaps
# `for_transformers`, which makes the published config.json one that transformers' own class reads.
MODULES = (bert, modernbert, mpnet, distilbert, deberta, nomic_bert, gte, eurobert, t5)
ENCODERS = {kind: module for module in MODULES for kind in module.MODEL_TYPES}


def load_backbone(
    folder: Path, bidirectional: bool | None = None, dtype: str = "auto", dequantize: str | None = None
) -> Backbone:
    """Load the backbone in `folder`, frozen and in evaluation mode.

    Args:
        folder: config.json and *.safetensors of Hugging Face or mlx-lm, quantised or not.
        bidirectional: whether tokens also attend to later ones; None = as the architecture and its config say.
        dtype: one of `backend.DTYPES`, to compute in. Quantised weights stay integers; their scales are cast.
        dequantize: how quantised weights are computed with on CPUs: see `dequantized.dequantize`.

    Raises UserError for a folder without weights, an unknown architecture, an encoder that is asked to be causal,
    tensors that do not fit, and an unknown dtype.
    """
    if dtype not in backend.DTYPES:
        known, near = ", ".join(backend.DTYPES), near_miss(dtype, backend.DTYPES)
        raise SettingError("{dtype} {wanted}: not one of {known}{near}", wanted=dtype, known=known, near=near)
    config = read_config(folder)
    if encoder := ENCODERS.get(config["model_type"]):
        if bidirectional is False:
            raise UserError(f"{folder}: {config['model_type']} is an encoder and cannot be made causal")
        model = encoder.load(folder, config, read_weights(folder))
    else:
        model = decoder.load(folder, config, bidirectional)
    may_cast = getattr(model.adapted, "cast_predicate", lambda _: True)  # mlx-lm's models keep a few in full precision
    half = dtype in ("bfloat16", "float16")

    def dtype_of(name: str, value: mx.array) -> mx.Dtype:
        return backend.compute_dtype(value.dtype, "auto" if half and not may_cast(name) else dtype)

    _cast(model, dtype_of)
    dequantized.dequantize(model, dequantize)
    model.freeze()
    model.eval()
    return model


def set_dtype(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast floating-point weights to `dtype`. Quantised weights stay integers."""
    _cast(model, lambda *_: dtype)


def _cast(model: nn.Module, dtype_of: Callable[[str, mx.array], mx.Dtype]) -> None:
    """Cast each floating-point parameter of a model to the dtype of its name and value."""

    def cast(name: str, value: mx.array) -> mx.array:
        return value.astype(dtype_of(name, value)) if mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map_with_path(cast, model.parameters()))


def dtype_name(backbone: Backbone) -> str:
    """Return the dtype that a backbone computes in, such as `bfloat16`; of a quantised one, its scales'."""
    dtypes = (value.dtype for _, value in tree_flatten(backbone.trunk.parameters()))
    return str(next(dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating))).rpartition(".")[-1]


def describe_dtype(backbone: Backbone) -> str:
    """Return `computes in bfloat16`, with a hint where this device takes much longer for it than for float32."""
    name = dtype_name(backbone)
    return f"computes in {name}" + SLOW * is_slow(backbone)


def is_slow(backbone: Backbone) -> bool:
    """Return whether this device has no fast products in the dtype that a backbone computes in."""
    return not backend.IS_GPU and dtype_name(backbone) != "float32"


def layer_size(backbone: Backbone) -> int:
    """Return the number of the first layer's parameters. A quantised layer counts as its dequantised weights."""
    return count_parameters(backbone.layers[0])[0]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of all and of trainable parameters. A quantised layer counts as its dequantised weights."""
    from mlx_lm.utils import get_total_parameters

    trainable = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    return get_total_parameters(model), trainable
