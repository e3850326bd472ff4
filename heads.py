"""Heads: from a backbone's token states to what is compared. One vector a text here; more heads, same contract.

A head is called with states (R, L, D) and the `MicroBatch` they belong to, and returns one representation a row in
float32. It has the parameters that mlx-lm's adapters do not know; a saved folder keeps them in `heads.safetensors`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from backend import mx, nn

from loss import unit

POOLING = ("mean", "cls", "last", "max")
ACTIVATIONS = {
    "Identity": lambda x: x,
    "Tanh": mx.tanh,
    "ReLU": nn.relu,
    "GELU": nn.gelu,
    "Sigmoid": mx.sigmoid,
    "SiLU": nn.silu,
}


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


class Dense(nn.Module):
    """A linear layer and an activation, as sentence-transformers has them after pooling: (R, D) -> (R, E) float32."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str = "Identity"):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias)
        self.activation = activation

    def __call__(self, vectors: mx.array) -> mx.array:
        return ACTIVATIONS[self.activation](self.linear(vectors))


class EmbeddingHead(nn.Module):
    """Pooling, dense layers where the model has some, then unit length: (R, L, D) -> (R, E) float32.

    Without `normalize`, vectors keep the length they have, as models want whose scores are plain dot products.
    """

    def __init__(self, pooling: str = "mean", dense: Sequence[Dense] = (), normalize: bool = True):
        super().__init__()
        self.pooling, self.normalize = pooling, normalize
        self.dense = list(dense)

    def __call__(self, states: mx.array, batch: MicroBatch) -> mx.array:
        vectors = pool(states, batch, self.pooling)
        for layer in self.dense:
            vectors = layer(vectors)
        return unit(vectors) if self.normalize else vectors


class LateHead(nn.Module):
    """One vector a token: (R, L, D) -> (R, L, E) float32, of unit length where a token counts and zero elsewhere.

    Tokens count as in `pool`'s mean; a dense layer, where there is one, is the projection (XTR: 768 to 128).
    """

    def __init__(self, dense: Sequence[Dense] = ()):
        super().__init__()
        self.dense = list(dense)

    def __call__(self, states: mx.array, batch: MicroBatch) -> mx.array:
        positions = mx.arange(states.shape[1])[None, :]
        counts = (positions >= batch.start[:, None]) & (positions < batch.end[:, None])
        vectors = mx.where(counts[..., None], states.astype(mx.float32), 0.0)
        for layer in self.dense:
            vectors = layer(vectors)
        return mx.where(counts[..., None], unit(vectors), 0.0)


class RetrievalModel(nn.Module):
    """A backbone and a head; called with a `MicroBatch`, it returns their representations (float32, one a row)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def __call__(self, batch: MicroBatch) -> mx.array:
        return self.head(self.backbone.hidden_states(batch.ids, batch.lengths), batch)
