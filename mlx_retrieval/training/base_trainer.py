"""The base of all trainers: schedule, state, the best evaluation, saving, resuming, and the weights of several ranks.

trainer.py builds on it for retrieval models, chat/trainer.py for chat models; run.py decides what happens when.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from mlx_retrieval.backend import device_errors, mx, nn
from mlx_retrieval.backend.device_errors import DeviceError

import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlx_retrieval.training import checkpoint, distributed, improvement, nothing_learnt
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.contents import EVALUATION, GUARDS, VALIDATION
from mlx_retrieval.training.moving_average import MovingAverage
from mlx_retrieval.training.reporting import NullReporter, Reporter
from mlx_retrieval.training.state import State
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import SettingError, UserError
from mlx_retrieval.utils.text import listed

# Batches left out one after the other (--skip-bad-batches) that end a run: single bad rows do not do that, but a model
# that can no longer compute does, and so do data of which nearly every batch has a bad row.
MOST_SKIPPED = 10
# Called after each optimizer step with a record to report, or None. Returns whether training ends here.
AfterStep = Callable[[dict | None], bool]


def learning_rate(settings: Settings, step: int) -> float:
    """Return the learning rate of update `step`, counted from 1: linear warm-up from above 0, then the schedule."""
    warmup = settings.warmup_steps
    if step <= warmup:
        return settings.learning_rate * step / warmup
    progress = (step - 1 - warmup) / max(1, settings.steps - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return settings.learning_rate * shape[settings.schedule]


def due(step: int, every: int) -> bool:
    """Return whether an action that is due after every `every` steps is due after this one; 0 = never."""
    return every > 0 and step % every == 0


class BaseTrainer(ABC):
    """The trainer of one run.

    Args:
        model: prepared by `backbones.lora.adapt`, so that only the weights to train are trainable.
        optimizer: initialised with the model's trainable parameters.
        state: of a run that has not begun.
        save_model: writes into the folder that it is given everything that using the model needs.

    `reporter` receives messages; run.py puts a `Reporter` there. `saved_step` is the step that was saved last.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        state: State,
        settings: Settings,
        save_model: Callable[[Path], None],
    ):
        self.model = model
        self.optimizer = optimizer
        self.state = state
        self.settings = settings
        self.save_model = save_model
        self.reporter: Reporter | NullReporter = NullReporter()
        self.saved_step = -1
        # Of several ranks, the first one alone evaluates and saves.
        averaged = settings.ema and distributed.is_main()
        self.average = MovingAverage(settings.ema, model.trainable_parameters()) if averaged else None
        self.weights_in_doubt = False  # whether the weights in memory may be those of no step

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.settings.folder

    # --- a trainer's own ----------------------------------------------------------------------------------------------

    @abstractmethod
    def train(self, last: int, after_step: AfterStep) -> None:
        """Take the steps that follow the state's, up to step `last`, or until `after_step` returns True."""

    @abstractmethod
    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate the model, report and return its metrics: ndcg_at_10, validation_loss ...; {} without data."""

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Load the weights of a saved step."""

    @abstractmethod
    def restore_state(self, state: State) -> None:
        """Continue from this state: set it, and go to its place in the data."""

    @abstractmethod
    def check_ranks(self) -> None:
        """Raise RankMismatch on all ranks if their settings, data or models differ. Called on several ranks only."""

    def probe(self) -> np.ndarray | None:
        """Return numbers that the trained weights decide, float32, to compare before and after; None = no such ones."""
        return None

    def watch(self, loss: float, grad_norm: float) -> None:
        """Note that a step was good, and warn, once, if the steps so far are a sign that nothing is learnt."""
        self.state.skipped_in_a_row = 0
        if warning := nothing_learnt.watch(self.state, self.settings, loss, grad_norm):
            self.reporter.warn(warning)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In this block the model has the average of its weights, with --ema."""
        if self.average is None:
            yield
            return
        weights = self.model.trainable_parameters()
        self.model.update(self.average.weights(weights, self.state.step))
        try:
            yield
        finally:
            self.model.update(weights)

    # --- evaluations --------------------------------------------------------------------------------------------------

    @property
    def stopped_early(self) -> bool:
        """Whether --early-stopping ends the run here."""
        patience = self.settings.early_stopping
        return bool(patience) and self.state.evaluations_since_best >= patience

    def keep_best(self, metrics: dict[str, float]) -> None:
        """Note an evaluation, and save the model to `best` if it is better than untrained and at all steps before."""
        before = replace(self.state)
        if not improvement.note(self.state, metrics):
            return
        try:
            files.write_folder(self.folder / "best", self.write)
        except files.SaveError as error:  # `best` still holds the previous one
            self.state.best, self.state.best_step = before.best, before.best_step
            self.reporter.warn(f"{error}; the run goes on")

    def forget_evaluations(self, changed: set[str]) -> None:
        """Forget the figures so far that are of other data than evaluations from now on.

        `changed`: the parts of `contents.Contents` that have changed since the run was begun.
        """
        if changed & {EVALUATION, VALIDATION}:
            improvement.forget(self.state)
        elif GUARDS in changed:
            improvement.forget_best(self.state)

    # --- saving and resuming ------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Write the model and everything that continuing needs into a folder. UserError if a weight is not finite."""
        self.check_weights(self.state.step)
        with self.averaged():
            self.save_model(folder)
        if self.average:
            self.average.save(folder, self.model.trainable_parameters())
        checkpoint.save_training(folder, self.optimizer, asdict(self.state))

    def save(self) -> None:
        """Write `step-NNNNNN`, then remove the steps that --keep does not keep. SaveError if it cannot be written."""
        if distributed.is_main():
            files.write_folder(checkpoint.step_folder(self.folder, self.state.step), self.write)
        self.saved_step = self.state.step
        if distributed.is_main():
            checkpoint.prune(self.folder, self.settings.keep)

    def save_last_good(self) -> str:
        """Before an error ends the run, save the state; return a text about it for the error's message."""
        if not self.state.step or not distributed.is_main() or self.settings.only_measures:
            return ""
        if self.weights_in_doubt:
            return "; it came while the weights changed, so only what was saved before is whole"
        try:
            self.save()
        except UserError as error:
            return f" ({error})"
        except RuntimeError as error:
            if not device_errors.is_device_error(error):
                raise
            return "; what the device holds can no longer be saved, and what was saved before is whole"
        return f"; the state after step {self.state.step} is saved"

    def check_weights(self, step: int) -> None:
        """Raise UserError if a trained weight is not finite after `step`. What was saved before stays the last good."""
        weights = tree_flatten(self.model.trainable_parameters())
        finite = mx.stack([mx.isfinite(value).all() for _, value in weights]).tolist()
        names = [name for (name, _), good in zip(weights, finite, strict=True) if not good]
        if not names:
            return
        last = None if self.settings.only_measures else checkpoint.last_step(self.folder)
        raise SettingError(
            "step {step}: the update made {names} infinite or NaN, and such weights are not saved; {saved}. A lower "
            "{learning_rate} may help",
            step=step,
            names=listed(names, 1),
            saved=f"the last good state is in {last}" if last else "no step was saved before",
        )

    def resume(self, folder: Path) -> None:
        """Continue from a saved step. UserError if its weights have other dtypes than the model's."""
        checkpoint.check_dtypes(folder, self.model.trainable_parameters())
        self.load_weights(folder)
        if self.average:
            self.model.update(self.average.load(folder, self.model.trainable_parameters()))
        self.restore_state(type(self.state)(**checkpoint.load_training(folder, self.optimizer)))

    def skip_or_refuse(self, reason: str, examples: str, places: Sequence[str], advice: str) -> None:
        """Deal with a loss or gradient that is not finite.

        With --skip-bad-batches, count the batch and warn, unless it is one of MOST_SKIPPED in a row; otherwise save the
        last good state and raise UserError.

        Args:
            reason: which step, and which numbers it gave.
            examples: the word for the data's rows, such as "Examples".
            places: where the rows concerned are, as file:line.
            advice: a sentence about what may help, without its end; settings in braces, as in `SettingError`.
        """
        if self.settings.skip_bad_batches:
            if self.state.skipped_in_a_row + 1 >= MOST_SKIPPED:
                raise SettingError(
                    f"{{reason}}, as in the {MOST_SKIPPED - 1} batches before: the run ends{{saved}}. {advice}",
                    reason=reason,
                    saved=self.save_last_good(),
                )
            self.state.skipped_batches += 1
            self.state.skipped_in_a_row += 1
            self.reporter.warn(f"{reason}; the batch is skipped. {examples} concerned: {', '.join(places)}")
            return
        listing = "\n  ".join(places)
        raise SettingError(
            f"{{reason}}{{saved}}. {{examples}} concerned:\n  {{listing}}\n{advice}; "
            "{skip_bad_batches} leaves such batches out.",
            reason=reason,
            saved=self.save_last_good(),
            examples=examples,
            listing=listing,
        )

    # --- errors of the GPU --------------------------------------------------------------------------------------------

    @contextmanager
    def changing_weights(self) -> Iterator[None]:
        """Note that the weights change in this block; after an error in it, they are not saved."""
        self.weights_in_doubt = True
        yield
        self.weights_in_doubt = False

    def recover(self, happened: str) -> None:
        """Bring the device to rest after an error, so that work can be repeated. DeviceError if it is of no more use.

        Args:
            happened: the error, see `device_errors.what_happened`.
        """
        try:
            device_errors.drain()
        except RuntimeError as error:  # seen with CUDA, where other processes had the rest of the card's memory
            raise DeviceError(
                f"{happened}, and this process can no longer use the device ({error}). Free some of its memory and "
                "continue from what was saved last with --resume"
            ) from error

    def lighter(self) -> str:
        """Return the flags with which a resumed run does less at once, for a message; "" = there are none."""
        return ""

    # --- several ranks ------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Take over the state of rank 0, and its weights and optimizer if it has resumed."""
        state = distributed.broadcast_object("the state", lambda: asdict(self.state))
        if state["step"]:
            self._take_weights()
        if not distributed.is_main():
            self.restore_state(type(self.state)(**state))

    def sync_weights(self) -> None:
        """Take rank 0's weights where the ranks' differ: machines of different kinds round differently in an update.

        The optimizer's state counts as well: masters may differ where the weights rounded from them do not.
        """
        weights = distributed.digest(dict(tree_flatten([self.model.trainable_parameters(), self.optimizer.state])))
        if len(set(distributed.gather_bytes("the weights", weights.encode(), patient=True))) > 1:
            self._take_weights()

    def _take_weights(self) -> None:
        self.model.update(distributed.broadcast_arrays(self.model.trainable_parameters()))
        self.optimizer.state = distributed.broadcast_arrays(self.optimizer.state)
