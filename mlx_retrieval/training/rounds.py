"""Rounds: mine hard negatives with the model as it is, train on them, and again from the best model so far.

    results = train(Settings(data=["pairs.jsonl"], rounds=2), train_one)

adapters/rounds/rows/1.jsonl            the rows to train on, without the held-out questions; a file for each source
adapters/rounds/round-1/mined/1.jsonl   the same rows with the negatives of the round
adapters/rounds/round-1/                a run on them, as any other; it resumes by itself
adapters/best, final                    the model of the best round, and that of the last one

All rounds are judged on the same questions, whose texts are mined for nothing. round_mining.py mines.
"""

import contextlib
import dataclasses
import gc
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_retrieval.backend import mx

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.dataset.elastic import server
from mlx_retrieval.dataset.sources import InterleavedRows, Source, is_default_data, names, weight_of
from mlx_retrieval.mining.output import by_row, positives_of, write_rows
from mlx_retrieval.training import (
    checkpoint,
    distributed,
    improvement,
    moving_average,
    other_vectors,
    output_folder,
)
from mlx_retrieval.training.config import DEFAULT_DATA, Settings
from mlx_retrieval.training.defaults import WEIGHTS
from mlx_retrieval.training.guards import check as check_guards
from mlx_retrieval.training.length import resolve_length
from mlx_retrieval.training.round_mining import MINED, check_teacher, mine_round
from mlx_retrieval.training.round_report import (
    Outcome,
    copy_evaluations,
    print_table,
    results_of,
    write_curves,
    write_round_report,
)
from mlx_retrieval.training.run_data import RunData, open_data
from mlx_retrieval.training.run_parts import build_model
from mlx_retrieval.training.settings_checks import DISTILLING
from mlx_retrieval.training.settings_file import write_yaml
from mlx_retrieval.training.starting_model import find as find_start
from mlx_retrieval.training.state import State
from mlx_retrieval.utils import files, toolkit
from mlx_retrieval.utils.console import print_lines
from mlx_retrieval.utils.errors import SettingError
from mlx_retrieval.utils.text import quantity, shell

ROWS = "rows"  # the folder, beside the rounds, of the rows to mine for
FORWARD = 1 / 3  # of a training step's time, about, that embedding its texts takes

TrainOne = Callable[[Settings, Sequence[tuple[str, str]]], dict]


@dataclass
class Rounds:
    """A run of several rounds: its settings, and what all its rounds share."""

    settings: Settings
    train_one: TrainOne

    @property
    def folder(self) -> Path:
        return self.settings.folder

    @property
    def rows(self) -> list[Path]:
        """The files of the rows to mine for, one for each source."""
        return sorted((self.folder / checkpoint.ROUNDS / ROWS).glob("*.jsonl"), key=lambda file: int(file.stem))

    @property
    def eval_tasks(self) -> list[str]:
        """The tasks that all rounds are judged on."""
        if self.settings.eval_tasks is not None:
            return self.settings.eval_tasks
        if (questions := self.folder / checkpoint.HELD_OUT).is_dir():
            return [str(questions)]
        is_toy = is_default_data(self.settings.data) and not self.settings.holdout
        return [toolkit.find(toolkit.EVALUATION)] if is_toy else []

    def settings_of(self, number: int, model: str) -> Settings:
        """Return the settings of a round that starts from a model."""
        settings = self.settings
        folder = checkpoint.round_folder(self.folder, number)
        mined = [str(folder / MINED / file.name) for file in self.rows]
        begun = (folder / "config.yaml").is_file()
        changes: dict[str, Any] = {
            "rounds": 0,
            "rounds_negatives": 1,
            "rounds_teacher": None,
            "model": model,
            "columns": None,
            "es_query": None,
            "ignore_keys": [],
            "eval_tasks": self.eval_tasks,
            "holdout": None,
            "seed": settings.seed + number - 1,
            "output": str(folder),
            "steps": None if settings.epochs else settings.steps,  # of epochs, a round counts its own
            "resume": begun,
            "accept_changed_data": begun and settings.accept_changed_data,
            "overwrite": False,
        }
        if settings.sources:
            pairs = zip(settings.sources, mined, strict=True)
            changes |= {"sources": [source | {"data": file} for source, file in pairs], "data": DEFAULT_DATA}
        elif len(mined) > 1:
            weights = [source.removeprefix(weight_of(source)[0]) for source in settings.data]
            changes["data"] = [file + weight for file, weight in zip(mined, weights, strict=True)]
        else:
            changes["data"] = mined
        if number > 1:  # the adapter of the round before says what is trained
            changes |= {name: [] if name == "lora_keys" else None for name in WEIGHTS}
        return dataclasses.replace(settings, **changes)

    def outcome(self, number: int) -> Outcome | None:
        """Return what a round has come to; None if it is not finished."""
        folder = checkpoint.round_folder(self.folder, number)
        if not checkpoint.is_finished(folder):
            return None
        return Outcome(number, folder, State(**read_json(folder / "final" / checkpoint.STATE)))


