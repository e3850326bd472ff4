"""What the loop of every run has: schedule, state, evaluations where they are due, the best one kept, saving, stopping.

trainer.py builds on it for retrieval models, chat/trainer.py for chat models.
"""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import checkpoint
from config import Settings
from reporting import Reporter


class Stopped(Exception):  # noqa: N818  (no error)
    """The run was stopped by a signal, after it was saved; `code` is the process's exit code."""

    def __init__(self, code: int):
        super().__init__(f"stopped by signal {code - 128}")
        self.code = code


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of update `step`, counted from 1: linear warm-up from above 0, then the schedule."""
    warmup = settings.warmup_steps
    if step <= warmup:
        return settings.learning_rate * step / warmup
    progress = (step - 1 - warmup) / max(1, settings.steps - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return settings.learning_rate * shape[settings.schedule]


@dataclass
class State:
    """What a run remembers besides weights and optimizer; saved as trainer_state.json."""

    step: int = 0
    tokens: int = 0  # real tokens trained on so far
    best: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0


class Loop:
    """What the loop of any run has: evaluations where they are due, the best one kept, saving. See `trainer.Trainer`.

    `measure(step, report)` gives the metrics of the model as it stands: ndcg_at_10, validation_loss, or none.
    """

    settings: Settings
    folder: Path
    save_model: Callable[[Path], None]
    optimizer: object  # of mlx.optimizers
    state: State
    _signal: int = 0  # that was noted and asks for an end

    @property
    def stopped_early(self) -> bool:
        patience = self.settings.early_stopping
        return bool(patience) and self.state.evaluations_since_best >= patience

    def _evaluate_if_due(self, report: Reporter, finished: bool) -> bool:
        """Evaluate where it is time to; whether training should stop for lack of gain."""
        if not (finished or due(self.state.step, self.settings.eval_steps)):
            return False
        metrics = self.measure(self.state.step, report)
        if not metrics:
            return False
        score = metrics.get("ndcg_at_10", -metrics.get("validation_loss", math.inf))
        if self.state.best is None or score > self.state.best:
            self.state.best, self.state.best_step, self.state.evaluations_since_best = score, self.state.step, 0
            checkpoint.write_folder(self.folder / "best", self._write)
        else:
            self.state.evaluations_since_best += 1
        return self.stopped_early

    def save(self) -> None:
        """Write `step-NNNNNN`, and remove those that are too many now that it is complete."""
        checkpoint.write_folder(checkpoint.step_folder(self.folder, self.state.step), self._write)
        checkpoint.prune(self.folder, self.settings.keep)

    def _write(self, folder: Path) -> None:
        self.save_model(folder)
        checkpoint.save_training(folder, self.optimizer, asdict(self.state))

    def _note(self, number: int) -> None:
        self._signal = number


@contextmanager
def signals(note: Callable[[int], None]) -> Iterator[None]:
    """Note the first SIGINT or SIGTERM, for the run to end after the current step; a second SIGINT ends it at once."""

    def handle(number: int, _frame) -> None:
        note(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: a notebook's or a test's business
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps is done after this one; 0 = never."""
    return every > 0 and step % every == 0
