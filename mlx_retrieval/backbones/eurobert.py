"""EuroBERT encoders, with the parameter names of their Hugging Face checkpoints.

Boizard et al. 2025 (arXiv 2503.05500): Llama's blocks, with attention to both sides.
"""

from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.base import Backbone, check_activation, check_sizes, real_tokens
from mlx_retrieval.backbones.hub import encoder_tensors, load_strictly
from mlx_retrieval.backbones.parts import GatedMLP, RotaryAttention
from mlx_retrieval.backbones.positions import Rope, rope_of

MODEL_TYPES = ("eurobert",)
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
BASE = 10_000.0  # of rotary positions, for configs without one; published ones have 250,000


def _norm(config: dict) -> nn.RMSNorm:
    return nn.RMSNorm(config["hidden_size"], eps=config.get("rms_norm_eps", 1e-5))


class Layer(nn.Module):
    def __init__(self, config: dict, rope: Rope):
        super().__init__()
        size, heads = config["hidden_size"], config["num_attention_heads"]
        keys, width = config.get("num_key_value_heads") or heads, config.get("head_dim") or size // heads
        bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
        self.input_layernorm = _norm(config)
        self.self_attn = RotaryAttention(size, heads, rope, keys, width, bias=bias)
        self.post_attention_layernorm = _norm(config)
        activation = config.get("hidden_act", "silu")
        self.mlp = GatedMLP(size, config["intermediate_size"], activation, bias=mlp_bias, down_bias=mlp_bias)

    def __call__(self, x: mx.array, real: mx.array) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), real)
        return x + self.mlp(self.post_attention_layernorm(x))


class EuroBert(Backbone):
    """EuroBERT; always bidirectional."""

    def __init__(self, config: dict, rope: Rope):
        super().__init__()
        self.config = config
        self.bidirectional = True
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self["layers"] = [Layer(config, rope) for _ in range(config["num_hidden_layers"])]
        self.norm = _norm(config)

    @property
    def layers(self) -> list[nn.Module]:
        return self["layers"]

    @property
    def max_positions(self) -> int:
        return self.config.get("max_position_embeddings", 8192)

    def hidden_states(self, ids: mx.array, lengths: mx.array) -> mx.array:
        real = real_tokens(ids, lengths)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, real)
        return self.norm(x)


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Remove heads and buffers, and the name prefix of checkpoints that were saved with a head."""
    return encoder_tensors(weights, "model", r"(lm_head|dense|classifier)\.|.*inv_freq$")


def load(folder: Path, config: dict, weights: dict[str, mx.array]) -> EuroBert:
    """Build the encoder and load `weights` into it.

    Raises UserError if the config is not supported, or with every missing, unknown and misshapen tensor.
    """
    check_sizes(folder, config, SIZES)
    check_activation(folder, config.get("hidden_act", "silu"))
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    model = EuroBert(config, rope_of(folder, config, width, BASE))
    load_strictly(model, sanitize(weights), folder, config.get("quantization"))
    return model
