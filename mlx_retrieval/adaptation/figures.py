"""The figures of an adaptation: the base model and the trained one, on every task.

figure_rows(read_evaluations(Path("handbook-model/evaluation.json")))
"""

import json
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval.evaluation.results import LABELS, Evaluation, compare, main_metric


def only(evaluation: Evaluation, task: str, label: str = "") -> Evaluation:
    """Return an evaluation of one task alone, which is then called `label`; "" = as it was."""
    values = {name: value for name, value in vars(evaluation).items() if isinstance(value, dict)}
    fields = {name: {label or task: value[task]} if task in value else {} for name, value in values.items()}
    return Evaluation(model=evaluation.model, **fields)


def read_evaluations(path: Path) -> list[Evaluation]:
    """Return the evaluations of `evaluation.json`: of the base model, and of the trained one if there is one."""
    return [Evaluation(**{"unreachable": {}} | record) for record in json.loads(path.read_text(encoding="utf-8"))]


def figure_rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, ...]]:
    """Return a row for each task: its name with its metric, before, after, difference, interval."""
    before, after = evaluations[0], evaluations[-1]
    rows = []
    for task, figures in before.tasks.items():
        one, other = only(before, task), only(after, task)
        name = f"{task}, {LABELS[main_metric(figures)]}, {one.asked()}"
        if len(evaluations) == 1:
            rows.append((name, f"{figures[main_metric(figures)]:.4f}", "-", "-", "-"))
            continue
        _, old, new, difference, low, high = compare(one, other)[0]
        rows.append((name, f"{old:.4f}", f"{new:.4f}", f"{difference:+.4f}", f"[{low:+.4f}, {high:+.4f}]"))
    return rows
