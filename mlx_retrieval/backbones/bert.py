"""BERT, RoBERTa and XLM-RoBERTa encoders, with the parameter names of their Hugging Face checkpoints.

Devlin et al. 2019 (arXiv 1810.04805), Liu et al. 2019 (arXiv 1907.11692), Conneau et al. 2020 (arXiv 1911.02116).
"""

from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.base import Backbone, check_activation, check_sizes, real_tokens
from mlx_retrieval.backbones.hub import encoder_tensors, load_strictly
from mlx_retrieval.backbones.ops import Linear, attention
from mlx_retrieval.backbones.parts import Embeddings, Layer, Output, join_heads, split_heads
from mlx_retrieval.utils.errors import UserError

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert")
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)


class SelfAttention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        size = config["hidden_size"]
        self.query = Linear(size, size)
        self.key = Linear(size, size)
        self.value = Linear(size, size)
        self._heads = config["num_attention_heads"]

    def __call__(self, x: mx.array, real: mx.array) -> mx.array:
        q, k, v = (split_heads(y, self._heads) for y in (self.query(x), self.key(x), self.value(x)))
        return join_heads(attention(q, k, v, scale=q.shape[-1] ** -0.5, real=real))


class Attention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config["hidden_size"], config)

    def __call__(self, x: mx.array, real: mx.array) -> mx.array:
        return self.output(self.self(x, real), x)


class Encoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.layer = [Layer(config, Attention(config)) for _ in range(config["num_hidden_layers"])]


class Bert(Backbone):
    """BERT or RoBERTa; always bidirectional."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.bidirectional = True
        self.embeddings = Embeddings(
            config,
            config.get("layer_norm_eps", 1e-12),
            config["max_position_embeddings"],
            first_position(config),
            config.get("type_vocab_size", 2),
        )
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


RENAMED = {r"LayerNorm\.gamma": "LayerNorm.weight", r"LayerNorm\.beta": "LayerNorm.bias"}  # of the first checkpoints


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Remove heads and buffers, and the name prefix of checkpoints that were saved with a head."""
    return encoder_tensors(weights, "bert|roberta|model", r"(pooler|cls|lm_head|classifier)\.|.*position_ids$", RENAMED)


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
