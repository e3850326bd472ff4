"""Evaluate a model as it is handed in: mteb runs its tasks and benchmarks, of every type, and keeps its own results.

tasks = select(["NanoBEIR", "STS12"], languages=["eng"])          # of mteb_selection.py
run = evaluate(load("adapters/final"), tasks, Path("mteb"))       # mteb/results/<model>/<revision>/<task>.json
print_table(run)

Tasks whose results are there already are not evaluated again, so that a run which was killed goes on.
"""

import io
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

from mlx_retrieval.evaluation import mteb_tasks
from mlx_retrieval.evaluation.mteb_selection import parts_of
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.locks import only_one

META = "model_meta.json"  # beside a model's results: which model it is


class Run(NamedTuple):
    """The results of a model."""

    model: str  # its name in the results
    folder: Path  # of its results
    scores: list[tuple[str, str, str, float]]  # task, type, name of its main score, and that score
    means: dict[str, float]  # mteb's means of several tasks, by its names
    unreachable: dict[str, str]  # see `Evaluation.unreachable`


def evaluate(
    model: Any,
    tasks: Sequence[Any],
    folder: Path,
    name: str | None = None,
    prompts: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Run:
    """Evaluate a model on tasks of mteb, and tell each result on standard error when it is there.

    Args:
        model: an `embedder.Model` or a `Reranker`, which only tasks of the types Reranking are for.
        tasks: from `mteb_selection.select`.
        folder: of the results; mteb puts them into its `results/<model>/<revision>`.
        name, settings: see `mteb_models.describe`.
        prompts: see `mteb_models.as_mteb`.
        overwrite: evaluate tasks again that have results.

    Raises UserError for tasks that the model is not for, and if the folder's results are another model's.
    """
    from mteb import ResultCache

    from mlx_retrieval.evaluation import mteb_models

    _check_types(model, tasks)
    meta = mteb_models.describe(
        model, name, dict(settings or {}) | ({"task_prompts": dict(prompts)} if prompts else {})
    )
    encoder = mteb_models.as_mteb(model, meta, prompts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--results {folder}: cannot be made ({error.strerror})") from error
    cache = ResultCache(folder)
    place = cache.get_task_result_path("_", meta).parent
    busy = f"--results {folder}: another process evaluates {meta.name} of this revision there"
    with only_one(folder / f".{meta.model_name_as_path()}-{meta.revision}.lock", busy):
        _check_place(place, meta)
        return _evaluate(encoder, tasks, cache, place, overwrite)


def _evaluate(encoder: Any, tasks: Sequence[Any], cache: Any, place: Path, overwrite: bool) -> Run:
    """Evaluate task by task, as `evaluate` says."""
    scores, unreachable = [], {}
    for number, task in enumerate(tasks, 1):
        started = time.perf_counter()
        try:
            result = _evaluate_task(encoder, task, cache, overwrite)
        except mteb_tasks.UnreachableError as error:
            unreachable[task.metadata.name] = str(error)
            continue
        score, seconds = result.get_score(), time.perf_counter() - started
        scores.append((task.metadata.name, task.metadata.type, task.metadata.main_score, score))
        line = f"{number}/{len(tasks)} {task.metadata.name}: {score:.4f}, {seconds:,.0f} s"
        print(line, file=sys.stderr, flush=True)
    means = _means(scores) if len(scores) == len(tasks) > 1 else {}
    return Run(encoder.mteb_model_meta.name, place, scores, means, unreachable)


@contextmanager
def _without_noise() -> Iterator[None]:
    """Silence warnings of mteb's libraries and, where no terminal shows them, its progress bars."""
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with warnings.catch_warnings(), bars:
        warnings.simplefilter("ignore")
        yield


def _evaluate_task(encoder: Any, task: Any, cache: Any, overwrite: bool) -> Any:
    """Return mteb's result of a task, from the folder if it is there; of a bundle, after that of each of its parts."""
    import mteb

    meta = encoder.mteb_model_meta
    # The model forms its own batches; mteb only passes texts on.
    options: Any = {"encode_kwargs": {"batch_size": 1024, "show_progress_bar": False}, "co2_tracker": False}
    for part in parts_of(task):
        file = cache.get_task_result_path(part.metadata.name, meta)
        again = overwrite or _is_broken(file)
        if part.is_aggregate:  # put together again from its parts' results, which may be new
            file.unlink(missing_ok=True)
            again = False
        with mteb_tasks.quiet(False), _without_noise():
            strategy = "always" if again else "only-missing"
            mteb.evaluate(encoder, part, cache=cache, overwrite_strategy=strategy, show_progress_bar=False, **options)
    # As it is in the folder, in which a run with other languages may have left more.
    return cache.load_task_result(task.metadata.name, meta).validate_and_filter_scores(task)


def _is_broken(file: Path) -> bool:
    """Return whether this file of results is not whole: a run was killed while it wrote it."""
    from mteb.results import TaskResult

    if not file.exists():
        return False
    try:
        TaskResult.from_disk(file)
    except (ValueError, KeyError, TypeError, AttributeError):
        print(f"{file}: not complete; the task is evaluated again", file=sys.stderr)
        return True
    return False


def _check_types(model: Any, tasks: Sequence[Any]) -> None:
    """Raise UserError for tasks that a model of this kind cannot be evaluated on."""
    kinds = {"rerank": ("Reranking",), "late": ("Reranking", "Retrieval")}
    fit = kinds.get(model.config.task)
    for task in tasks:
        if fit and not task.metadata.type.endswith(fit):
            raise UserError(
                f"{task.metadata.name} is of type {task.metadata.type}, and {model.name} is for tasks of "
                f"{' and '.join(fit)} alone: choose them by --task-types"
            )


def _check_place(place: Path, meta: Any) -> None:
    """Write a model_meta.json that a killed run left incomplete, and tell of results of other revisions, which stay.

    Raises UserError if this revision's results are another model's.
    """
    file, here = place / META, json.loads(json.dumps(meta.to_dict(), default=str))
    if (there := _read_meta(file)) is not None:
        if differing := [key for key in ("name", "revision", "experiment_kwargs") if there.get(key) != here[key]]:
            of = " and ".join(f"{key} {there.get(key)!r} in place of {here[key]!r}" for key in differing)
            raise UserError(f"--results: {file} has {of}: these are another model's results; name another folder")
    elif file.exists() or any(place.glob("*.json")):
        print(f"{file}: {'not complete' if file.exists() else 'missing'}; written again", file=sys.stderr)
        files.write_file(file, json.dumps(here, indent=4), f"--results {file}")
    elif others := sorted(path.parent.name for path in place.parent.glob(f"*/{META}")):
        listing = ", ".join(others)
        print(f"{place.parent}: has results of other revisions, which stay as they are: {listing}", file=sys.stderr)


def _read_meta(file: Path) -> dict[str, Any] | None:
    """Return what a model_meta.json holds, or None if it is missing or names no model: mteb would not read it."""
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return meta if isinstance(meta, dict) and {"name", "revision"} <= meta.keys() else None


def _means(scores: Sequence[tuple[str, str, str, float]]) -> dict[str, float]:
    """Return mteb's two means of several tasks: over all, and over the means of the types."""
    by_type: dict[str, list[float]] = {}
    for _, kind, _, score in scores:
        by_type.setdefault(kind, []).append(score)
    return {
        "Mean (Task)": statistics.fmean(score for *_, score in scores),
        "Mean (TaskType)": statistics.fmean(map(statistics.fmean, by_type.values())),
    }


def print_table(run: Run) -> None:
    """Print the main score of every task, and mteb's means of them; in a narrow terminal without the tasks' types."""
    from mlx_retrieval.utils.console import fits, print_rows

    rows = [(task, kind, metric, f"{score:.4f}") for task, kind, metric, score in run.scores]
    rows += [(name, "", "", f"{score:.4f}") for name, score in run.means.items()]
    rows += [(f"{task} (unreachable)", "", "", "-") for task in run.unreachable]
    columns = ("task", "type", "metric", "score")
    if not fits(columns, rows):
        columns, rows = ("task", "metric", "score"), [(task, *figures) for task, _, *figures in rows]
    print_rows(run.model, columns, rows)
