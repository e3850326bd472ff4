"""The figures of an adaptation, by hand-made evaluations.

python -m pytest tests/adaptation/test_figures.py
"""

import json

import pytest

from mlx_retrieval.adaptation.figures import figure_rows, only, read_evaluations
from mlx_retrieval.evaluation.results import METRICS, Evaluation


def evaluation(model: str, scores: dict[str, list[float]]) -> Evaluation:
    """Return an evaluation in which query i of a task has the i-th score, by every metric."""
    per_query = {
        task: {metric: {f"q{i}": score for i, score in enumerate(those)} for metric in METRICS}
        for task, those in scores.items()
    }
    tasks = {task: dict.fromkeys(METRICS, sum(those) / len(those)) for task, those in scores.items()}
    return Evaluation(model, tasks, per_query, {})


BEFORE = evaluation("base", {"held-out": [0.5] * 20, "guard": [0.0, 1.0]})
AFTER = evaluation("trained", {"held-out": [0.75] * 20, "guard": [0.0, 0.5]})


def test_a_row_has_before_after_difference_and_interval():
    assert figure_rows([BEFORE, AFTER]) == [
        ("held-out, nDCG@10, 20 queries", "0.5000", "0.7500", "+0.2500", "[+0.2500, +0.2500]"),
        ("guard, nDCG@10, 2 queries", "0.5000", "0.2500", "-0.2500", "[-0.5000, +0.0000]"),
    ]


def test_without_a_trained_model_there_is_nothing_to_compare():
    assert figure_rows([BEFORE])[0] == ("held-out, nDCG@10, 20 queries", "0.5000", "-", "-", "-")


def test_figures_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps([one.to_json() for one in (BEFORE, AFTER)]))
    assert read_evaluations(file) == [BEFORE, AFTER]


@pytest.mark.parametrize("task", ["held-out", "guard"])
def test_one_task_alone(task):
    assert [*only(BEFORE, task).per_query] == [*only(BEFORE, task).tasks] == [task]
    assert only(BEFORE, task).tasks[task] == BEFORE.tasks[task] and only(BEFORE, "none").tasks == {}
