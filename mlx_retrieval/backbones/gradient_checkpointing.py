"""Gradient checkpointing of transformer blocks: keep a block's input, compute the rest again for the gradient."""

import random

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.base import Backbone

_draw = random.Random(0)


def seed(value: int) -> None:
    """Seed dropout, in checkpointed blocks as well. Equal seeds replay equal masks."""
    mx.random.seed(value)
    _draw.seed(value)


def checkpoint_blocks(backbone: Backbone) -> None:
    """Let every block of this backbone recompute its inside in the backward pass.

    Each block object gets a class of its own that derives from its old one, so the library's classes and the names of
    parameters stay as they are.
    """
    for layer in backbone.layers:
        kind = type(layer)
        if kind.__call__ is _call:  # already
            continue
        layer.__class__ = type(f"Checkpointed{kind.__name__}", (kind,), {"__call__": _call})


def checkpointed(backbone: Backbone) -> bool:
    """Whether `checkpoint_blocks` was called on it."""
    return any(type(layer).__call__ is _call for layer in backbone.layers)


def _call(self: nn.Module, *args, **kwargs):
    # A block runs twice, and both times has to drop the same inputs: it starts from a seed of its own.
    dropout_seed = _draw.getrandbits(32)

    def block(parameters: dict, *args, **kwargs):
        mx.random.seed(dropout_seed)
        self.update(parameters)
        return super(type(self), self).__call__(*args, **kwargs)

    # All arrays among the arguments are traced: some blocks take more than x that has a gradient.
    return mx.checkpoint(block)(self.trainable_parameters(), *args, **kwargs)
