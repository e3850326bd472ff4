"""Opens what a retrieval model's run reads: the rows that it trains on, and what is kept from training to judge it by.

data = open_data(Settings(data=["pairs.jsonl"]))
len(data.rows), data.eval_tasks
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loss import SCORED_PAIRS
from mlx_retrieval.dataset import choice, held_out, held_out_pairs
from mlx_retrieval.dataset.columns import parse as parse_columns
from mlx_retrieval.dataset.held_out import HeldOut, Questions
from mlx_retrieval.dataset.held_out_pairs import Pairs
from mlx_retrieval.dataset.row_files import hub_validations
from mlx_retrieval.dataset.rows import Rows, find_validation
from mlx_retrieval.dataset.similar_rows import side_by_side
from mlx_retrieval.dataset.sources import (
    InterleavedRows,
    ReadOptions,
    Source,
    is_default_data,
    local,
    names,
    open_mixture,
    open_source,
)
from mlx_retrieval.training import contents, distributed, source_settings
from mlx_retrieval.training.checkpoint import HELD_OUT, is_saved
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.objectives import check_scored, is_alone
from mlx_retrieval.training.settings_checks import DISTILLING
from mlx_retrieval.utils import files, toolkit
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.text import located, quantity


@dataclass
class RunData:
    """The data of a run.

    Attributes:
        rows: to train on.
        validation: of `valid.jsonl`, for the validation loss; None = there is no such file.
        lines: (name, text) about the rows, for the run's first lines.
        eval_tasks: evaluation folders and MTEB tasks that the run is judged on.
        questions: held-out ones, which `keep` writes into a folder of `eval_tasks`; None = no such folder is missing.
    """

    rows: Source
    validation: Rows | None = None
    lines: Lines = field(default_factory=list)
    eval_tasks: list[str] = field(default_factory=list)
    questions: Questions | Pairs | None = None

    def keep(self, run: Path) -> None:
        """Write the held-out questions into a run's folder, from where they are read from now on."""
        if self.questions:
            files.write_folder(run / HELD_OUT, self.questions.write)
            self.eval_tasks = [str(run / HELD_OUT)]

    @contextmanager
    def readable_tasks(self) -> Iterator[list[str]]:
        """Yield `eval_tasks`, with questions that are not kept yet in a temporary folder."""
        if not self.questions:
            yield self.eval_tasks
            return
        with tempfile.TemporaryDirectory() as folder:
            self.questions.write(Path(folder))
            yield [folder]

    def leave_out_validation(self, settings: Settings) -> None:
        """Compute no loss on validation rows that lack what the run's loss needs, and say so."""
        if self.validation is None:
            return
        if is_alone(self.validation, settings, settings.batch_size):
            cause = "--batch-size 1" if settings.batch_size == 1 else "a single row"
            reason = f"{cause} leaves {settings.loss} nothing to compare"
        elif settings.loss in DISTILLING and not self.validation.has_scores:
            reason = f"{settings.loss} learns a teacher's scores, and not every row has them"
        else:
            return
        self.lines.append(("validation", f"{' and '.join(self.validation.names)} gives no loss: {reason}"))
        self.validation = None


def open_rows(settings: Settings) -> Source:
    """Open and check the rows of a run, held-out ones included. UserError as of `open_data`."""
    options = ReadOptions(
        columns=settings.columns,
        es_query=settings.es_query,
        skip_bad=settings.skip_bad_rows,
        ignore_keys=settings.ignore_keys,
        block=settings.batch_size if settings.batches == "homogeneous" else 1,
        temperature=settings.source_temperature,
    )
    parts = [(source_settings.paths(source), source_settings.weight(source)) for source in settings.sources]
    return open_mixture(parts, options) if parts else open_source(settings.data, options)


def open_data(settings: Settings) -> RunData:
    """Open and check all rows of a run. UserError for a source that cannot be read, or the first bad row."""
    rows = open_rows(settings)
    columns = None if settings.columns is None else parse_columns(settings.columns)
    valid_files: list[Path | str] = [*find_validation(local(settings.data))]
    if settings.eval_tasks is None and settings.holdout != 0:
        valid_files += hub_validations(names(settings.data))
    chosen = (settings.skip_bad_rows, settings.ignore_keys, columns, False)
    validation = Rows(valid_files, *chosen) if valid_files else None
    lines = [("reads", line) for line in rows.readings]
    lines += [("left out", line) for line in rows.skipped[:20]]
    data = RunData(rows, validation, lines, settings.eval_tasks or [])
    if settings.eval_tasks is None:
        _choose_evaluation(data, settings)
    if settings.guard:
        allowed = f"each may lose {settings.guard_tolerance:g} of nDCG@10 or Spearman"
        data.lines.append(("guards", f"{', '.join(str(located(Path(task))) for task in settings.guard)}: {allowed}"))
    for task in (*(settings.eval_tasks or []), *settings.guard):
        _warn_of_trained(data, Path(task).expanduser())
    if not data.eval_tasks and not validation and not any(name == "judged on" for name, _ in data.lines):
        given = "--holdout 0" if settings.eval_tasks is None else "--eval-tasks without a name"
        data.lines.append(("judged on", f"nothing ({given}), so there is no table, no best and no report"))
    if isinstance(data.rows, InterleavedRows):  # a batch has no more rows than there are
        data.rows.block = min(data.rows.block, len(data.rows))
    data.rows = side_by_side(data.rows, settings.similar_rows)
    return data


