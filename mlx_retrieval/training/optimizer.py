"""AdamW in float32, whatever dtype the trained weights have.

optimizer = AdamW(model.trainable_parameters(), learning_rate=2e-5, weight_decay=0.01)
optimizer.update(model, grads)

An update is mostly smaller than half the distance between two neighbours in bfloat16 or float16, so a weight that is
updated in half precision stays where it is; and in float16 AdamW's epsilon and the squares of most gradients are 0. So
every such weight has a float32 copy, its master, in the optimizer's state. Updates add up in the master, and the model
computes with the master rounded to the weight's own dtype (Micikevicius et al. 2018, "Mixed Precision Training",
section 3.1, https://arxiv.org/abs/1710.03740). Moments are float32 too. That takes 12 bytes a weight, a third of them
for the master, where `mlx.optimizers.AdamW` takes 4.

Float32 weights need no master: they are updated as by `mlx.optimizers.AdamW`, bit for bit and in the same memory.
"""

from mlx_retrieval.backend import mx, nn

import mlx.optimizers as optim

HALF = (mx.bfloat16, mx.float16)
MASTER = "master"  # the entry of a half-precision weight's state, beside the moments "m" and "v"


class AdamW(optim.AdamW):
    """AdamW with float32 moments, and a float32 master of every weight in half precision.

    The state holds all of it, so a run that is saved and resumed goes on bit for bit.

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

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Return the updated weight in its own dtype."""
        updated = super().apply_single(gradient.astype(mx.float32), state.get(MASTER, parameter), state)
        if MASTER in state:
            state[MASTER] = updated
        return updated.astype(parameter.dtype)
