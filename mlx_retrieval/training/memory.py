"""How many tokens may be in the backbone at once, measured by small passes before the first step.

    python train.py --micro-batch-tokens auto --dry-run

The loss does not depend on the budget, so memory alone decides it: the largest of a grid of budgets whose step fits
into a share of the free memory of the device, or of the machine and its control groups. On Metal that is the default
as well, up to the tokens that suit a GPU. Where memory runs out nevertheless and the backend reports it, `Trainer`
halves the budget and repeats the step.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_retrieval.backend import device_memory, mx

from data_loader import Batch
from mlx_retrieval import backend
from mlx_retrieval.training.gradient_cache import GradientCache
from mlx_retrieval.training.step_memory import loss_of_tokens, measure_passes
from mlx_retrieval.utils.text import gb

GRID = tuple(128 << i for i in range(14))  # tokens: 128 to 1,048,576
UNLIMITED = 2 * GRID[-1]  # stands for no budget where ranks agree on the smallest
SAMPLES = 2  # batches that `fit` should see


@dataclass(frozen=True)
class Fit:
    """A budget of tokens, and the memory that it takes, in bytes."""

    budget: int
    estimate: int  # the peak of a step with that budget
    free: int  # memory for mlx's arrays, weights included

    def __str__(self) -> str:
        warning = "" if self.estimate <= self.free else ", which may be too little: see --grad-checkpoint, --max-length"
        return (
            f"about {gb(self.estimate, 2)} GB at most, an estimate, with {self.budget:,} tokens at once; "
            f"{gb(self.free, 2)} GB are free{warning}"
        )


# --- the budget -----------------------------------------------------------------------------------------------------


def most() -> int:
    """Return the largest budget that is of use here. More are no quicker on CPUs (benchmarks/README.md)."""
    return GRID[-1] if backend.IS_GPU else backend.MICRO_BATCH_TOKENS


def fit(grad_cache: GradientCache, samples: Sequence[Batch], largest: int) -> Fit:
    """Choose the budget of a run's steps and set it, and bound the freed memory. Weights stay as they are.

    Args:
        grad_cache: computes the steps; its `budget` is set.
        samples: batches, among whose texts the longest stands for the longest of the run.
        largest: the largest budget that may be chosen.
    """
    texts = max((batch.texts for batch in samples), key=lambda texts: texts.lengths.max())
    losses = [loss_of_tokens(batch.texts.lengths, batch.queries) for batch in samples if isinstance(batch, Batch)]
    step = measure_passes(grad_cache, texts, max(losses, default=0))
    mx.clear_cache()
    active = mx.get_active_memory()
    room = device_memory.free()

    def estimate(budget: int) -> int:
        cutting = dataclasses.replace(grad_cache.cutting, budget=budget)
        return active + max(step.peak(batch.texts.lengths, cutting) for batch in samples)

    # A budget that holds the whole batch need not be larger.
    useful = min(largest, max(batch.tokens for batch in samples))
    grid = [budget for budget in GRID if budget < 2 * useful]
    budget = max((b for b in grid if estimate(b) - active <= device_memory.share() * room), default=grid[0])
    result = Fit(budget, estimate(budget), active + room)
    grad_cache.budget = budget
    device_memory.bound_cache(result.estimate)
    return result
