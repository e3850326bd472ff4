"""AdamW in float32, whatever dtype the trained weights have.

optimizer = AdamW(model.trainable_parameters(), learning_rate=2e-5, weight_decay=0.01)
optimizer.update(model, grads)

An update is mostly smaller than half the distance between two neighbours in bfloat16 or float16, so a weight that is
updated in half precision stays where it is; and in float16 AdamW's epsilon and the squares of most gradients are 0. So
every such weight has a float32 copy, its master, in the optimizer's state. Updates add up in the master, and the model
computes with the master rounded to the weight's own dtype (Micikevicius et al. 2018, "Mixed Precision Training",
section 3.1, https://arxiv.org/abs/1710.03740). Moments are float32 too. That takes 12 bytes a weight, a third of them
for the master, where `mlx.optimizers.AdamW` takes 4.

A checkpoint's weights are numbers of half precision. Rounded to the nearest, most of them would come back to where they
began, for a whole short run. So masters are rounded at random, up or down with probabilities by which the mean is the
master (stochastic rounding; Zamirai et al. 2020, "Revisiting BFloat16 Training", https://arxiv.org/abs/2010.06192).

Float32 weights need no master: they are updated as by `mlx.optimizers.AdamW`, bit for bit and in the same memory.
"""

import itertools

from mlx_retrieval.backend import mx, nn

import mlx.optimizers as optim
from mlx.utils import tree_map

HALF = {mx.bfloat16: 16, mx.float16: 13}  # bits of a float32 number that it has no room for
SMALLEST, NORMAL = 2.0**-24, 2.0**-14  # of float16's positive numbers: the smallest, and the smallest of full precision
MASTER = "master"  # the entry of a half-precision weight's state, beside the moments "m" and "v"


def round_at_random(values: mx.array, dtype: mx.Dtype, key: mx.array) -> mx.array:
    """Round float32 values to one of their two neighbours in a dtype of HALF, so that their mean is the value.

    NaN stays, and so do numbers that the dtype holds. What is too large for it becomes infinite as in `astype`.
    """
    bits, range_ = HALF[dtype], mx.finfo(dtype)
    noise = mx.random.randint(0, 1 << bits, values.shape, mx.uint32, key)
    rounded = ((values.view(mx.uint32) + noise) >> bits << bits).view(mx.float32)
    if dtype == mx.float16:  # whose smallest numbers, below its exponents, have one distance
        steps = mx.floor(values / SMALLEST + noise / (1 << bits))
        rounded = mx.where(mx.abs(values) < NORMAL, steps * SMALLEST, rounded)
    rounded = mx.clip(rounded, range_.min, range_.max)
    return mx.where(mx.isfinite(values.astype(dtype)), rounded, values).astype(dtype)


class AdamW(optim.AdamW):
    """AdamW with float32 moments, and a float32 master of every weight in half precision.

    The state holds all of it, and its step is the seed of the rounding, so a run that is saved and resumed goes on bit
    for bit.

    Args:
        parameters: a model's `trainable_parameters()`, by which the state is initialised.
        compiled: whether an update is one graph, built once. It is a dozen operations for each of a hundred weights,
            which a GPU otherwise starts one by one.
    """

    def __init__(self, parameters: dict, learning_rate: float, weight_decay: float, compiled: bool = False):
        super().__init__(learning_rate, weight_decay=weight_decay, bias_correction=True)
        self.init(parameters)
        self._compiled = mx.compile(self._step) if compiled else None

    def update(self, model: nn.Module, gradients: dict) -> None:
        """Update the model's trained weights, and the state."""
        if self._compiled is None:
            super().update(model, gradients)
            return
        weights, self.state = self._compiled(gradients, model.trainable_parameters(), self.state)
        model.update(weights)

    def _step(self, gradients: dict, weights: dict, state: dict) -> tuple[dict, dict]:
        """Return the updated weights and state: a function of its arguments alone."""
        own, self.state = self.state, state
        try:
            return self.apply_gradients(gradients, weights), self.state
        finally:
            self.state = own

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Initialise the state of one weight."""
        master = parameter.astype(mx.float32)
        super().init_single(master, state)
        if parameter.dtype in HALF:
            state[MASTER] = master

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Return the updated weights, each in its own dtype."""
        updated = super().apply_gradients(gradients, parameters)
        step, numbers = self.step.astype(mx.uint32), itertools.count()

        def rounded(value: mx.array, parameter: mx.array) -> mx.array:
            key = mx.stack([step, mx.array(next(numbers), mx.uint32)])  # of this step and weight
            return round_at_random(value, parameter.dtype, key) if parameter.dtype in HALF else value

        return tree_map(rounded, updated, parameters)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Return the updated weight in float32, which is its master."""
        updated = super().apply_single(gradient.astype(mx.float32), state.get(MASTER, parameter), state)
        if MASTER in state:
            state[MASTER] = updated
        return updated
