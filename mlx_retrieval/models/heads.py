"""Heads: turn a backbone's token states into a vector a text, a vector a token, or a reranker's scores.

A head takes states (R, L, D) and their `MicroBatch`, and returns one float32 representation a row. Its parameters have
no place in mlx-lm's adapter files; a saved folder keeps them in `heads.safetensors`.
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
    """Return one vector a row: states (R, L, D) of any float dtype -> (R, D) float32.

    Args:
        mode: `mean` and `max` are over the tokens from `batch.start` to `batch.end` (the tokenizer decides whether that
            includes special tokens and prompts); `cls` takes the first token, `last` the last real one.
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
    """A linear layer and an activation, as sentence-transformers puts them after pooling: (R, D) -> (R, E) float32."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str = "Identity"):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias)
        self.activation = activation

    def __call__(self, vectors: mx.array) -> mx.array:
        return ACTIVATIONS[self.activation](self.linear(vectors))


class EmbeddingHead(nn.Module):
    """Pooling, dense layers if the model has any, then scaling to unit length: (R, L, D) -> (R, E) float32.

    Without `normalize`, vectors keep their length, for models whose scores are plain dot products.
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

    The tokens that count are those of `pool`'s mean; a dense layer, if any, is the projection (XTR: 768 to 128).
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
    """Head of a cross-encoder: pooling, optional dense layer and norm, then a score: (R, L, D) -> (R, 1) float32.

    Args:
        hidden_size: D.
        pooling: see `pool`.
        activation: of the dense layer, see ACTIVATIONS; "" = no dense layer.
        bias: whether the dense layer has a bias.
        out_bias: whether the last layer has a bias.
        norm_eps: epsilon of a LayerNorm after the dense layer; None = no LayerNorm.
        norm_bias: whether that LayerNorm has a bias.
        late: pool the scores of the tokens, not their states.
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
        late: bool = False,
    ):
        super().__init__()
        self.pooling, self.activation, self._late = pooling, activation, late
        if activation:
            self.dense = nn.Linear(hidden_size, hidden_size, bias)
        if norm_eps is not None:
            self.norm = nn.LayerNorm(hidden_size, eps=norm_eps, bias=norm_bias)
        self.out = nn.Linear(hidden_size, 1, out_bias)

    def __call__(self, states: mx.array, batch: MicroBatch) -> mx.array:
        if self._late:
            return pool(self._score(states.astype(mx.float32)), batch, self.pooling)
        return self._score(pool(states, batch, self.pooling))

    def _score(self, vectors: mx.array) -> mx.array:
        if "dense" in self:
            vectors = ACTIVATIONS[self.activation](self.dense(vectors))
        if "norm" in self:
            vectors = self.norm(vectors)
        return self.out(vectors)


class YesNoHead(nn.Module):
    """A language model as a judge: logit of "yes" minus logit of "no" at the last token, (R, L, D) -> (R, 1) float32.

    The sigmoid of that is the softmax over the two tokens. No other logits are computed.

    Args:
        logits: (R, D) states -> (R, 2) float32 logits of "no" and "yes": see `Decoder.logits_of`.
    """

    def __init__(self, logits: Callable[[mx.array], mx.array]):
        super().__init__()
        self._logits = logits  # a function: its weights are the language model's, not this head's

    def __call__(self, states: mx.array, batch: MicroBatch) -> mx.array:
        last = mx.take_along_axis(states, (batch.lengths - 1)[:, None, None], axis=1)[:, 0]
        logits = self._logits(last)
        return logits[:, 1:] - logits[:, :1]


class ListHead(nn.Module):
    """Head of jina-reranker-v3: cosines of projected passage and query tokens, (R, L, D) -> (R, L, 1) float32.

    Scores are at the tokens `passage`, which end each passage, and zero elsewhere; the query's vector is that of the
    last token `query`.
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
    """A backbone and a head: `MicroBatch` -> representations (R, ...) float32, one a row."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def __call__(self, batch: MicroBatch) -> mx.array:
        optional = {name: getattr(batch, name) for name in ("second", "past") if getattr(batch, name) is not None}
        return self.head(self.backbone.hidden_states(batch.ids, batch.lengths, **optional), batch)
