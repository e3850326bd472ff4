"""A command's parser of flags, and the ways a command ends: one line and an exit code.

@command("eval.py")
def main(argv=None) -> int:
    args = parser().parse_args(argv)
"""

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress

from mlx_retrieval.utils import streams
from mlx_retrieval.utils.errors import UserError, near_miss
from mlx_retrieval.utils.text import writable

DTYPE_HELP = (
    "compute in this dtype; auto = the checkpoint's on GPUs, float32 on CPUs (default: the --dtype of the adapter's "
    "training, or auto)"
)
NUMBERS = {"int": "a whole number", "float": "a number"}
COMPILE_HELP = "compile the model's passes; auto = on CPUs only, as GPUs have not been measured (default: auto)"
DEQUANTIZE_HELP = (
    "what CPUs compute with if a model is quantised: on = float32 copies of its weights, blocks = each weight "
    "dequantised for its product, off = the packed weights, about 20 times slower; auto = copies if there is memory "
    "for them, else blocks (default: auto). GPUs always compute with the packed weights"
)
Main = Callable[[Sequence[str] | None], int]


def command(
    program: str, goes_on: bool = False, explain: Callable[[RuntimeError], str | None] = lambda error: None
) -> Callable[[Main], Main]:
    """Return a decorator for a command's `main`: streams that work, and an exit code for every error of the user.

    The exit codes are those of `main`, 2 after an error that the user can fix, the disk's included, and 130 after
    Ctrl-C. The message of a KeyboardInterrupt is printed; without one, "interrupted".

    Args:
        program: the name that messages begin with.
        goes_on: whether the command goes on if nothing can be printed any more, and says so once.
        explain: returns a message for an error of the machine that is no fault of the program, and None for any other.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            streams.prepare(program if goes_on else None)
            message = ""
            try:
                code = main(argv)
            except (UserError, FloatingPointError) as error:
                message, code = str(error), 2
            except OSError as error:
                message, code = _reason(error), 2
            except RuntimeError as error:
                if (reason := explain(error)) is None:
                    raise
                message, code = reason, 2
            except KeyboardInterrupt as stop:
                message, code = str(stop) or "interrupted", 130
            if (reason := streams.flush()) and (code == 0 or message == reason):
                message, code = f"standard output: {reason}", 2
            if message:
                with suppress(OSError):
                    print(f"{program}: {writable(message)}", file=sys.stderr)
            return code

        return run

    return decorate


def _reason(error: OSError) -> str:
    """Return an error of the system in one line, with the file that it concerns."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"


def user_path(text: str) -> str:
    """Return a path with the home folder for a leading ~; any other text as it is: `type=` of flags that name files.

    Shells leave ~ as it is in `--index=~/x`, and configurations of other programs in all arguments.
    """
    return os.path.expanduser(text)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the near miss of a misspelt flag or choice; exit code 2."""

    def parse_known_args(self, args=None, namespace=None):
        """Parse all arguments; unlike argparse, refuse unknown ones here, where the flags of a subcommand are known."""
        self._words = [*(sys.argv[1:] if args is None else args)]
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown)
        return namespace, unknown

    def error(self, message: str) -> None:
        """Print one line and exit."""
        if message.startswith(("the following arguments are required", "one of the arguments")):
            self._refuse([word for word in self._words if self._is_misspelt(word)], required=True)
        message = message.removeprefix("argument ")
        message = re.sub(r"invalid (\w+) value: (.*)", _not_understood, message, flags=re.DOTALL)
        self.exit(2, f"{self.prog}: {message}\n")

    def take_only(self, args: argparse.Namespace, names: Collection[str], reason: str) -> None:
        """Exit with a line about flags other than `names` that are given: they would have no effect.

        Args:
            names: of the attributes of `args`.
            reason: why the others have none.
        """
        self.take_none(args, {each.dest for each in self._actions} - {*names}, reason)

    def take_none(self, args: argparse.Namespace, names: Collection[str], reason: str) -> None:
        """Exit with a line about flags among `names` that are given: they would have no effect. See `take_only`."""
        flags = (each for each in self._actions if each.dest in names)
        given = [each.option_strings[0] for each in flags if getattr(args, each.dest, each.default) != each.default]
        if given:
            self.error(f"{reason}: leave out {', '.join(given)}")

    def _check_value(self, action: argparse.Action, value) -> None:
        if action.choices is not None and value not in action.choices:
            listing = ", ".join(map(str, action.choices))
            near = near_miss(value, action.choices)
            raise argparse.ArgumentError(action, f"{_shown(value)} is not one of {listing}{near}")

    def _refuse(self, words: Sequence[str], required: bool = False) -> None:
        """Exit with a line about words that are neither flags nor values; with `required`, only if there are any."""
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        if flags:
            known = [*self._flags()]
            near = near_miss(flags[0], known) or f" ({self.prog} --help lists all)"
            self.exit(2, f"{self.prog}: no such flag: {', '.join(map(_shown, flags))}{near}\n")
        if not required:
            self.exit(2, f"{self.prog}: no flag takes this: {' '.join(map(_shown, words))}\n")

    def _is_misspelt(self, word: str) -> bool:
        """Return whether a word looks like a flag, is none, and is not the beginning of one either."""
        name = word.partition("=")[0]
        return name.startswith("--") and name != "--" and not any(flag.startswith(name) for flag in self._flags())

    def _flags(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings


def _shown(word: object) -> str:
    """Return a word of the command line as it can be printed in one line."""
    text = str(word)
    text = text if text.isprintable() and text else repr(text)
    return text if len(text) <= 80 else text[:79] + "…"


def _not_understood(match: re.Match) -> str:
    kind, value = match.groups()
    return f"{_shown(value)} is not {NUMBERS.get(kind, 'understood')}"
