"""Heads: from a backbone's token states to what is compared. One vector a text here; more heads, same contract.

A head is called with states (R, L, D) and the `MicroBatch` they belong to, and returns one representation a row in
float32. It has the parameters that mlx-lm's adapters do not know; a saved folder keeps them in `heads.safetensors`.
"""

from typing import NamedTuple

from backend import mx, nn

from loss import unit

POOLING = ("mean", "cls", "last", "max")


class MicroBatch(NamedTuple):
    """R right-padded texts of at most L tokens, as the backbone sees them."""

    ids: mx.array  # (R, L) int32
    lengths: mx.array  # (R,) int32: real tokens of each row
    start: mx.array  # (R,) int32: first token that pooling counts
    end: mx.array  # (R,) int32: one past the last


def pool(states: mx.array, batch: MicroBatch, mode: str) -> mx.array:
    """One vector a row: states (R, L, D) of any float dtype -> (R, D) float32.

    `mean` and `max` are over the tokens from `batch.start` to `batch.end` (what counts is decided where texts become
    tokens: special tokens and prompts in or out), `cls` takes the first token and `last` the last real one.
    """
    if mode == "cls":
        return states[:, 0].astype(mx.float32)
    if mode == "last":
        last = (batch.lengths - 1)[:, None, None]
        return mx.take_along_axis(states, last, axis=1)[:, 0].astype(mx.float32)
    positions = mx.arange(states.shape[1])[None, :]
    counts = ((positions >= batch.start[:, None]) & (positions < batch.end[:, None]))[..., None]  # (R, L, 1)
    if mode == "max":
        return mx.where(counts, states.astype(mx.float32), -mx.inf).max(axis=1)
    # A matrix product with the normalised mask sums in one pass and never multiplies padding into the result.
    weights = counts.astype(mx.float32) / counts.sum(axis=1, keepdims=True)
    states = mx.where(counts, states.astype(mx.float32), 0.0)
    return (weights.transpose(0, 2, 1) @ states)[:, 0]


class EmbeddingHead(nn.Module):
    """Pooling, then unit length: (R, L, D) -> (R, D) float32."""

    def __init__(self, pooling: str = "mean"):
        super().__init__()
        self.pooling = pooling

    def __call__(self, states: mx.array, batch: MicroBatch) -> mx.array:
        return unit(pool(states, batch, self.pooling))


class RetrievalModel(nn.Module):
    """A backbone and a head; called with a `MicroBatch`, it returns their representations (float32, one a row)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def __call__(self, batch: MicroBatch) -> mx.array:
        return self.head(self.backbone.hidden_states(batch.ids, batch.lengths), batch)
