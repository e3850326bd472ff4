"""ModernBERT encoders, with the parameter names of their Hugging Face checkpoints.

Warner et al. 2024 (arXiv 2412.13663). Every n-th layer attends to the whole text, the others to a window. Positions are
rotary, with one base for each of these two kinds. The feed-forward part is gated (GeGLU; Shazeer 2020, arXiv
2002.05202).
"""

from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.base import Backbone, check_activation, check_sizes, real_tokens
from mlx_retrieval.backbones.hub import encoder_tensors, load_strictly
from mlx_retrieval.backbones.ops import ACTIVATIONS, Linear
from mlx_retrieval.utils.errors import UserError

MODEL_TYPES = ("modernbert",)
FULL, LOCAL = "full_attention", "sliding_attention"  # as transformers 5 names the kinds of layers
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def layer_types(config: dict) -> list[str]:
    """Return the kind of every layer. Configs of transformers 5 list them; older ones give a period."""
    if config.get("layer_types"):
        return config["layer_types"]
    period = config.get("global_attn_every_n_layers", 3)
    return [LOCAL if i % period else FULL for i in range(config["num_hidden_layers"])]


def rope_bases(config: dict) -> dict[str, float]:
    """Return the base of the rotary positions of each kind of layer, from new and old configs."""
    whole, local = config.get("global_rope_theta", 160_000.0), config.get("local_rope_theta", 10_000.0)
    bases = {FULL: whole, LOCAL: whole if local is None else local}
    for kind, settings in (config.get("rope_parameters") or {}).items():
        if kind in bases and settings:
            bases[kind] = settings.get("rope_theta", bases[kind])
    return bases


def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """Return attention (R, heads, L, d) of q, k, v (R, heads, L, d). mask: bool (R, 1, 1 or L, L), True = seen."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)


def _norm(config: dict) -> nn.LayerNorm:
    return nn.LayerNorm(config["hidden_size"], eps=config.get("norm_eps", 1e-5), bias=config.get("norm_bias", False))


class Embeddings(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.norm = _norm(config)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.norm(self.tok_embeddings(ids))


class Attention(nn.Module):
    def __init__(self, config: dict, rope_base: float):
        super().__init__()
        size, bias = config["hidden_size"], config.get("attention_bias", False)
        self.Wqkv = Linear(size, 3 * size, bias=bias)
        self.Wo = Linear(size, size, bias=bias)
        self._heads, self._rope_base = config["num_attention_heads"], rope_base

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        rows, length, size = x.shape
        qkv = self.Wqkv(x).reshape(rows, length, 3, self._heads, -1).transpose(2, 0, 3, 1, 4)
        q, k = (
            mx.fast.rope(y, y.shape[-1], traditional=False, base=self._rope_base, scale=1.0, offset=0) for y in qkv[:2]
        )
        out = attend(q, k, qkv[2], mask)
        return self.Wo(out.transpose(0, 2, 1, 3).reshape(rows, length, size))


class MLP(nn.Module):
    """Gated feed-forward part; one matrix, Wi, computes the activated half and the gate."""

    def __init__(self, config: dict):
        super().__init__()
        size, inner, bias = config["hidden_size"], config["intermediate_size"], config.get("mlp_bias", False)
        self.Wi = Linear(size, 2 * inner, bias=bias)
        self.Wo = Linear(inner, size, bias=bias)
        self._activation = ACTIVATIONS[config.get("hidden_activation", "gelu")]

    def __call__(self, x: mx.array) -> mx.array:
        activated, gate = mx.split(self.Wi(x), 2, axis=-1)
        return self.Wo(self._activation(activated) * gate)


class Layer(nn.Module):
    def __init__(self, config: dict, rope_base: float, first: bool):
        super().__init__()
        self.attn_norm = nn.Identity() if first else _norm(config)  # the embeddings are normalised
        self.attn = Attention(config, rope_base)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        x = x + self.attn(self.attn_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class ModernBert(Backbone):
    """Bidirectional by nature; `bidirectional=False` is refused when it is loaded."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.bidirectional = True
        self.embeddings = Embeddings(config)
        self._kinds, bases = tuple(layer_types(config)), rope_bases(config)
        self["layers"] = [Layer(config, bases[kind], first=i == 0) for i, kind in enumerate(self._kinds)]
        self.final_norm = _norm(config)

    @property
    def layers(self) -> list[nn.Module]:
        return self["layers"]

    @property
    def max_positions(self) -> int:
        return self.config.get("max_position_embeddings", 8192)

    def hidden_states(self, ids: mx.array, lengths: mx.array) -> mx.array:
        masks = self._masks(real_tokens(ids, lengths))
        x = self.embeddings(ids)
        for layer, kind in zip(self.layers, self._kinds, strict=True):
            x = layer(x, masks[kind])
        return self.final_norm(x)

    def _masks(self, real: mx.array) -> dict[str, mx.array]:
        """Return the attention mask of each kind of layer, bool (R, 1, 1 or L, L), True = seen; from real (R, L)."""
        whole = real[:, None, None, :]  # no row is empty
        positions = mx.arange(real.shape[1])
        distance = mx.abs(positions[:, None] - positions)
        reach = self.config.get("local_attention", 128) // 2
        if real.shape[1] <= reach + 1:
            return {FULL: whole, LOCAL: whole}
        # Padding far behind a text sees itself: attention to nothing would be NaN.
        return {FULL: whole, LOCAL: ((distance <= reach) & whole) | (distance == 0)}


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Remove heads, and the name prefix of checkpoints that were saved with one."""
    return encoder_tensors(weights, "model", r"(head|decoder|classifier)\.")


def _check(folder: Path, config: dict) -> None:
    """Raise UserError for settings that are missing, contradict each other or are not supported."""
    check_sizes(folder, config, SIZES)
    where = folder / "config.json"
    size, heads = config["hidden_size"], config["num_attention_heads"]
    if size % heads:
        raise UserError(f"{where}: hidden_size {size} is not a multiple of num_attention_heads {heads}")
    check_activation(folder, config.get("hidden_activation", "gelu"))
    types = layer_types(config)
    if len(types) != config["num_hidden_layers"] or set(types) - {FULL, LOCAL}:
        raise UserError(
            f"{where}: layer_types must name {FULL} or {LOCAL} for each of {config['num_hidden_layers']} layers, "
            f"not {', '.join(map(str, types))}"
        )
    scalings = [config.get("rope_scaling"), *(config.get("rope_parameters") or {}).values()]
    for settings in scalings:
        kind = settings.get("rope_type", settings.get("type", "default")) if isinstance(settings, dict) else "default"
        if kind != "default":
            raise UserError(f"{where}: rotary positions of type {kind!r} are not supported, only unscaled ones")


def load(folder: Path, config: dict, weights: dict[str, mx.array]) -> ModernBert:
    """Build the encoder and load `weights` into it.

    Raises UserError if the config is not supported, or with every missing, unknown and misshapen tensor.
    """
    _check(folder, config)
    model = ModernBert(config)
    load_strictly(model, sanitize(weights), folder, config.get("quantization"))
    return model
