"""What a run was begun with: its data, what it is evaluated on, and its base model. `--resume` compares them.

contents = {"data": rows.contents(), "evaluation": evaluation_contents(settings.eval_tasks)}
check(run_folder, contents, accept=False)           # UserError if they are not those of the run
"""

import json
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.contents import Content, differences, of_file
from mlx_retrieval.evaluation import pairs
from mlx_retrieval.inference.fingerprint import model_files
from mlx_retrieval.utils import files
from mlx_retrieval.utils.console import print_lines
from mlx_retrieval.utils.errors import SettingError, UserError

FILE = "contents.json"
# Each part of a run: the contents of its files and indices.
VALIDATION, EVALUATION, GUARDS = "validation", "evaluation", "guards"
BASE, ADAPTER = "base model", "the adapter in --model"
Contents = dict[str, list[Content]]


def base_contents(folder: Path, run: Path) -> list[Content]:
    """Return the contents of a base model's files, without those of a run inside its folder."""
    run = run.resolve()
    return [of_file(file) for file in model_files(folder) if run not in file.resolve().parents]


def evaluation_contents(tasks: Sequence[str]) -> list[Content]:
    """Return the contents of the evaluation's folders and files; a task of the hub is not compared."""
    found: list[Path] = []
    for task in tasks:
        if file := pairs.file_of(task):
            found.append(file)
        elif (folder := Path(task).expanduser()).is_dir():
            found += beir.files_of(folder)
    return [of_file(file) for file in found]


def write(run: Path, contents: Contents) -> None:
    """Write the contents into a run's folder. A digest that is not known now is kept as it was."""
    before = {content.name: content for some in (read(run) or {}).values() for content in some}
    known = {part: [c if c.digest else before.get(c.name, c) for c in some] for part, some in contents.items()}
    text = json.dumps({part: [content._asdict() for content in some] for part, some in known.items()}, indent=2)
    files.write_file(run / FILE, text + "\n")


def read(run: Path) -> Contents | None:
    """Return the contents that a run was begun with; None if it was begun by a version that did not save them."""
    try:
        saved = json.loads((run / FILE).read_text(encoding="utf-8"))
        return {part: [Content(**values) for values in some] for part, some in saved.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = f"not as this toolkit writes it ({error}); without the file nothing is compared"
        raise UserError(f"{run / FILE}: {reason}") from error


def check(run: Path, contents: Contents, accept: bool) -> set[str]:
    """Compare the contents with those that a run was begun with; return the parts that have changed.

    Args:
        accept: let the run continue with changed data; another base model is never accepted.

    Raises UserError that says what has changed.
    """
    if (saved := read(run)) is None:
        line = f"not compared with those that the run was begun with: an earlier version began it, and saved no {FILE}"
        print_lines([("contents", line)])
        return set()
    unknown = [content.name for some in contents.values() for content in some if not content.digest]
    print_lines([("contents", f"{name}: not compared, as the index's settings cannot be read") for name in unknown])
    changes = {part: differences(saved.get(part, []), some) for part, some in contents.items()}
    changes = {part: lines for part, lines in changes.items() if lines}
    if BASE in changes:
        raise SettingError(
            "{resume}: the base model is not the one that the run in {run} was begun with. {lines}. What was trained "
            "fits no other weights: bring them back, or begin a run with another {output}",
            run=run,
            lines="; ".join(changes[BASE]),
        )
    listing = [f"{part}: {line}" for part, lines in changes.items() for line in lines]
    if listing and not accept:
        raise SettingError(
            "{resume}: this has changed since the run in {run} was begun:\n  {listing}\n"
            "{accept_changed_data} continues with the current data; the result is not that of an uninterrupted run",
            run=run,
            listing="\n  ".join(listing),
        )
    print_lines([("changed", line) for line in listing])
    return set(changes)