def train(settings: Settings, train_one: TrainOne, introduction: Sequence[tuple[str, str]] = ()) -> dict:
    """Carry out a run of several rounds, or continue it; return the content of its `results.json`.

    Args:
        train_one: trains as settings without rounds say, see `run.train`.
        introduction: (name, text) lines to print before the run's own.

    Raises UserError as `run.train`, and KeyboardInterrupt with the command that continues while negatives are mined.
    """
    check(settings)
    if settings.dry_run:
        return _dry_run(settings, train_one, introduction)
    chosen = settings.output is None and not (settings.resume or settings.overwrite)
    settings.output = output_folder.choose(settings)
    output_folder.check(settings.folder, settings)
    with output_folder.held(settings, chosen):
        rounds = Rounds(settings, train_one)
        outcomes = finished(rounds) if settings.resume else []
        begin(rounds, introduction)
        take_rounds(rounds, outcomes)
        return conclude(rounds, outcomes)


def check(settings: Settings) -> None:
    """Raise UserError if the settings, or the model, cannot be trained in rounds."""
    if distributed.size() > 1:
        raise SettingError("{rounds} works in one process only: start it without mlx.launch")
    if settings.task == "chat":
        settings.check_task("chat")
    for name in filter(server.is_address, names(settings.data)):
        raise SettingError(
            "{rounds}: {name} is an index; {rounds} mines for rows of files and hub data sets", name=name
        )
    copy = dataclasses.replace(settings)
    _, retrieval, _ = build_model(copy, find_start(copy), fingerprint=False)
    settings.check_task(retrieval.task)
    check_teacher(settings)


def finished(rounds: Rounds) -> list[Outcome]:
    """Return the outcomes of a resumed run's finished rounds. UserError if there is nothing left to do."""
    numbers = itertools.count(1)
    outcomes = list(itertools.takewhile(bool, (rounds.outcome(number) for number in numbers)))
    planned, run = rounds.settings.rounds, rounds.folder
    if len(outcomes) > planned:
        raise SettingError(
            "{rounds} {planned}: the run in {run} has done {taken}", planned=planned, run=run,
            taken=quantity(len(outcomes), "round"),
        )  # fmt: skip
    if (run / "final").is_dir() and outcomes and not outcomes[-1].model:
        raise SettingError(
            "{resume}: the run in {run} ended with round {number}, which was no better than the model that it began "
            "with, so a further one would mine the same negatives", run=run, number=outcomes[-1].number,
        )  # fmt: skip
    if len(outcomes) == planned and checkpoint.is_finished(run):
        raise SettingError(
            "{resume}: the run in {run} is finished, after {taken}. {rounds} N, above that, adds rounds", run=run,
            taken=quantity(planned, "round"),
        )  # fmt: skip
    return outcomes


