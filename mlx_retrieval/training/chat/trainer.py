"""Trains chat models: the steps of a run, which tuning.py takes with mlx-lm's loop.

Before each step the batches set the learning rate and the seed of dropout; after
it a callback lets run.py report, evaluate and save. All of it depends on the step's number alone, so a resumed run is
the uninterrupted one. Tested by `python -m pytest tests/training/test_chat.py`.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.backend import device_errors, device_memory, mx, nn
from mlx_retrieval.backend.device_errors import halved

import numpy as np
from mlx.utils import tree_map

from mlx_retrieval import backend
from mlx_retrieval.backbones.decoder import Decoder
from mlx_retrieval.backbones.gradient_checkpointing import seed
from mlx_retrieval.backbones.hub import read_safetensors
from mlx_retrieval.models import loading
from mlx_retrieval.training import contents, loss_scale
from mlx_retrieval.training.base_trainer import AfterStep, BaseTrainer, due, learning_rate
from mlx_retrieval.training.chat.data import ChatBatches, Counts, Part
from mlx_retrieval.training.chat.tuning import Optimizer, StopTraining, compiled, loss_of, tune
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.state import State
from mlx_retrieval.utils.errors import SettingError, UserError


@dataclass
class ChatState(State):
    """The state of a chat run."""

    before: float | None = None  # validation loss before training
    after: float | None = None  # validation loss at the last evaluation
    data: int = 0  # the checksum of the conversations
    seconds: float = 0.0  # of training, without evaluations and saving
    # Since the last report: loss x trained tokens, trained tokens, real tokens, tokens with padding, seconds.
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    parts: int = 0  # micro-batches of a step, if the device could not compute the run's own
    largest: float = loss_scale.LARGEST[0]  # of the gradients that enter a float16 model, see `value_and_grad`


class Weights(NamedTuple):
    """The trained weights and the optimizer's state of a moment, which later steps leave alone."""

    parameters: dict
    optimizer: dict

    @classmethod
    def of(cls, model: nn.Module, optimizer: Optimizer) -> "Weights":
        return cls(*(tree_map(lambda value: value, tree) for tree in (model.trainable_parameters(), optimizer.state)))


