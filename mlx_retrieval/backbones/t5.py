"""The encoders of T5, T5 v1.1, mT5 and umT5, with the parameter names of their Hugging Face checkpoints.

Raffel et al. 2020 (arXiv 1910.10683), Xue et al. 2021 (mT5, arXiv 2010.11934), Chung et al. 2023 (umT5, arXiv
2304.09151). Positions enter through attention alone, as a bias on its scores that depends on the distance of two
tokens. Nothing else has a bias, scores are not scaled, and norms subtract no mean (Zhang and Sennrich 2019, arXiv
1910.07467).
"""

import re
from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.base import Backbone, check_activation, check_sizes, real_tokens
from mlx_retrieval.backbones.hub import load_strictly
from mlx_retrieval.backbones.ops import ACTIVATIONS
from mlx_retrieval.backbones.parts import join_heads, split_heads
from mlx_retrieval.backbones.positions import biased_attention, bucket_bias, hide_padding

MODEL_TYPES = ("t5", "mt5", "umt5")
SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")


def feed_forward(config: dict) -> tuple[bool, str]:
    """Return (gated, name of the activation), from `feed_forward_proj` such as `relu` or `gated-gelu`."""
    projection = config.get("feed_forward_proj", "relu" if config["model_type"] == "t5" else "gated-gelu")
    gate, _, activation = projection.rpartition("-")
    if projection == "gated-gelu":
        activation = "gelu_new"  # despite its name, v1.1 was trained with the tanh form
    return config.get("is_gated_act", gate == "gated"), config.get("dense_act_fn", activation)


class SelfAttention(nn.Module):
    def __init__(self, config: dict, has_bias: bool):
        super().__init__()
        size, inner = config["d_model"], config["num_heads"] * config["d_kv"]
        self.q = nn.Linear(size, inner, bias=False)
        self.k = nn.Linear(size, inner, bias=False)
        self.v = nn.Linear(size, inner, bias=False)
        self.o = nn.Linear(inner, size, bias=False)
        self._heads = config["num_heads"]
        self._buckets = config.get("relative_attention_num_buckets", 32)
        self._farthest = config.get("relative_attention_max_distance", 128)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(self._buckets, self._heads)

    def position_bias(self, length: int) -> mx.array:
        """Return the bias (heads, L, L) of the score of a query (rows) and a key (columns), by their distance."""
        return bucket_bias(self.relative_attention_bias, length, self._buckets, self._farthest)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        q, k, v = (split_heads(y, self._heads) for y in (self.q(x), self.k(x), self.v(x)))
        return self.o(join_heads(biased_attention(q, k, v, bias, differentiable=self.training)))


class Dense(nn.Module):
    """The feed-forward part: `wi` and `wo`, or gated `wi_0`, `wi_1` and `wo`.

    Of float16 states, everything after the first products is computed in float32: T5 was trained in bfloat16, whose
    range float16 does not have, and one product that overflows makes NaN of a state. transformers keeps `wo` in
    float32 for that reason; here its weights stay in float16, which loses nothing and takes half the memory.
    """

    def __init__(self, config: dict):
        super().__init__()
        gated, activation = feed_forward(config)
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            self[name] = nn.Linear(config["d_model"], config["d_ff"], bias=False)
        self.wo = nn.Linear(config["d_ff"], config["d_model"], bias=False)
        self._gated, self._activation = gated, ACTIVATIONS[activation]

    def __call__(self, x: mx.array) -> mx.array:
        if self._gated:
            return self.wo(self._activation(_widened(self.wi_0(x))) * _widened(self.wi_1(x)))
        return self.wo(self._activation(_widened(self.wi(x))))


class Sublayer(nn.Module):
    """A norm, and the module that takes the normalised states, under its name in the checkpoint."""

    def __init__(self, config: dict, name: str, module: nn.Module):
        super().__init__()
        self[name] = module
        self.layer_norm = nn.RMSNorm(config["d_model"], eps=config.get("layer_norm_epsilon", 1e-6))


class Block(nn.Module):
    def __init__(self, config: dict, has_bias: bool):
        super().__init__()
        self.layer = [
            Sublayer(config, "SelfAttention", SelfAttention(config, has_bias)),
            Sublayer(config, "DenseReluDense", Dense(config)),
        ]

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        attention, dense = self.layer
        x = _finite(x + attention.SelfAttention(attention.layer_norm(x), bias), x.dtype)
        return _finite(x + dense.DenseReluDense(dense.layer_norm(x)), x.dtype)


def _finite(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return states in `dtype`, in float16 clipped to its finite numbers."""
    if dtype != mx.float16:
        return x
    return mx.clip(x, mx.finfo(dtype).min, mx.finfo(dtype).max).astype(dtype)


def _widened(x: mx.array) -> mx.array:
    """Return float16 numbers in float32, those that overflowed as the largest ones; others unchanged."""
    return _finite(x, x.dtype).astype(mx.float32) if x.dtype == mx.float16 else x


class Encoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        every = config["model_type"] == "umt5"  # each block has its own bias; elsewhere all share the first
        self.block = [Block(config, every or i == 0) for i in range(config["num_layers"])]
        self.final_layer_norm = nn.RMSNorm(config["d_model"], eps=config.get("layer_norm_epsilon", 1e-6))


class T5(Backbone):
    """The encoder of a T5 model; always bidirectional."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.bidirectional = True
        self.shared = nn.Embedding(config["vocab_size"], config["d_model"])
        self.encoder = Encoder(config)

    @property
    def layers(self) -> list[nn.Module]:
        return self.encoder.block

    @property
    def hidden_size(self) -> int:
        return self.config["d_model"]

    @property
    def max_positions(self) -> int:
        """No limit: far distances share a bucket. `n_positions` in some configs is the texts' length in pretraining."""
        return 1 << 20

    def hidden_states(self, ids: mx.array, lengths: mx.array) -> mx.array:
        real = real_tokens(ids, lengths)
        x = self.shared(ids)
        bias = None
        for block in self.layers:
            attention = block.layer[0].SelfAttention
            if "relative_attention_bias" in attention:
                bias = hide_padding(attention.position_bias(ids.shape[1]), real, x.dtype)
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Keep the encoder's tensors; rename those of checkpoints that were saved as part of a model, or in parts."""
    clean = {}
    for name, value in weights.items():
        name = re.sub(r"^(transformer|model|t5)\.", "", name)
        if re.match(r"(decoder|lm_head|classification_head|classifier|qa_outputs)\.", name):
            continue
        if re.match(r"(embed_tokens|block|final_layer_norm)\.", name):  # saved as a stack of blocks alone
            name = f"encoder.{name}"
        clean[name] = value
    embeddings = {name: clean.pop(name) for name in list(clean) if name.startswith("encoder.embed_tokens.")}
    # A checkpoint that has both names holds the same embedding twice.
    return {name.replace("encoder.embed_tokens.", "shared."): value for name, value in embeddings.items()} | clean


def load(folder: Path, config: dict, weights: dict[str, mx.array]) -> T5:
    """Build the encoder and load `weights` into it.

    Raises UserError if the config is not supported, or with every missing, unknown and misshapen tensor.
    """
    check_sizes(folder, config, SIZES)
    check_activation(folder, feed_forward(config)[1])
    model = T5(config)
    load_strictly(model, sanitize(weights), folder, config.get("quantization"))
    return model
