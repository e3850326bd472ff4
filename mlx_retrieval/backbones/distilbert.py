"""DistilBERT encoders, with the parameter names of their Hugging Face checkpoints.

Sanh et al. 2019 (arXiv 1910.01108): half of BERT's blocks, no token types, and other names for everything.
"""

from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.base import Backbone, check_activation, check_sizes, real_tokens, with_usual_names
from mlx_retrieval.backbones.hub import encoder_tensors, load_strictly
from mlx_retrieval.backbones.ops import ACTIVATIONS, Linear, attention
from mlx_retrieval.backbones.parts import Embeddings, join_heads, split_heads

MODEL_TYPES = ("distilbert",)
SIZES = ("vocab_size", "dim", "hidden_dim", "n_layers", "n_heads", "max_position_embeddings")
EPS = 1e-12  # of every norm; the config does not say


class SelfAttention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            self[name] = Linear(config["dim"], config["dim"])
        self._heads = config["n_heads"]

    def __call__(self, x: mx.array, real: mx.array) -> mx.array:
        q, k, v = (split_heads(y, self._heads) for y in (self.q_lin(x), self.k_lin(x), self.v_lin(x)))
        return self.out_lin(join_heads(attention(q, k, v, scale=q.shape[-1] ** -0.5, real=real)))


class FeedForward(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.lin1 = Linear(config["dim"], config["hidden_dim"])
        self.lin2 = Linear(config["hidden_dim"], config["dim"])
        self._activation = ACTIVATIONS[config.get("activation", "gelu")]

    def __call__(self, x: mx.array) -> mx.array:
        return self.lin2(self._activation(self.lin1(x)))


class Layer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.attention = SelfAttention(config)
        self.sa_layer_norm = nn.LayerNorm(config["dim"], eps=EPS)
        self.ffn = FeedForward(config)
        self.output_layer_norm = nn.LayerNorm(config["dim"], eps=EPS)

    def __call__(self, x: mx.array, real: mx.array) -> mx.array:
        x = self.sa_layer_norm(self.attention(x, real) + x)
        return self.output_layer_norm(self.ffn(x) + x)


class Transformer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.layer = [Layer(config) for _ in range(config["n_layers"])]


class DistilBert(Backbone):
    """DistilBERT; always bidirectional."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config = with_usual_names(config)
        self.bidirectional = True
        self.embeddings = Embeddings(config, EPS, config["max_position_embeddings"])
        self.transformer = Transformer(config)

    @property
    def layers(self) -> list[nn.Module]:
        return self.transformer.layer

    def hidden_states(self, ids: mx.array, lengths: mx.array) -> mx.array:
        real = real_tokens(ids, lengths)
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x, real)
        return x


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Remove heads and buffers, and the name prefix of checkpoints that were saved with a head."""
    return encoder_tensors(weights, "distilbert", r"(vocab_\w+|pre_classifier|classifier|qa_outputs)\.|.*position_ids$")


def load(folder: Path, config: dict, weights: dict[str, mx.array]) -> DistilBert:
    """Build the encoder and load `weights` into it.

    Raises UserError if the config is not supported, or with every missing, unknown and misshapen tensor.
    """
    check_sizes(folder, config, SIZES)
    check_activation(folder, config.get("activation", "gelu"))
    model = DistilBert(config)
    load_strictly(model, sanitize(weights), folder, config.get("quantization"))
    return model
