"""GTE's encoders, whose configs say `new` or `gte`, with the parameter names of their published checkpoints.

Zhang et al. 2024 (mGTE, arXiv 2407.19669): BERT's order of sublayers and norms, with rotary positions, scaled for long
texts in some, and a gated feed-forward part.
"""

import re
from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.base import Backbone, check_activation, check_sizes, real_tokens
from mlx_retrieval.backbones.hub import encoder_tensors, load_strictly
from mlx_retrieval.backbones.parts import Embeddings, GatedMLP, RotaryAttention
from mlx_retrieval.backbones.positions import Rope, rope_of
from mlx_retrieval.utils.errors import UserError

MODEL_TYPES = ("new", "gte")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
BASES = {"new": 10_000.0, "gte": 160_000.0}  # of rotary positions, for configs without one
PACKED, PACKED_MLP = "qkv_proj", "up_gate_proj"
# Settings that published configs may have, and the values that are supported.
SUPPORTED = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "logn_attention_scale": False,
    "logn_attention_clip1": False,
}
# Parts of names in transformers 5 -> in published checkpoints.
RENAMED = {
    r"^layers\.": "encoder.layer.",
    r"\.self_attn\.": ".attention.",
    r"\.post_attention_layernorm\.": ".attn_ln.",
    r"\.post_mlp_layernorm\.": ".mlp_ln.",
}


def for_transformers(config: dict) -> dict:
    """Return the config by which transformers' own class, Gte, computes the same. It looks for no code.

    It knows no `ntk`, which is a linear scaling of positions with another base.
    """
    rope = rope_of(Path(), config, _head_width(config), BASES[config["model_type"]])
    settings = {"rope_type": "default", "rope_theta": rope.base}
    if rope.scale != 1:
        settings |= {"rope_type": "linear", "factor": 1 / rope.scale}
    old = ("auto_map", "rope_theta", "rope_scaling")
    classes = [re.sub("^New", "Gte", name) for name in config.get("architectures") or ["GteModel"]]
    names = {"model_type": "gte", "architectures": classes, "rope_parameters": settings}
    return {key: value for key, value in config.items() if key not in old} | names


def _head_width(config: dict) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


class Layer(nn.Module):
    def __init__(self, config: dict, rope: Rope, packed: str, packed_mlp: str):
        super().__init__()
        size, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-12)
        self.attention = RotaryAttention(size, config["num_attention_heads"], rope, packed=packed, bias=True)
        self.attn_ln = nn.LayerNorm(size, eps=eps)
        names = (packed_mlp or "gate_proj", packed_mlp or "up_proj", "down_proj")
        inner, activation = config["intermediate_size"], config.get("hidden_act", "gelu")
        self.mlp = GatedMLP(size, inner, activation, names, down_bias=True)
        self.mlp_ln = nn.LayerNorm(size, eps=eps)

    def __call__(self, x: mx.array, real: mx.array) -> mx.array:
        x = self.attn_ln(self.attention(x, real) + x)
        return self.mlp_ln(self.mlp(x) + x)


class Encoder(nn.Module):
    def __init__(self, config: dict, *arguments):
        super().__init__()
        self.layer = [Layer(config, *arguments) for _ in range(config["num_hidden_layers"])]


class Gte(Backbone):
    """GTE's encoder; always bidirectional.

    Args:
        packed: name of the one matrix for queries, keys and values, "" = they have three.
        packed_mlp: name of the one matrix for both halves of the feed-forward part, "" = they have two.
    """

    def __init__(self, config: dict, rope: Rope, packed: str = PACKED, packed_mlp: str = PACKED_MLP):
        super().__init__()
        self.config = config
        self.bidirectional = True
        types = config.get("type_vocab_size", 1)
        self.embeddings = Embeddings(config, config.get("layer_norm_eps", 1e-12), types=types)
        self.encoder = Encoder(config, rope, packed, packed_mlp)

    @property
    def layers(self) -> list[nn.Module]:
        return self.encoder.layer

    @property
    def max_positions(self) -> int:
        return self.config.get("max_position_embeddings", 8192)

    def hidden_states(self, ids: mx.array, lengths: mx.array, second: mx.array | None = None) -> mx.array:
        real = real_tokens(ids, lengths)
        x = self.embeddings(ids, second)
        for layer in self.layers:
            x = layer(x, real)
        return x


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Remove heads and buffers, and rename tensors of transformers 5 and of checkpoints that were saved with a head."""
    return encoder_tensors(
        weights, "new|gte|model", r"(pooler|lm_head|classifier|qa_outputs)\.|.*(position_ids|inv_freq)$", RENAMED
    )


def load(folder: Path, config: dict, weights: dict[str, mx.array]) -> Gte:
    """Build the encoder and load `weights` into it.

    Raises UserError if the config is not supported, or with every missing, unknown and misshapen tensor.
    """
    check_sizes(folder, config, SIZES)
    check_activation(folder, config.get("hidden_act", "gelu"))
    if other := [f"{k} {config[k]!r}" for k, v in SUPPORTED.items() if (config.get(k) or v) != v]:
        raise UserError(f"{folder / 'config.json'}: {', '.join(other)}: not supported in a model of GTE's")
    weights = sanitize(weights)
    packed, packed_mlp = (name * any(name in tensor for tensor in weights) for name in (PACKED, PACKED_MLP))
    rope = rope_of(folder, config, _head_width(config), BASES[config["model_type"]])
    model = Gte(config, rope, packed, packed_mlp)
    load_strictly(model, weights, folder, config.get("quantization"))
    return model
