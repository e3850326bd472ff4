"""Tasks on which a model must not get worse while it learns another: --guard.

guards = Guards(evaluate, Path("adapters/mine"), tolerance=0.002)
guards(0); guards(50); guards.fallen()              # ["eval-data"]
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.dataset.beir import FolderRules
from mlx_retrieval.evaluation.results import LABELS, Evaluation, Scores, compare, main_metric
from mlx_retrieval.evaluation.retrieval import load_tasks
from mlx_retrieval.training import checkpoint, distributed
from mlx_retrieval.training.checkpoint import GUARDS
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.evaluations import Evaluations
from mlx_retrieval.training.run_data import RunData
from mlx_retrieval.utils import files, toolkit
from mlx_retrieval.utils.console import print_rows
from mlx_retrieval.utils.errors import SettingError

ROUNDING = 1e-9  # of a difference of two figures, which have 5 digits


def check(settings: Settings, data: RunData, evaluated: bool) -> None:
    """Raise UserError if guards cannot guard.

    Args:
        data: of the run, whose held-out questions need not be written yet.
        evaluated: whether a step of the run can be its best.
    """
    if not settings.guard:
        return
    if not evaluated:
        raise SettingError("{guard}: nothing is evaluated, so no step is kept as the best")
    if distributed.is_main():  # other machines need not have the folders
        with data.readable_tasks() as tasks:
            check_apart(settings.guard, tasks, settings.folder_rules)


def check_apart(guards: Sequence[str], tasks: Sequence[str], rules: FolderRules) -> None:
    """Raise UserError for a guard that could never act: one of a run's own tasks, another guard, or a copy of either.

    Args:
        tasks: that the run is judged on.
    """
    judging, seen = ({_identity(task, rules) for task in tasks}, set())
    for guard in guards:
        if (identity := _identity(guard, rules)) in judging:
            reason = "the run is judged on this task, or on a copy of it; a guard is another one"
            raise SettingError("{guard} {task}: {reason}", task=guard, reason=reason)
        if identity in seen:
            raise SettingError("{guard} {task}: names a task twice, or a copy of it", task=guard)
        seen.add(identity)


def _identity(task: str, rules: FolderRules) -> str:
    """Return what tells a task from others: the digest of a folder or file, the name of any other."""
    if not Path(toolkit.find(task)).expanduser().exists():
        return task
    (loaded,) = load_tasks([task], rules=rules)[0].values()
    return loaded.digest


def holds(change: float, tolerance: float) -> bool:
    """Return whether a guard whose figure has changed by this has lost `tolerance` at most."""
    return change >= -tolerance - ROUNDING


def refuse_unreachable(unreachable: Mapping[str, str]) -> None:
    """Raise UserError if a guard cannot be evaluated, with its reason: nothing would guard it."""
    for task, reason in unreachable.items():
        raise SettingError(
            "{guard} {task}: it cannot be evaluated, so nothing would guard it: {reason}", task=task, reason=reason
        )


class Guards(Evaluations):
    """Evaluates the model on its guards, and knows by how much each has changed.

    Args:
        evaluate: returns None and the result of the model as it is now; see `Evaluations`.
        run: the run's folder.
        tolerance: of nDCG@10, or Spearman; a guard that loses more has fallen.
    """

    def __init__(self, evaluate: Callable[[], tuple[None, Evaluation]], run: Path, tolerance: float):
        super().__init__(evaluate, run / GUARDS)
        self.tolerance = tolerance

    def __call__(self, step: int) -> Evaluation:
        """Evaluate the model after a step. UserError if a guard cannot be evaluated before the first one."""
        self.folder.mkdir(exist_ok=True)
        result = super().__call__(step)
        if step == 0:
            refuse_unreachable(result.unreachable)
            self._compare_with_the_first_round()
        return result

    @property
    def has_reference(self) -> bool:
        """Whether the figures of the model that the run began with are saved."""
        return (self.folder / "before.json").is_file()

    def _compare_with_the_first_round(self) -> None:
        """In a later round, take the model that the first one began with as the one that must not get worse.

        Raises UserError if that one was judged by other texts or judgements.
        """
        if checkpoint.round_of(self.folder.parent) > 1:
            first = self.folder.parent.with_name("round-1") / GUARDS / "before.json"
            then, now = Evaluation(**read_json(first)), self.before
            if changed := [task for task in then.tasks if then.digests.get(task) != now.digests.get(task)]:
                (self.folder / "before.json").unlink()
                raise SettingError(
                    "{guard} {task}: it has changed since the first round, whose model must not get worse on it; begin "
                    "the run again with {overwrite}",
                    task=changed[0],
                )
            self.before = then
            files.write_file(self.folder / "before.json", first.read_text(encoding="utf-8"))

    def changes(self) -> dict[str, float]:
        """Return task -> what the last step's figure differs from the untrained model's; {} before a step."""
        if not self.before or not self.last:
            return {}
        now = self.last.evaluation.tasks
        return {task: _figure(now[task]) - _figure(old) for task, old in self.before.tasks.items() if task in now}

    @property
    def label(self) -> str:
        """The names of the metrics that its guards are judged by."""
        tasks = self.before.tasks.values() if self.before else ()
        return " and ".join(dict.fromkeys(LABELS[main_metric(figures)] for figures in tasks))

    def fallen(self) -> list[str]:
        """Return the tasks that the last step has lost more of than the tolerance, or that could not be evaluated."""
        if not self.before or not self.last:
            return []
        changes = self.changes()
        return [task for task in self.before.tasks if not holds(changes.get(task, -math.inf), self.tolerance)]

    def results(self) -> dict[str, Any]:
        """Return task -> {"before": figure, "after": that of the model in `best`, or of the last step}."""
        before = self.before.tasks if self.before else {}
        after = self.after.evaluation.tasks if self.after else {}
        return {
            task: {"before": _figure(scores), "after": _figure(after[task])}
            for task, scores in before.items()
            if task in after
        }

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return a row of figures for each task: name, before, after, difference, its interval."""
        rows = []
        for task in self.results():
            before, after = (_only(task, evaluation) for evaluation in (self.before, self.after.evaluation))
            _, old, new, difference, low, high = compare(before, after)[0]
            rows.append((task, f"{old:.4f}", f"{new:.4f}", f"{difference:+.4f}", f"[{low:+.4f}, {high:+.4f}]"))
        return rows

    def print(self) -> None:
        """Print the table of the guards."""
        if self.after and self.before:
            title = f"guards, {self.label}, before training and after step {self.after.number:,}"
            print_rows(title, ("task", "before", "after", "difference", "95 % interval"), self.rows())


def _figure(figures: Scores) -> float:
    """Return what a guard is judged by: nDCG@10, or Spearman's correlation for scored pairs."""
    return figures[main_metric(figures)]


def _only(task: str, evaluation: Evaluation) -> Evaluation:
    """Return an evaluation's figures of one task."""
    return replace(evaluation, tasks={task: evaluation.tasks[task]})
