"""The stages of an adaptation, one function each: it writes its files, prints what it did, and returns its figures.

read       chunks.jsonl                  the documents' chunks
           unread.jsonl                  files that cannot be read, wholly or in parts, each with its reason
questions  questions/none-1f0c.jsonl     questions of chunks, with their origin; a file for each way to make them
filter     rows.jsonl, held-out/         those that stay: to train on, and to judge by
negatives  mined.jsonl                   the rows with hard negatives
train      run/, held.safetensors        a run of train.py, and the base model's vectors of texts that it holds in place
           held-0.jsonl                  rows of those texts, as many as the run comes to
export     model/                        the trained model, for sentence-transformers; absent if none was better
evaluate   evaluation.json               the base model and the trained one, on every task
index      index/                        for search.py
report     report.html

run.py calls them in this order.
"""

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_retrieval.adaptation import chunk_file, costs, split
from mlx_retrieval.adaptation.asking import questions
from mlx_retrieval.adaptation.costs import minutes
from mlx_retrieval.adaptation.figures import figure_rows
from mlx_retrieval.adaptation.held import Held, rows_of
from mlx_retrieval.adaptation.record import UNFINISHED
from mlx_retrieval.adaptation.training_settings import (
    evaluations_in,
    rows_to_hold,
    settings_of,
    steps_for,
    with_held,
)
from mlx_retrieval.adaptation.workshop import Figures, TooFewQuestionsError, Workshop
from mlx_retrieval.dataset.documents.document_chunks import FEWEST_LETTERS, ChunkCounts, chunk_documents
from mlx_retrieval.dataset.documents.folder import read_folder
from mlx_retrieval.dataset.documents.summary import summary, unread_rows
from mlx_retrieval.dataset.rows import find_files
from mlx_retrieval.evaluation.retrieval import evaluate as evaluate_model
from mlx_retrieval.exporters.job import Export
from mlx_retrieval.exporters.run import export_with_warnings
from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.mining import hard_negatives
from mlx_retrieval.mining.cache import cache_folder
from mlx_retrieval.mining.output import write_rows
from mlx_retrieval.mining.questions import filtering
from mlx_retrieval.mining.questions.store import CHUNK, STYLE
from mlx_retrieval.mining.run import mine_negatives, naming_lines, write_vectors
from mlx_retrieval.retrieval.indexer import update
from mlx_retrieval.training import checkpoint
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.improvement import model_to_use
from mlx_retrieval.training.length import resolve_length
from mlx_retrieval.training.run_data import open_rows
from mlx_retrieval.utils import files
from mlx_retrieval.utils.console import WARNING, print_lines, print_rows
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import progress_bar
from mlx_retrieval.utils.text import quantity

EXAMPLES = 8  # questions that are shown
LENGTH = ("steps", "epochs", "eval_steps")  # settings of a run that its rows and the budget have decided
NO_GAIN = "no step was better than the untrained model"


# --- documents and questions ------------------------------------------------------------------------------------------


def read(shop: Workshop) -> Figures:
    """Read the documents and cut them into chunks."""
    job, counts = shop.job, ChunkCounts()
    with read_folder(job.documents, job.max_file_size, job.exclude) as folder:
        with progress_bar("cutting", "documents", len(folder)) as progress:

            def chunks():
                for chunk in chunk_documents(folder, counts, job.chunk_size, job.overlap):
                    progress(counts.documents + counts.without_chunks)
                    yield chunk

            count = chunk_file.write(shop.path("chunks.jsonl"), chunks())
        if not count:
            raise UserError(f"{job.documents}: no document has a text of {FEWEST_LETTERS} letters or more")
        lines, unread = summary(folder, counts), unread_rows(folder)
    if unread:
        write_rows(shop.path("unread.jsonl"), (file._asdict() for file in folder.unread))
        print_rows("not read", ("reason", "files"), unread)
        lines += [("all of these", str(shop.path("unread.jsonl")))] * shop.is_kept
    print_lines(lines)
    return {"chunks": count, "lines": lines, "unread": unread}


