"""The training loop: plan, step, schedule, evaluate, save, resume, stop. It knows neither pooling nor prompts.

The loss always sees the whole batch. Rows go through the model in micro-batches; where there are several, the step is
computed by gradient caching (Gao et al. 2021, arXiv 2101.06983) and gives what one big micro-batch would give.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from mlx_retrieval.backend import mx

import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from data_loader import Batch, Batches, pack
from mlx_retrieval import backend
from mlx_retrieval.models import loading
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.training import checkpoint, distributed, memory
from mlx_retrieval.training.base_trainer import Loop, State, due, learning_rate, signals
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.gradient_cache import GradientCache, Objective, StepResult
from mlx_retrieval.training.reporting import Reporter
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError

SHORTAGE = ("out of memory", "outofmemory", "insufficient memory", "unable to allocate", "attempting to allocate")

VALIDATION_BATCHES = 8


class Trainer(Loop):
    """One run.

    Args:
        model: prepared by `models.lora.adapt`, so that only what is to be trained is trainable.
        batches: `stream(first, last)` gives the batches of steps first+1 to last.
        objective: see `Objective`.
        folder: the run's folder.
        save_model: writes what use of the model needs into a folder that is given to it.
        evaluate: gives an `eval.Evaluation` of the model as it stands at a step; None = no evaluation.
        validation: batches whose loss is reported at every evaluation.
    """

    def __init__(
        self,
        model: RetrievalModel,
        batches: Batches,
        objective: Objective,
        settings: Settings,
        folder: Path,
        save_model: Callable[[Path], None],
        evaluate: Callable[[int], "Evaluation"] | None = None,  # noqa: F821  (eval.py stands above this file)
        validation: Batches | None = None,
    ):
        self.model, self.batches, self.settings, self.folder = model, batches, settings, folder
        self.save_model, self.evaluate, self.validation = save_model, evaluate, validation
        parts, budget = settings.gradient_accumulation_steps, settings.micro_batch_tokens
        budget = 0 if budget == "auto" else budget  # then memory.fit chooses
        self.grad_cache = GradientCache(model, objective, parts, budget, batches.tokenizer.pad_id)
        self.clock = self.grad_cache.clock
        self.optimizer = optim.AdamW(settings.learning_rate, weight_decay=settings.weight_decay, bias_correction=True)
        self.optimizer.init(model.trainable_parameters())
        self.state = State()

    def resume(self, folder: Path) -> None:
        """Continue from a saved step."""
        loading.load_weights(self.model, folder)
        self.state = State(**checkpoint.load_training(folder, self.optimizer))
        self.batches.restore(self.state.cursor, self.state.step)
        recall(self)

    def follow(self) -> None:
        """Take over the state of rank 0, which has resumed, or begun: weights and optimizer where steps were taken."""
        state = distributed.broadcast_object("the state", lambda: asdict(self.state))
        if state["step"]:
            self._take_weights()
        if not distributed.is_main():
            self.state = State(**state)
            self.batches.restore(self.state.cursor, self.state.step)
            recall(self)

    def _take_weights(self) -> None:
        self.model.update(distributed.broadcast_arrays(self.model.trainable_parameters()))
        self.optimizer.state = distributed.broadcast_arrays(self.optimizer.state)

    def agree_on_weights(self) -> None:
        """Before a save: where machines of different kinds rounded differently in an update, rank 0's weights count."""
        if distributed.size() == 1 or not due(self.state.step, self.settings.save_steps):
            return
        weights = distributed.digest(dict(tree_flatten(self.model.trainable_parameters())))
        if len(set(distributed.gather_bytes("the weights", weights.encode(), patient=True))) > 1:
            self._take_weights()

    def compute_grads(self, batch: Batch, step: int) -> tuple[StepResult, mx.array]:
        """The gradient of a step, clipped, and its norm before that; nothing is updated."""
        self.model.train()
        if distributed.size() > 1:
            distributed.check_equal(f"step {step}", {"the batch": distributed.digest(pack(batch))}, patient=True)
        result = differentiate(self, batch, self.settings.seed * 1_000_003 + step)
        with self.clock("optimizer"):
            clipped, norm = optim.clip_grad_norm(result.grads, self.settings.max_grad_norm or math.inf)
            if self.settings.max_grad_norm:
                result = result._replace(grads=clipped)
            mx.eval(result.loss, result.grads, norm)
        return result, norm

    def update(self, batch: Batch, step: int) -> dict:
        """One optimizer step on a batch; returns what is worth reporting of it."""
        rate = learning_rate(self.settings, step)
        result, norm = self.compute_grads(batch, step)
        loss, norm = result.loss.item(), norm.item()
        if math.isfinite(loss) and math.isfinite(norm):
            with self.clock("optimizer"):
                self.optimizer.learning_rate = rate
                self.optimizer.update(self.model, result.grads)
                mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        else:
            self._skip_or_refuse(batch, step, result, f"step {step}: loss {loss}, gradient norm {norm}: not finite")
        if self.settings.micro_batch_tokens != "auto":  # which has bounded it before
            memory.bound_cache()
        self.state.step, self.state.tokens = step, self.state.tokens + batch.tokens
        self.state.cursor = self.batches.cursor(step)
        skipped = {"skipped_batches": self.state.skipped_batches} if self.settings.skip_bad_batches else {}
        return {
            "step": step,
            "epoch": round(step * self.batches.size / len(self.batches.rows), 4),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": batch.tokens,
            "padding": 1 - batch.tokens / result.padded_tokens,
            "micro_batches": result.micro_batches,
            **skipped,
        }

    def run(self, report: Reporter) -> None:
        """Train from the state's step to the last one. Raises Stopped after a signal, UserError on sick numbers."""
        settings, state, self._report = self.settings, self.state, report
        last = state.step if self.stopped_early else min(settings.steps, settings.stop_after or settings.steps)
        stream = self.batches.stream(state.step, last)
        mx.reset_peak_memory()  # loading is over
        with signals(self._note), distributed.rescuing(self.save_last_good), _closing(stream):
            begin = time.perf_counter()
            for batch in stream:
                metrics = self.update(batch, state.step + 1)
                now = time.perf_counter()
                metrics |= {
                    "seconds": now - begin,
                    "tokens_per_second": batch.tokens / (now - begin),
                    "peak_memory_bytes": backend.peak_memory(),
                }
                report.step(metrics)
                finished = state.step == settings.steps
                stop = self.decide(self._evaluate_if_due(report, finished))
                self.agree_on_weights()
                self.save_if_due(last, finished or stop)
                if stop:
                    report.message(f"no better for {settings.early_stopping} evaluations: stopped at step {state.step}")
                    break
                begin = time.perf_counter()
        if distributed.is_main() and (state.step == settings.steps or self.stopped_early):
            files.write_folder(self.folder / "final", self._write)

    def measure(self, step: int, report: Reporter) -> dict[str, float]:
        """Evaluate as the model stands: metrics averaged over the tasks, and the loss on the validation rows."""
        self.model.eval()
        report.status("evaluating")
        metrics, tasks = {}, {}
        if self.evaluate:
            result = self.evaluate(step)
            for line in result.unreachable.values():
                report.warn(line)
            metrics, tasks = dict(result.average()), result.tasks
        if self.validation:
            count = min(VALIDATION_BATCHES, len(self.validation.rows) // self.validation.size)
            losses = [self.grad_cache.loss(self.validation.batch(k)) for k in range(count)]
            metrics["validation_loss"] = sum(losses) / len(losses)
        if metrics:
            report.evaluation(step, metrics, tasks)
        report.status("")
        return metrics

    def _skip_or_refuse(self, batch: Batch, step: int, result: StepResult, told: str) -> None:
        """Count a batch with sick numbers, or save the last good state and end the run; say which examples it was."""
        finite = np.array(mx.isfinite(result.representations.reshape(len(batch.texts), -1)).all(axis=1))
        sick = {int(row) for text in np.flatnonzero(~finite) for row in batch.rows_with(text)}
        rows = sorted(sick or {int(row) for row in batch.rows})
        named = [self.batches.rows.where(row) for row in rows[:10]]
        named += [f"and {len(rows) - 10} more"] if len(rows) > 10 else []
        if self.settings.skip_bad_batches:
            self.state.skipped_batches += 1
            self.warn(f"{told}; the batch is skipped. Examples concerned: {', '.join(named)}")
            return
        named = "\n  ".join(named)
        raise UserError(
            f"{told}{self.save_last_good()}. Examples concerned:\n  {named}\n"
            "A lower --learning-rate or a higher --temperature may help if the rows are sound; "
            "--skip-bad-batches leaves such batches out."
        )


@contextmanager
def _closing(stream: Iterator) -> Iterator[None]:
    try:
        yield
    finally:
        stream.close()


def trainable(model: RetrievalModel) -> int:
    """Number of trainable parameters."""
    return sum(value.size for _, value in tree_flatten(model.trainable_parameters()))


def differentiate(trainer: "Trainer", batch, seed: int) -> StepResult:
    """`trainer.grad_cache(batch, seed)`, again with half the budget where memory runs out.

    UserError where not even single texts find room, and RuntimeError on several ranks, which would no longer agree.
    """
    step = trainer.grad_cache
    while True:
        try:
            return step(batch, seed)
        except RuntimeError as error:
            if not is_shortage(error) or distributed.size() > 1:
                raise
            reason = str(error).strip().splitlines()[0]
        # Not in the handler: the error holds on to all that the step had computed.
        try:
            mx.clear_cache()
        except RuntimeError as error:  # seen with CUDA, where other processes had the rest of the card's memory
            raise UserError(
                f"memory ran out ({reason}), and this process can no longer use the device ({error}). Free some of its "
                "memory and continue from what was saved last with --resume"
            ) from error
        share = -(-batch.tokens // step.accumulation) if step.accumulation else backend.MICRO_BATCH_TOKENS
        budget = min(step.budget or share, batch.tokens) // 2
        if budget < batch.texts.lengths.max() // 2 or budget == 0:
            raise UserError(
                f"memory ran out on a single text ({reason}); --grad-checkpoint, a lower --max-length or a smaller "
                f"model need less{trainer.save_last_good()}"
            )
        step.budget = trainer.state.micro_batch_tokens = budget
        trainer.warn(f"memory ran out ({reason}): from here on {budget:,} tokens at once, and the step is repeated")


def recall(trainer: "Trainer") -> None:
    """After a resume: the budget that the run had come to, so that it goes on bit for bit, unless less has room now."""
    known = [budget for budget in (trainer.grad_cache.budget, trainer.state.micro_batch_tokens) if budget]
    if trainer.state.micro_batch_tokens:
        trainer.grad_cache.budget = trainer.state.micro_batch_tokens = min(known)


def is_shortage(error: RuntimeError) -> bool:
    """Whether this is Metal's or CUDA's word that memory ran out. On CPUs mlx crashes then, or is killed."""
    told = str(error).lower()
    return any(words in told for words in SHORTAGE)
