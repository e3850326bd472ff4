"""nomic-bert encoders, with the parameter names of their published checkpoints.

Nussbaum et al. 2024 (arXiv 2402.01613): BERT's order of sublayers and norms, with rotary positions, a gated
feed-forward part (SwiGLU) and hardly any bias. Published configs name their settings as GPT-2's do, those of
transformers 5 as BERT's.
"""

from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.base import Backbone, check_activation, check_sizes, real_tokens, with_usual_names
from mlx_retrieval.backbones.hub import encoder_tensors, load_strictly
from mlx_retrieval.backbones.parts import Embeddings, GatedMLP, RotaryAttention
from mlx_retrieval.backbones.positions import Rope, rope_of
from mlx_retrieval.utils.errors import UserError

MODEL_TYPES = ("nomic_bert",)
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
BASE = 1000.0  # of rotary positions
PACKED = "Wqkv"
# Settings that published configs may have, and the values that are supported.
SUPPORTED = {
    "prenorm": False,
    "parallel_block": False,
    "use_rms_norm": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "activation_function": "swiglu",
    "num_experts": 0,
}
# Parts of names in checkpoints, most of them of transformers 5 -> here, which are the published ones but for the first.
RENAMED = {
    r"^emb_ln\.": "embeddings.LayerNorm.",
    r"^layers\.": "encoder.layers.",
    r"\.self_attn\.o_proj\.": ".attn.out_proj.",
    r"\.self_attn\.": ".attn.",
    r"\.up_proj\.": ".fc11.",
    r"\.gate_proj\.": ".fc12.",
    r"\.down_proj\.": ".fc2.",
    r"\.post_attention_layernorm\.": ".norm1.",
    r"\.post_mlp_layernorm\.": ".norm2.",
}


def usual(config: dict) -> dict:
    """Return a config that has its settings under the names that transformers 5 reads, too."""
    defaults = {"hidden_act": "silu", "layer_norm_eps": 1e-12, "type_vocab_size": 2}
    theta = {"rope_theta": config["rotary_emb_base"]} if config.get("rotary_emb_base") else {}
    return defaults | theta | with_usual_names(config)


def for_transformers(config: dict) -> dict:
    """Return a config that transformers' own class reads: it looks for no code."""
    return {key: value for key, value in usual(config).items() if key != "auto_map"}


class Layer(nn.Module):
    def __init__(self, config: dict, rope: Rope, packed: str):
        super().__init__()
        size, eps = config["hidden_size"], config["layer_norm_eps"]
        self.attn = RotaryAttention(size, config["num_attention_heads"], rope, packed=packed, out="out_proj")
        self.norm1 = nn.LayerNorm(size, eps=eps)
        self.mlp = GatedMLP(size, config["intermediate_size"], config["hidden_act"], ("fc12", "fc11", "fc2"))
        self.norm2 = nn.LayerNorm(size, eps=eps)

    def __call__(self, x: mx.array, real: mx.array) -> mx.array:
        x = self.norm1(self.attn(x, real) + x)
        return self.norm2(self.mlp(x) + x)


class Encoder(nn.Module):
    def __init__(self, config: dict, rope: Rope, packed: str):
        super().__init__()
        self["layers"] = [Layer(config, rope, packed) for _ in range(config["num_hidden_layers"])]


class NomicBert(Backbone):
    """nomic-bert; always bidirectional.

    Args:
        packed: whether queries, keys and values have one matrix.
    """

    def __init__(self, config: dict, rope: Rope, packed: bool = True):
        super().__init__()
        self.config = config = usual(config)
        self.bidirectional = True
        self.embeddings = Embeddings(config, config["layer_norm_eps"], types=config["type_vocab_size"])
        self.encoder = Encoder(config, rope, PACKED if packed else "")

    @property
    def layers(self) -> list[nn.Module]:
        return self.encoder["layers"]

    @property
    def max_positions(self) -> int:
        """The number of positions; of those that are scaled for longer texts, only the number without scaling."""
        scaled = self.config.get("max_trained_positions", 2048) if self.config.get("rotary_scaling_factor") else None
        return scaled or self.config.get("max_position_embeddings", 2048)

    def hidden_states(self, ids: mx.array, lengths: mx.array, second: mx.array | None = None) -> mx.array:
        real = real_tokens(ids, lengths)
        x = self.embeddings(ids, second)
        for layer in self.layers:
            x = layer(x, real)
        return x


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Remove heads and buffers, and rename tensors of transformers 5 and of checkpoints that were saved with a head."""
    return encoder_tensors(
        weights,
        "bert|nomic_bert|model",
        r"(pooler|cls|lm_head|classifier|qa_outputs)\.|.*(position_ids|inv_freq)$",
        RENAMED,
    )


def load(folder: Path, config: dict, weights: dict[str, mx.array]) -> NomicBert:
    """Build the encoder and load `weights` into it.

    Raises UserError if the config is not supported, or with every missing, unknown and misshapen tensor.
    """
    config = usual(config)
    check_sizes(folder, config, SIZES)
    check_activation(folder, config["hidden_act"])
    if other := [f"{k} {config[k]!r}" for k, v in SUPPORTED.items() if (config.get(k) or v) != v]:
        raise UserError(f"{folder / 'config.json'}: {', '.join(other)}: not supported in a nomic-bert")
    width = config["hidden_size"] // config["num_attention_heads"]
    weights = sanitize(weights)
    model = NomicBert(config, rope_of(folder, config, width, BASE), any(PACKED in name for name in weights))
    load_strictly(model, weights, folder, config.get("quantization"))
    return model