def _warn_of_trained(data: RunData, folder: Path) -> None:
    """Warn if the questions that another run has held out are trained on."""
    if folder.name == HELD_OUT and folder.is_dir():
        if pairs := held_out_pairs.read(folder):
            if count := held_out.Leaving(held_out.Scan(data.rows, 0), pairs.texts).count:
                line = f"{quantity(count, 'row')} with a text of {folder} {'is' if count == 1 else 'are'} trained on"
                way_on = "its figures will be too good. Without --eval-tasks, pairs are held out"
                data.lines.append(("warning", f"{line}: {way_on}"))
            return
        questions = held_out.read_questions(folder)
        if count := held_out.count_asked(data.rows, questions):
            line = f"{count} of the {quantity(len(questions.queries), 'question')} of {folder} are trained on"
            way_on = "its figures will be too good. Without --eval-tasks, questions are held out"
            data.lines.append(("warning", f"{line}: {way_on}"))


def _choose_evaluation(data: RunData, settings: Settings) -> None:
    """Decide what a run is judged on whose --eval-tasks are not given, and take it out of the rows."""
    if not settings.holdout and is_default_data(settings.data):
        data.eval_tasks = [toolkit.find(toolkit.EVALUATION)]
        return
    if settings.holdout == 0:
        return
    run = settings.folder
    earlier = None
    if settings.resume:
        earlier = distributed.broadcast_object("the held-out questions", lambda: _earlier(run))
    if _are_scored_pairs(data, settings):
        _choose_pairs(data, settings, earlier)
    elif earlier is not None and not earlier["texts"]:
        data.lines.append(("judged on", "no held-out questions, as when the run was begun"))
    elif earlier is not None:
        texts = frozenset(earlier["texts"])
        if data.validation and held_out.take_validation(data.rows, data.validation, settings.seed).questions:
            texts |= held_out.texts_in(data.validation)
        questions = f"{quantity(earlier['questions'], 'question')} of {run / HELD_OUT}, as when the run was begun"
        data.lines.append(("judged on", f"{questions}, {_among(earlier['documents'])}"))
        _leave_out(data, held_out.leave_out(data.rows, texts, settings.seed))
        data.eval_tasks = [str(run / HELD_OUT)]
    elif not (_ask_validation(data, settings) or _ask_again(data, settings)):
        share = choice.SHARE if settings.holdout is None else settings.holdout
        held = held_out.hold_out(data.rows, share, settings.seed)
        count = len(held.questions.queries) if held.questions else 0
        bound = {choice.LEAST: f", at least {choice.LEAST}", choice.MOST: f", at most {choice.MOST}"}.get(count, "")
        _take_questions(data, held, run, f"held out (--holdout {share:g}{bound})")


def _are_scored_pairs(data: RunData, settings: Settings) -> bool:
    """Return whether a run learns from scored pairs as such: rerankers do not."""
    losses = {source.get("loss") or settings.loss for source in settings.sources} or {settings.loss}
    return data.rows.format == "label" and losses <= {*SCORED_PAIRS}


def _choose_pairs(data: RunData, settings: Settings, earlier: dict[str, Any] | None) -> None:
    """Do the same as `_choose_evaluation` where rows are scored pairs: judge the run on pairs. `earlier`: see there."""
    run, seed = settings.folder, settings.seed
    if earlier is not None:
        if not earlier["texts"]:
            data.lines.append(("judged on", "no held-out pairs, as when the run was begun"))
            return
        count = quantity(earlier["questions"], "pair")
        data.lines.append(("judged on", f"{count} of {run / HELD_OUT}, as when the run was begun, by Spearman"))
        _leave_out(data, held_out.leave_out(data.rows, frozenset(earlier["texts"]), seed), "texts")
        data.eval_tasks = [str(run / HELD_OUT)]
        return
    share = choice.SHARE if settings.holdout is None else settings.holdout
    before = Path(settings.model).expanduser()
    saved = distributed.broadcast_object(
        "the pairs of the starting model", lambda: _saved_pairs(before) if is_saved(before) else None
    )
    if data.validation:
        check_scored(data.validation, settings.loss or settings.sources[0]["loss"])
        held, origin = (
            held_out_pairs.take_validation(data.rows, data.validation, seed),
            "of " + " and ".join(data.validation.names),
        )
    elif saved:
        held, origin = held_out_pairs.take(data.rows, Pairs(saved), seed), f"of {before.parent / HELD_OUT}"
    else:
        held, origin = held_out_pairs.hold_out(data.rows, share, seed), f"held out (--holdout {share:g})"
    if held.questions is None:
        line = f"nothing, as no pairs could be held out: {held.reason}. --eval-tasks names a file of your own"
        data.lines.append(("judged on", line))
        return
    data.questions, data.eval_tasks = held.questions, [str(run / HELD_OUT)]
    data.lines.append(("judged on", f"{quantity(len(held.questions.pairs), 'pair')} {origin}, by Spearman"))
    _leave_out(data, held, "texts")


