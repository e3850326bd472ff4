"""DeBERTa-v2 and v3 encoders, with the parameter names of their Hugging Face checkpoints.

He et al. 2020 and 2021 (arXiv 2006.03654, 2111.09543). The score of a query and a key has three parts: of both
contents, of the query's content and the distance, and of the key's content and the distance. Distances share one table
of embeddings, which each block projects with matrices of its own or with those of its contents.
"""

import functools
from pathlib import Path

from mlx_retrieval.backend import mx, nn

import numpy as np

from mlx_retrieval.backbones.base import Backbone, check_activation, check_sizes, real_tokens
from mlx_retrieval.backbones.hub import encoder_tensors, load_strictly
from mlx_retrieval.backbones.ops import ACTIVATIONS, Linear, attention
from mlx_retrieval.backbones.parts import Embeddings, Layer, Output, join_heads, split_heads
from mlx_retrieval.backbones.positions import biased_attention, hide_padding, signed_buckets, skewed

MODEL_TYPES = ("deberta-v2",)
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)
KEYS, QUERIES = "c2p", "p2c"  # the parts of scores that the distance has: with the query's content, the key's content


def position_parts(config: dict) -> tuple[str, ...]:
    """Return which of KEYS and QUERIES a config names, in `pos_att_type`: a list, or `p2c|c2p`."""
    names = config.get("pos_att_type") or ()
    names = names.lower().split("|") if isinstance(names, str) else names
    return tuple(part for part in (KEYS, QUERIES) if part in [name.strip() for name in names])


def farthest(config: dict) -> int:
    """Return `max_relative_positions`, which is the number of positions unless the config says otherwise."""
    limit = config.get("max_relative_positions", -1)
    return limit if limit > 0 else config["max_position_embeddings"]


def span(config: dict) -> int:
    """Return the number of distances to either side that have an embedding."""
    count = config.get("position_buckets", -1)
    return count if count > 0 else farthest(config)


