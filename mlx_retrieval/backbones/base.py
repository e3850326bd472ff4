"""The interface of every backbone: token ids in, token states out. A backbone knows no task."""

from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.ops import ACTIVATIONS
from mlx_retrieval.utils.errors import UserError


class Backbone(nn.Module):
    """Base of all backbones.

    Contract: `hidden_states(ids, lengths)` returns the last layer's states (R, L, D) in the model's dtype for ids
    (R, L) int32, right-padded, and lengths (R,) int32. Padding never changes a real token's state; the states at
    padded positions are arbitrary. Parameters keep the checkpoint's own names below `adapted`.

    Models with token types also take `second`, (R,) int32: the position at which the second text of a pair begins.
    Causal decoders also take `past`: see `Decoder.past`.
    """

    config: dict
    bidirectional: bool
    shared_weights: object = None  # keeps those alive that it shares with others: see models/shared_weights.py

    @property
    def adapted(self) -> nn.Module:
        """The module whose parameter names are those in `adapters.safetensors`."""
        return self

    @property
    def trunk(self) -> nn.Module:
        """The module that computes hidden states, without the head of a language model."""
        return self

    @property
    def layers(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""
        raise AttributeError(f"{type(self).__name__} has no layers")

    @property
    def hidden_size(self) -> int:
        """D, the width of a token's state."""
        return self.config["hidden_size"]

    @property
    def max_positions(self) -> int:
        """The length in tokens of the longest text that the model has positions for."""
        return self.config.get("max_position_embeddings", 512)

    def hidden_states(self, ids: mx.array, lengths: mx.array) -> mx.array:
        """Return the states (R, L, D) of the last layer: see the class."""
        raise AttributeError(f"{type(self).__name__} computes no hidden states")


# The names of a setting in configs: the usual one, and those that a few architectures have for it.
NAMES = {
    "hidden_size": ("dim", "n_embd"),
    "intermediate_size": ("hidden_dim", "n_inner"),
    "num_hidden_layers": ("n_layers", "n_layer"),
    "num_attention_heads": ("n_heads", "n_head"),
    "max_position_embeddings": ("n_positions",),
    "layer_norm_eps": ("layer_norm_epsilon",),
}


def with_usual_names(config: dict) -> dict:
    """Return a config that has its settings also under their usual names."""
    found = {usual: next((n for n in others if config.get(n) is not None), None) for usual, others in NAMES.items()}
    return {usual: config[other] for usual, other in found.items() if other} | config


def real_tokens(ids: mx.array, lengths: mx.array) -> mx.array:
    """Return (R, L) bool: True where a position holds a real token, not padding."""
    return mx.arange(ids.shape[1])[None, :] < lengths[:, None]


def check_sizes(folder: Path, config: dict, names: Sequence[str]) -> None:
    """Raise UserError that names every size that the folder's config.json lacks."""
    if missing := [name for name in names if not config.get(name)]:
        raise UserError(f"{folder / 'config.json'}: no {', '.join(missing)}")


def check_activation(folder: Path, name: str) -> None:
    """Raise UserError if the activation that the folder's config.json names is not in `ops.ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise UserError(f"{folder / 'config.json'}: activation {name!r} is unknown; known: {names}")
