"""The loop of a chat run: mlx-lm's trainer with our batches, loss and optimizer, reports, evaluations and saving.

The arithmetic of a step is mlx-lm's. Before each step the batches set the learning rate and the seed of dropout; after
it a callback reports, evaluates and saves. All of that depends on the step's number alone, so a resumed run is the
uninterrupted one. Tested by `python -m pytest tests/test_chat.py`.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlx_retrieval.backend import mx, nn

import mlx.optimizers as optim
import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.backbones.decoder import Decoder
from mlx_retrieval.backbones.gradient_checkpointing import seed
from mlx_retrieval.backbones.hub import read_safetensors
from mlx_retrieval.models import loading
from mlx_retrieval.training import checkpoint, memory
from mlx_retrieval.training.base_trainer import Loop, State, due, learning_rate, signals
from mlx_retrieval.training.chat.data import ChatBatches, Counts, Part
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.reporting import Reporter
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError

# --- a step ---------------------------------------------------------------------------------------------------------


def loss_of(model: nn.Module, ids: mx.array, counted: mx.array, share: mx.array) -> tuple[mx.array, mx.array]:
    """Cross-entropy of a batch, as mlx-lm's trainer wants its losses.

    Args:
        ids: (R, L + 1) int32.
        counted: (R, L) bool: whether ids[:, 1:] counts there.
        share: float32 scalar: what the sum over counted tokens is divided by; their number, for the mean.

    Returns the loss and the number of counted tokens, both scalars. mlx-lm's own `default_loss` counts one token of
    padding after every text, and is not a number where nothing counts.
    """
    losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    total = mx.where(counted, losses, 0).astype(mx.float32).sum()
    # A loss that is not finite has no gradient that is, so that the optimizer leaves everything as it was.
    total = total * mx.where(mx.isfinite(total), 1.0, math.nan)
    return total / share, counted.sum()


class Optimizer(optim.AdamW):
    """AdamW on a clipped gradient, as retrieval models have it; a gradient that is not finite changes nothing.

    `state["grad_norm"]` is the gradient's norm before clipping.
    """

    def __init__(self, rate: float, weight_decay: float, limit: float):
        super().__init__(rate, weight_decay=weight_decay, bias_correction=True)
        self.limit = limit
        self.state["grad_norm"] = mx.array(0.0)
        self._good: mx.array | None = None

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        clipped, norm = optim.clip_grad_norm(gradients, self.limit or math.inf)
        self._good, step = mx.isfinite(norm), self.step
        updated = super().apply_gradients(clipped if self.limit else gradients, parameters)
        self.state["step"] = mx.where(self._good, self.step, step)
        self.state["grad_norm"], self._good = norm, None
        return updated

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        before = dict(state)
        updated = super().apply_single(gradient, parameter, state)
        for name, value in before.items():
            state[name] = mx.where(self._good, state[name], value)
        return mx.where(self._good, updated, parameter)


class Enough(Exception):  # noqa: N818  (no error)
    """Ends mlx-lm's `train` after a step; at its own end it would write the weights once more."""


def tune(model: nn.Module, optimizer: Optimizer, parts: Iterable[Part], steps: int, per_step: int, callback) -> None:
    """mlx-lm's trainer on `parts`, `per_step` of them a step, without its screen.

    `callback.on_train_loss_report(info)` is called after each step, `info["train_loss"]` being its loss, and raises
    Enough after the last one.
    """
    from mlx_lm.cli_ui import make_console
    from mlx_lm.tuner.trainer import TrainingArgs, train

    arguments = TrainingArgs(
        iters=steps * per_step,
        steps_per_report=per_step,
        steps_per_save=steps * per_step + 1,
        grad_accumulation_steps=per_step,
    )
    console = make_console()
    before, console.quiet = console.quiet, True
    try:
        train(
            model=model,
            optimizer=optimizer,
            train_dataset=None,
            args=arguments,
            loss=loss_of,
            iterate_batches=lambda **_: (part.arrays for part in parts),
            training_callback=callback,
        )
    except Enough:
        pass
    finally:
        console.quiet = before


