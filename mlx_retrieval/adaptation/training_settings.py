"""The settings by which an adaptation trains: those of train.py, with what suits questions of documents.

settings = settings_of(job, Path("mined.jsonl"), [Path("held-out")], Path("run"))
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlx_retrieval.adaptation.held import Held
from mlx_retrieval.adaptation.job import Adaptation
from mlx_retrieval.training import source_settings
from mlx_retrieval.training.config import Settings

EVALUATIONS = 4  # in a run, at most
EVALUATED = 0.25  # of a run's time, at most, unless the first evaluation and one more take longer
FEWEST_STEPS, MOST_EPOCHS = 30, 10
PLANNED_EPOCHS = 3  # that a budget has room for; more, if time is left
# Rows whose questions share rare words come in one batch: they are hard for each other, at no cost.
DEFAULTS = {"similar_rows": 4, "save_steps": 25}
# Of three batches, one holds other texts in place. They hardly move, so their gradient is small (benchmarks/LOG.md).
QUESTIONS_WEIGHT, HELD_WEIGHT, DISTILL_WEIGHT = 2, 1, 20


def settings_of(job: Adaptation, rows: Path, tasks: Sequence[Path], output: Path, held: Held | None = None) -> Settings:
    """Return the settings of the training run. UserError if those of the job contradict each other.

    Args:
        rows: to train on.
        tasks: evaluation folders that the run is judged on.
        output: the folder of the run.
        held: texts to hold in place; None = none.
    """
    decided = {
        "model": job.model,
        "task": "embed",
        "data": [str(rows)],
        "eval_tasks": [str(task) for task in tasks],
        "output": str(output),
        "seed": job.seed,
        "dtype": job.dtype,
        "compile": job.compile,
        "dequantize": job.dequantize,
    }
    training = dict(job.training)
    if training.get("epochs"):
        training.pop("steps", None)  # as in train.py --config
    if held:
        of_loss = {name: training.pop(name) for name in source_settings.of_loss(fields(Settings)) if name in training}
        questions = {"data": str(rows), "weight": QUESTIONS_WEIGHT} | of_loss
        others = {"weight": HELD_WEIGHT / len(held.rows), "loss": "distill_vectors", "distill_weight": DISTILL_WEIGHT}
        del decided["data"]
        decided["sources"] = [questions, *({"data": name} | others for name in held.rows)]
        decided["teacher_vectors"] = str(held.vectors)
    return Settings(**DEFAULTS | training | decided)


def with_held(count: float) -> int:
    """Return the steps, or rows, of a run that holds texts in place, of which `count` are those of its questions."""
    return round(count * (QUESTIONS_WEIGHT + HELD_WEIGHT) / QUESTIONS_WEIGHT)


def evaluations_in(seconds: float, one: float) -> int:
    """Return how often a run of `seconds` is evaluated, besides before its first step; `one`: seconds of it."""
    return max(1, min(EVALUATIONS, int(EVALUATED * seconds / one) - 1)) if one else EVALUATIONS


def epochs_for(rows: int, batch_size: int) -> int:
    """Return the epochs of a run: one, or as many as FEWEST_STEPS need, MOST_EPOCHS at most."""
    return max(1, min(MOST_EPOCHS, round(FEWEST_STEPS * batch_size / rows)))


def steps_for(rows: int, batch_size: int) -> int:
    """Return the steps of a run over its questions."""
    return max(1, round(epochs_for(rows, batch_size) * rows / batch_size))


def planned_rows(training: dict[str, Any], rows: int, holds: bool, most_epochs: int = MOST_EPOCHS) -> int:
    """Return how many rows of questions a run trains on; a question counts each time.

    Args:
        training: the settings that the user gives.
        rows: questions.
        holds: whether it holds other texts, too.
        most_epochs: where the user says nothing of steps or epochs, to come to FEWEST_STEPS.
    """
    size = training.get("batch_size") or Settings.batch_size
    if epochs := training.get("epochs"):
        return round(epochs * rows)
    if steps := training.get("steps"):
        return round(steps * size * (QUESTIONS_WEIGHT / (QUESTIONS_WEIGHT + HELD_WEIGHT) if holds else 1))
    return max(rows, min(FEWEST_STEPS * size, most_epochs * rows))


def rows_to_hold(settings: Settings, rows: int, names: int, most_steps: float = math.inf) -> int:
    """Return how many rows of other texts a run comes to: half as many as of its questions.

    Args:
        settings: of the run, without those texts.
        rows: those of its questions.
        names: how many sources the texts have; each is to fill a batch.
        most_steps: that there is time for.
    """
    size = settings.batch_size
    if settings.epochs is not None:  # which count the rows of both
        held = with_held(rows) - rows
    else:
        steps = min(most_steps, settings.steps or with_held(steps_for(rows, size)))
        held = math.ceil(steps * HELD_WEIGHT / (QUESTIONS_WEIGHT + HELD_WEIGHT)) * size
    return max(held, names * size)
