"""Parts that several encoders share: embeddings, heads of attention, and the sublayers of BERT and of Llama.

Parameters get the names that the checkpoints give them; where these differ between families, they are arguments.
"""

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.ops import ACTIVATIONS, Linear, attention
from mlx_retrieval.backbones.positions import Rope


def split_heads(x: mx.array, heads: int) -> mx.array:
    """Return (R, heads, L, d) of x (R, L, heads * d)."""
    rows, length, _ = x.shape
    return x.reshape(rows, length, heads, -1).transpose(0, 2, 1, 3)


def join_heads(x: mx.array) -> mx.array:
    """Return (R, L, heads * d) of x (R, heads, L, d)."""
    rows, _, length, _ = x.shape
    return x.transpose(0, 2, 1, 3).reshape(rows, length, -1)


class Embeddings(nn.Module):
    """Word embeddings, and those of positions and token types where a model has them, summed and normalised.

    Args:
        config: with `vocab_size` and `hidden_size`.
        eps: of the norm.
        positions: rows of the table of positions; 0 = none.
        first_position: row of the first token.
        types: rows of the table of token types; 0 = none.
        width: of the tables, if a matrix brings their sum to the hidden size (DeBERTa); 0 = the hidden size.
    """

    def __init__(
        self, config: dict, eps: float, positions: int = 0, first_position: int = 0, types: int = 0, width: int = 0
    ):
        super().__init__()
        size = config["hidden_size"]
        width = width or size
        self.word_embeddings = nn.Embedding(config["vocab_size"], width)
        if positions:
            self.position_embeddings = nn.Embedding(positions, width)
        if types:
            self.token_type_embeddings = nn.Embedding(types, width)
        if width != size:
            self.embed_proj = Linear(width, size, bias=False)
        self.LayerNorm = nn.LayerNorm(size, eps=eps)
        self._first_position, self._last_position = first_position, positions - 1

    def __call__(self, ids: mx.array, second: mx.array | None = None) -> mx.array:
        """Return (R, L, D) for ids (R, L). `second`: see `Backbone`; models without types ignore it."""
        states = self.word_embeddings(ids)
        if "position_embeddings" in self:
            positions = mx.arange(self._first_position, self._first_position + ids.shape[1])
            positions = mx.minimum(positions, self._last_position)  # padding may lie beyond the table
            states = states + self.position_embeddings(positions)
        if "token_type_embeddings" in self:
            types = mx.array([0]) if second is None else mx.arange(ids.shape[1])[None, :] >= second[:, None]
            states = states + self.token_type_embeddings(types.astype(mx.int32))
        if "embed_proj" in self:
            states = self.embed_proj(states)
        return self.LayerNorm(states)


# --- BERT's blocks: each sublayer adds its input and is then normalised -----------------------------------------------


class Output(nn.Module):
    """Project, add the residual and normalise: the second half of both sublayers."""

    def __init__(self, width: int, config: dict):
        super().__init__()
        self.dense = Linear(width, config["hidden_size"])
        self.LayerNorm = nn.LayerNorm(config["hidden_size"], eps=config.get("layer_norm_eps", 1e-12))

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        return self.LayerNorm(self.dense(x) + residual)


class Intermediate(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.dense = Linear(config["hidden_size"], config["intermediate_size"])


class Layer(nn.Module):
    """A block: attention, then the feed-forward part.

    Args:
        attention: a module that maps states and further arrays to states, with residual and norm.
    """

    def __init__(self, config: dict, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self.intermediate = Intermediate(config)
        self.output = Output(config["intermediate_size"], config)
        self._activation = ACTIVATIONS[config.get("hidden_act", "gelu")]

    def __call__(self, x: mx.array, *context: mx.array) -> mx.array:
        x = self.attention(x, *context)
        return self.output(self._activation(self.intermediate.dense(x)), x)


# --- attention with rotary positions, and gated feed-forward parts ----------------------------------------------------


class RotaryAttention(nn.Module):
    """Bidirectional attention of `heads` heads with rotary positions.

    Args:
        size: D, of the states.
        keys: heads of keys and values, each shared by heads / keys heads of queries; 0 = `heads`.
        width: d, of a head; 0 = size / heads.
        packed: name of the one matrix for queries, keys and values; "" = the three q_proj, k_proj and v_proj.
        out: name of the matrix after attention.
        bias: whether the matrices have biases.
    """

    def __init__(
        self,
        size: int,
        heads: int,
        rope: Rope,
        keys: int = 0,
        width: int = 0,
        packed: str = "",
        out: str = "o_proj",
        bias: bool = False,
    ):
        super().__init__()
        width, keys = width or size // heads, keys or heads
        widths = {"q_proj": heads * width, "k_proj": keys * width, "v_proj": keys * width}
        for name, outputs in ({packed: sum(widths.values())} if packed else widths).items():
            self[name] = Linear(size, outputs, bias=bias)
        self[out] = Linear(heads * width, size, bias=bias)
        self._heads, self._keys, self._rope, self._packed, self._out = heads, keys, rope, packed, out

    def __call__(self, x: mx.array, real: mx.array) -> mx.array:
        """Return (R, L, D) of x (R, L, D); `real`: (R, L) bool, True for tokens that are not padding."""
        if self._packed:
            q, k, v = mx.split(self[self._packed](x), 3, axis=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = split_heads(q, self._heads), split_heads(k, self._keys), split_heads(v, self._keys)
        states = attention(self._rope(q), self._rope(k), v, scale=q.shape[-1] ** -0.5, real=real)
        return self[self._out](join_heads(states))


class GatedMLP(nn.Module):
    """A gated feed-forward part: down(activation(gate(x)) * up(x)); Shazeer 2020, arXiv 2002.05202.

    Args:
        size, inner: widths of the states and within.
        activation: a name in ACTIVATIONS.
        names: of the matrices gate, up and down. If the first two are equal, they are one, whose upper half is `up`.
        bias, down_bias: whether gate and up have biases, and down.
    """

    def __init__(
        self,
        size: int,
        inner: int,
        activation: str,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        bias: bool = False,
        down_bias: bool = False,
    ):
        super().__init__()
        gate, up, down = names
        for name in {gate: None, up: None}:
            self[name] = Linear(size, 2 * inner if gate == up else inner, bias=bias)
        self[down] = Linear(inner, size, bias=down_bias)
        self._activation, self._names = ACTIVATIONS[activation], names

    def __call__(self, x: mx.array) -> mx.array:
        gate, up, down = self._names
        if gate == up:
            upper, gated = mx.split(self[up](x), 2, axis=-1)
        else:
            upper, gated = self[up](x), self[gate](x)
        return self[down](self._activation(gated) * upper)
