"""Backbones: from token ids to token states. `load_backbone` chooses the class by a folder's config.json."""

from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx.utils import tree_flatten, tree_map

from mlx_retrieval import backend
from mlx_retrieval.backbones import bert, decoder, modernbert, t5
from mlx_retrieval.backbones.base import Backbone
from mlx_retrieval.backbones.hub import read_config, read_weights, resolve
from mlx_retrieval.utils.errors import UserError

__all__ = ["ENCODERS", "Backbone", "load_backbone", "resolve"]

# The module that loads each model_type that is not a decoder: each has `load` and `sanitize`.
ENCODERS = {kind: module for module in (bert, modernbert, t5) for kind in module.MODEL_TYPES}


def load_backbone(folder: Path, bidirectional: bool | None = None, dtype: mx.Dtype | None = None) -> Backbone:
    """Load the backbone in `folder`, frozen and in evaluation mode.

    Args:
        folder: config.json and *.safetensors of Hugging Face or mlx-lm, quantised or not.
        bidirectional: whether tokens also attend to later ones; None = as the architecture and its config say.
        dtype: of the floating-point weights; None = the checkpoint's on a GPU, float32 on CPUs.

    Raises UserError for a folder without weights, an unknown architecture, an encoder that is asked to be causal, and
    tensors that do not fit.
    """
    config = read_config(folder)
    if encoder := ENCODERS.get(config["model_type"]):
        if bidirectional is False:
            raise UserError(f"{folder}: {config['model_type']} is an encoder and cannot be made causal")
        model = encoder.load(folder, config, read_weights(folder))
    else:
        model = decoder.load(folder, config, bidirectional)
    set_dtype(model, dtype)
    model.freeze()
    model.eval()
    return model


def set_dtype(model: Backbone, dtype: mx.Dtype | None) -> None:
    """Cast floating-point weights to `dtype`; None = `backend.compute_dtype`. Quantised weights stay integers."""

    def cast(value: mx.array) -> mx.array:
        if not mx.issubdtype(value.dtype, mx.floating):
            return value
        return value.astype(dtype or backend.compute_dtype(value.dtype))

    model.update(tree_map(cast, model.parameters()))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of all and of trainable parameters. A quantised layer counts as its dequantised weights."""
    from mlx_lm.utils import get_total_parameters

    trainable = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    return get_total_parameters(model), trainable
