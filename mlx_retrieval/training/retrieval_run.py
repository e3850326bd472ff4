"""Prepares the run of a retrieval model, embed, late or rerank: checks, loads, wires. run.py carries it out.

run = prepare(settings)                             # nothing is written yet
run.trainer.update(run.trainer.batches.batch(0), 1)
"""

import dataclasses
import math
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlx_retrieval.backend import mx

from mlx_retrieval import backend
from mlx_retrieval.backbones import count_parameters, dequantized
from mlx_retrieval.backbones.gradient_checkpointing import checkpoint_blocks, seed
from mlx_retrieval.dataset.sources import InterleavedRows
from mlx_retrieval.evaluation import pairs
from mlx_retrieval.evaluation.retrieval import load_tasks
from mlx_retrieval.models import loading
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training import contents, distributed, guards, improvement, nothing_learnt, other_vectors
from mlx_retrieval.training.checkpoint import GUARDS, HELD_OUT
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.contents import (
    ADAPTER,
    BASE,
    EVALUATION,
    VALIDATION,
    Contents,
    base_contents,
    evaluation_contents,
)
from mlx_retrieval.training.defaults import resolve_defaults
from mlx_retrieval.training.estimate import here
from mlx_retrieval.training.estimate_job import retrieval_job, samples
from mlx_retrieval.training.evaluations import Evaluations
from mlx_retrieval.training.example_rows import example_lines
from mlx_retrieval.training.guards import Guards
from mlx_retrieval.training.headline import first_lines, machine_lines
from mlx_retrieval.training.length import length_warnings, resolve_length
from mlx_retrieval.training.memory_lines import Outlook, decides
from mlx_retrieval.training.mixtures import objective_of, parts_of
from mlx_retrieval.training.objectives import check_normalized, make_objective
from mlx_retrieval.training.profiling import profile
from mlx_retrieval.training.report import Report, add_survey, loss_report, retrieval_report
from mlx_retrieval.training.report_facts import evaluation_flags, model_defaults, model_values
from mlx_retrieval.training.rerank_batches import check_random_negatives, takes_random_negatives
from mlx_retrieval.training.run_data import RunData, open_data
from mlx_retrieval.training.run_parts import build_model, make_batches, make_evaluator
from mlx_retrieval.training.settings_file import write_yaml
from mlx_retrieval.training.starting_model import StartingModel
from mlx_retrieval.training.starting_model import find as find_start
from mlx_retrieval.training.trainer import Trainer
from mlx_retrieval.utils.console import Lines, print_lines
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import located, quantity, shell


