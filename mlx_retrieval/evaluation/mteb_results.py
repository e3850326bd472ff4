"""Evaluate a model as it is handed in: mteb runs its tasks and benchmarks, of every type, and keeps its own results.

tasks = select(["NanoBEIR", "STS12"], languages=["eng"])
run = evaluate(load("adapters/final"), tasks, Path("mteb"))       # mteb/results/<model>/<revision>/<task>.json
print_table(run)

Tasks whose results are there already are not evaluated again, so that a run which was killed goes on.
"""

import copy
import functools
import io
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple, get_args

from mlx_retrieval.evaluation import mteb_tasks
from mlx_retrieval.utils.errors import UserError, near_miss

MOCK = "mock"  # the name of mteb's own mock tasks
ROLES = ("query", "document")


class Run(NamedTuple):
    """The results of a model."""

    model: str  # its name in the results
    folder: Path  # of its results
    scores: list[tuple[str, str, str, float]]  # task, type, name of its main score, and that score
    means: dict[str, float]  # mteb's means of several tasks, by its names
    unreachable: dict[str, str]  # see `Evaluation.unreachable`


# --- which tasks ------------------------------------------------------------------------------------------------------


def select(names: Sequence[str], languages: Sequence[str] = (), types: Sequence[str] = ()) -> list[Any]:
    """Return mteb's tasks of these names, each once.

    Args:
        names: of tasks and benchmarks of mteb, or "mock".
        languages: keep only subsets in one of these, such as "eng" or "deu-Latn"; empty = all.
        types: keep only tasks of one of these types, such as "Retrieval"; empty = all.

    Raises UserError for a name, language or type that mteb does not know, for tasks that are not of text, and if no
    task is left.
    """
    mteb_tasks.import_mteb()
    from mteb.abstasks.task_metadata import TaskType

    for kind in types:
        if kind not in get_args(TaskType):
            raise UserError(f"--task-types {kind}: mteb knows no such type{near_miss(kind, get_args(TaskType))}")
    for language in languages:
        _check_language(language)
    tasks = {}
    for task in (task for name in names for task in _tasks_of(name)):
        if (not types or task.metadata.type in types) and (not languages or _keep(task, languages)):
            tasks.setdefault((task.metadata.name, *task.hf_subsets, *task.eval_splits), task)
    if not tasks:
        raise UserError(f"{' '.join(names)}: no task has one of these --languages and --task-types")
    for task in tasks.values():
        if task.metadata.modalities != ["text"]:
            about = ", ".join(task.metadata.modalities)
            raise UserError(f"{task.metadata.name} is about {about}; only tasks of text can be evaluated")
    return list(tasks.values())


def _tasks_of(name: str) -> list[Any]:
    """Return the tasks of a task's, bundle's or benchmark's name; their subsets may be changed."""
    import mteb

    if name == MOCK:
        from mteb import mocks

        return [type(task)() for task in mocks.MOCK_TASK_TEST_GRID]
    if name in mteb_tasks.benchmarks():
        tasks = [copy.copy(task) for task in mteb_tasks.benchmarks()[name].tasks]
    else:
        try:
            tasks = [mteb.get_task(name)]
        except KeyError as error:
            if Path(name).expanduser().exists():
                raise UserError(
                    f"{name}: --results is for tasks of mteb; evaluate folders and files without it"
                ) from error
            known = [*mteb_tasks.benchmarks(), *_task_names(), MOCK]
            raise UserError(f"{name}: mteb knows no such task or benchmark{near_miss(name, known)}") from error
    for part in (part for task in tasks for part in _parts(task)):
        part.load_data = functools.partial(mteb_tasks.load_data, part)
    return tasks


def _task_names() -> list[str]:
    import mteb

    return [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False, exclude_private=False)]


def _parts(task: Any) -> Iterator[Any]:
    """Return the tasks that a bundle is made of, and then the bundle; of any other task, itself."""
    for part in getattr(task.metadata, "tasks", ()):
        yield from _parts(part)
    yield task


def _keep(task: Any, languages: Sequence[str]) -> bool:
    """Leave only the task's subsets in these languages; return whether there are any."""
    try:
        task.filter_languages(languages)
    except ValueError:
        return False
    return True


def _check_language(code: str) -> None:
    from mteb.languages import ISO_TO_LANGUAGE
    from mteb.languages.check_language_code import check_language_code

    try:
        check_language_code(code)
    except ValueError as error:
        by_name = {language.lower(): known for known, language in ISO_TO_LANGUAGE.items()}
        near = f"; did you mean {by_name[code.lower()]}?" if code.lower() in by_name else ""
        raise UserError(
            f"--languages {code}: mteb's codes have three letters, such as eng or deu-Latn{near}"
        ) from error


def read_prompts(file: Path, tasks: Sequence[Any]) -> dict[str, str]:
    """Return a file's prompts by what they are for: a task, a type of task, "query" or "document", or two of these
    joined, such as "STS12", "Retrieval-query" and "query".

    Raises UserError if the file is not an object of texts, or if mteb does not know what a prompt is for.
    """
    from mteb.abstasks.task_metadata import TaskType

    try:
        prompts = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"--task-prompts {file}: not JSON: {error}") from error
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise UserError(
            f'--task-prompts {file}: not an object of texts such as {{"STS": "...", "Retrieval-query": "..."}}'
        )
    known = [*get_args(TaskType), *ROLES, *(task.metadata.name for task in tasks), *_task_names()]
    for key in prompts:
        subject = next((key.removesuffix(f"-{role}") for role in ROLES if key.endswith(f"-{role}")), key)
        if subject not in known:
            raise UserError(
                f"--task-prompts {file}: {key} is neither a task of mteb, nor a type of task, query or document"
                f"{near_miss(subject, known)}"
            )
    return prompts


# --- the run ----------------------------------------------------------------------------------------------------------


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
        tasks: from `select`.
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
    cache = ResultCache(folder)
    place = cache.get_task_result_path("_", meta).parent
    _check_place(place, meta)
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
    return Run(meta.name, place, scores, means, unreachable)


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
    for part in _parts(task):
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
    except (ValueError, KeyError, TypeError):
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
    """Tell of results of other revisions, which stay. Raise UserError if this revision's are another model's."""
    file = place / "model_meta.json"
    if file.exists():
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:  # a run was killed while it wrote it, and writes it again
            return
        here = json.loads(json.dumps(meta.to_dict(), default=str))
        if differing := [key for key in ("name", "revision", "experiment_kwargs") if there.get(key) != here[key]]:
            of = " and ".join(f"{key} {there.get(key)!r} in place of {here[key]!r}" for key in differing)
            raise UserError(f"--results: {file} has {of}: these are another model's results; name another folder")
    elif others := sorted(path.parent.name for path in place.parent.glob("*/model_meta.json")):
        listing = ", ".join(others)
        print(f"{place.parent}: has results of other revisions, which stay as they are: {listing}", file=sys.stderr)


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
    """Print the main score of every task, and mteb's means of them."""
    from mlx_retrieval.utils.console import print_rows

    rows = [(task, kind, metric, f"{score:.4f}") for task, kind, metric, score in run.scores]
    rows += [(name, "", "", f"{score:.4f}") for name, score in run.means.items()]
    rows += [(f"{task} (unreachable)", "", "", "-") for task in run.unreachable]
    print_rows(run.model, ("task", "type", "metric", "score"), rows)
