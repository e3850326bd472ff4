"""Choose tasks of mteb by the names of tasks, bundles and benchmarks, by type and language, and prompts for them.

tasks = select(["NanoBEIR", "MTEB(eng, v2)"], languages=["eng"], types=["Retrieval"])
prompts = read_prompts(Path("prompts.json"), tasks)
"""

import copy
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from mlx_retrieval.evaluation import mteb_tasks
from mlx_retrieval.utils.errors import UserError, near_miss
from mlx_retrieval.utils.text import listed

MOCK = mteb_tasks.MOCK
ROLES = ("query", "document")
SHOWN = 12  # languages that a message lists


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
    named = [task for name in names for task in _tasks_of(name)]
    there = sorted({language for task in named for language in task.languages})
    for code in languages:
        _check_language(code, there)
    tasks: dict[tuple[str, ...], Any] = {}
    for task in named:
        if (not types or task.metadata.type in types) and (not languages or _keep(task, languages)):
            tasks.setdefault((task.metadata.name, *task.hf_subsets, *task.eval_splits), task)
    if not tasks:
        kinds = ", ".join(sorted({task.metadata.type for task in named}))
        raise UserError(
            f"{' '.join(names)}: no task has one of these --languages and --task-types; there are the types {kinds} "
            f"and the languages {listed(there, SHOWN)}"
        )
    for task in tasks.values():
        if task.metadata.modalities != ["text"]:
            about = ", ".join(task.metadata.modalities)
            raise UserError(f"{task.metadata.name} is about {about}; only tasks of text can be evaluated")
    return list(tasks.values())


def _tasks_of(name: str) -> list[Any]:
    """Return the tasks of a task's, bundle's or benchmark's name; their subsets may be changed."""
    import mteb
    from mteb import mocks

    if name == MOCK:
        return [type(task)() for task in mocks.MOCK_TASK_TEST_GRID]
    if name in mocks.ALL_MOCK_TASK_REGISTRY:  # mteb itself finds them by no name
        return [mocks.ALL_MOCK_TASK_REGISTRY[name]()]
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
            known = [*mteb_tasks.benchmarks(), *_task_names(), MOCK, *mocks.MOCK_TASK_REGISTRY]
            raise UserError(f"{name}: mteb knows no such task or benchmark{near_miss(name, known)}") from error
    for part in (part for task in tasks for part in parts_of(task)):
        part.load_data = functools.partial(mteb_tasks.load_data, part)
    return tasks


@functools.cache  # mteb makes all of them, which takes seconds
def _task_names() -> list[str]:
    import mteb

    return [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False, exclude_private=False)]


def parts_of(task: Any) -> Iterator[Any]:
    """Return the tasks that a bundle is made of, and then the bundle; of any other task, itself."""
    for part in getattr(task.metadata, "tasks", ()):
        yield from parts_of(part)
    yield task


def _keep(task: Any, languages: Sequence[str]) -> bool:
    """Leave only the task's subsets in these languages; return whether there are any."""
    try:
        task.filter_languages(languages)
    except ValueError:
        return False
    return True


def _check_language(code: str, there: Sequence[str]) -> None:
    """Raise UserError for a code that mteb does not know; `there`: the languages of the tasks that are named."""
    from mteb.languages import ISO_TO_LANGUAGE
    from mteb.languages.check_language_code import check_language_code

    by_name = {language.lower(): known for known, language in ISO_TO_LANGUAGE.items()}
    try:
        check_language_code(code)
        if code[0].isupper() and "-" not in code:
            raise ValueError("a script without a language")
    except ValueError as error:
        near = near_miss(code, there) or near_miss(by_name.get(code.lower(), code.lower()), ISO_TO_LANGUAGE)
        raise UserError(
            f"--languages {code}: mteb knows no such code; they are those of ISO 639-3, as eng or deu-Latn"
            f"{near or '.'} The tasks that you name have {listed(there, SHOWN)}"
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
