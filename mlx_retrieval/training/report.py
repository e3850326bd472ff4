"""The report of a finished run, `report.html`: one page without scripts and without network, to read and to show.

It holds the headline with its interval, the table, curves, what the rows are like, the queries that gained and lost
most with what was found before and after, settings, versions, and the commands to repeat the run and to use the model.
The page is report.html.j2; everything that comes from data or settings is escaped there.
"""

import dataclasses
import importlib.metadata
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_loader import Batches
from loss import GROUPS
from mlx_retrieval.dataset.elastic import server
from mlx_retrieval.dataset.sources import names as source_names
from mlx_retrieval.evaluation.changes import QueryChange, largest_changes
from mlx_retrieval.evaluation.comparison import FEWEST_QUERIES, judge
from mlx_retrieval.evaluation.reranking import harm
from mlx_retrieval.evaluation.results import METRICS, Evaluation, compare
from mlx_retrieval.evaluation.tasks import Task
from mlx_retrieval.training.checkpoint import HELD_OUT
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.curves import COLORS, curves_svg, is_number, read_metrics
from mlx_retrieval.training.data_survey import Survey, survey_rows
from mlx_retrieval.training.improvement import model_to_use
from mlx_retrieval.training.reporting import METRICS_FILE, without_secrets
from mlx_retrieval.utils import files
from mlx_retrieval.utils.text import excerpt, quantity, shell, writable

FILE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
PACKAGES = ("mlx-retrieval", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy")
LONGEST_VALUE = 400  # characters of a setting


@dataclass
class Table:
    """Figures of one task, or of all together. `rows`: metric, before, after, difference, low, high."""

    title: str
    queries: int
    rows: list[tuple]


@dataclass
class Report:
    """The content of a report that the kind of run decides.

    headline, detail: the result in one sentence, and a second one about it.
    verdict: "better", "worse" or "no difference shown"; "" = nothing was compared.
    """

    headline: str
    detail: str = ""
    verdict: str = ""
    tables: list[Table] = field(default_factory=list)
    gained: list[QueryChange] = field(default_factory=list)
    lost: list[QueryChange] = field(default_factory=list)
    survey: Survey | None = None
    survey_note: str = ""  # why there is no survey
    notes: list[str] = field(default_factory=list)
    step: int = 0  # whose model is that of the figures after training
    eval_tasks: list[str] = field(default_factory=list)  # that the figures are of


# --- content ----------------------------------------------------------------------------------------------------------


def retrieval_report(
    before: Evaluation | None, after: Evaluation, tasks: Mapping[str, Task], first_stage: Evaluation | None = None
) -> Report:
    """Return the content about the evaluations before and after training.

    Args:
        before: None = the untrained model was not evaluated.
        tasks: of the evaluations, from `retrieval.load_tasks`.
        first_stage: what finds the documents that a reranker puts in order; None = it is no reranker.
    """
    names = ", ".join(after.tasks)
    count = sum(len(scores["ndcg_at_10"]) for scores in after.per_query.values())
    average = after.average()
    main = METRICS["ndcg_at_10"]
    notes = [f"Not evaluated: {line}" for line in after.unreachable.values()]
    if not average:
        return Report("The run is finished; no task of its evaluation could be reached.", notes=notes)
    if first_stage:
        found = first_stage.average()["ndcg_at_10"]
        notes.append(f"Without the reranker, {first_stage.model} finds these documents with {main} {found:.4f}.")
        notes += [f"{line[0].upper()}{line[1:]}."] if (line := harm(first_stage, after)) else []
    if before is None or not any(task in before.tasks for task in after.tasks):
        rows = [(label, None, average[metric], None, None, None) for metric, label in METRICS.items()]
        sentence = f"{main} is {average['ndcg_at_10']:.4f} after training, over {_asked(names, count)}."
        detail = "The untrained model was not evaluated, so nothing shows what training has changed."
        return Report(sentence, detail, tables=[Table(names, count, rows)], notes=notes)
    tables = []
    if len(after.tasks) > 1:
        tables = [_table(task, _only(before, task), _only(after, task)) for task in after.tasks if task in before.tasks]
    tables.append(whole := _table(names, before, after))
    _, old, new, difference, low, high = whole.rows[0]
    verdict = judge(("ndcg_at_10", *whole.rows[0][1:]), count)
    moved = "rose" if difference > 0 else "fell" if difference < 0 else "stayed"
    headline = f"{main} {moved} from {old:.4f} to {new:.4f} over {_asked(names, count)}."
    meaning = f"The trained model is {verdict}: the interval is clear of zero."
    if verdict == "no difference shown":
        reason = "the interval holds zero" if count >= FEWEST_QUERIES else f"{count} queries are too few"
        meaning = f"No difference is shown: {reason}."
    detail = f"{difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}. {meaning}"
    gained, lost = largest_changes(before, after, tasks)
    return Report(headline, detail, verdict, tables, gained, lost, notes=notes)


def _asked(names: str, count: int) -> str:
    """Return which queries the tasks of these names have, in words."""
    return quantity(count, "held-out question") if names == HELD_OUT else f"{quantity(count, 'query')} of {names}"


def _only(evaluation: Evaluation, task: str) -> Evaluation:
    return Evaluation(evaluation.model, {task: evaluation.tasks[task]}, {task: evaluation.per_query[task]}, {})


def _table(title: str, before: Evaluation, after: Evaluation) -> Table:
    count = sum(len(scores["ndcg_at_10"]) for task, scores in after.per_query.items() if task in before.per_query)
    return Table(title, count, [(METRICS[metric], *rest) for metric, *rest in compare(before, after)])


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
    alone = task == "rerank" or settings.loss in (*GROUPS, "kl_distill")
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
) -> str:
    """Return the page; see `write_report`."""
    import jinja2

    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    template = jinja2.Environment(**options).from_string(TEMPLATE.read_text(encoding="utf-8"))
    colors = {color: f"var(--c{i})" for i, color in enumerate(COLORS)}
    sources = [("trained on", ", ".join(settings.data))]
    if report.eval_tasks and "judged on" not in dict(facts):
        sources.append(("judged on", ", ".join(report.eval_tasks)))
    page = template.render(
        title=writable(folder.resolve().name),
        report=report,
        facts=[(name, excerpt(without_secrets(value), 2 * LONGEST_VALUE)) for name, value in (*sources, *facts)],
        run=run_facts(folder),
        curves=curves_svg(folder / METRICS_FILE, colors),
        settings=settings_table(settings),
        versions=versions(),
        commands=commands(folder, settings, report.eval_tasks, next_lines),
        date=time.strftime("%Y-%m-%d %H:%M %Z"),
    )
    return re.sub(r"\n\s*\n+", "\n", page)


