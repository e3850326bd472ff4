"""Backbones: token ids to token states. `load_backbone` picks the class that fits a folder's config.json."""

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
        folder: config.json and *.safetensors, Hugging Face's or mlx-lm's, quantised or not.
        bidirectional: None takes what is natural for the architecture (and `is_causal` of its config, if it says so).
        dtype: of the floating-point weights; None: the checkpoint's on a GPU, float32 on CPUs.

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
    """Cast floating-point weights to `dtype`, or to what the device computes fastest in; quantised ones stay."""

    def cast(value: mx.array) -> mx.array:
        if not mx.issubdtype(value.dtype, mx.floating):
            return value
        return value.astype(dtype or backend.default_dtype(value.dtype))

    model.update(tree_map(cast, model.parameters()))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters; those of quantised layers are counted as the numbers they stand for."""
    from mlx_lm.utils import get_total_parameters

    trainable = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    return get_total_parameters(model), trainable
