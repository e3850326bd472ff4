"""Trains retrieval models: the steps of a run. It knows neither pooling nor prompts; run.py decides what happens when.

trainer.update(trainer.batches.batch(0), step=1)

The loss always sees the whole batch. Its texts go through the model in micro-batches; with several of them, the step is
computed by gradient caching (gradient_cache.py) and gives the result of a single large one.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from mlx_retrieval.backend import device_errors, device_memory, mx

import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from data_loader import Batch, Batches, pack
from mlx_retrieval import backend
from mlx_retrieval.backbones.hub import load_strictly, read_safetensors, save_tensors
from mlx_retrieval.models import loading
from mlx_retrieval.models.batching import Texts, pad_rows
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.training import distributed, memory, other_vectors
from mlx_retrieval.training.base_trainer import AfterStep, BaseTrainer, learning_rate
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.evaluations import Evaluations
from mlx_retrieval.training.gradient_cache import GradientCache, Objective, StepResult
from mlx_retrieval.training.guards import Guards
from mlx_retrieval.training.optimizer import AdamW
from mlx_retrieval.training.state import State
from mlx_retrieval.utils.errors import SettingError

VALIDATION_BATCHES = 8


class Trainer(BaseTrainer):
    """The trainer of one run.

    Args:
        model, folder, save_model: as of `BaseTrainer`.
        batches: `stream(first, last)` gives the batches of steps first+1 to last.
        objective: see `Objective`.
        evaluations: evaluates the model at a step; None = no evaluation.
        guards: evaluates the model on the tasks that it must not get worse at; None = there are none.
        validation: batches whose loss is reported at every evaluation; None = none.
        validation_objective: gives that loss; None = `objective`.
        probe_texts: texts whose representations are compared before and after training; None = none.
    """

    def __init__(
        self,
        model: RetrievalModel,
        batches: Batches,
        objective: Objective,
        settings: Settings,
        save_model: Callable[[Path], None],
        evaluations: Evaluations | None = None,
        guards: Guards | None = None,
        validation: Batches | None = None,
        validation_objective: Objective | None = None,
        probe_texts: Texts | None = None,
    ):
        parameters, compiled = model.trainable_parameters(), backend.IS_GPU and backend.compiles(settings.compile)
        optimizer = AdamW(parameters, settings.learning_rate, settings.weight_decay, compiled)
        super().__init__(model, optimizer, State(), settings, save_model)
        self.batches = batches
        self.evaluations = evaluations
        self.guards = guards
        self.validation = validation
        self.validation_objective = validation_objective
        self.probe_texts = probe_texts
        budget = settings.micro_batch_tokens
        self.grad_cache = GradientCache(
            model,
            objective,
            accumulation=settings.gradient_accumulation_steps,
            budget=0 if budget == "auto" else budget,  # `fit_memory` chooses it
            pad_id=batches.tokenizer.pad_id,
            compile=settings.compile,
        )
        self.clock = self.grad_cache.clock

    # --- steps --------------------------------------------------------------------------------------------------------

    def train(self, last: int, after_step: AfterStep) -> None:
        """Take the steps that follow the state's, up to step `last`, or until `after_step` returns True."""
        with closing(self.batches.stream(self.state.step, last)) as stream:
            begin = time.perf_counter()
            for batch in stream:
                record = self.update(batch, self.state.step + 1)
                seconds = time.perf_counter() - begin
                record |= {
                    "seconds": seconds,
                    "tokens_per_second": batch.tokens / seconds,
                    "peak_memory_bytes": backend.peak_memory(),
                }
                if after_step(record):
                    break
                begin = time.perf_counter()

    def update(self, batch: Batch, step: int) -> dict:
        """Take one optimizer step on a batch. Return a record of it, as `metrics.jsonl` holds it."""
        rate = learning_rate(self.settings, step)
        result, norm = self.compute_grads(batch, step)
        loss = result.loss.item()
        norm = norm.item()
        if math.isfinite(loss) and math.isfinite(norm):
            with self.clock("optimizer"), self.changing_weights():
                self.optimizer.learning_rate = rate
                self.optimizer.update(self.model, result.grads)
                mx.eval(self.model.trainable_parameters(), self.optimizer.state)
                self.check_weights(step)
                if self.average:
                    self.average.update(self.model.trainable_parameters(), self.optimizer.state, step)
        else:
            reason = f"step {step}: loss {loss}, gradient norm {norm}: not finite"
            advice = "A lower {learning_rate} or a higher {temperature} may help if the rows are sound"
            self.skip_or_refuse(reason, "Examples", self._not_finite(batch, result), advice)
        device_memory.bound_cache()
        self.state.step = step
        self.state.tokens += batch.tokens
        self.state.cursor = self.batches.cursor(step)
        if math.isfinite(loss) and math.isfinite(norm):
            self.watch(loss, norm)
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

    def compute_grads(self, batch: Batch, step: int) -> tuple[StepResult, mx.array]:
        """Return loss and gradient of a step, clipped, and the gradient's norm before clipping. Update nothing."""
        self.model.train()
        if distributed.size() > 1:
            distributed.check_equal(f"step {step}", {"the batch": distributed.digest(pack(batch))}, patient=True)
        result = self._grads_within_memory(batch, self.settings.seed * 1_000_003 + step)
        with self.clock("optimizer"):
            clipped, norm = optim.clip_grad_norm(result.grads, self.settings.max_grad_norm or math.inf)
            if self.settings.max_grad_norm:
                result = result._replace(grads=clipped)
            mx.eval(result.loss, result.grads, norm)
        return result, norm

    def _not_finite(self, batch: Batch, result: StepResult) -> list[str]:
        """Return the places of the rows whose representations are not finite, or of all rows: ten at most."""
        finite = np.array(mx.isfinite(result.representations.reshape(len(batch.texts), -1)).all(axis=1))
        concerned = {int(row) for text in np.flatnonzero(~finite) for row in batch.rows_with(text)}
        rows = sorted(concerned or {int(row) for row in batch.rows})
        places = [self.batches.rows.where(row) for row in rows[:10]]
        return [*places, f"and {len(rows) - 10} more"] if len(rows) > 10 else places

    # --- memory -------------------------------------------------------------------------------------------------------

    def fit_memory(self) -> memory.Fit:
        """Choose the budget of the steps by the memory that is free: with --micro-batch-tokens auto, and on Metal."""
        mx.eval(self.optimizer.state)  # else it would be counted as what a step takes
        samples = [self.batches.batch(k) for k in self.batches.sample_numbers(memory.SAMPLES)]
        settings = self.settings
        open_ended = settings.micro_batch_tokens == "auto" or settings.gradient_accumulation_steps
        fit = memory.fit(self.grad_cache, samples, memory.most() if open_ended else backend.MICRO_BATCH_TOKENS)
        self.state.micro_batch_tokens = fit.budget
        return fit

    def _grads_within_memory(self, batch: Batch, seed: int) -> StepResult:
        """Return `grad_cache(batch, seed)`, repeated with half the budget while the device reports an overload.

        Raises UserError if not even a single text fits; on several ranks RuntimeError, as they would no longer agree.
        """
        cache = self.grad_cache
        while True:
            try:
                return cache(batch, seed)
            except RuntimeError as error:
                if not device_errors.is_overload(error) or distributed.size() > 1:
                    raise
                happened = device_errors.what_happened(error)
            # Outside the handler: the error holds on to everything that the step had computed.
            self.recover(happened)
            share = -(-batch.tokens // cache.accumulation) if cache.accumulation else backend.MICRO_BATCH_TOKENS
            budget = min(cache.budget or share, batch.tokens) // 2
            if budget < batch.texts.lengths.max() // 2 or budget == 0:
                raise SettingError(
                    "{happened}, on a single text; {grad_checkpoint}, a lower {max_length} or a smaller model need "
                    "less at once{saved}",
                    happened=happened,
                    saved=self.save_last_good(),
                )
            cache.budget = self.state.micro_batch_tokens = budget
            self.reporter.warn(f"{happened}: from here on {budget:,} tokens at once, and the step is repeated")

    def lighter(self) -> str:
        """Return the flags with which a resumed run does half as much at once; "" before the first batch."""
        at_once = self.grad_cache.at_once
        return f"--micro-batch-tokens {max(1, at_once // 2)}" if at_once else ""

    def restore_budget(self) -> None:
        """After a resume, use the budget that the run had come to, so that it goes on bit for bit, or a lower one."""
        if saved := self.state.micro_batch_tokens:
            budget = min(saved, self.grad_cache.budget or saved)
            self.grad_cache.budget = self.state.micro_batch_tokens = budget

    # --- evaluations --------------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> dict[str, float]:
        """Report and return the metrics averaged over the tasks, and the loss on the validation rows; {} without."""
        self.model.eval()
        self.reporter.status("evaluating")
        metrics = {}
        tasks = {}
        if self.evaluations:
            result = self.evaluations(step)
            for line in result.unreachable.values():
                self.reporter.warn(line)
            metrics = dict(result.average())
            tasks = result.tasks
        if self.validation:
            count = min(VALIDATION_BATCHES, len(self.validation.rows) // self.validation.size)
            batches = map(self.validation.batch, range(count))
            losses = [self.grad_cache.loss(batch, self.validation_objective) for batch in batches]
            metrics["validation_loss"] = sum(losses) / len(losses)
        changes = {}
        if self.guards:
            for line in self.guards(step).unreachable.values():
                self.reporter.warn(line)
            changes, self.state.fallen = self.guards.changes(), self.guards.fallen()
        if metrics:
            self.reporter.evaluation(step, metrics, tasks, changes, self.state.fallen)
        self.reporter.status("")
        return metrics

    def keep_best(self, metrics: dict[str, float]) -> None:
        """Note an evaluation, and save the model to `best` if it is better than untrained and at all steps before."""
        super().keep_best(metrics)
        if 0 < self.state.step == self.state.best_step:
            for evaluations in filter(None, (self.evaluations, self.guards)):
                evaluations.keep_best()

    def probe(self) -> np.ndarray | None:
        """Return the representations of the probe's texts, as one row (N,)."""
        if self.probe_texts is None:
            return None
        self.model.eval()
        rows = pad_rows(self.probe_texts, np.arange(len(self.probe_texts)), self.batches.tokenizer.pad_id)
        (representations,) = self.grad_cache.runner.representations([rows])
        return np.array(representations.astype(mx.float32)).ravel()

    # --- resuming, and several ranks ----------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """See `BaseTrainer`; the projection to a teacher's vectors, no part of the model, has a file of its own."""
        super().write(folder)
        if "projection" in self.model:
            tensors = dict(tree_flatten(self.model.projection.parameters()))
            save_tensors(folder / other_vectors.PROJECTION, tensors)

    def load_weights(self, folder: Path) -> None:
        """Load the weights of a saved step."""
        loading.load_weights(self.model, folder)
        if "projection" in self.model:
            file = folder / other_vectors.PROJECTION
            load_strictly(self.model.projection, read_safetensors(file), file)

    def restore_state(self, state: State) -> None:
        """Continue from this state: its place in the data, and its budget."""
        self.state = state
        self.batches.restore(state.cursor, state.step)
        self.restore_budget()

    def check_ranks(self) -> None:
        """Raise RankMismatch on all ranks if their settings, data or models differ; take the smallest budget of all."""
        distributed.check_equal("the settings", self.settings.to_dict())
        budget = distributed.all_min("the memory", self.grad_cache.budget or memory.UNLIMITED)[0]
        self.grad_cache.budget = 0 if budget == memory.UNLIMITED else budget
        if not self.settings.micro_batch_tokens or self.settings.micro_batch_tokens == "auto":
            self.state.micro_batch_tokens = self.grad_cache.budget
        data = {
            "the number of rows": len(self.batches.rows),
            "the first batch": distributed.digest(pack(self.batches.batch(0))),
            **{name: files[0].digest for name, files in other_vectors.contents(self.settings).items()},
        }
        distributed.check_equal("the data", data)
        weights = dict(tree_flatten(self.model.parameters()))
        distributed.check_equal("the model", {"its weights": distributed.digest(weights)})
