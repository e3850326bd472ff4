"""Errors that the user can fix, in the words of the interface that the user has."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Other tools' names of dtypes, which are too short to be recognised as misspelt.
SHORT = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
}


def flag(setting: str) -> str:
    """Return a setting's name as the command line spells it: `--max-length` of `max_length`."""
    return "--" + setting.replace("_", "-")


def near_miss(word: object, known: Iterable[object]) -> str:
    """Return `; did you mean info_nce?` for a misspelt word, or "" if it is like none of the known ones."""
    names = [*map(str, known)]
    wanted = str(word).lower()
    same = [name for name in names if name.lower() == wanted or name == SHORT.get(wanted)]
    near = same or difflib.get_close_matches(str(word)[:80], names, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


class UserError(Exception):
    """An error the user can fix; commands print it as one line and exit with status 2."""

    about: str | None = None  # the setting whose value is at fault, where `concerning` noted one


class Place(NamedTuple):
    """A line of a file, counted from 1, or with None the whole file."""

    file: Path | str
    line: int | None = None

    def __str__(self) -> str:
        return str(self.file) if self.line is None else f"{self.file}:{self.line}"


class SettingError(UserError):
    """A UserError that names settings, which commands call by their flags and Python code by its own parameters.

        raise SettingError("{max_length}: the model has {positions} positions", positions=512)

    Names in braces are fields: those among `values` stand for their value, all others are settings, shown as flags.
    Values that are a `Place`, or a list of them, can be renamed as well.
    """

    def __init__(self, template: str, /, **values: Any):
        self.template, self.values = template, values
        super().__init__(self._text(flag, str))

    def _text(self, setting: Callable[[str], str], place: Callable[[Place], str]) -> str:
        def shown(value: Any) -> Any:
            if isinstance(value, list):
                return ", ".join(map(shown, value))
            return place(value) if isinstance(value, Place) else value

        values = {key: shown(value) for key, value in self.values.items()}
        return self.template.format_map(_Fields(setting, values))

    def renamed(self, setting: Callable[[str], str], place: Callable[[Place], str] = str) -> "SettingError":
        """Return the same error with settings and places as these functions name them."""
        error = SettingError(self.template, **self.values)
        error.args = (self._text(setting, place),)
        return error


class _Fields(dict):
    """The values of a template's fields; a field that has none is a setting's name."""

    def __init__(self, setting: Callable[[str], str], values: dict[str, Any]):
        super().__init__(values)
        self.setting = setting

    def __missing__(self, field: str) -> str:
        return self.setting(field)


@contextmanager
def concerning(setting: str) -> Iterator[None]:
    """Note in UserErrors of this block that the value of `setting` is at fault, unless an inner block noted another."""
    try:
        yield
    except UserError as error:
        error.about = error.about or setting
        raise
