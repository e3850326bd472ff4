"""How much memory the passes of a backbone take for a gradient: numbers for each token, from its sizes alone.

    activations(sizes_of(config), Passes("plain"), rows=16, width=128)          numbers of the computed dtype

For the gradient, a block keeps arrays as wide as its states, heads, keys, feed-forward part and scores. How many of
each was fitted to the peaks of small random backbones (benchmarks/activations.py): within 6 % there, with
checkpointing 13 %.
"""

from dataclasses import dataclass
from typing import Literal

from mlx_retrieval.backbones import t5
from mlx_retrieval.backbones.base import with_usual_names

How = Literal["compiled", "plain", "checkpointed", "plain checkpointed"]
Sizes5 = tuple[float, float, float, float, float]  # numbers of: states, heads, keys, feed-forward part, scores


@dataclass(frozen=True)
class Sizes:
    """The sizes of a backbone that decide what its passes take, in numbers."""

    family: str
    layers: int
    hidden: int
    heads: int
    attention: int  # the width of all heads together
    keys: int  # the width of the keys' heads together
    inner: int  # the feed-forward part's width; of a mixture of experts, that of the experts a token goes through
    vocabulary: int


@dataclass(frozen=True)
class Passes:
    """How passes are computed.

    Attributes:
        how: "compiled" on CPUs, "plain" on GPUs; with gradient checkpointing "checkpointed" and "plain checkpointed".
        train_type: "lora", "dora" or "full".
        half: whether in 16 bits.
        float16: whether these are float16's.
        trained_layers: the last N blocks, which alone keep something; -1 = all.
    """

    how: How
    train_type: str = "lora"
    half: bool = False
    trained_layers: int = -1
    float16: bool = False