def begin(rounds: Rounds, introduction: Sequence[tuple[str, str]]) -> None:
    """Make the run's folder with its questions and rows, unless they are there, and print the first lines."""
    settings, folder = rounds.settings, rounds.folder
    if settings.overwrite:
        checkpoint.remove_run(folder)
    files.make_folder(folder)
    if not rounds.rows:
        data = open_data(settings)
        _check_data(settings, data)
        resolve_length(settings, _per_epoch(settings, len(data.rows)))  # a round's data are none of the toolkit's own
        data.keep(folder)
        files.write_folder(folder / checkpoint.ROUNDS / ROWS, lambda target: _write_rows(target, data.rows))
        introduction = [*introduction, *data.lines]
        data.rows.close()
    write_yaml(settings, folder / "config.yaml")
    teacher = f", scored by {settings.rounds_teacher}" if settings.rounds_teacher else ""
    plan = f"{settings.rounds}, each with {quantity(settings.rounds_negatives, 'mined negative')} a query{teacher}"
    print_lines([*introduction, ("rounds", plan)])


def _check_data(settings: Settings, data: RunData) -> None:
    """Raise UserError if negatives cannot be mined for the rows, or if guards cannot guard."""
    for source in data.rows.sources if isinstance(data.rows, InterleavedRows) else [data.rows]:
        if source.format in ("label", "documents"):
            raise SettingError(
                "{rounds}: {names} has rows of the kind {kind!r}; negatives are mined for queries with a positive",
                names=", ".join(source.names),
                kind=source.format,
            )
    improvement.check_evaluated(settings, bool(data.eval_tasks))
    check_guards(settings, data, bool(data.eval_tasks))


def _per_epoch(settings: Settings, rows: int) -> float:
    """Return the steps of an epoch of that many rows."""
    return rows / min(settings.batch_size, rows)


def _write_rows(folder: Path, rows: Source) -> None:
    """Write the examples of each source into a file, in their order."""
    for number, source in enumerate(rows.sources if isinstance(rows, InterleavedRows) else [rows], 1):
        write_rows(folder / f"{number}.jsonl", _as_rows(source))


def _as_rows(source: Source) -> Iterator[dict[str, Any]]:
    examples = (source[i] for i in sorted(itertools.islice(source.numbers(0, 0), len(source))))
    for items in by_row(({}, example) for example in examples):
        example = items[0][1]
        row = {"query": example.query} | positives_of(items)
        row |= {"rank": example.rank} if example.rank != 1 else {}
        yield row | ({"negatives": list(example.negatives)} if example.negatives else {})


# --- rounds -----------------------------------------------------------------------------------------------------------


def take_rounds(rounds: Rounds, outcomes: list[Outcome]) -> None:
    """Take the rounds that are left, and add their outcomes. They end early after one without a better model."""
    for number in range(len(outcomes) + 1, rounds.settings.rounds + 1):
        model = outcomes[-1].model if outcomes else rounds.settings.model
        if model is None:
            return
        print_lines([("round", f"{number} of {rounds.settings.rounds}, from {model}")])
        settings = rounds.settings_of(number, model)
        try:
            mine_round(settings, rounds.settings, rounds.rows)
        except KeyboardInterrupt as stop:
            again = output_folder.continue_command(rounds.folder)
            raise KeyboardInterrupt(f"stopped while negatives were mined. Continue: {again}") from stop
        _free()
        rounds.train_one(settings, [])
        _free()
        outcomes.append(rounds.outcome(number))
        best = best_of(outcomes)
        if best is not None and best.number == number:
            _copy(best.folder / "best", rounds, "best")