@functools.lru_cache(64)
def used_rows(length: int, count: int, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of the table of distances that texts of this length use, and where each distance's row is.

    Args:
        length: L, in tokens.
        count, limit: see `signed_buckets`.

    Returns (rows, places, mirrored): rows (U,), and for the distances d = j - i from 1 - L to L, as `skewed` has its
    columns, places (2L,) in `rows` of d and of -d.
    """
    half = count if count > 0 else limit
    distances = np.arange(1 - length, length + 1)
    tables = [np.clip(signed_buckets(d, count, limit) + half, 0, 2 * half - 1) for d in (distances, -distances)]
    rows, places = np.unique(np.concatenate(tables), return_inverse=True)
    return rows, places[: 2 * length], places[2 * length :]


class SelfAttention(nn.Module):
    """Disentangled attention; without relative positions, attention that is scaled alike."""

    def __init__(self, config: dict):
        super().__init__()
        size, heads = config["hidden_size"], config["num_attention_heads"]
        width = heads * (config.get("attention_head_size") or size // heads)
        self.query_proj = Linear(size, width)
        self.key_proj = Linear(size, width)
        self.value_proj = Linear(size, width)
        self._parts = position_parts(config) if config.get("relative_attention") else ()
        self._scale = (width // heads * (1 + len(position_parts(config)))) ** -0.5
        self._heads, self._shared = heads, config.get("share_att_key", False)
        self._buckets = (config.get("position_buckets", -1), farthest(config))
        if not self._shared:
            for part, name in ((KEYS, "pos_key_proj"), (QUERIES, "pos_query_proj")):
                if part in self._parts:
                    self[name] = Linear(size, width)

    def __call__(self, x: mx.array, real: mx.array, distances: mx.array | None = None) -> mx.array:
        """Return (R, L, width) of x (R, L, D).

        Args:
            real: (R, L) bool, True for tokens that are not padding.
            distances: (U, D), the embeddings of `used_rows`; None = the model has none.
        """
        q, k, v = (split_heads(y, self._heads) for y in (self.query_proj(x), self.key_proj(x), self.value_proj(x)))
        if not self._parts:
            return join_heads(attention(q, k, v, scale=self._scale, real=real))
        bias = hide_padding(self._scale * self._position_scores(q, k, distances), real, q.dtype)
        return join_heads(biased_attention(q, k, v, bias, self._scale, differentiable=self.training))

    def _position_scores(self, q: mx.array, k: mx.array, distances: mx.array) -> mx.array:
        """Return the parts of the scores (R, heads, L, L) that the distances of query and key have, not scaled."""
        _, places, mirrored = (mx.array(rows) for rows in used_rows(q.shape[2], *self._buckets))

        def embedded(projection: nn.Linear, columns: mx.array) -> mx.array:  # (heads, d, 2L), a column a distance
            return split_heads(projection(distances)[None], self._heads)[0][:, columns].swapaxes(-1, -2)

        scores = []
        if KEYS in self._parts:  # [i, j]: of query i, and the distance i - j, which is -(j - i)
            projection = self.key_proj if self._shared else self.pos_key_proj
            scores.append(skewed(q @ embedded(projection, mirrored)))
        if QUERIES in self._parts:  # [j, i]: of key j, and the distance i - j
            projection = self.query_proj if self._shared else self.pos_query_proj
            scores.append(skewed(k @ embedded(projection, places)).swapaxes(-1, -2))
        return sum(scores[1:], scores[0])


class Attention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(self.self.query_proj.weight.shape[0], config)

    def __call__(self, x: mx.array, *context: mx.array) -> mx.array:
        return self.output(self.self(x, *context), x)


class Conv(nn.Module):
    """A convolution along the text, its weight (out, in / groups, width) as torch has it: (R, L, D) -> (R, L, D)."""

    def __init__(self, size: int, width: int, groups: int):
        super().__init__()
        self.weight = mx.zeros((size, size // groups, width))
        self.bias = mx.zeros((size,))
        self._groups = groups

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.weight.swapaxes(1, 2)
        return mx.conv1d(x, weight, padding=(weight.shape[1] - 1) // 2, groups=self._groups) + self.bias


class ConvLayer(nn.Module):
    """What the first block's states get from the neighbouring tokens' embeddings (v2 alone)."""

    def __init__(self, config: dict):
        super().__init__()
        self.conv = Conv(config["hidden_size"], config["conv_kernel_size"], config.get("conv_groups", 1))
        self.LayerNorm = nn.LayerNorm(config["hidden_size"], eps=config["layer_norm_eps"])
        self._activation = ACTIVATIONS[config.get("conv_act", "tanh")]

    def __call__(self, embeddings: mx.array, x: mx.array, real: mx.array) -> mx.array:
        embeddings = mx.where(real[..., None], embeddings, 0.0)  # so that a text's last token sees no padding
        return self.LayerNorm(x + self._activation(self.conv(embeddings)))


class Encoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.layer = [Layer(config, Attention(config)) for _ in range(config["num_hidden_layers"])]
        if config.get("relative_attention"):
            self.rel_embeddings = nn.Embedding(2 * span(config), config["hidden_size"])
        if "layer_norm" in config.get("norm_rel_ebd", "none").lower():
            self.LayerNorm = nn.LayerNorm(config["hidden_size"], eps=config["layer_norm_eps"])
        if config.get("conv_kernel_size", 0) > 0:
            self.conv = ConvLayer(config)
        self._buckets = (config.get("position_buckets", -1), farthest(config))

    def distances(self, length: int) -> list[mx.array]:
        """Return the embeddings (U, D) of the distances in a text of `length` tokens, see `used_rows`; or nothing."""
        if "rel_embeddings" not in self:
            return []
        rows = self.rel_embeddings(mx.array(used_rows(length, *self._buckets)[0]))
        return [self.LayerNorm(rows) if "LayerNorm" in self else rows]


class Deberta(Backbone):
    """DeBERTa-v2 or v3; always bidirectional."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config = {"layer_norm_eps": 1e-7} | config
        self.bidirectional = True
        positions = config["max_position_embeddings"] if has_positions(config) else 0
        width, types = config.get("embedding_size", 0), config.get("type_vocab_size", 0)
        self.embeddings = Embeddings(config, config["layer_norm_eps"], positions, types=types, width=width)
        self.encoder = Encoder(config)

    @property
    def layers(self) -> list[nn.Module]:
        return self.encoder.layer

    @property
    def max_positions(self) -> int:
        """No limit without a table of positions: far distances share an embedding."""
        return self.config["max_position_embeddings"] if has_positions(self.config) else 1 << 20

    def hidden_states(self, ids: mx.array, lengths: mx.array, second: mx.array | None = None) -> mx.array:
        real = real_tokens(ids, lengths)
        embeddings = x = self.embeddings(ids, second)
        distances = self.encoder.distances(ids.shape[1])
        for i, layer in enumerate(self.layers):
            x = layer(x, real, *distances)
            if i == 0 and "conv" in self.encoder:
                x = self.encoder.conv(embeddings, x, real)
        return x


def has_positions(config: dict) -> bool:
    """Return whether the embeddings have a table of positions. v3 has none."""
    return config.get("position_biased_input", True)


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Remove heads and buffers, and the name prefix of checkpoints that were saved with a head."""
    return encoder_tensors(
        weights, "deberta", r"(pooler|classifier|cls|lm_predictions|mask_predictions|qa_outputs)\.|.*position_ids$"
    )


def load(folder: Path, config: dict, weights: dict[str, mx.array]) -> Deberta:
    """Build the encoder and load `weights` into it.

    Raises UserError if the config is not supported, or with every missing, unknown and misshapen tensor.
    """
    check_sizes(folder, config, SIZES)
    check_activation(folder, config.get("hidden_act", "gelu"))
    check_activation(folder, config.get("conv_act", "tanh"))
    weights = sanitize(weights)
    if not has_positions(config):  # some checkpoints hold a table all the same
        weights.pop("embeddings.position_embeddings.weight", None)
    model = Deberta(config)
    load_strictly(model, weights, folder, config.get("quantization"))
    return model