def _saved_pairs(model: Path) -> list[list] | None:
    """Return the pairs that the run of a saved step has held out; None = there are none."""
    pairs = held_out_pairs.read(model.parent / HELD_OUT)
    return pairs and pairs.pairs


def _ask_validation(data: RunData, settings: Settings) -> bool:
    """Judge the run on the questions of its validation rows, if it has some; return whether they can be asked."""
    if not data.validation:
        return False
    name = " and ".join(data.validation.names)
    held = held_out.take_validation(data.rows, data.validation, settings.seed)
    if not held.questions:
        data.lines.append(("validation", f"{name} gives a loss, but no questions: {held.reason}"))
        return False
    few = len(held.questions.queries) < 3 * choice.FEWEST
    _take_questions(data, held, settings.folder, f"of {name}" + ", too few to tell models apart" * few)
    return True


def _ask_again(data: RunData, settings: Settings) -> bool:
    """Judge a run that starts from a saved step of another on the questions that this one has held out.

    Return whether the run does and they can be asked.
    """
    before = Path(settings.model).expanduser()
    folder = before.parent / HELD_OUT
    saved = distributed.broadcast_object(
        "the questions of the starting model", lambda: _saved_questions(folder) if is_saved(before) else None
    )
    if saved is None:
        if is_saved(before) and _shares_data(before.parent, data.rows):
            line = f"{settings.model} was trained on these data without holding out questions, and knows those of now"
            data.lines.append(("warning", line))
        return False
    held = held_out.take_questions(data.rows, Questions(**saved), settings.seed)
    if not held.questions:
        if not held.reason:
            return False
        line = f"{settings.model} may know some of the held-out questions from its own training: {held.reason}"
        data.lines.append(("warning", line))
        return False
    _take_questions(data, held, settings.folder, f"of {folder}, which {settings.model} was not trained on")
    return True


def _saved_questions(folder: Path) -> dict[str, Any] | None:
    """Return the fields of the questions that a run has held out; None = it has held out pairs, or nothing."""
    if not folder.is_dir() or held_out_pairs.holds_pairs(folder):
        return None
    return vars(held_out.read_questions(folder))


def _shares_data(run: Path, rows: Source) -> bool:
    """Return whether a run was begun with one of the files or indices of these rows, as it was then or is now."""
    before = (contents.read(run) or {}).get("data", [])
    return any(now.name == then.name or now.digest == then.digest != "" for now in rows.contents() for then in before)


def _earlier(run: Path) -> dict[str, Any] | None:
    """Return the texts that a run has held out, by their keys, and the counts of questions and documents.

    There are no texts if it held nothing out. None = it has not begun.
    """
    if pairs := held_out_pairs.read(run / HELD_OUT):
        return {"texts": sorted(pairs.texts), "questions": len(pairs.pairs), "documents": 0}
    if (run / HELD_OUT).is_dir():
        questions = held_out.read_questions(run / HELD_OUT)
        counts = {"questions": len(questions.queries), "documents": len(questions.documents)}
        return {"texts": sorted(questions.texts), **counts}
    begun = contents.read(run)
    return {"texts": []} if begun is not None and not begun.get("evaluation") else None


def _take_questions(data: RunData, held: HeldOut, run: Path, origin: str) -> None:
    """Judge the run on held-out questions, if there are any. `origin`: of the questions, in words."""
    if (questions := held.questions) is None:
        line = f"nothing, as no questions could be held out: {held.reason}. --eval-tasks names a folder of your own"
        data.lines.append(("judged on", line))
        return
    data.questions, data.eval_tasks = questions, [str(run / HELD_OUT)]
    count = quantity(len(questions.queries), "question")
    data.lines.append(("judged on", f"{count} {origin}, {_among(len(questions.documents))}"))
    _leave_out(data, held)


def _among(documents: int) -> str:
    return f"searched among {quantity(documents, 'document')}"


def _leave_out(data: RunData, held: HeldOut, texts: str = "questions or answers") -> None:
    """Train on the rows that are left. `texts`: the held-out ones that the others have, in words."""
    data.rows = held.rows
    line = f"{held.left_out:,} of {quantity(held.examples, 'row')}, which hold one of these {texts}"
    if held.negatives:
        line += (
            f"; from other rows, {quantity(held.negatives, 'negative')} that {'is' if held.negatives == 1 else 'are'}"
        )
        line += " one of these answers"
    data.lines.append(("not trained", line))
