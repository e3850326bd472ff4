"""BERT, RoBERTa and XLM-RoBERTa encoders, with the parameter names of their Hugging Face checkpoints.

Devlin et al. 2019 (arXiv 1810.04805), Liu et al. 2019 (arXiv 1907.11692), Conneau et al. 2020 (arXiv 1911.02116).
"""

import re
from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.base import Backbone, check_activation, check_sizes, real_tokens
from mlx_retrieval.backbones.hub import load_strictly
from mlx_retrieval.backbones.ops import ACTIVATIONS, attention
from mlx_retrieval.utils.errors import UserError

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert")
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)


class Embeddings(nn.Module):
    """Word, position and token-type embeddings, summed and normalised."""

    def __init__(self, config: dict):
        super().__init__()
        size = config["hidden_size"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], size)
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], size)
        self.token_type_embeddings = nn.Embedding(config.get("type_vocab_size", 2), size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.get("layer_norm_eps", 1e-12))
        self._first_position = first_position(config)
        self._last_position = config["max_position_embeddings"] - 1

    def __call__(self, ids: mx.array, second: mx.array | None = None) -> mx.array:
        positions = mx.arange(self._first_position, self._first_position + ids.shape[1])
        positions = mx.minimum(positions, self._last_position)  # padding may lie beyond the table
        states = self.word_embeddings(ids) + self.position_embeddings(positions)
        types = mx.array([0]) if second is None else mx.arange(ids.shape[1])[None, :] >= second[:, None]
        return self.LayerNorm(states + self.token_type_embeddings(types.astype(mx.int32)))


class SelfAttention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        size = config["hidden_size"]
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self._heads = config["num_attention_heads"]

    def __call__(self, x: mx.array, real: mx.array) -> mx.array:
        rows, length, size = x.shape

        def split(y: mx.array) -> mx.array:  # (R, L, D) -> (R, heads, L, D / heads)
            return y.reshape(rows, length, self._heads, -1).transpose(0, 2, 1, 3)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        out = attention(q, k, v, scale=q.shape[-1] ** -0.5, real=real)
        return out.transpose(0, 2, 1, 3).reshape(rows, length, size)


class Output(nn.Module):
    """Project, add the residual and normalise: the second half of both sublayers."""

    def __init__(self, width: int, config: dict):
        super().__init__()
        self.dense = nn.Linear(width, config["hidden_size"])
        self.LayerNorm = nn.LayerNorm(config["hidden_size"], eps=config.get("layer_norm_eps", 1e-12))

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config["hidden_size"], config)


class Intermediate(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.dense = nn.Linear(config["hidden_size"], config["intermediate_size"])


class Layer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config["intermediate_size"], config)
        self._activation = ACTIVATIONS[config.get("hidden_act", "gelu")]

    def __call__(self, x: mx.array, real: mx.array) -> mx.array:
        x = self.attention.output(self.attention.self(x, real), x)
        return self.output(self._activation(self.intermediate.dense(x)), x)


class Encoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.layer = [Layer(config) for _ in range(config["num_hidden_layers"])]


class Bert(Backbone):
    """BERT or RoBERTa; always bidirectional."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.bidirectional = True
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    @property
    def layers(self) -> list[nn.Module]:
        return self.encoder.layer

    @property
    def max_positions(self) -> int:
        return self.config["max_position_embeddings"] - first_position(self.config)

    def hidden_states(self, ids: mx.array, lengths: mx.array, second: mx.array | None = None) -> mx.array:
        real = real_tokens(ids, lengths)
        x = self.embeddings(ids, second)
        for layer in self.layers:
            x = layer(x, real)
        return x


def first_position(config: dict) -> int:
    """Return the position of the first token: 0 in BERT, one after the padding id in RoBERTa."""
    return 0 if config["model_type"] == "bert" else config.get("pad_token_id", 1) + 1


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Remove heads and buffers, and the name prefix of checkpoints that were saved with a head."""
    clean = {}
    for name, value in weights.items():
        name = re.sub(r"^(bert|roberta|model)\.", "", name)
        if re.match(r"(pooler|cls|lm_head|classifier)\.", name) or name.endswith("position_ids"):
            continue
        clean[name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")] = value
    return clean


def load(folder: Path, config: dict, weights: dict[str, mx.array]) -> Bert:
    """Build the encoder and load `weights` into it.

    Raises UserError if the config is not supported, or with every missing, unknown and misshapen tensor.
    """
    check_sizes(folder, config, SIZES)
    if (kind := config.get("position_embedding_type", "absolute")) != "absolute":
        raise UserError(f"{folder}: {kind!r} position embeddings are not supported, only absolute ones")
    check_activation(folder, config.get("hidden_act", "gelu"))
    model = Bert(config)
    load_strictly(model, sanitize(weights), folder, config.get("quantization"))
    return model
