"""The report of a finished run, `report.html`: one page without scripts and without network, to read and to show.

It holds the headline with its interval, the table, curves, what the rows are like, the queries that gained and lost
most with what was found before and after, settings, versions, and the commands to repeat the run and to use the model.
The page is report.html.j2; everything that comes from data or settings is escaped there.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_loader import Batches
from loss import GROUPS, SCORED_PAIRS
from mlx_retrieval.dataset.elastic import server
from mlx_retrieval.dataset.sources import names as source_names
from mlx_retrieval.evaluation.changes import QueryChange, largest_changes
from mlx_retrieval.evaluation.comparison import FEWEST_QUERIES, judge
from mlx_retrieval.evaluation.results import LABELS, PAIR_METRICS, Evaluation, compare
from mlx_retrieval.evaluation.tasks import Task
from mlx_retrieval.training.checkpoint import HELD_OUT
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.curves import COLORS, curves_svg, is_number, read_metrics
from mlx_retrieval.training.data_survey import Survey, survey_rows
from mlx_retrieval.training.report_facts import (
    LONGEST_VALUE,
    commands,
    near_paths,
    run_facts,
    settings_table,
    versions,
)
from mlx_retrieval.training.reporting import METRICS_FILE, without_secrets
from mlx_retrieval.utils import files
from mlx_retrieval.utils.text import excerpt, writable

FILE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass
class Table:
    """Figures of one task, or of all together.

    rows: metric, before, after, difference, low, high; only metric and after are not None if nothing was compared.
    names: of the columns before and after.
    reference: the figures of a reranker's first stage, in the order of the rows; [] = not shown.
    reference_name: the name of their column.
    """

    title: str
    asked: str  # how many queries or pairs
    rows: list[tuple]
    names: tuple[str, str] = ("before", "after")
    reference: list[float] = field(default_factory=list)
    reference_name: str = ""


class Part(NamedTuple):
    """A section of its own: lines of names and values, and a table of texts."""

    title: str
    lines: Sequence[tuple[str, str]]
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


@dataclass
class Report:
    """The content of a report that the kind of run decides.

    headline, detail: the result in one sentence, and a second one about it.
    verdict: "better", "worse" or "no difference shown"; "" = nothing was compared.
    by_query: whether queries have figures of their own, which single scored pairs have not.
    compared: whether all tasks after training were evaluated before it.
    defaults: of settings whose default depends on the model.
    of_model: values that the model's files give to settings that are not given.
    """

    headline: str
    detail: str = ""
    verdict: str = ""
    by_query: bool = True
    compared: bool = False
    tables: list[Table] = field(default_factory=list)
    gained: list[QueryChange] = field(default_factory=list)
    lost: list[QueryChange] = field(default_factory=list)
    survey: Survey | None = None
    survey_note: str = ""  # why there is no survey
    notes: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    step: int = 0  # whose model is that of the figures after training
    eval_tasks: list[str] = field(default_factory=list)  # that the figures are of
    defaults: dict[str, Any] = field(default_factory=dict)
    of_model: dict[str, Any] = field(default_factory=dict)


# --- content ----------------------------------------------------------------------------------------------------------


def retrieval_report(
    before: Evaluation | None, after: Evaluation, tasks: Mapping[str, Task], first_stage: Evaluation | None = None
) -> Report:
    """Return the content about the evaluations before and after training.

    A reranker is judged by the order that it was given: one that makes it worse is of no use, however much it learnt.

    Args:
        before: None = the untrained model was not evaluated.
        tasks: of the evaluations, from `retrieval.load_tasks`.
        first_stage: what finds the documents that a reranker puts in order; None = it is no reranker.
    """
    names = ", ".join(after.tasks)
    count, asked = after.count(), after.asked()
    average = after.average()
    metric, main = after.main, LABELS[after.main]
    notes = [f"Not evaluated: {line}" for line in after.unreachable.values()]
    if not average:
        return Report("The run is finished; no task of its evaluation could be reached.", notes=notes)
    if before and not before.tasks.keys() & after.tasks.keys():
        before = None
    sentences = []
    if before:
        sentences = _judgement(before, after, count, "trained model", "untrained one")
    unknown = "The untrained model was not evaluated, so nothing shows what training has changed."
    report = Report("", notes=notes, tables=_tables(before, after, first_stage), by_query=metric not in PAIR_METRICS)
    if first_stage:
        stage = first_stage.model
        given = first_stage.average()[metric]
        figures = f"{average[metric]:.4f} after reranking and {given:.4f} in the order of {stage}"
        report.headline = f"{main} is {figures}, over {_asked(names, asked)}."
        report.verdict, report.detail = _judgement(first_stage, after, count, "reranked order", f"order of {stage}")
        if before:
            report.notes.insert(0, f"Training: {_moved(before, after)}, {sentences[1]}")
        else:
            report.notes.insert(0, unknown)
    elif before:
        report.headline = f"{_moved(before, after)} over {_asked(names, asked)}."
        report.verdict, report.detail = sentences
    else:
        report.headline = f"{main} is {average[metric]:.4f} after training, over {_asked(names, asked)}."
        report.detail = unknown
    if before:
        report.compared = before.tasks.keys() == after.tasks.keys()
        report.gained, report.lost = largest_changes(before, after, tasks)
    return report


def _moved(before: Evaluation, after: Evaluation) -> str:
    metric, old, new, difference, *_ = compare(before, after)[0]
    way = "rose" if difference > 0 else "fell" if difference < 0 else "stayed"
    return f"{LABELS[metric]} {way} from {old:.4f} to {new:.4f}"


def _judgement(first: Evaluation, second: Evaluation, count: int, this: str, other: str) -> tuple[str, str]:
    """Return the verdict on the second evaluation, and the difference with its interval and meaning in words.

    `this`, `other`: what the second and the first evaluation are of.
    """
    row = compare(first, second)[0]
    *_, difference, low, high = row
    verdict = judge(row, count)
    meaning = f"The {this} is {verdict} than the {other}: the interval is clear of zero."
    if verdict == "no difference shown":
        reason = "the interval holds zero" if count >= FEWEST_QUERIES else f"{second.asked()} are too few"
        meaning = f"No difference to the {other} is shown: {reason}."
    return verdict, f"{difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}. {meaning}"


def _asked(names: str, asked: str) -> str:
    """Return which queries or pairs the tasks of these names have, in words."""
    if names != HELD_OUT:
        return f"{asked} of {names}"
    count, noun = asked.split(" ")
    return f"{count} held-out {noun.replace('queries', 'questions').replace('query', 'question')}"


def _only(evaluation: Evaluation, task: str) -> Evaluation:
    return Evaluation(evaluation.model, {task: evaluation.tasks[task]}, {task: evaluation.per_query[task]}, {})


def _tables(before: Evaluation | None, after: Evaluation, first_stage: Evaluation | None) -> list[Table]:
    """Return a table for each of several tasks, and one of all together."""
    tables = []
    if before and len(after.tasks) > 1:
        for task in after.tasks:
            if task in before.tasks:
                tables.append(_table(task, _only(before, task), _only(after, task), first_stage))
    return [*tables, _table(", ".join(after.tasks), before, after, first_stage)]


def _table(title: str, before: Evaluation | None, after: Evaluation, first_stage: Evaluation | None) -> Table:
    """Return the table of two evaluations; without one before training, that of the first stage stands in its place."""
    reference = first_stage if before else None
    names = ("before", "after") if before or not first_stage else (first_stage.model, "after")
    if (before := before or first_stage) is None:
        figures = after.average()
        rows = [(label, None, figures[m], None, None, None) for m, label in after.metrics.items()]
        return Table(title, after.asked(), rows)
    common = [task for task in after.tasks if task in before.tasks]
    table = Table(
        title, after.asked(common), [(LABELS[metric], *rest) for metric, *rest in compare(before, after)], names
    )
    if reference:
        table.reference_name = reference.model
        table.reference = [sum(reference.tasks[task][m] for task in common) / len(common) for m in after.metrics]
    return table


def loss_report(folder: Path) -> Report:
    """Return the content about a run that is judged by the loss on its validation rows, from its metrics."""
    records = [record for record in read_metrics(folder / METRICS_FILE) if record["type"] == "eval"]
    losses = {record["step"]: record.get("metrics", {}).get("validation_loss") for record in records}
    losses = {step: loss for step, loss in losses.items() if is_number(loss)}
    if not losses:
        return Report("The run is finished.", "There are no validation rows: only the training loss shows its course.")
    after = losses[max(losses)]
    if 0 not in losses or len(losses) == 1:
        return Report(f"The loss on the validation rows is {after:.4f} after training.")
    before = losses[0]
    moved, verdict = ("fell", "better") if after < before else ("rose", "worse") if after > before else ("stayed", "")
    return Report(f"The loss on the validation rows {moved} from {before:.4f} to {after:.4f}.", verdict=verdict)


def add_survey(report: Report, settings: Settings, batches: Batches, task: str) -> None:
    """Look at a sample of the training rows, for the report."""
    if any(server.is_address(name) for name in source_names(settings.data)):
        report.survey_note = "The rows come from Elasticsearch; no sample of them is kept to be looked at."
        return
    # Rerankers, and losses on a row's own documents, do not hold one row's document against another's query.
    losses = {source.get("loss") or settings.loss for source in settings.sources} or {settings.loss}
    alone = task == "rerank" or losses <= {*GROUPS, *SCORED_PAIRS, "kl_distill", "kl", "distill_vectors"}
    if batches.tokenizers:
        report.notes.append("Lengths and truncation of the rows are those under the saved model's prompts and limits.")
    size = 0 if alone else batches.size
    report.survey = survey_rows(batches.rows, batches.tokenizer, size, settings.seed)


# --- the page ---------------------------------------------------------------------------------------------------------


def write_report(
    folder: Path,
    settings: Settings,
    facts: Sequence[tuple[str, str]],
    next_lines: Sequence[tuple[str, str]],
    content: Callable[[], Report | None],
    warn: Callable[[str], None],
) -> Path | None:
    """Write the run's report and return its path; None if there is none. A failure is a warning, no end of a run.

    Args:
        facts: (name, text) lines about the run.
        next_lines: of the run, see `run.Run`.
        content: returns what the kind of run decides; None = there is to be no report.
        warn: prints a warning.
    """
    try:
        if (report := content()) is None:
            return None
        files.write_file(folder / FILE, render(folder, settings, facts, next_lines, report))
    except Exception as error:  # of any kind: the run's result is worth more than a page about it
        warn(f"{FILE} could not be written: {str(error) or type(error).__name__}")
        return None
    return folder / FILE


def render(
    folder: Path,
    settings: Settings,
    facts: Sequence[tuple[str, str]],
    next_lines: Sequence[tuple[str, str]],
    report: Report,
    title: str = "",
) -> str:
    """Return the page; see `write_report`. `title`: "" = the folder's name."""
    import jinja2

    near = near_paths(settings)
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(**options)
    environment.filters["near"] = near
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    colors = {color: f"var(--c{i})" for i, color in enumerate(COLORS)}
    sources = [("training data", ", ".join(settings.data))]
    if report.eval_tasks and "judged on" not in dict(facts):
        sources.append(("judged on", ", ".join(report.eval_tasks)))
    rows = settings_table(settings, report.defaults, report.of_model)
    page = template.render(
        title=writable(title or folder.resolve().name),
        report=report,
        facts=[(name, excerpt(near(without_secrets(value)), 2 * LONGEST_VALUE)) for name, value in (*sources, *facts)],
        run=run_facts(folder),
        curves=curves_svg(folder / METRICS_FILE, colors),
        settings=[(name, near(value), changed) for name, value, changed in rows],
        versions=versions(),
        commands=commands(folder, settings, report.eval_tasks, report.compared, next_lines),
        date=time.strftime("%Y-%m-%d %H:%M %Z"),
    )
    return re.sub(r"\n\s*\n+", "\n", page)
