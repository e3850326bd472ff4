"""Heads: from a backbone's token states to what is compared: a vector a text, a vector a token, or a reranker's scores.

A head is called with states (R, L, D) and the `MicroBatch` they belong to, and returns one representation a row in
float32. It has the parameters that mlx-lm's adapters do not know; a saved folder keeps them in `heads.safetensors`.
"""

from collections.abc import Callable, Sequence

from mlx_retrieval.backend import mx, nn
from mlx_retrieval.backend.vectors import unit

from mlx_retrieval.models.batching import MicroBatch

POOLING = ("mean", "cls", "last", "max")
ACTIVATIONS = {
    "Identity": lambda x: x,
    "Tanh": mx.tanh,
    "ReLU": nn.relu,
    "GELU": nn.gelu,
    "Sigmoid": mx.sigmoid,
    "SiLU": nn.silu,
}


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


class ScoreHead(nn.Module):
    """A cross-encoder's: pooling, a dense layer and a norm where the model has them, one score: (R, L, D) -> (R, 1).

    Args:
        hidden_size: D. pooling: see `pool`.
        activation: of the dense layer, see ACTIVATIONS; "" = there is none.
        bias: of the dense layer; out_bias: of the last one.
        norm_eps: there is a LayerNorm after the dense layer, with this epsilon and, with `norm_bias`, a bias.
    """

    def __init__(
        self,
        hidden_size: int,
        pooling: str = "cls",
        activation: str = "Tanh",
        bias: bool = True,
        out_bias: bool = True,
        norm_eps: float | None = None,
        norm_bias: bool = True,
    ):
        super().__init__()
        self.pooling, self.activation = pooling, activation
        if activation:
            self.dense = nn.Linear(hidden_size, hidden_size, bias)
        if norm_eps is not None:
            self.norm = nn.LayerNorm(hidden_size, eps=norm_eps, bias=norm_bias)
        self.out = nn.Linear(hidden_size, 1, out_bias)

    def __call__(self, states: mx.array, batch: MicroBatch) -> mx.array:
        vectors = pool(states, batch, self.pooling)
        if "dense" in self:
            vectors = ACTIVATIONS[self.activation](self.dense(vectors))
        if "norm" in self:
            vectors = self.norm(vectors)
        return self.out(vectors)


class YesNoHead(nn.Module):
    """A language model as a judge: logit of "yes" less that of "no" at the last position, (R, L, D) -> (R, 1) float32.

    Its sigmoid is the softmax over the two tokens. No other logit is computed.

    Args:
        logits: (R, D) states -> (R, 2) float32 logits of "no" and "yes": see `Decoder.logits_of`.
    """

    def __init__(self, logits: Callable[[mx.array], mx.array]):
        super().__init__()
        self._logits = logits  # the language model's own weights, so none of this head's

    def __call__(self, states: mx.array, batch: MicroBatch) -> mx.array:
        last = mx.take_along_axis(states, (batch.lengths - 1)[:, None, None], axis=1)[:, 0]
        logits = self._logits(last)
        return logits[:, 1:] - logits[:, :1]


class ListHead(nn.Module):
    """jina-reranker-v3's: cosine of every token with the query's, projected: (R, L, D) -> (R, L, 1) float32.

    Scores stand where a passage ends (`passage`'s token), zeros elsewhere; the query is read at its last `query` token.
    """

    def __init__(self, hidden_size: int, inner: int, dimensions: int, passage: int, query: int):
        super().__init__()
        self.inner = nn.Linear(hidden_size, inner, bias=False)
        self.outer = nn.Linear(inner, dimensions, bias=False)
        self._passage, self._query = passage, query

    def __call__(self, states: mx.array, batch: MicroBatch) -> mx.array:
        vectors = unit(self.outer(nn.relu(self.inner(states.astype(mx.float32)))))
        positions = mx.arange(states.shape[1])
        query = mx.where(batch.ids == self._query, positions, 0).max(axis=1)[:, None, None]
        scores = (vectors * mx.take_along_axis(vectors, query, axis=1)).sum(axis=-1, keepdims=True)
        return mx.where((batch.ids == self._passage)[..., None], scores, 0.0)


class RetrievalModel(nn.Module):
    """A backbone and a head; called with a `MicroBatch`, it returns their representations (float32, one a row)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def __call__(self, batch: MicroBatch) -> mx.array:
        more = {name: getattr(batch, name) for name in ("second", "past") if getattr(batch, name) is not None}
        return self.head(self.backbone.hidden_states(batch.ids, batch.lengths, **more), batch)