@contextmanager
def compiled(allowed: bool) -> Iterator[None]:
    """mlx-lm compiles its step; not where `allowed` is False."""
    if not allowed:
        mx.disable_compile()
    try:
        yield
    finally:
        if not allowed:
            mx.enable_compile()


# --- the loop -------------------------------------------------------------------------------------------------------


@dataclass
class ChatState(State):
    """The state of a chat run."""

    before: float | None = None  # validation loss before training
    after: float | None = None  # at the last evaluation
    data: int = 0  # the mark of the conversations
    seconds: float = 0.0  # of training, without evaluations and saving
    # Since the last report: loss x trained tokens, these, all real tokens, these with padding, seconds.
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)


class ChatTrainer(Loop):
    """One chat run.

    Args:
        backbone: prepared by `models.lora.adapt`, so that only what is to be trained is trainable.
        validation: batches whose loss is measured; None = none.
        folder, save_model: as of `trainer.Trainer`.
    """

    def __init__(
        self,
        backbone: Decoder,
        batches: ChatBatches,
        validation: ChatBatches | None,
        settings: Settings,
        folder: Path,
        save_model,
    ):
        self.model, self.batches, self.validation = backbone.adapted, batches, validation
        self.settings, self.folder, self.save_model = settings, folder, save_model
        self.optimizer = Optimizer(settings.learning_rate, settings.weight_decay, settings.max_grad_norm)
        self.optimizer.init(self.model.trainable_parameters())
        self.state = ChatState(data=batches.rows.mark)
        # Checkpointed blocks draw their dropout's seeds in Python, which a compiled step would do only once.
        self.compiled = not (settings.grad_checkpoint and settings.lora_dropout)

    def resume(self, folder: Path) -> None:
        """Continue from a saved step."""
        loading.load_trainable(self.model, read_safetensors(folder / loading.ADAPTERS), folder)
        saved = ChatState(**checkpoint.load_training(folder, self.optimizer))
        if saved.data != self.state.data:
            raise UserError(f"--resume: the conversations are not those that the run in {self.folder} was begun with")
        self.state = saved

    def run(self, report: Reporter) -> None:
        """Train from the state's step to the last one. Raises Stopped after a signal, UserError on sick numbers."""
        settings, state = self.settings, self.state
        self._report, self._last = report, min(settings.steps, settings.stop_after or settings.steps)
        self._last = state.step if self.stopped_early else self._last
        if state.step < self._last:
            mx.reset_peak_memory()  # loading is over
            with signals(self._note), compiled(self.compiled):
                steps = self._last - state.step
                tune(self.model, self.optimizer, self._parts(), steps, self.batches.parts, self)
        if state.step == settings.steps or self.stopped_early:
            files.write_folder(self.folder / "final", self._write)

    def _parts(self) -> Iterator[Part]:
        """The parts of every batch to come; each is asked for when the step before it is done."""
        self._began = time.perf_counter()
        for step in range(self.state.step + 1, self._last + 1):
            self.optimizer.learning_rate = learning_rate(self.settings, step)
            self._numbers = self.batches.numbers(step - 1)
            draw = np.random.SeedSequence(self.settings.seed * 1_000_003 + step)
            seeds = draw.generate_state(self.batches.parts)
            for part, value in zip(self.batches.make(self._numbers), seeds, strict=True):
                seed(int(value))
                yield part

    def on_train_loss_report(self, info: dict) -> None:
        """What mlx-lm calls after each step."""
        memory.bound_cache()
        settings, state, step = self.settings, self.state, self.state.step + 1
        loss, norm = info["train_loss"], self.optimizer.state["grad_norm"].item()
        counts, trained = self.batches.counts(self._numbers), 0
        if math.isfinite(loss) and math.isfinite(norm):
            trained = counts.trained
        else:
            self._skip_or_refuse(step, f"step {step}: loss {loss}, gradient norm {norm}: not finite")
        seconds = time.perf_counter() - self._began
        more = (loss * trained if trained else 0.0, trained, counts.tokens, counts.padded, seconds)
        state.sums = [before + new for before, new in zip(state.sums, more, strict=True)]
        state.step, state.tokens, state.seconds = step, state.tokens + counts.tokens, state.seconds + seconds
        finished = step == settings.steps
        if finished or due(step, settings.steps_per_report):
            self._tell(norm)
        stop = self._evaluate_if_due(self._report, finished)
        self.save_if_due(self._last, finished or stop)
        if stop and not finished:
            patience = settings.early_stopping
            self._report.message(f"no better for {patience} evaluations: stopped at step {step}")
        if step == self._last or stop:
            raise Enough
        self._began = time.perf_counter()

    def _tell(self, norm: float) -> None:
        """Report the steps since the last report."""
        total, trained, tokens, padded, seconds = self.state.sums
        self.state.sums = [0.0] * 5
        skipped = {"skipped_batches": self.state.skipped_batches} if self.settings.skip_bad_batches else {}
        self._report.step(
            {
                "step": self.state.step,
                "epoch": round(self.state.step / self.batches.per_epoch, 4),
                "loss": total / trained if trained else None,  # every one of the batches was skipped
                "learning_rate": learning_rate(self.settings, self.state.step),
                "grad_norm": norm,
                "tokens": int(tokens),
                "trained_tokens": int(trained),
                "padding": 1 - tokens / padded,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "peak_memory_bytes": backend.peak_memory(),
                **skipped,
            }
        )

    def measure(self, step: int, report: Reporter) -> dict[str, float]:
        """The loss on the validation conversations as the model stands; {} without any."""
        from mlx_lm.tuner.trainer import evaluate

        if self.validation is None:
            return {}
        report.status("evaluating")
        count = self.validation.per_epoch
        count = count if self.settings.val_batches == -1 else min(count, self.settings.val_batches)
        parts = (part.arrays for k in range(count) for part in self.validation.make(self.validation.numbers(k)))
        loss = evaluate(self.model, None, 0, -1, loss=loss_of, iterate_batches=lambda **_: parts)
        self.model.train()
        setattr(self.state, "after" if step else "before", loss)
        report.evaluation(step, {"validation_loss": loss})
        report.status("")
        return {"validation_loss": loss}

    def measure_step(self) -> tuple[float, Counts]:
        """Seconds of a step on the largest batch, and what that batch holds. Weights change, in memory only."""
        numbers, times = self.batches.longest(), []
        counts = self.batches.counts(numbers)

        class Watch:
            @staticmethod
            def on_train_loss_report(info: dict) -> None:
                times.append(time.perf_counter())
                if len(times) == 3:
                    raise Enough
                mx.reset_peak_memory()  # the first step also compiles

        parts = [part for _ in range(3) for part in self.batches.make(numbers)]
        with compiled(self.compiled):
            tune(self.model, self.optimizer, parts, 3, self.batches.parts, Watch())
        return times[2] - times[1], counts

    def _skip_or_refuse(self, step: int, told: str) -> None:
        """Count a batch with sick numbers, or save the last good state and end the run; say which conversations."""
        self.model.eval()
        rows = self.batches.rows
        alone = ChatBatches(rows, 1, pad_id=self.batches.pad_id)
        sick = [i for i in self._numbers if not mx.isfinite(loss_of(self.model, *alone.make([i])[0].arrays)[0]).item()]
        self.model.train()
        named = [rows.where(i) for i in (sick or list(self._numbers))[:10]]
        if self.settings.skip_bad_batches:
            self.state.skipped_batches += 1
            self.warn(f"{told}; the batch is skipped. Conversations concerned: {', '.join(named)}")
            return
        named = "\n  ".join(named)
        raise UserError(
            f"{told}{self.save_last_good()}. Conversations concerned:\n  {named}\n"
            "A lower --learning-rate may help if they are sound; --skip-bad-batches leaves such batches out."
        )
