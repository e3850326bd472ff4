"""The exponential moving average of the trained weights, which is evaluated and saved in their place: --ema.

average = MovingAverage(0.99, model.trainable_parameters())
average.update(model.trainable_parameters(), optimizer.state, step=1)
model.update(average.weights(model.trainable_parameters(), step=1))

Averaged weights lie in a flatter place than those of any step, and need less of a schedule (Polyak and Juditsky 1992;
Izmailov et al. 2018, arXiv 1803.05407). The decay of step t is min(decay, (1 + t) / (10 + t)): the first steps count
little, so that the average is not tied to where training began.
"""

from pathlib import Path

from mlx_retrieval.backend import mx

from mlx.utils import tree_flatten, tree_unflatten

from mlx_retrieval.backbones.hub import check_fit, read_safetensors, save_tensors
from mlx_retrieval.training.optimizer import HALF, MASTER, round_at_random

FILE = "average.safetensors"  # of a saved step: the average in float32, and the weights that training goes on from
AVERAGE, WEIGHTS = "average.", "weights."  # prefixes of its tensors


class MovingAverage:
    """The average so far, float32, by the names of the weights.

    Args:
        decay: what the average keeps of itself at a step, later on; from 0 to below 1.
        parameters: a model's `trainable_parameters()` before the first step.
    """

    def __init__(self, decay: float, parameters: dict):
        self.decay = decay
        self.values = {name: value.astype(mx.float32) for name, value in tree_flatten(parameters)}

    def update(self, parameters: dict, optimizer_state: dict, step: int) -> None:
        """Take in the weights after a step, counted from 1; of those in half precision, their float32 masters."""
        decay = min(self.decay, (1 + step) / (10 + step))
        masters = dict(tree_flatten(optimizer_state))
        for name, value in tree_flatten(parameters):
            value = masters.get(f"{name}.{MASTER}", value).astype(mx.float32)
            self.values[name] = decay * self.values[name] + (1 - decay) * value
        mx.eval(self.values)

    def weights(self, parameters: dict, step: int) -> dict:
        """Return the average as a tree like `parameters`, in their dtypes; half precision is rounded at random.

        The same step gives the same weights.
        """
        weights = []
        for number, (name, value) in enumerate(tree_flatten(parameters)):
            average = self.values[name]
            if value.dtype in HALF:
                average = round_at_random(average, value.dtype, mx.array([step, number], mx.uint32))
            weights.append((name, average))
        mx.eval(weights)
        return tree_unflatten(weights)

    def save(self, folder: Path, parameters: dict) -> None:
        """Write the average, and the weights that training goes on from."""
        tensors = {f"{AVERAGE}{name}": value for name, value in self.values.items()}
        save_tensors(folder / FILE, tensors | {f"{WEIGHTS}{name}": value for name, value in tree_flatten(parameters)})

    def load(self, folder: Path, parameters: dict) -> dict:
        """Load a saved average; return the weights that training goes on from. UserError if they do not fit."""
        saved = read_safetensors(folder / FILE)
        flat = dict(tree_flatten(parameters))
        check_fit({f"{prefix}{name}": value for prefix in (AVERAGE, WEIGHTS) for name, value in flat.items()}, saved,
                  folder / FILE)  # fmt: skip
        self.values = {name: saved[f"{AVERAGE}{name}"] for name in flat}
        return tree_unflatten([(name, saved[f"{WEIGHTS}{name}"]) for name in flat])