def sizes_of(config: dict) -> Sizes:
    """Return the sizes in a config.json. A size that is missing has the value most models have."""
    config = with_usual_names(config.get("text_config") or config)
    kind = config["model_type"]
    if kind in t5.MODEL_TYPES:
        gated, _ = t5.feed_forward(config)
        attention = config["num_heads"] * config["d_kv"]
        family = "gated t5" if gated else "t5"
        layers, hidden, heads = config["num_layers"], config["d_model"], config["num_heads"]
        return Sizes(family, layers, hidden, heads, attention, attention, config["d_ff"], config["vocab_size"])
    hidden = config["hidden_size"]
    heads = config.get("num_attention_heads") or max(1, hidden // 64)
    size = config.get("head_dim") or hidden // heads
    inner = config.get("intermediate_size") or 4 * hidden
    experts = config.get("num_experts_per_tok") or 0
    if experts and config.get("moe_intermediate_size"):
        inner = experts * config["moe_intermediate_size"]
    return Sizes(
        family=_family(kind),
        layers=config.get("num_hidden_layers") or 1,
        hidden=hidden,
        heads=heads,
        attention=heads * size,
        keys=(config.get("num_key_value_heads") or heads) * size,
        inner=inner if isinstance(inner, int) else max(inner),
        vocabulary=config["vocab_size"],
    )


def _family(kind: str) -> str:
    """Return the row of NUMBERS for a model_type. Most decoders are built as Llama is."""
    if kind in ALIKE:
        return ALIKE[kind]
    for name in ("gemma", "qwen3"):
        if kind.startswith(name):
            return name
    return "llama"


# The row of NUMBERS of encoders: their own, or that of one that is built alike.
ALIKE = dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert"), "bert")
ALIKE |= dict.fromkeys(("modernbert", "nomic_bert", "new", "gte"), "modernbert") | {"deberta-v2": "deberta"}
# Printed by benchmarks/activations.py; DeBERTa's in 16 bits are BERT's and what it takes more than BERT in 32.
NUMBERS: dict[str, dict[str, tuple[Sizes5, Sizes5]]] = {
    "bert": {
        "compiled": ((10.2, 0.0, 0.0, 4.7, 1.0), (19.7, 0.0, 0.0, 0.0, 1.1)),
        "compiled full": ((12.3, 0.0, 0.0, 2.3, 1.0), (26.1, 0.0, 0.0, 3.6, 0.9)),
        "plain": ((9.5, 0.0, 0.0, 3.9, 1.0), (14.7, 0.0, 0.0, 0.9, 2.0)),
        "plain half": ((20.1, 0.0, 0.0, 4.6, 1.0), (18.1, 0.0, 0.0, 4.8, 1.9)),
        "plain full": ((8.1, 0.0, 0.0, 3.8, 1.0), (24.3, 0.0, 0.0, 0.0, 2.0)),
        "plain full half": ((13.1, 0.0, 0.0, 2.6, 1.0), (22.6, 0.0, 0.0, 3.9, 2.1)),
        "checkpointed": ((3.4, 0.0, 0.0, 0.0, 0.0), (24.8, 0.0, 0.0, 5.9, 3.0)),
        "plain checkpointed": ((3.5, 0.0, 0.0, 0.0, 0.0), (24.3, 0.0, 0.0, 5.7, 4.0)),
        "plain checkpointed half": ((8.0, 0.0, 0.0, 0.0, 0.0), (36.8, 0.0, 0.0, 12.2, 3.8)),
    },
    "deberta": {
        "compiled": ((10.0, 0.0, 0.0, 4.6, 0.9), (13.2, 0.0, 0.0, 0.0, 16.4)),
        "compiled full": ((20.1, 0.0, 0.0, 1.0, 4.0), (9.7, 0.0, 0.0, 5.2, 13.3)),
        "plain": ((9.7, 0.0, 0.0, 4.7, 0.8), (9.0, 0.0, 0.0, 0.0, 9.9)),
        "plain half": ((20.3, 0.0, 0.0, 5.4, 0.8), (12.4, 0.0, 0.0, 3.9, 9.8)),
        "plain full": ((13.8, 0.0, 0.0, 2.0, 3.6), (14.8, 0.0, 0.0, 2.4, 8.9)),
        "plain full half": ((18.8, 0.0, 0.0, 0.8, 3.6), (13.1, 0.0, 0.0, 6.3, 9.0)),
        "checkpointed": ((6.6, 0.0, 0.0, 0.0, 0.0), (16.5, 0.0, 0.0, 4.4, 15.4)),
        "plain checkpointed": ((6.8, 0.0, 0.0, 0.0, 0.0), (17.1, 0.0, 0.0, 4.0, 15.1)),
        "plain checkpointed half": ((11.3, 0.0, 0.0, 0.0, 0.0), (29.6, 0.0, 0.0, 10.5, 14.9)),
    },
    "modernbert": {
        "compiled": ((7.4, 0.0, 0.0, 5.1, 1.7), (35.4, 0.0, 0.0, 6.8, 0.4)),
        "compiled full": ((4.9, 0.0, 0.0, 7.1, 1.6), (48.6, 0.0, 0.0, 0.0, 1.1)),
        "plain": ((8.2, 0.0, 0.0, 6.1, 1.0), (11.1, 0.0, 0.0, 6.5, 2.2)),
        "plain half": ((13.8, 0.0, 0.0, 6.8, 1.0), (20.8, 0.0, 0.0, 10.9, 1.8)),
        "plain full": ((8.7, 0.0, 0.0, 6.0, 1.1), (17.3, 0.0, 0.0, 4.3, 2.3)),
        "plain full half": ((11.9, 0.0, 0.0, 5.5, 1.0), (22.8, 0.0, 0.0, 6.6, 2.4)),
        "checkpointed": ((4.7, 0.0, 0.0, 0.0, 0.0), (12.0, 0.0, 0.0, 24.1, 2.5)),
        "plain checkpointed": ((4.6, 0.0, 0.0, 0.0, 0.0), (9.3, 0.0, 0.0, 24.8, 2.5)),
        "plain checkpointed half": ((13.8, 0.0, 0.0, 0.0, 0.0), (0.5, 0.0, 0.0, 38.3, 1.8)),
    },
    "t5": {
        "compiled": ((5.7, 4.1, 0.0, 2.2, 0.8), (6.0, 14.2, 0.0, 1.1, 2.8)),
        "compiled full": ((3.4, 6.1, 0.0, 2.1, 0.5), (20.4, 9.2, 0.0, 0.7, 7.0)),
        "plain": ((4.7, 4.6, 0.0, 2.2, 0.9), (0.0, 11.3, 0.0, 4.1, 2.1)),
        "plain half": ((16.1, 3.8, 0.0, 3.3, 1.0), (3.3, 13.3, 0.0, 7.2, 1.2)),
        "plain full": ((5.0, 3.9, 0.0, 1.6, 1.0), (14.9, 12.5, 0.0, 2.6, 2.0)),
        "plain full half": ((7.2, 3.3, 0.0, 1.9, 1.0), (27.0, 11.8, 0.0, 1.9, 2.2)),
        "checkpointed": ((3.7, 0.0, 0.0, 0.0, 0.0), (1.0, 20.3, 0.0, 6.6, 4.1)),
        "plain checkpointed": ((3.8, 0.0, 0.0, 0.0, 0.0), (8.4, 16.3, 0.0, 5.1, 4.0)),
        "plain checkpointed half": ((7.9, 0.0, 0.0, 0.0, 0.0), (4.5, 25.8, 0.0, 15.8, 2.9)),
    },
    "gated t5": {
        "compiled": ((5.5, 5.3, 0.0, 4.9, 1.3), (1.8, 11.6, 0.0, 4.0, 1.4)),
        "compiled full": ((5.1, 3.1, 0.0, 5.8, 0.7), (16.3, 15.4, 0.0, 2.8, 4.4)),
        "plain": ((3.4, 6.5, 0.0, 6.8, 0.9), (9.3, 3.0, 0.0, 3.5, 1.3)),
        "plain half": ((15.2, 4.8, 0.0, 7.7, 0.9), (9.1, 18.2, 0.0, 7.1, 1.1)),
        "plain full": ((4.7, 4.6, 0.0, 7.2, 1.0), (10.0, 9.4, 0.0, 0.9, 2.0)),
        "plain full half": ((6.9, 4.0, 0.0, 7.2, 1.1), (23.0, 10.8, 0.0, 0.0, 1.5)),
        "checkpointed": ((3.1, 0.0, 0.0, 0.0, 0.0), (2.0, 22.0, 0.0, 18.2, 2.6)),
        "plain checkpointed": ((3.3, 0.0, 0.0, 0.0, 0.0), (4.0, 24.1, 0.0, 13.7, 3.3)),
        "plain checkpointed half": ((7.8, 0.0, 0.0, 0.0, 0.0), (4.9, 32.2, 0.0, 22.8, 2.3)),
    },
    "llama": {
        "compiled": ((6.5, 4.1, 0.6, 4.3, 0.9), (0.0, 8.0, 5.1, 3.8, 1.2)),
        "compiled full": ((3.0, 0.2, 2.3, 6.2, 1.2), (15.7, 19.5, 4.8, 0.0, 0.5)),
        "plain": ((5.1, 2.9, 1.9, 4.3, 1.0), (0.7, 3.7, 0.7, 8.8, 1.6)),
        "plain half": ((13.7, 5.6, 0.9, 5.8, 0.8), (22.6, 0.0, 1.1, 8.1, 1.9)),
        "plain full": ((8.3, 2.5, 0.6, 3.6, 1.0), (5.0, 6.4, 6.3, 4.9, 1.9)),
        "plain full half": ((9.1, 3.2, 0.7, 4.2, 0.9), (23.3, 4.9, 2.1, 2.8, 2.0)),
        "checkpointed": ((4.1, 0.0, 0.0, 0.0, 0.0), (0.0, 16.2, 0.0, 14.6, 2.5)),
        "plain checkpointed": ((3.2, 0.0, 0.0, 0.0, 0.0), (5.3, 14.0, 0.5, 14.4, 2.1)),
        "plain checkpointed half": ((5.7, 0.0, 0.0, 0.0, 0.0), (26.1, 19.9, 0.0, 19.0, 1.6)),
    },
    "qwen3": {
        "compiled": ((6.8, 4.5, 4.8, 4.2, 0.8), (2.3, 3.0, 0.0, 4.4, 1.3)),
        "compiled full": ((5.2, 6.1, 0.0, 5.0, 1.0), (14.4, 9.7, 19.9, 1.2, 1.1)),
        "plain": ((0.0, 4.8, 2.5, 6.0, 1.0), (28.2, 0.0, 0.0, 0.0, 0.9)),
        "plain half": ((11.9, 6.1, 1.3, 6.9, 0.9), (36.3, 0.0, 0.0, 4.5, 1.0)),
        "plain full": ((6.2, 4.3, 1.0, 4.9, 1.0), (13.1, 2.3, 21.2, 0.5, 2.0)),
        "plain full half": ((10.9, 2.9, 12.6, 3.3, 1.1), (21.3, 3.9, 0.0, 4.9, 1.7)),
        "checkpointed": ((4.2, 0.0, 0.0, 0.0, 0.0), (10.6, 2.6, 20.0, 13.4, 1.2)),
        "plain checkpointed": ((3.3, 0.0, 0.0, 0.0, 0.0), (0.0, 1.1, 0.0, 19.1, 2.5)),
        "plain checkpointed half": ((6.1, 0.0, 0.0, 0.0, 0.0), (19.7, 4.1, 22.6, 23.5, 1.8)),
    },
    "gemma": {
        "compiled": ((9.9, 4.7, 0.6, 6.5, 0.9), (0.0, 8.0, 17.5, 3.8, 1.2)),
        "compiled full": ((3.5, 1.7, 6.7, 9.6, 1.2), (24.0, 19.5, 4.8, 0.0, 0.8)),
        "plain": ((8.5, 3.5, 1.2, 6.5, 1.0), (0.0, 3.6, 13.1, 2.6, 1.5)),
        "plain half": ((18.1, 4.6, 4.0, 8.4, 0.9), (17.2, 6.5, 12.8, 2.8, 1.5)),
        "plain full": ((8.8, 4.0, 5.0, 7.0, 1.0), (13.3, 5.7, 0.0, 0.0, 2.2)),
        "plain full half": ((15.8, 4.6, 2.5, 6.9, 1.2), (8.7, 7.3, 27.2, 0.0, 1.3)),
        "checkpointed": ((4.1, 0.0, 0.0, 0.0, 0.0), (0.0, 16.2, 0.0, 14.6, 2.5)),
        "plain checkpointed": ((3.2, 0.0, 0.0, 0.0, 0.0), (5.3, 14.0, 0.5, 14.4, 2.1)),
        "plain checkpointed half": ((5.7, 0.0, 0.0, 0.0, 0.0), (30.5, 19.9, 3.1, 21.6, 1.7)),
    },
}


LORA_COPIES = 2  # of an adapter's inner numbers, its rank, for each of a block's about seven linear layers
LINEAR_LAYERS = 7
DORA_COPIES = 0.6  # of a linear layer's output; from BERT's peaks in benchmarks/memory.py, as most are freed at once
# Of states and of the feed-forward part: what a block keeps beside that in float16, as it computes partly in float32
# and clips what would exceed float16. A block that is computed again holds so many times that. Fitted to two shapes.
CLIPPED = {"gemma": (8.0, 0.0), "t5": (6.0, 4.0), "gated t5": (5.0, 12.0)}
CLIPPED_AGAIN = 1.4


def activations(sizes: Sizes, passes: Passes, rows: int, width: int, rank: int = 0) -> float:
    """Return the numbers that the passes of a micro-batch hold at their peak, weights and their gradients not counted.

    Args:
        rows, width: texts of the micro-batch, and tokens of each, padding included.
        rank: of LoRA or DoRA; 0 = none.
    """
    _, once = _numbers(sizes.family, passes)
    widths = _widths(sizes, width)
    rest = rows * width * sum(count * size for count, size in zip(once, widths, strict=True))
    if "checkpointed" in passes.how:
        rest += CLIPPED_AGAIN * rows * width * _clipped(sizes, passes)
    return kept_activations(sizes, passes, rows, width, rank) + rest


def kept_activations(sizes: Sizes, passes: Passes, rows: int, width: int, rank: int = 0) -> float:
    """Return those numbers of `activations` that the blocks keep between forward and backward pass."""
    layer, _ = _numbers(sizes.family, passes)
    block = sum(count * size for count, size in zip(layer, _widths(sizes, width), strict=True))
    if "checkpointed" not in passes.how:
        block += LORA_COPIES * LINEAR_LAYERS * rank + _clipped(sizes, passes)
        if passes.train_type == "dora":  # the outputs of the linear layers, before they are scaled
            block += DORA_COPIES * (2 * sizes.hidden + sizes.attention + 2 * sizes.keys + 2 * sizes.inner)
    layers = sizes.layers if passes.trained_layers == -1 else passes.trained_layers
    return rows * width * layers * block


def _clipped(sizes: Sizes, passes: Passes) -> float:
    """Return the numbers of a token that a block keeps in float16 beside those in bfloat16."""
    states, inner = CLIPPED.get(sizes.family, (0.0, 0.0)) if passes.float16 else (0.0, 0.0)
    return states * sizes.hidden + inner * sizes.inner


def _widths(sizes: Sizes, width: int) -> tuple[int, int, int, int, int]:
    """Return the widths that NUMBERS count, of texts of `width` tokens. Those that equal the states' count there."""
    encoder = sizes.family in ("bert", "deberta", "modernbert")
    attention = 0 if encoder else sizes.attention
    keys = 0 if encoder or "t5" in sizes.family else sizes.keys
    return sizes.hidden, attention, keys, sizes.inner, sizes.heads * width


def _numbers(family: str, passes: Passes) -> tuple[Sizes5, Sizes5]:
    """Return how many arrays of each width every trained block keeps, and how many there are once."""
    name = passes.how
    if passes.train_type == "full" and "checkpointed" not in name:
        name += " full"
    if passes.half and name.startswith("plain"):
        name += " half"
    return NUMBERS[family][name]


# --- language models, whose step mlx-lm compiles as a whole -----------------------------------------------------------


def language_model_activations(sizes: Sizes, passes: Passes, rows: int, width: int) -> float:
    """Return the numbers that a step of language modelling holds at its peak, logits included."""
    tokens, scores = rows * width, rows * sizes.heads * width**2
    token = 7 * sizes.hidden + 2.5 * sizes.attention + 2 * sizes.keys + 6.5 * sizes.inner
    block = tokens * token + 0.7 * scores
    logits = 4 * tokens * sizes.vocabulary  # with their exponentials and gradients
    kept = sizes.layers if passes.trained_layers == -1 else passes.trained_layers
    held = kept * block + 2 * scores + logits
    if "checkpointed" in passes.how:  # the inputs of all blocks; one block's inside, and its gradient or the logits
        inside = 8 * tokens * sizes.inner + 3 * scores
        held = min(held, kept * 7 * tokens * sizes.hidden + block + max(logits, inside))
    return held
