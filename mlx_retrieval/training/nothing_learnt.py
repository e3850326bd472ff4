"""Signs that a run learns nothing: in its rows and settings, in its first steps, and in the model at its end."""

import math

import numpy as np

from mlx_retrieval.dataset.sources import Source
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.state import State
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.text import quantity

LEAST_STEPS = 3  # of fewer losses, equal ones tell nothing
SAME_LOSS = 1e-6  # relative; float32 rounds to 6e-8
SAME_VECTORS = 1e-5  # relative to the largest number: rounding on another machine, far below the effect of a step
PROBE_SIZE = 64  # numbers that represent the probe's vectors
PROBE = ("which train goes to Kyoto", "The train to Kyoto leaves from platform 12 at ten past nine.")


def warnings(settings: Settings, rows: Source | None = None) -> Lines:
    """Return a line, ("warning", text), for everything in the settings and rows that leaves nothing to learn."""
    lines = []
    if settings.warmup_steps > settings.steps:
        reached = settings.steps / settings.warmup_steps
        lines.append(
            f"--warmup of {quantity(settings.warmup_steps, 'step')} is longer than the run of {settings.steps:,}: the "
            f"learning rate ends at {reached:.1%} of --learning-rate"
        )
    for side, text in (rows.constant if rows else {}).items():
        shown = text if len(text) <= 40 else text[:39] + "…"
        lines.append(
            f'all rows that were read have the same {side} ("{shown}"): nothing to tell apart. Is it the right key?'
        )
    return [("warning", line) for line in lines]


def watch(state: State, settings: Settings, loss: float, grad_norm: float) -> str:
    """Note loss and gradient of the state's step. Return a warning after a tenth of the steps, once; "" = none is due.

    It is due if all gradients were 0, or all losses equal to rounding although batches differ.
    """
    if state.first_loss is None:
        state.first_loss = loss
    state.loss_moved |= abs(loss - state.first_loss) > SAME_LOSS * max(1.0, abs(state.first_loss))
    state.has_gradient |= grad_norm > 0
    checked = min(settings.steps, max(LEAST_STEPS, math.ceil(settings.steps / 10)))
    if state.step != checked:
        return ""
    if not state.has_gradient:
        return (
            f"the gradient has been 0 in all {checked} steps so far, and the loss is {loss:.4g}: nothing is learnt. Do "
            "the rows leave something to tell apart?"
        )
    if not state.loss_moved and checked >= LEAST_STEPS:
        return (
            f"the loss has been {loss:.4g} in all {checked} steps so far: nothing is learnt. --learning-rate "
            f"{settings.learning_rate:g} may be too low, or the rows leave nothing to tell apart"
        )
    return ""


def sample(vectors: np.ndarray | None) -> list[float]:
    """Return numbers spread over the vectors, for the saved state; [] for None or numbers that are not finite."""
    if vectors is None or not np.isfinite(vectors).all():
        return []
    flat = np.ravel(vectors)
    return flat[np.linspace(0, flat.size - 1, min(flat.size, PROBE_SIZE)).astype(int)].tolist()


def unchanged(before: list[float], after: list[float]) -> bool:
    """Return whether two samples of the same model are equal to rounding; False if one is missing."""
    if not before or len(before) != len(after):
        return False
    largest = max(map(abs, before))
    return bool(np.allclose(before, after, rtol=0, atol=SAME_VECTORS * largest))