@dataclass
class RetrievalRun:
    """A run that trains a retrieval model; see `run.Run`."""

    settings: Settings
    trainer: Trainer
    data: RunData
    evaluations: Evaluations | None
    guards: Guards | None
    retrieval: RetrievalConfig
    start: StartingModel
    base: Path  # the base model's folder
    outlook: Outlook
    headline: Lines

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.settings.folder

    def measure(self) -> dict:
        """For --dry-run and --profile: measure steps, print and return the figures. Write nothing."""
        if self.settings.dry_run:
            return self._dry_run()
        with tempfile.TemporaryDirectory() as folder:
            self.data.keep(Path(folder))
            return profile(self.trainer, self.evaluations and self.evaluations.evaluate)

    def _dry_run(self) -> dict:
        """Measure one step on the first batch, and print what the whole run would take. Change nothing."""
        trainer = self.trainer
        settings = self.settings
        samples = [trainer.batches.batch(k) for k in trainer.batches.sample_numbers(1)]
        batch = max(samples, key=lambda batch: batch.texts.lengths.max())  # of the source with the longest texts
        trainer.compute_grads(batch, 1)  # the first call also compiles and allocates
        mx.reset_peak_memory()
        began = time.perf_counter()
        result, _ = trainer.compute_grads(batch, 1)
        seconds = time.perf_counter() - began
        peak = backend.peak_memory()
        texts = len(batch.texts)
        longest = int(batch.texts.lengths.max())
        plan = {
            "texts": texts,
            "tokens": batch.tokens,
            "padding": 1 - batch.tokens / result.padded_tokens,
            "micro_batches": result.micro_batches,
            "seconds_per_step": seconds,
            "tokens_per_second": batch.tokens / seconds,
            "seconds": seconds * settings.steps,
            "peak_memory_bytes": peak,
            "estimated_memory_bytes": self.outlook.expected.total,
            "loss": result.loss.item(),
        }
        minutes, rest = divmod(round(plan["seconds"]), 60)
        print_lines(
            [
                (
                    "first batch" if len(samples) == 1 else "longest",
                    f"{quantity(texts, 'distinct text')}, {batch.tokens:,} tokens, longest {longest}",
                ),
                ("plan", f"{quantity(result.micro_batches, 'micro-batch')}, {plan['padding']:.1%} padding"),
                ("one step", f"{seconds:.2f} s = {plan['tokens_per_second']:,.0f} tokens/s, loss {plan['loss']:.4f}"),
                *self.outlook.measured_lines(peak),
                ("all steps", f"{minutes} min {rest} s for {quantity(settings.steps, 'step')}{self._evaluations()}"),
                ("dry run", "nothing was trained or written"),
            ]
        )
        return plan

    def _evaluations(self) -> str:
        """Return which evaluations a time without them leaves out, in words."""
        if not self.evaluations:
            return ""
        settings = self.settings
        every = settings.steps_per_evaluation or settings.steps
        count = math.ceil(settings.steps / every) + (not settings.skip_eval_init)
        return f", without the run's {quantity(count, 'evaluation')}"

    def begin(self) -> None:
        """Write into the run's folder what its steps need: the held-out questions."""
        self.data.keep(self.folder)
        if self.evaluations:
            self.evaluations.folder = self.folder  # another one than planned, if a run came there meanwhile
        if self.guards:
            self.guards.folder = self.folder / GUARDS

    def contents(self) -> Contents:
        """Return what the run's data, evaluation and base model hold."""
        trainer = self.trainer
        return {
            "data": trainer.batches.rows.contents(),
            VALIDATION: trainer.validation.rows.contents() if trainer.validation else [],
            EVALUATION: evaluation_contents(self.data.eval_tasks),
            contents.GUARDS: evaluation_contents(self.settings.guard),
            BASE: base_contents(self.base, self.folder),
            ADAPTER: self.start.contents(),
            **other_vectors.contents(self.settings),
        }

    def renew(self, changed: set[str]) -> None:
        """Before the weights of a resumed run are loaded, judge the model that it began with on guards that are new."""
        if self.guards and (contents.GUARDS in changed or not self.guards.has_reference):
            self.trainer.model.eval()
            self.guards.forget()
            self.guards(0)

    def restore(self, changed: set[str]) -> None:
        """Before a resumed run continues, read back its evaluations, unless they were of other data."""
        state = self.trainer.state
        if self.evaluations and EVALUATION in changed:
            self.evaluations.forget()
        elif self.evaluations:
            self.evaluations.restore(state.best_step, state.step)
        if self.guards:
            self.guards.restore(state.best_step, state.step)

    def results(self) -> dict:
        """Return the content of `results.json`: metrics before and after, averaged over the tasks."""
        results = self.evaluations.results() if self.evaluations else {"before": None, "after": None}
        if self.guards:
            results["guards"] = self.guards.results()
        if self.settings.skip_bad_batches:
            results["skipped_batches"] = self.trainer.state.skipped_batches
        return results

    def print_results(self) -> str:
        """Print the table of metrics that ends a run; return its verdict."""
        if not self.evaluations:
            return ""
        self.evaluations.print()
        if self.guards:
            self.guards.print()
        return self.evaluations.verdict()

    def report(self) -> Report | None:
        """Return what `report.html` says of the run's evaluations and data; None if nothing was evaluated."""
        evaluations, settings = self.evaluations, self.settings
        if evaluations and evaluations.after:
            tasks, _ = load_tasks(self.data.eval_tasks, rules=settings.folder_rules)
            step, after = evaluations.after
            report = retrieval_report(evaluations.before, after, tasks, evaluations.first_stage)
            report.step, report.eval_tasks = step, self.data.eval_tasks
            if line := evaluations.last_line():
                report.notes.append(f"The last step is not the best one: {line}.")
        elif self.trainer.validation:
            report = loss_report(self.folder)
        else:
            return None
        if self.guards:
            rows = [f"{task} {before} → {after} ({change})" for task, before, after, change, _ in self.guards.rows()]
            report.notes.append(
                f"Guards, {self.guards.label}: {', '.join(rows)}; each may lose {settings.guard_tolerance:g}."
            )
        add_survey(report, settings, self.trainer.batches, self.retrieval.task)
        parameters = count_parameters(self.trainer.model)[0]
        report.defaults = model_defaults(settings, parameters, self.retrieval.reranker)
        report.of_model = model_values(self.retrieval)
        return report

    def next_lines(self) -> Lines:
        """Return (name, text) lines about using the trained model."""
        model = improvement.model_to_use(self.folder)
        folders = [Path(task) for task in self.data.eval_tasks]
        corpora = [folder / "corpus.jsonl" for folder in folders if (folder / "corpus.jsonl").is_file()]
        lines = []
        if folders == [self.folder / HELD_OUT]:
            again = (
                "python",
                "eval.py",
                "--model",
                model,
                "--eval-tasks",
                folders[0],
                *evaluation_flags(self.settings),
            )
            lines.append(("evaluate", shell(*again)))
        texts, where = (located(corpora[0]), "") if corpora else ("FILE", "  # FILE: texts of your own")
        if self.retrieval.task == "rerank":
            use = ("python", "rerank.py", "--model", model, "--query", "your question", "--documents", texts)
        else:
            use = ("python", "embed.py", "--model", model, "--input", texts, "--output", "vectors.npy")
        return [*lines, ("next", shell(*use) + where)]


