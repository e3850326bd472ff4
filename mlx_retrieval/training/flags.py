"""Settings from flags: one for every field of `config.Settings`.

settings, given = from_flags("Train a retrieval model.")         # `given`: the fields that a file or a flag sets

A YAML file (`--config`) wins over defaults, flags win over the file.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_retrieval.training import checkpoint, contents
from mlx_retrieval.training.config import CHAT, TASK_DEFAULTS, Settings, for_task
from mlx_retrieval.training.setting_fields import aliases, kind_of
from mlx_retrieval.training.settings_file import read_yaml
from mlx_retrieval.utils import toolkit
from mlx_retrieval.utils.command import Parser, user_path
from mlx_retrieval.utils.errors import UserError, flag


def parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Return a parser with one flag for every field. Flags that are not given have no default, so that YAML counts."""
    out = Parser(
        prog="train.py",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    out.add_argument(
        "--config",
        type=user_path,
        metavar="FILE",
        help="YAML file of settings; flags win over it, and the output of a run's own config.yaml does not count. "
        "In it, `sources:` in place of `data:` gives each source its own weight, prompts, lengths and loss",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in dataclasses.fields(Settings):
        if f.metadata.get("file_only"):
            continue
        if (name := f.metadata["group"]) not in groups:
            groups[name] = out.add_argument_group(name)
        kind, many = kind_of(f)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        text = f.metadata["help"].replace("%", "%%") + _default_note(f.name, default)
        arguments = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction if default is None else "store_true"
        else:
            words = f.metadata.get("words", ())
            arguments |= {"type": _or_word(kind, words), "choices": f.metadata.get("choices")}
            arguments |= {"nargs": "*" if many else None}
            shape = "|".join(({int: "N", float: "X", str: "TEXT"}[kind], *words))
            arguments["metavar"] = None if "choices" in f.metadata else shape
        groups[name].add_argument(flag(f.name), *aliases(f), **arguments)
    return out


def _default_note(name: str, default) -> str:
    """Return ` (default: 64; chat: 4)` for --help; "" for a default that the help describes itself."""
    if default is None or default is False or default == []:
        return ""

    def text(value) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    others = [f"; {task}: {text(values[name])}" for task, values in TASK_DEFAULTS.items() if values.get(name)]
    return f" (default: {text(default)}{''.join(others)})"


def _or_word(kind: type, words: tuple[str, ...]) -> Callable:
    """Return a function that reads a value of a type, or one of a few words in its place."""
    if not words:
        return kind

    def read(text: str):
        return text if text in words else kind(text)

    read.__name__ = kind.__name__  # in argparse's message
    return read


def from_flags(description: str, epilog: str = "", argv: Sequence[str] | None = None) -> tuple[Settings, dict]:
    """Return the settings, from defaults, YAML file and flags, and those that a file or a flag sets, as a dict."""
    flags = vars(parser(description, epilog).parse_args(argv))
    path = flags.pop("config", None)
    if path is not None and not path.strip():
        raise UserError("--config: must not be empty")
    path = toolkit.find(path or "")
    file = read_yaml(Path(path)) if path else {}
    begins = not any((file | flags).get(name) for name in ("resume", "overwrite"))
    if path and begins and _is_of_a_run(Path(path)):
        file.pop("output", None)  # the run of these settings has its folder, and a new one gets its own
    # A run saves its steps beside the epochs that they were counted from: of other data, an epoch has other steps.
    if file.get("epochs") or flags.get("epochs"):
        file.pop("steps", None)
    if "steps" in flags:
        file.pop("epochs", None)
    if file.get("sources") and "data" in flags:
        raise UserError(f"--data: the sources in --config {path} say what is read; leave one of both out")
    given = file | flags
    chat_data = {"data": TASK_DEFAULTS["chat"]["data"]} if chat_flag(given, argv) else {}
    settings = for_task(given.get("task"), given | chat_data)
    if path and settings.overwrite:
        written = settings.folder / "config.yaml"
        if written.exists() and written.samefile(Path(path)):
            raise UserError(f"--config {path}: --overwrite would replace this file; copy it to another folder first")
    return settings, given


def _is_of_a_run(file: Path) -> bool:
    """Return whether a file of settings is one that a run has saved, in its folder or with a step."""
    beside = (contents.FILE, checkpoint.STATE)
    return file.name == "config.yaml" and any((file.parent / name).is_file() for name in beside)


def chat_flag(given: dict, argv: Sequence[str] | None = None) -> str:
    """Return the flag that selects chat on the folder data/ where neither --task nor --data is given; "" = none does.

    It is a setting's name in mlx-lm, or a setting that only chat has. `given`: as `from_flags` returns it.
    """
    if given.keys() & {"task", "data", "resume", "sources"}:
        return ""
    fields = dataclasses.fields(Settings)
    words = [word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)]
    mlx_lm_names = {name for f in fields for name in f.metadata.get("mlx_lm_names", ())}
    chat_only = [flag(f.name) for f in fields if f.metadata.get("tasks") == CHAT and f.name in given]
    return next((name for name in [*words, *chat_only] if name in {*mlx_lm_names, *chat_only}), "")
