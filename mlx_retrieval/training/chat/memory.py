"""How much memory a chat run will take, before it begins: an estimate from shapes, not a measurement.

    estimate(shape_of(backbone), Work(rows=4, width=512, layers=16)).total

Besides weights and the optimizer's state, a step keeps, for the gradient, everything that the trained blocks compute
for each token, and the logits. The factors were fitted to the peaks of Llamas with random weights on a CPU in float32,
and agree with them within about 10 %. A GPU that does not store attention scores takes less.
`benchmarks/chat_memory.py` prints estimates beside measured peaks.
"""

from dataclasses import dataclass

from mlx.utils import tree_flatten

from mlx_retrieval.backbones.base import Backbone


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide its memory: `weights` and `trained` in bytes, the others in numbers."""

    weights: int
    trained: int  # the trained ones of the weights
    width: int  # bytes of a computed number
    hidden: int
    inner: int  # the feed-forward part's width
    heads: int
    attention: int  # the width of all heads together
    keys: int  # the width of keys and values together
    vocabulary: int


@dataclass(frozen=True)
class Work:
    """The largest micro-batch, and how it is trained."""

    rows: int
    width: int  # tokens of a row, padding included
    layers: int  # blocks that keep what they compute for the gradient
    grad_checkpoint: bool = False
    parts: int = 1  # micro-batches a step


@dataclass(frozen=True)
class Estimate:
    """The memory of a run, in bytes."""

    weights: int
    training: int  # gradient and moments of the trained weights
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations


def shape_of(backbone: Backbone) -> Shape:
    """Return the shape of a model that `backbones.lora.adapt` has prepared."""
    config = backbone.config.get("text_config", backbone.config)
    parameters = dict(tree_flatten(backbone.parameters()))
    trained = dict(tree_flatten(backbone.trainable_parameters()))
    hidden = backbone.hidden_size
    heads = config.get("num_attention_heads") or 1
    size = config.get("head_dim") or hidden // heads
    experts = config.get("num_experts_per_tok") or 0
    inner = config.get("intermediate_size") or 4 * hidden
    if experts and config.get("moe_intermediate_size"):
        inner = experts * config["moe_intermediate_size"]
    norms = [value for name, value in parameters.items() if "norm" in name]
    return Shape(
        weights=sum(value.nbytes for value in parameters.values()),
        trained=sum(value.nbytes for value in trained.values()),
        width=norms[0].itemsize if norms else 4,
        hidden=hidden,
        inner=inner if isinstance(inner, int) else max(inner),
        heads=heads,
        attention=heads * size,
        keys=2 * (config.get("num_key_value_heads") or heads) * size,
        vocabulary=config["vocab_size"],
    )


def estimate(shape: Shape, work: Work) -> Estimate:
    """Estimate the peak memory of a run. It grows with all that `Work` counts; checkpointing never adds to it."""
    tokens = work.rows * work.width
    scores = work.rows * shape.heads * work.width**2
    token = 7 * shape.hidden + 2.5 * shape.attention + shape.keys + 6.5 * shape.inner
    block = tokens * token + 0.7 * scores
    logits = 4 * tokens * shape.vocabulary  # with their exponentials and gradients
    held = work.layers * block + 2 * scores + logits
    if work.grad_checkpoint:  # the inputs of all blocks; the inside of one block, and its gradient or the logits
        inside = 8 * tokens * shape.inner + 3 * scores
        held = min(held, work.layers * 7 * tokens * shape.hidden + block + max(logits, inside))
    return Estimate(
        weights=shape.weights,
        training=shape.trained * (4 if work.parts > 1 else 3),
        activations=round(shape.width * held),
    )