def run_facts(folder: Path) -> list[tuple[str, str]]:
    """Return (name, text) about time, speed and memory, from the run's metrics."""
    steps = [record for record in read_metrics(folder / METRICS_FILE) if record["type"] == "train"]
    seconds = sum(record.get("seconds") or 0 for record in steps)
    tokens = sum(record.get("tokens") or 0 for record in steps)
    if not seconds:
        return []
    peak = max(record.get("peak_memory_bytes") or 0 for record in steps)
    return [
        ("time of the steps", duration(seconds)),
        ("speed", f"{tokens / seconds:,.0f} tokens a second, {tokens:,} tokens in all"),
        ("peak memory", f"{peak / 1e9:.2f} GB"),
    ]


def duration(seconds: float) -> str:
    """Return a time as people say it: 48 s, 3 min 4 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def settings_table(settings: Settings) -> list[tuple[str, str, bool]]:
    """Return (name, value, whether it differs from the default) of every setting, without passwords."""
    defaults = Settings()
    defaults.resolve_weights()
    defaults = defaults.to_dict()
    values = without_secrets(settings.to_dict())
    words = {"True": "yes", "False": "no"}
    of_model = {f.name for f in dataclasses.fields(Settings) if f.metadata["group"] == "model"}

    def shown(name: str, value: Any) -> str:
        if value is None:
            return "as the model's files say" if name in of_model else "not given"
        text = " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
        return excerpt(words.get(text, text), LONGEST_VALUE)

    return [(name, shown(name, value), value != defaults.get(name)) for name, value in values.items()]


def versions() -> list[tuple[str, str]]:
    """Return (name, version) of Python, the system and the libraries that decide a run's result."""
    lines = [("Python", platform.python_version()), ("system", f"{platform.system()} {platform.machine()}")]
    for package in PACKAGES:
        try:
            lines.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return lines


def commands(
    folder: Path, settings: Settings, eval_tasks: Sequence[str], next_lines: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Return (purpose, command) lines: to repeat the run, to evaluate and compare its model, and to use it."""
    again = shell("python", "train.py", "--config", folder / "config.yaml", "--output", f"{folder}-again")
    lines = [("repeat this run", again)]
    model = model_to_use(folder)
    if eval_tasks:
        evaluate = ("python", "eval.py", "--eval-tasks", *eval_tasks)
        lines.append(("evaluate the model", shell(*evaluate, "--model", model)))
        lines.append(("compare it with its base", shell(*evaluate, "--compare", settings.model, model)))
    uses = {"next": "use the model", "fuse": "fuse it with its base", "export": "export it"}
    return lines + [(uses[name], command) for name, command in next_lines if name in uses]