def best_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the round with the best model, the first of equals; None if none has a better one than it began with."""
    better = [outcome for outcome in outcomes if (outcome.folder / "best").is_dir()]
    return max(better, key=lambda outcome: outcome.state.best, default=None)


def _free() -> None:
    """Free the models of the last round: `run.train` has frozen what was there, so that nothing collects it."""
    gc.unfreeze()
    gc.collect()
    mx.clear_cache()


def _copy(model: Path, rounds: Rounds, name: str) -> None:
    """Copy a model of a round into the run's folder, with the settings of the whole run."""

    def fill(folder: Path) -> None:
        for file in model.iterdir():
            if file.name not in (
                checkpoint.STATE,
                checkpoint.OPTIMIZER,
                moving_average.FILE,
                other_vectors.PROJECTION,
            ):  # the round alone goes on from there
                shutil.copyfile(file, folder / file.name)
        write_yaml(rounds.settings, folder / "config.yaml")

    files.write_folder(rounds.folder / name, fill)


def conclude(rounds: Rounds, outcomes: Sequence[Outcome]) -> dict:
    """Write the run's `final`, figures and report, print where everything is, and return the figures."""
    folder, best, last = rounds.folder, best_of(outcomes), outcomes[-1]
    if best is not None:  # again: a kill may have come between the end of its round and the copy
        _copy(best.folder / "best", rounds, "best")
    results = results_of(outcomes, best)
    files.write_file(folder / "results.json", json.dumps(results, indent=2) + "\n")
    copy_evaluations(folder, outcomes, best)
    write_curves(folder, outcomes)
    _copy(last.folder / "final", rounds, "final")  # when all else is there: with it the run is finished
    print_table(outcomes, best)
    lines = []
    if best is not None:
        lines.append(("best", f"{folder / 'best'} (round {best.number}, step {best.state.best_step})"))
    if last.model is None:
        reason = f"round {last.number} was no better than the model that it began with"
        ended = last.number < rounds.settings.rounds
        lines.append(("no gain", f"{reason}, so the rounds end there" if ended else reason))
    lines.append(("final", f"{folder / 'final'}, of the last round"))
    use = ("python", "embed.py", "--model", improvement.model_to_use(folder), "--input", "FILE")
    following = [("next", shell(*use, "--output", "vectors.npy") + "  # FILE: texts of your own")]
    if results["improved"] is False:
        following = [("use", f"{rounds.settings.model}, which the run began with: final is no better")]
    report = write_round_report(rounds.settings, outcomes, best, rounds.eval_tasks, lines, following)
    lines += [("report", f"{report}")] if report else []
    print_lines([*lines, *following])
    return results


# --- dry run ----------------------------------------------------------------------------------------------------------


def _dry_run(settings: Settings, train_one: TrainOne, introduction: Sequence[tuple[str, str]]) -> dict:
    """Measure a step on the rows as they are, and print what all rounds would take. Change nothing."""
    count, negatives = settings.rounds, settings.rounds_negatives
    one = dataclasses.replace(settings, rounds=0, rounds_negatives=1, rounds_teacher=None)
    if settings.loss in DISTILLING:
        one.loss = None  # the rows have no scores yet
    with contextlib.closing(open_data(dataclasses.replace(one)).rows) as rows:
        examples = len(rows)
    resolve_length(one, _per_epoch(one, examples))
    plan = train_one(one, introduction)
    step = plan["seconds_per_step"]
    mining = _per_epoch(one, examples) * step * FORWARD
    training = one.steps * step
    teacher = f"; {settings.rounds_teacher} scores them, which takes longer" if settings.rounds_teacher else ""
    print_lines(
        [
            ("rounds", f"{count}, each mines {quantity(negatives, 'negative')} for each of {quantity(examples, 'row')}"
             f" and takes {quantity(one.steps, 'step')}"),
            ("mining", f"about {_minutes(mining)} a round, a pass over the texts of all rows{teacher}"),
            ("training", f"{_minutes(training)} to {_minutes(training * (1 + negatives))} a round, by the length of "
             "what is mined; without evaluations"),
            ("all rounds", f"{_minutes(count * (mining + training))} to "
             f"{_minutes(count * (mining + training * (1 + negatives)))}"),
        ]
    )  # fmt: skip
    return plan | {"rounds": count, "mining_seconds": mining}


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
