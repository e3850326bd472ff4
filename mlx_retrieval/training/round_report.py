"""What a run of several rounds ends with: figures of all rounds, a table, curves and a report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.evaluation.results import Evaluation, print_comparison
from mlx_retrieval.evaluation.retrieval import load_tasks
from mlx_retrieval.training import improvement
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.curves import draw_curves, read_metrics
from mlx_retrieval.training.report import FILE as REPORT
from mlx_retrieval.training.report import Report, retrieval_report, write_report
from mlx_retrieval.training.reporting import CURVES_FILE, METRICS_FILE
from mlx_retrieval.training.state import State
from mlx_retrieval.utils import files
from mlx_retrieval.utils.console import Lines, print_lines, print_rows
from mlx_retrieval.utils.text import located

UNKNOWN = "-"


class Outcome(NamedTuple):
    """What a finished round has come to."""

    number: int
    folder: Path
    state: State  # after its last step

    @property
    def model(self) -> str | None:
        """The model that a further round starts from; None = no step was better than the one that this began with."""
        if not self.state.metric:  # nothing was evaluated
            return str(self.folder / "final")
        return str(self.folder / "best") if (self.folder / "best").is_dir() else None

    def evaluation(self, *names: str) -> Evaluation | None:
        """Return the first of some results that the round has saved, such as best.json; None = it has none."""
        for name in names:
            if (self.folder / name).is_file():
                values = read_json(self.folder / name)
                return Evaluation(**{key: value for key, value in values.items() if key != "step"})
        return None


def results_of(outcomes: Sequence[Outcome], best: Outcome | None) -> dict[str, Any]:
    """Return the content of `results.json`: figures before the first round and of the best one, and of every round."""
    rounds = [read_json(outcome.folder / "results.json") for outcome in outcomes]
    chosen = rounds[(best or outcomes[-1]).number - 1]
    results = {key: chosen[key] for key in ("after", "after_step", "guards") if key in chosen}
    results = {"before": rounds[0]["before"], **results, "after_round": (best or outcomes[-1]).number}
    known = [value for value in map(improvement.improved, (outcome.state for outcome in outcomes)) if value is not None]
    if rounds[0].get("guards") and "guards" in results:
        for task, figures in results["guards"].items():
            figures["before"] = rounds[0]["guards"][task]["before"]
    return results | {"improved": any(known) if known else None, "rounds": rounds}


def print_table(outcomes: Sequence[Outcome], best: Outcome | None) -> None:
    """Print a line for each round, and the best model beside the one that the first round began with."""
    if not outcomes[0].state.metric:
        return
    name = improvement.METRICS[outcomes[0].state.metric]
    print_rows("rounds", ("round", f"{name} before", "best", "at step", "last step"), rows_of(outcomes))
    before, after = outcomes[0].evaluation("before.json"), best and best.evaluation("best.json")
    if before and after:
        when = f"before training and in round {best.number} after step {best.state.best_step:,}"
        print_comparison(before, after, when=when)


def rows_of(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Return a row of figures for each round: its number, before it, its best, the step of that, the last."""

    def shown(score: float | None) -> str:
        return UNKNOWN if score is None else f"{abs(score):.4f}"

    rows = []
    for outcome in outcomes:
        state = outcome.state
        best = (shown(state.best), f"{state.best_step:,}") if state.best_step else (UNKNOWN, UNKNOWN)
        rows.append((f"{outcome.number}", shown(state.untrained), *best, shown(state.last)))
    return rows


def copy_evaluations(folder: Path, outcomes: Sequence[Outcome], best: Outcome | None) -> None:
    """Copy into the run's folder the results of the model that the first round began with, and of the best one."""
    for name, outcome in (("before.json", outcomes[0]), ("best.json", best)):
        if outcome and (outcome.folder / name).is_file():
            files.write_file(folder / name, (outcome.folder / name).read_text(encoding="utf-8"))


def write_curves(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the metrics of all rounds, their steps counted on, into one file, and draw them."""
    records, first = [], 0
    for outcome in outcomes:
        for record in read_metrics(outcome.folder / METRICS_FILE):
            if record["step"] or not first:  # a later round begins where the best step before has been evaluated
                records.append(record | {"round": outcome.number, "step": first + record["step"]})
        first += outcome.state.step
    files.write_file(folder / METRICS_FILE, "".join(json.dumps(record) + "\n" for record in records))
    draw_curves(folder / METRICS_FILE, folder / CURVES_FILE)


def write_round_report(
    settings: Settings,
    outcomes: Sequence[Outcome],
    best: Outcome | None,
    tasks: list[str],
    lines: Lines,
    following: Lines,
) -> Path | None:
    """Write the report of the whole run; None if nothing was evaluated.

    Args:
        tasks: that all rounds were judged on.
        lines, following: of the run's end: its results, and how to use its model.
    """

    def content() -> Report | None:
        before, chosen = outcomes[0].evaluation("before.json"), best or outcomes[-1]
        after = chosen.evaluation("best.json", "last.json")
        if after is None:
            return None
        loaded, _ = load_tasks(tasks, rules=settings.folder_rules)
        report = retrieval_report(before, after, loaded)
        report.step, report.eval_tasks = chosen.state.best_step or chosen.state.step, tasks
        where = located(chosen.folder / REPORT)
        report.survey_note = f"Each round's own report, such as {where}, shows the rows."
        for number, old, new, step, last in rows_of(outcomes):
            what = f"{new} at step {step}" if step != UNKNOWN else "no better step"
            report.notes.append(f"Round {number}: {old} before, {what}, {last} at its last step.")
        return report

    facts = [("rounds", f"{len(outcomes)} of {settings.rounds}"), *lines]
    return write_report(settings.folder, settings, facts, following, content, _warn)


def _warn(message: str) -> None:
    print_lines([("warning", message)])