def foresee(settings: Settings, data: RunData, start: StartingModel) -> Outlook:
    """Return what the run will take, before any weight is read. UserError as `prepare`.

    Sets what quantised weights are computed with, where the settings leave that to the memory there is, so that a
    resumed run computes as it was begun.
    """
    rows = data.rows
    model, retrieval, base = build_model(settings, start, fingerprint=False)
    settings.check_task(retrieval.task)
    resolved = dataclasses.replace(settings)
    resolve_defaults(resolved, 0, retrieval.reranker)
    tokenizer = retrieval.tokenizer(base)  # before those of sources: the run's limits are no fault of the first
    parts = parts_of(resolved, retrieval, base, rows, model.backbone.max_positions)
    batches = make_batches(resolved, retrieval, rows, tokenizer, settings.batch_size, parts=parts)
    way = dequantized.way(model.backbone)
    outlook = Outlook.of(retrieval_job(settings, model, retrieval, base, samples(batches), data.eval_tasks))
    if settings.dequantize == "auto" and way in ("on", "blocks"):
        fitting = "blocks" if outlook.is_tight else way
        settings.dequantize = distributed.broadcast_object("the weights to compute with", lambda: fitting)
        if settings.dequantize != way:
            return foresee(settings, data, start)
    return outlook


def prepare(settings: Settings) -> RetrievalRun:
    """Check everything that can be checked, load the model and wire the trainer. UserError for any mistake."""
    start = find_start(settings)
    data = open_data(settings)
    rows = data.rows
    resolve_length(settings, len(rows) / min(settings.batch_size, len(rows)))
    outlook = foresee(settings, data, start)
    print_lines(outlook.lines())
    seed(settings.seed)  # a fresh projection
    model, retrieval, base = build_model(settings, start)
    settings.dtype = retrieval.dtype
    settings.check_task(retrieval.task)
    if start.adapter:
        settings.matryoshka_dims = settings.matryoshka_dims or retrieval.matryoshka_dims
    if too_long := [d for d in settings.matryoshka_dims if d > retrieval.dimensions]:
        raise UserError(f"--matryoshka-dims {too_long[0]}: the model's vectors have {retrieval.dimensions} dimensions")
    if settings.matryoshka_dims and retrieval.task == "embed":
        check_normalized("matryoshka_dims", retrieval)
    seed(settings.seed)  # fresh LoRA weights
    adapter_config = start.adapt(model.backbone, settings)
    if retrieval.task == "rerank" or (settings.train_type == "full" and settings.num_layers == -1):
        model.head.unfreeze()
    defaults = resolve_defaults(settings, count_parameters(model)[0], retrieval.reranker)
    if settings.grad_checkpoint:
        checkpoint_blocks(model.backbone)
    if retrieval.task != "rerank":
        data.leave_out_validation(settings)
    tokenizer = retrieval.tokenizer(base)
    parts = parts_of(settings, retrieval, base, rows, model.backbone.max_positions)
    learnt = [(part.settings, part.rows) for part in parts] or [(settings, rows)]
    if settings.random_negatives:
        check_random_negatives([(its_rows, own.loss) for own, its_rows in learnt])
    learnt += [(settings, data.validation)] if data.validation else []
    vectors = other_vectors.open_vectors(settings, learnt, retrieval.dimensions)
    if vectors.projection:
        model.projection = vectors.projection  # trained with the model, and saved beside it
    if parts:
        objective = objective_of(parts, settings, retrieval, vectors)
    else:
        objective = make_objective(settings, retrieval, tokenizer, rows, vectors)
    batches = make_batches(settings, retrieval, rows, tokenizer, settings.batch_size, settings.seed, parts)
    validation = of_validation = None
    if data.validation:
        validation = make_batches(settings, retrieval, data.validation, tokenizer, settings.batch_size)
        of_validation = make_objective(settings, retrieval, tokenizer, data.validation, vectors)
    evaluated = bool(data.eval_tasks or validation)
    improvement.check_evaluated(settings, evaluated)
    guards.check(settings, data, evaluated)

    def save_model(target: Path) -> None:
        loading.save_model(target, model, adapter_config, retrieval)
        write_yaml(settings, target / "config.yaml")

    evaluations = guarding = None
    make = partial(make_evaluator, settings, model=model, retrieval=retrieval, tokenizer=tokenizer)
    if data.eval_tasks and distributed.is_main():
        evaluations = Evaluations(make(lambda: data.eval_tasks), settings.folder)
    if settings.guard and distributed.is_main():
        guarding = Guards(make(lambda: settings.guard), settings.folder, settings.guard_tolerance)
    one, other = nothing_learnt.PROBE
    probe = (
        tokenizer([(one, [one, other])]).texts if retrieval.task == "rerank" else tokenizer([one, other], "document")
    )
    judges = evaluations, guarding, validation, of_validation
    trainer = Trainer(model, batches, objective, settings, save_model, *judges, probe)
    if distributed.is_main():  # a wrong name or folder is reported now, not after a hundred steps
        for tasks in ([] if data.questions else data.eval_tasks, settings.guard):
            loaded, _ = load_tasks(tasks, rules=settings.folder_rules)
            if retrieval.task != "embed":
                pairs.refuse(loaded, f"and this is --task {retrieval.task}")
            if tasks is not settings.guard:
                pairs.check_alike(loaded)
    headline = first_lines(settings, retrieval, rows, model, defaults, start.describe(settings), parts)
    headline += vectors.lines() + data.lines
    for part in parts:
        drawn = settings.random_negatives if takes_random_negatives(part.rows, part.settings.loss) else 0
        headline += example_lines(part.rows, part.tokenizer, drawn, 1)
    if not parts:
        headline += example_lines(rows, tokenizer, settings.random_negatives)
    if decides(outlook.job, here()) and (settings.micro_batch_tokens == "auto" or not outlook.ample):
        fit = trainer.fit_memory()
        outlook = outlook.with_budget(fit.budget)
        headline.append(("memory", str(fit)))
    by_source = isinstance(rows, InterleavedRows) and rows.block > 1
    headline += machine_lines() + length_warnings(settings, len(rows), by_source=by_source)
    headline += nothing_learnt.warnings(settings, rows)
    return RetrievalRun(settings, trainer, data, evaluations, guarding, retrieval, start, base, outlook, headline)
