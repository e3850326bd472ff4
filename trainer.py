"""The training loop: plan, step, schedule, evaluate, save, resume, stop. It knows neither pooling nor prompts.

The loss always sees the whole batch. Rows go through the model in micro-batches; where there are several, the step is
computed by gradient caching (Gao et al. 2021, arXiv 2101.06983) and gives what one big micro-batch would give.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import backend
from backend import UserError, mx, nn

import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

import checkpoint
import memory
import ranks
from batching import pad_rows, plan
from config import Settings
from data_loader import Batch, Batches, pack
from heads import MicroBatch, RetrievalModel
from loop import Loop, State, due, learning_rate, signals
from models.remat import seed as seed_dropout
from passes import Passes, shares
from profiling import Clock
from reporting import Reporter

# Representations (N, ...) of a batch's N texts -> scalar loss. It may have a method `gradient` with the same arguments
# that returns the loss and its gradient by the representations, where it knows a better way than `mx.value_and_grad`.
Objective = Callable[[mx.array, Batch], mx.array]
VALIDATION_BATCHES = 8
PARTS_OF_A_RANK = 2  # micro-batches, at least: of two that differ in size, one rank would have less to do


class Gradient(NamedTuple):
    """What one batch gives."""

    loss: mx.array  # float32 scalar
    gradient: dict  # of the trainable parameters
    representations: mx.array  # (N, ...) float32
    padded_tokens: int  # tokens that went through the backbone once, padding included
    micro_batches: int


def join(parts: Sequence[mx.array], order: np.ndarray) -> mx.array:
    """Representations of micro-batches, (R_i, ...) each, as one array in the batch's order.

    Token representations (R_i, L_i, d) are padded with zeros to the longest.
    """
    if parts[0].ndim == 3:
        longest = max(part.shape[1] for part in parts)
        parts = [mx.pad(part, [(0, 0), (0, longest - part.shape[1]), (0, 0)]) for part in parts]
    return mx.concatenate(parts)[mx.array(np.argsort(order))]


def split(joined: mx.array, parts: Sequence[mx.array], order: np.ndarray) -> list[mx.array]:
    """The rows of a `join`ed array, in the shapes of the micro-batches that they came from."""
    rows = joined[mx.array(order)]
    ends = np.cumsum([len(part) for part in parts])[:-1].tolist()
    return [
        mine[:, : part.shape[1]] if part.ndim == 3 else mine
        for mine, part in zip(mx.split(rows, ends), parts, strict=True)
    ]


class Differentiator:
    """Loss and gradient of whole batches, exact whatever the micro-batches.

    Args:
        model: maps a MicroBatch to representations, one a row.
        objective: the loss of a batch's representations.
        accumulation: cut a batch into at least so many micro-batches; 0 = as many as `budget` asks for.
        budget: most tokens of a micro-batch; 0 = what suits the device. With both, the smaller one counts.
    """

    def __init__(
        self, model: RetrievalModel, objective: Objective, accumulation: int = 0, budget: int = 0, pad_id: int = 0
    ):
        self.model, self.objective, self.passes, self.clock = model, objective, Passes(model), Clock()
        self.accumulation, self.budget, self.pad_id = accumulation, budget, pad_id

    def _budget(self, batch: Batch) -> float:
        """Most tokens that may be in the backbone at once."""
        wanted = self._wanted
        if wanted == 1 and not self.budget:
            return math.inf
        share = -(-batch.tokens // wanted) if wanted else math.inf
        return min(share, self.budget or (math.inf if self.accumulation else backend.MICRO_BATCH_TOKENS))

    @property
    def _wanted(self) -> int:
        """Micro-batches that there have to be at least."""
        return max(self.accumulation, PARTS_OF_A_RANK * ranks.size() if ranks.size() > 1 else 0)

    def _cut(self, batch: Batch) -> tuple[list[MicroBatch], np.ndarray]:
        """The batch's micro-batches, and the order in which they hold its texts."""
        budget = self._budget(batch)
        if budget == math.inf:
            everything = np.arange(len(batch.texts))
            return [pad_rows(batch.texts, everything, self.pad_id)], everything
        while len(index := plan(batch.texts.lengths, budget)) < min(self._wanted, len(batch.texts)):
            budget *= 0.9  # texts that fill a micro-batch alone leave fewer than there should be
        return [pad_rows(batch.texts, part, self.pad_id) for part in index], np.concatenate(index)

    def __call__(self, batch: Batch, seed: int) -> Gradient:
        rows, order = self._cut(batch)
        padded = sum(part.ids.size for part in rows)
        seeds = np.random.SeedSequence(seed).generate_state(len(rows))
        if len(rows) < ranks.size():
            raise UserError(f"a batch of {len(batch.texts)} texts is too small for {ranks.size()} ranks (--batch-size)")
        # What has room at once needs no second pass; but an objective with a gradient of its own saves memory by it.
        room = padded <= self._budget(batch) and not hasattr(self.objective, "gradient")
        if not self.passes.compiled and (len(rows) == 1 or (room and ranks.size() == 1)):
            loss, gradient, parts = self._plain(rows, seeds, batch, order)
        else:
            loss, gradient, parts = self._cached(rows, seeds, batch, order)
        return Gradient(loss, gradient, join(parts, order), padded, len(rows))

    def _plain(self, rows: list[MicroBatch], seeds: np.ndarray, batch: Batch, order: np.ndarray) -> tuple:
        def loss_of() -> tuple[mx.array, list[mx.array]]:
            parts = []
            for part, seed in zip(rows, seeds, strict=True):
                seed_dropout(int(seed))
                parts.append(self.model(part))
            return self.objective(join(parts, order), batch), parts

        with self.clock("forward, loss, backward"):
            (loss, parts), gradient = nn.value_and_grad(self.model, loss_of)()
            mx.eval(loss, gradient, parts)
        return loss, gradient, parts

    def _cached(self, rows: list[MicroBatch], seeds: np.ndarray, batch: Batch, order: np.ndarray) -> tuple:
        # 1. Representations of all micro-batches, without a gradient; of several ranks, each computes its share.
        whose = shares(rows, ranks.size()) if ranks.size() > 1 else [range(len(rows))]
        mine = whose[ranks.rank()]
        my_rows, my_seeds, kept = [rows[i] for i in mine], [seeds[i] for i in mine], {}
        with self.clock("forward"):
            parts = list(self.passes.representations(my_rows, my_seeds, kept))
        if ranks.size() > 1:
            with self.clock("exchange"):
                parts = ranks.exchange(parts, ranks.shapes_of(parts[0], rows), whose)
        # 2. The loss of the whole batch, and its gradient with respect to the representations.
        gradient_of = getattr(self.objective, "gradient", None) or mx.value_and_grad(self.objective)
        with self.clock("loss"):
            loss, cotangent = gradient_of(join(parts, order), batch)
            cotangents = split(cotangent, parts, order)
            cotangents = [cotangents[i] for i in mine]
            mx.eval(loss, cotangents)
        # 3. Every micro-batch again, under the same dropout, with its share of that gradient.
        with self.clock("backward"):
            gradient = self.passes.gradient(my_rows, my_seeds, cotangents, kept)
        if ranks.size() > 1:
            with self.clock("exchange"):
                gradient = ranks.total(gradient)
        return loss, gradient, parts

    def loss(self, batch: Batch) -> float:
        """The loss alone, without dropout or gradient."""
        rows, order = self._cut(batch)
        return self.objective(join(list(self.passes.representations(rows)), order), batch).item()


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
        self.gradient_of = Differentiator(model, objective, parts, budget, batches.tokenizer.pad_id)
        self.clock = self.gradient_of.clock
        self.optimizer = optim.AdamW(settings.learning_rate, weight_decay=settings.weight_decay, bias_correction=True)
        self.optimizer.init(model.trainable_parameters())
        self.state = State()

    def resume(self, folder: Path) -> None:
        """Continue from a saved step."""
        checkpoint.load_weights(self.model, folder)
        self.state = State(**checkpoint.load_training(folder, self.optimizer))
        self.batches.restore(self.state.cursor, self.state.step)
        memory.recall(self)

    def follow(self) -> None:
        """Take over the state of rank 0, which has resumed, or begun: weights and optimizer where steps were taken."""
        state = ranks.of_first("the state", lambda: asdict(self.state))
        if state["step"]:
            self._take_weights()
        if not ranks.first():
            self.state = State(**state)
            self.batches.restore(self.state.cursor, self.state.step)
            memory.recall(self)

    def _take_weights(self) -> None:
        self.model.update(ranks.arrays_of_first(self.model.trainable_parameters()))
        self.optimizer.state = ranks.arrays_of_first(self.optimizer.state)

    def agree_on_weights(self) -> None:
        """Before a save: where machines of different kinds rounded differently in an update, rank 0's weights count."""
        if ranks.size() == 1 or not due(self.state.step, self.settings.save_steps):
            return
        weights = ranks.digest(dict(tree_flatten(self.model.trainable_parameters())))
        if len(set(ranks.gather("the weights", weights.encode(), patient=True))) > 1:
            self._take_weights()

    def gradient(self, batch: Batch, step: int) -> tuple[Gradient, mx.array]:
        """The gradient of a step, clipped, and its norm before that; nothing is updated."""
        self.model.train()
        if ranks.size() > 1:
            ranks.agree(f"step {step}", {"the batch": ranks.digest(pack(batch))}, patient=True)
        result = memory.differentiate(self, batch, self.settings.seed * 1_000_003 + step)
        with self.clock("optimizer"):
            clipped, norm = optim.clip_grad_norm(result.gradient, self.settings.max_grad_norm or math.inf)
            if self.settings.max_grad_norm:
                result = result._replace(gradient=clipped)
            mx.eval(result.loss, result.gradient, norm)
        return result, norm

    def update(self, batch: Batch, step: int) -> dict:
        """One optimizer step on a batch; returns what is worth reporting of it."""
        rate = learning_rate(self.settings, step)
        result, norm = self.gradient(batch, step)
        loss, norm = result.loss.item(), norm.item()
        if math.isfinite(loss) and math.isfinite(norm):
            with self.clock("optimizer"):
                self.optimizer.learning_rate = rate
                self.optimizer.update(self.model, result.gradient)
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
        with signals(self._note), ranks.rescuing(self.save_last_good), _closing(stream):
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
        if ranks.first() and (state.step == settings.steps or self.stopped_early):
            checkpoint.write_folder(self.folder / "final", self._write)

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
            losses = [self.gradient_of.loss(self.validation.batch(k)) for k in range(count)]
            metrics["validation_loss"] = sum(losses) / len(losses)
        if metrics:
            report.evaluation(step, metrics, tasks)
        report.status("")
        return metrics

    def _skip_or_refuse(self, batch: Batch, step: int, result: Gradient, told: str) -> None:
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