class ChatTrainer(BaseTrainer):
    """The trainer of one chat run.

    Args:
        backbone: prepared by `backbones.lora.adapt`, so that only the weights to train are trainable.
        validation: batches whose loss is measured; None = none.
        folder, save_model: as of `BaseTrainer`.
    """

    def __init__(
        self,
        backbone: Decoder,
        batches: ChatBatches,
        validation: ChatBatches | None,
        settings: Settings,
        save_model: Callable[[Path], None],
    ):
        model = backbone.adapted
        parameters = model.trainable_parameters()
        optimizer = Optimizer(parameters, settings.learning_rate, settings.weight_decay, settings.max_grad_norm)
        super().__init__(model, optimizer, ChatState(data=batches.rows.checksum), settings, save_model)
        self.batches = batches
        self.validation = validation
        # Checkpointed blocks draw their dropout's seeds in Python, which a compiled step would do only once.
        self.compiled = not (settings.grad_checkpoint and settings.lora_dropout)
        self.at_once: int | None = None  # conversations that the device could evaluate, after it failed at more

    # --- steps --------------------------------------------------------------------------------------------------------

    def train(self, last: int, after_step: AfterStep) -> None:
        """Take the steps that follow the state's, up to step `last`, or until `after_step` returns True."""
        while True:
            steps = Steps(self, last, after_step)
            try:
                with compiled(self.compiled):
                    count, per_step = last - self.state.step, self.batches.parts
                    tune(self.model, self.optimizer, steps.parts(), count, per_step, steps, self.state.largest)
                if not steps.overflowed:
                    return
                self.state.largest = loss_scale.LARGEST[1]  # from here on, and the step is repeated
                continue
            except RuntimeError as error:
                if steps.before is None or not (self.weights_in_doubt and device_errors.is_overload(error)):
                    raise
                happened = device_errors.what_happened(error)
            # Outside the handler: the error holds on to everything that the step had computed.
            self._repeat(happened, steps.before)

    def _repeat(self, happened: str, before: Weights) -> None:
        """After an overload, go back to the weights before the step, and take it in twice as many micro-batches.

        Raises UserError if a micro-batch was a single conversation.
        """
        self.recover(happened)
        self.model.update(before.parameters)
        self.optimizer.state = before.optimizer
        self.weights_in_doubt = False
        if self.batches.parts >= self.batches.size:
            raise SettingError(
                "{happened}, on a single conversation; {grad_checkpoint}, a lower {max_length} or a smaller model need "
                "less at once{saved}",
                happened=happened,
                saved=self.save_last_good(),
            )
        self.batches.parts = self.state.parts = min(2 * self.batches.parts, self.batches.size)
        self.reporter.warn(
            f"{happened}: from here on {self.batches.parts} micro-batches a step, and the step is repeated"
        )

    def overflows(self, loss: float) -> bool:
        """Return whether float16 did not hold a step's scaled gradient, and a smaller scale is left to try.

        Such a step has changed no weights.
        """
        is_finite = math.isfinite(self.optimizer.state["grad_norm"].item())
        is_largest = self.state.largest == loss_scale.LARGEST[0]
        return math.isfinite(loss) and not is_finite and is_largest and loss_scale.is_needed(self.model)

    def lighter(self) -> str:
        """Return the flags with which a resumed run does less at once."""
        if self.batches.parts >= self.batches.size:
            return ""
        return f"--gradient-accumulation-steps {min(2 * self.batches.parts, self.batches.size)}"

    def update_state(self, numbers: np.ndarray, loss: float, seconds: float) -> dict | None:
        """Count a step that was taken on the rows `numbers`; return a record if one is due to be reported."""
        settings = self.settings
        state = self.state
        step = state.step + 1
        norm = self.optimizer.state["grad_norm"].item()
        counts = self.batches.counts(numbers)
        trained = 0
        if math.isfinite(loss) and math.isfinite(norm):
            trained = counts.trained
            self.check_weights(step)
        else:
            reason = f"step {step}: loss {loss}, gradient norm {norm}: not finite"
            advice = "A lower {learning_rate} may help if they are sound"
            self.skip_or_refuse(reason, "Conversations", self._not_finite(numbers), advice)
        more = (loss * trained if trained else 0.0, trained, counts.tokens, counts.padded, seconds)
        state.sums = [total + new for total, new in zip(state.sums, more, strict=True)]
        state.step = step
        state.tokens += counts.tokens
        state.seconds += seconds
        if trained:
            self.watch(loss, norm)
        if step == settings.steps or due(step, settings.steps_per_report):
            return self._record(norm)
        return None

    def _record(self, norm: float) -> dict:
        """Return the record of the steps since the last one, as `metrics.jsonl` holds it."""
        total, trained, tokens, padded, seconds = self.state.sums
        self.state.sums = [0.0] * 5
        skipped = {"skipped_batches": self.state.skipped_batches} if self.settings.skip_bad_batches else {}
        return {
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

    def _not_finite(self, numbers: np.ndarray) -> list[str]:
        """Return the places of the conversations whose loss is not finite, or of all in the batch: ten at most."""
        self.model.eval()
        rows = self.batches.rows
        single = ChatBatches(rows, 1, pad_id=self.batches.pad_id)

        def is_finite(i: int) -> bool:
            loss, _ = loss_of(self.model, *single.make([i])[0].arrays)
            return mx.isfinite(loss).item()

        concerned = [i for i in numbers if not is_finite(i)]
        self.model.train()
        return [rows.where(i) for i in (concerned or list(numbers))[:10]]

    # --- evaluations and measurements ---------------------------------------------------------------------------------

    def evaluate(self, step: int) -> dict[str, float]:
        """Report and return the loss on the validation conversations; {} without any."""
        if self.validation is None:
            return {}
        self.reporter.status("evaluating")
        count = self.validation.per_epoch
        count = count if self.settings.val_batches == -1 else min(count, self.settings.val_batches)
        self.model.eval()
        device_memory.bound_cache()
        sums = [self._validation_loss(self.validation.numbers(k)) for k in range(count)]
        device_memory.bound_cache()
        loss = sum(total for total, _ in sums) / sum(trained for _, trained in sums)
        self.model.train()
        if step == 0:
            self.state.before = loss
        else:
            self.state.after = loss
        metrics = {"validation_loss": loss}
        self.reporter.evaluation(step, metrics)
        self.reporter.status("")
        return metrics

    def _validation_loss(self, numbers: np.ndarray) -> tuple[float, int]:
        """Return the sum of losses on the conversations of these numbers, and the number of tokens that it is of."""

        def sums(first: int, last: int) -> tuple[float, int]:
            (part,) = self.validation.make(numbers[first:last])
            loss, trained = loss_of(self.model, *part.arrays)
            return loss.item() * trained.item(), trained.item()

        def overloaded(fewer: int) -> None:
            self.at_once = min(fewer, self.at_once or fewer)

        parts = [*halved(sums, 0, len(numbers), self.at_once, overloaded)]
        return sum(loss for loss, _ in parts), sum(trained for _, trained in parts)

    def probe(self) -> np.ndarray:
        """Return the logits after a few tokens, (V,)."""
        self.model.eval()
        logits = self.model(mx.arange(1, 9)[None])[0, -1].astype(mx.float32)
        self.model.train()
        return np.array(logits)

    def measure_step(self) -> tuple[float, Counts]:
        """Return the seconds of a step on the largest batch, and what that batch holds. Changes weights in memory."""
        numbers = self.batches.longest()
        times = []

        class Stopwatch:
            @staticmethod
            def on_train_loss_report(info: dict) -> None:
                times.append(time.perf_counter())
                if len(times) == 3:
                    raise StopTraining
                mx.reset_peak_memory()  # the first step also compiles

        parts = [part for _ in range(3) for part in self.batches.make(numbers)]
        with compiled(self.compiled):
            tune(self.model, self.optimizer, parts, 3, self.batches.parts, Stopwatch())
        return times[2] - times[1], self.batches.counts(numbers)

    def forget_evaluations(self, changed: set[str]) -> None:
        super().forget_evaluations(changed)
        if contents.VALIDATION in changed:
            self.state.before = self.state.after = None

    # --- resuming -----------------------------------------------------------------------------------------------------

    def load_weights(self, folder: Path) -> None:
        """Load the weights of a saved step."""
        loading.load_trainable(self.model, read_safetensors(folder / loading.ADAPTERS), folder)

    def restore_state(self, state: ChatState) -> None:
        """Continue from this state. UserError if an earlier version began the run with other conversations."""
        if state.data != self.state.data and not (self.folder / contents.FILE).is_file():
            raise UserError(f"--resume: the conversations are not those that the run in {self.folder} was begun with")
        state.data = self.state.data
        self.state = state
        self.batches.parts = max(self.batches.parts, state.parts)

    def check_ranks(self) -> None:
        raise AssertionError("run.prepare refuses chat runs of several ranks")


class Steps:
    """Connects a trainer to mlx-lm's loop, which reads the batches' parts and calls back after each step."""

    def __init__(self, trainer: ChatTrainer, last: int, after_step: AfterStep):
        self.trainer = trainer
        self.last = last
        self.after_step = after_step
        self.numbers: np.ndarray | None = None  # the rows of the step that is being taken
        self.before: Weights | None = None  # as of that step's beginning; None = they would take too much memory
        self.began = 0.0
        self.overflowed = False  # whether the loop ended at a step to be repeated, see `ChatTrainer.overflows`

    def parts(self) -> Iterator[Part]:
        """Yield the parts of every batch to come; mlx-lm asks for one when the step before it is done."""
        trainer = self.trainer
        settings = trainer.settings
        batches = trainer.batches
        self.began = time.perf_counter()
        for step in range(trainer.state.step + 1, self.last + 1):
            trainer.optimizer.learning_rate = learning_rate(settings, step)
            self.numbers = batches.numbers(step - 1)
            # Training all weights, mlx reuses the memory of the old ones for the new ones.
            self.before = None if settings.train_type == "full" else Weights.of(trainer.model, trainer.optimizer)
            trainer.weights_in_doubt = True  # mlx-lm puts the new ones in place before they are computed
            seeds = np.random.SeedSequence(settings.seed * 1_000_003 + step).generate_state(batches.parts)
            for part, value in zip(batches.make(self.numbers), seeds, strict=True):
                seed(int(value))
                yield part

    def on_train_loss_report(self, info: dict) -> None:
        """Called by mlx-lm after each step."""
        self.trainer.weights_in_doubt = False
        device_memory.bound_cache()
        self.overflowed = self.trainer.overflows(info["train_loss"])
        if self.overflowed:
            raise StopTraining
        seconds = time.perf_counter() - self.began
        record = self.trainer.update_state(self.numbers, info["train_loss"], seconds)
        if self.after_step(record) or self.trainer.state.step == self.last:
            raise StopTraining
        self.began = time.perf_counter()
