"""Gradient checkpointing of transformer blocks: keep a block's input, recompute the rest for the gradient."""

import random

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.base import Backbone

_draw = random.Random(0)


def seed(value: int) -> None:
    """Seed dropout, in checkpointed blocks as well. Equal seeds replay equal masks."""
    mx.random.seed(value)
    _draw.seed(value)


def checkpoint_blocks(backbone: Backbone) -> None:
    """Let every block of this backbone recompute its activations in the backward pass.

    Each block object becomes an instance of a subclass of its class, so the library's classes and the names of
    parameters do not change.
    """
    for layer in backbone.layers:
        if not _is_checkpointed(layer):
            layer.__class__ = _checkpointing(type(layer))


def checkpointed(backbone: Backbone) -> bool:
    """Return whether `checkpoint_blocks` was called on this backbone."""
    return any(_is_checkpointed(layer) for layer in backbone.layers)


def _is_checkpointed(layer: nn.Module) -> bool:
    return getattr(type(layer), "recomputes", False)


def _checkpointing(kind: type) -> type:
    """Return a subclass that recomputes. It can be subclassed in turn."""

    def call(self: nn.Module, *args, **kwargs):
        # A block runs twice and must drop the same inputs both times, so each call has a seed.
        dropout_seed = _draw.getrandbits(32)

        def block(parameters: dict, *args, **kwargs):
            mx.random.seed(dropout_seed)
            self.update(parameters)
            return kind.__call__(self, *args, **kwargs)

        # Every array argument is traced: in some blocks, others than x have a gradient, too.
        return mx.checkpoint(block)(self.trainable_parameters(), *args, **kwargs)

    return type(f"Checkpointed{kind.__name__}", (kind,), {"__call__": call, "recomputes": True})
