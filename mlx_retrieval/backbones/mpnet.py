"""MPNet encoders, with the parameter names of their Hugging Face checkpoints.

Song et al. 2020 (arXiv 2004.09297): BERT's blocks, RoBERTa's positions, and T5's bias by distance, which all blocks
share.
"""

from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.base import Backbone, check_activation, check_sizes, real_tokens
from mlx_retrieval.backbones.hub import encoder_tensors, load_strictly
from mlx_retrieval.backbones.ops import Linear
from mlx_retrieval.backbones.parts import Embeddings, Layer, join_heads, split_heads
from mlx_retrieval.backbones.positions import biased_attention, bucket_bias, hide_padding

MODEL_TYPES = ("mpnet",)
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)
FIRST_POSITION = 2  # positions 0 and 1 are none, as in RoBERTa
BUCKETS, FARTHEST = 32, 128  # of distances; transformers computes with these, whatever the config says


class SelfAttention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        size = config["hidden_size"]
        self.q = Linear(size, size)
        self.k = Linear(size, size)
        self.v = Linear(size, size)
        self.o = Linear(size, size)
        self._heads = config["num_attention_heads"]

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        q, k, v = (split_heads(y, self._heads) for y in (self.q(x), self.k(x), self.v(x)))
        out = biased_attention(q, k, v, bias, q.shape[-1] ** -0.5, differentiable=self.training)
        return self.o(join_heads(out))


class Attention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.attn = SelfAttention(config)
        self.LayerNorm = nn.LayerNorm(config["hidden_size"], eps=config.get("layer_norm_eps", 1e-12))

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        return self.LayerNorm(self.attn(x, bias) + x)


class Encoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.layer = [Layer(config, Attention(config)) for _ in range(config["num_hidden_layers"])]
        rows = config.get("relative_attention_num_buckets", BUCKETS)
        self.relative_attention_bias = nn.Embedding(rows, config["num_attention_heads"])


class MPNet(Backbone):
    """MPNet; always bidirectional."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.bidirectional = True
        positions = config["max_position_embeddings"]
        self.embeddings = Embeddings(config, config.get("layer_norm_eps", 1e-12), positions, FIRST_POSITION)
        self.encoder = Encoder(config)

    @property
    def layers(self) -> list[nn.Module]:
        return self.encoder.layer

    @property
    def max_positions(self) -> int:
        return self.config["max_position_embeddings"] - FIRST_POSITION

    def hidden_states(self, ids: mx.array, lengths: mx.array) -> mx.array:
        x = self.embeddings(ids)
        bias = bucket_bias(self.encoder.relative_attention_bias, ids.shape[1], BUCKETS, FARTHEST)
        bias = hide_padding(bias, real_tokens(ids, lengths), x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        return x


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Remove heads and buffers, and the name prefix of checkpoints that were saved with a head."""
    return encoder_tensors(weights, "mpnet", r"(pooler|lm_head|classifier|qa_outputs)\.|.*position_ids$")


def load(folder: Path, config: dict, weights: dict[str, mx.array]) -> MPNet:
    """Build the encoder and load `weights` into it.

    Raises UserError if the config is not supported, or with every missing, unknown and misshapen tensor.
    """
    check_sizes(folder, config, SIZES)
    check_activation(folder, config.get("hidden_act", "gelu"))
    model = MPNet(config)
    load_strictly(model, sanitize(weights), folder, config.get("quantization"))
    return model
