"""What the loop of every run has: schedule, state, evaluations where they are due, the best one kept, saving, stopping.

trainer.py builds on it for retrieval models, chat/trainer.py for chat models.
"""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mlx_retrieval.training import checkpoint, distributed
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.reporting import Reporter
from mlx_retrieval.utils import files


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
    cursor: dict = field(default_factory=dict)  # what the source of the data needs to continue
    skipped_batches: int = 0  # with --skip-bad-batches
    micro_batch_tokens: int = 0  # the budget, where memory decided it; see memory.py


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
    _agreed: int = 0  # the same, once all ranks know it
    _report: Reporter | None = None  # of the run that goes on
    _saved: int = -1  # the step that was saved last

    def warn(self, line: str) -> None:
        """Tell what went wrong without ending the run."""
        if self._report:
            self._report.warn(line)

    @property
    def stopped_early(self) -> bool:
        patience = self.settings.early_stopping
        return bool(patience) and self.state.evaluations_since_best >= patience

    def _evaluate_if_due(self, report: Reporter, finished: bool) -> bool:
        """Evaluate where it is time to, on rank 0; whether training should stop for lack of gain."""
        if not distributed.is_main() or not (finished or due(self.state.step, self.settings.eval_steps)):
            return False
        metrics = self.measure(self.state.step, report)
        if not metrics:
            return False
        score = metrics.get("ndcg_at_10", -metrics.get("validation_loss", math.inf))
        if self.state.best is None or score > self.state.best:
            before = self.state.best, self.state.best_step
            self.state.best, self.state.best_step, self.state.evaluations_since_best = score, self.state.step, 0
            try:
                files.write_folder(self.folder / "best", self._write)
            except files.SaveError as error:  # the best one is the one that is kept
                self.state.best, self.state.best_step = before
                self.warn(f"{error}; the run goes on")
        else:
            self.state.evaluations_since_best += 1
        return self.stopped_early

    @property
    def _asked(self) -> int:
        """The signal that ends the run: of several ranks, one that all of them know of."""
        return self._agreed if distributed.size() > 1 else self._signal

    def decide(self, stop: bool) -> bool:
        """Of several ranks, after a step: whether any is to stop; none goes on alone, be it for lack of gain or not."""
        stop, self._agreed = distributed.all_max(f"the end of step {self.state.step}", stop, self._signal, patient=True)
        return bool(stop)

    def save(self) -> None:
        """Write `step-NNNNNN`, and remove those that are too many now that it is complete. SaveError: nothing is."""
        if not distributed.is_main():
            self._saved = self.state.step
            return
        files.write_folder(checkpoint.step_folder(self.folder, self.state.step), self._write)
        self._saved = self.state.step
        checkpoint.prune(self.folder, self.settings.keep)

    def save_if_due(self, last: int, ending: bool) -> None:
        """Save where it is time to, and raise Stopped where a signal asks for an end.

        Where the disk is full the run goes on with a warning: the older checkpoint is whole, and the next due save
        tries again. Only where the run is left to be continued from this very step, that is an error.

        Args:
            last: the step at which this process stops; ending: whether the run itself ends here and writes `final`.
        """
        leaving = not ending and self.state.step == last
        if ending or leaving or self._asked or due(self.state.step, self.settings.save_steps):
            try:
                self.save()
            except files.SaveError as error:
                if leaving or self._asked:
                    raise
                self.warn(f"{error}; the run goes on, and the next save tries again")
        if self._asked:
            if self._saved != self.state.step:  # it came while a save failed
                self.save()
            raise Stopped(128 + self._asked)

    def save_last_good(self) -> str:
        """Before an error ends the run: save the state as it stands, and say so."""
        if not self.state.step or not distributed.is_main():
            return ""
        try:
            self.save()
        except files.SaveError as error:
            return f" ({error})"
        return f"; the state after step {self.state.step} is saved"

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
            # mlx.launch sends it to all ranks once one has ended with an error, while rank 0 says what became of them.
            deaf = number == signal.SIGTERM and distributed.size() > 1
            signal.signal(number, signal.SIG_IGN if deaf else handler)


def due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps is done after this one; 0 = never."""
    return every > 0 and step % every == 0