def filter_questions(shop: Workshop) -> Figures:
    """Leave out questions that the base model does not find the chunk of, copies and duplicates; hold some out."""
    job, chunks = shop.job, shop.chosen()
    judge = Reranker(job.reranker, dtype=job.dtype, raw_scores=True) if job.reranker else None  # a sigmoid ties many

    def rows():
        with open(shop.questions, encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    with cache_folder(shop.path("rows.jsonl"), None) as cache:
        model = shop.base_model()
        scores, name = (judge.score_groups, judge.fingerprint()) if judge else (None, "")
        result = filtering.keep(rows(), chunks, model, cache, job.rules, scores, name)
    del model, judge
    costs.free()
    kept = {*result.kept}
    rows_kept = [row for number, row in enumerate(rows()) if number in kept]
    divided = split.split_rows(rows_kept, (chunk.id for chunk in chunks), job.holdout, job.seed)
    if divided.reason:
        raise TooFewQuestionsError(
            f"{quantity(len(rows_kept), 'question')} left of {len(result.ranks):,}: {divided.reason}, to train and to "
            "judge; more documents, more --questions, another --generator, or a larger --found-among"
        )
    held = split.questions_of(rows_kept, divided, chunks, job.seed)
    shutil.rmtree(shop.path("held-out"), ignore_errors=True)
    files.write_folder(shop.path("held-out"), held.write)
    trained = [rows_kept[number] for number in divided.trained]
    write_rows(shop.path("rows.jsonl"), trained)
    dropped = result.dropped.lines()
    asked = f"{len(held.queries):,} of {quantity(len(divided.chunks), 'chunk')} that nothing is trained on"
    lines = [
        ("kept", f"{len(rows_kept):,} of {quantity(len(result.ranks), 'question')}"),
        *dropped,
        ("held out", asked),
        ("to train on", quantity(len(trained), "question")),
    ]
    print_lines(lines)
    examples = _examples(trained)
    print_rows("examples", ("question", "made as"), [(text, style) for text, style, _ in examples])
    return {
        "rows": len(trained),
        "held_out": len(held.queries),
        "held_chunks": sorted(divided.chunks),
        "lines": lines,
        "examples": examples,
    }


def _examples(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return some questions spread over the rows: their text, style and source."""
    step = max(1, len(rows) // EXAMPLES)
    return [(row["query"], row[STYLE], row["source"]) for row in rows[::step][:EXAMPLES]]


# --- training ---------------------------------------------------------------------------------------------------------


def negatives(shop: Workshop) -> Figures:
    """Mine hard negatives among the chunks that are not held out; a row's own chunk is never one."""
    job, held = shop.job, frozenset(shop.figures["filter"]["held_chunks"])
    rows, target = shop.path("rows.jsonl"), shop.path("mined.jsonl")
    own = {chunk.id: chunk.embedded for chunk in shop.chosen() if chunk.id not in held}
    if not job.negatives:
        shutil.copyfile(rows, target)
        return {"negatives": 0, "lines": [("negatives", "none are mined (--negatives 0)")]}
    rules = hard_negatives.Rules(take=job.negatives, relative_margin=hard_negatives.RELATIVE_MARGIN)
    found = target.with_name("found.jsonl")
    with cache_folder(target, None) as cache:
        mined = mine_negatives([rows], own.values(), rules, cache, shop.base_model(), notify=_note)
        mined.write(found, with_scores=False)
    costs.free()
    count = 0

    def without_own_chunks():
        nonlocal count
        with open(found, encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                # A question that was taken out of its chunk still has the rest of it as its document.
                row["negatives"] = [text for text in row["negatives"] if text != own[row[CHUNK]]]
                count += len(row["negatives"])
                yield row

    total = write_rows(target, without_own_chunks())
    found.unlink()
    lines = [("negatives", f"{count:,} for {quantity(total, 'question')}")]
    print_lines(lines)
    return {"negatives": count, "lines": lines}


def _note(line: str) -> None:
    print_lines([("mining", line)])


def train(shop: Workshop) -> Figures:
    """Train; a run that was stopped goes on."""
    run = shop.path("run")
    if checkpoint.is_finished(run):  # a kill came before the stage was noted
        return _trained(run)
    rows = shop.figures["filter"]["rows"]
    settings_with = partial(settings_of, shop.job, shop.path("mined.jsonl"), [shop.path("held-out")], run)
    held = _hold(shop, _rows_to_hold(shop, settings_with(), rows)) if shop.job.hold else None
    settings = settings_with(held)
    if checkpoint.last_step(run):
        saved, settings.resume = checkpoint.run_settings(run), True
        settings.steps, settings.epochs, settings.eval_steps = (saved[name] for name in LENGTH)
    else:
        settings.overwrite = checkpoint.holds_run(run)
        with contextlib.closing(open_rows(settings)) as every:
            total = len(every)  # those of held texts, too
        size = min(settings.batch_size, total)
        if settings.steps is None and settings.epochs is None:
            steps = steps_for(rows, size)
            settings.steps = with_held(steps) if held else steps
        if shop.deadline is not None:
            resolve_length(settings, total / size)
            _limit_steps(shop, settings, size)
    training_run.train(settings)
    costs.free()
    return _trained(run)


def _rows_to_hold(shop: Workshop, settings: Settings, rows: int) -> int:
    """Return how many rows of other texts a run comes to, in the time that is left; `rows`: of its questions."""
    most = math.inf if shop.deadline is None else max(0, _fitting(shop, settings.batch_size)[0])
    return rows_to_hold(settings, rows, len(shop.job.hold), most)


def _hold(shop: Workshop, count: int) -> Held:
    """Return texts of `job.hold`, with the base model's vectors of them, computed if they are not there.

    `count`: rows, see `rows_of`.
    """
    target, names = shop.path("held.safetensors"), rows_of(shop.job, shop.job.output, count)
    if not target.exists():
        model = embedder.load(shop.job.model, dtype=shop.job.dtype)
        sources = find_files(names)
        with cache_folder(target, None) as cache, naming_lines(sources):
            texts = write_vectors(sources, target, model, cache, notify=_note)
        costs.free()
        print_lines([("held", f"{quantity(len(texts), 'text')} in place, of {', '.join(shop.job.hold)}")])
    return Held(target, names)


def _trained(run: Path) -> Figures:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return {"improved": results["improved"], "lines": [("run", str(run))]}


def _fitting(shop: Workshop, size: int) -> tuple[int, int]:
    """Return how many steps, of `size` rows, and how many evaluations there is time for before the later stages."""
    left, search = shop.deadline - time.monotonic(), shop.plan.search
    room = left - sum(shop.plan.seconds[name] for name in ("export", "evaluate", "index"))
    evaluations = evaluations_in(room, search)
    return int((room - (1 + evaluations) * search) / (shop.plan.row_seconds * size)), evaluations


def _limit_steps(shop: Workshop, settings: Settings, size: int) -> None:
    """Lower the steps of a run so that the stages after it are done in time, and decide when it is evaluated.

    `size`: rows of a batch.
    """
    whole, (fitting, evaluations) = settings.steps, _fitting(shop, size)
    settings.steps, settings.epochs = min(whole, max(evaluations, fitting)), None
    if settings.eval_steps is None:  # 0 is a setting: only the last step is evaluated
        settings.eval_steps = math.ceil(settings.steps / evaluations)
    if settings.steps < whole:
        left = minutes(max(0.0, shop.deadline - time.monotonic()))
        print_lines([("budget", f"{left} left: {settings.steps:,} of {whole:,} steps")])


def export(shop: Workshop) -> Figures:
    """Export the trained model, with as large a share of the trained weights as the guards allow."""
    run, target = shop.path("run"), shop.path("model")
    shutil.rmtree(target, ignore_errors=True)
    if shop.figures["train"]["improved"] is False and not (run / "best").is_dir():
        lines = [("no gain", f"{NO_GAIN}, so {shop.job.model} stays the model to use")]
        print_lines(lines)
        return {"exported": False, "lines": lines}
    wanted = shop.job
    share = {"merge_with_base": wanted.trained_share if wanted.trained_share < 1 else None}
    if wanted.guard:
        share = {"merge_with_base": "guards", "largest_share": wanted.trained_share}
        share |= {"guard": wanted.guard, "guard_tolerance": wanted.guard_tolerance}
    try:
        job = Export(str(target), adapter=str(model_to_use(run)), skip_library_check=True, **share)
        export_with_warnings(job, "adapt.py")
    except UserError as error:
        if "no share of" not in str(error):
            raise
        lines = [("no gain", f"{error}, so {shop.job.model} stays the model to use")]
        print_lines(lines)
        return {"exported": False, "lines": lines}
    finally:
        costs.free()
    return {"exported": True, "share": job.merge_with_base, "lines": [("exported", str(target))]}


# --- use --------------------------------------------------------------------------------------------------------------


def evaluate(shop: Workshop) -> Figures:
    """Evaluate the base model and the exported one on the held-out questions, the guards and the user's tasks.

    Tasks of the hub that cannot be reached leave the stage unfinished: the next call tries them again.
    """
    tasks = [str(shop.path("held-out")), *shop.job.eval_tasks, *shop.job.guard]
    names = [shop.job.model] + [str(shop.path("model"))] * shop.path("model").is_dir()
    evaluations = []
    for name in names:
        evaluations.append(evaluate_model(embedder.load(name, dtype=shop.job.dtype), tasks, sys.stderr.isatty()))
        costs.free()
    record = [evaluation.to_json() for evaluation in evaluations]
    files.write_file(shop.path("evaluation.json"), json.dumps(record, indent=1) + "\n")
    rows = figure_rows(evaluations)
    print_rows("before and after", ("task", "before", "after", "difference", "95 % interval"), rows)
    lines = [(WARNING, f"not evaluated: {reason}") for reason in evaluations[0].unreachable.values()]
    print_lines(lines)
    return {"rows": rows, "lines": lines} | ({UNFINISHED: lines[0][1]} if lines else {})


def index(shop: Workshop) -> Figures:
    """Index the folder with the model to use, cut as it was for training; search.py keeps such an index up to date."""
    job = shop.job
    model = embedder.load(shop.model, dtype=job.dtype)
    limits = (job.chunk_size, job.overlap, job.max_file_size, job.exclude)
    result = update(job.documents, shop.path("index"), model, *limits, documents=True)
    costs.free()
    lines = [("index", f"{shop.path('index')}: {result.chunks:,} chunks of {quantity(result.files, 'file')}")]
    print_lines(lines)
    return {"chunks": result.chunks, "files": result.files, "lines": lines}


STAGES: dict[str, Callable[[Workshop], Figures]] = {
    "read": read,
    "questions": questions,
    "filter": filter_questions,
    "negatives": negatives,
    "train": train,
    "export": export,
    "evaluate": evaluate,
    "index": index,
}
