"""Text that can be written: without halves of surrogate pairs, quoted for the shell.

JSON can spell half of a pair as an escape. Python also reads a byte of a file's name or of the command line that is not
UTF-8 as one.
"""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
COMMANDS = ("train.py", "eval.py", "embed.py", "rerank.py", "search.py", "serve.py", "mine.py", "export.py", "adapt.py")
REPLACEMENT = "\ufffd"
CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")


def writable(text: str) -> str:
    """Return the text with U+FFFD for each half of a surrogate pair, which no encoding and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def writable_values(value: Any) -> Any:
    """Return a JSON value with `writable` keys and texts."""
    if isinstance(value, str):
        return writable(value)
    if isinstance(value, list):
        return [writable_values(item) for item in value]
    if isinstance(value, dict):
        return {writable_values(key): writable_values(item) for key, item in value.items()}
    return value


def shell(*words: str | Path) -> str:
    """Return a command to be pasted into a shell: words that need it are quoted.

    One of the toolkit's own, `python train.py`, is named by its whole path unless it is in the current folder.
    """
    match words:
        case ("python", script, *rest) if script in COMMANDS and (CHECKOUT / script).is_file():
            words = ("python", located(CHECKOUT / script), *rest)
    return shlex.join(map(str, words))


def located(path: Path) -> Path:
    """Return a path as it is shortest to write: relative if it is below the current folder, else whole."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def gb(count: float, digits: int = 1) -> str:
    """Return bytes in the GB that memory is sold in and macOS counts in, 2^30 bytes: `1.9`; below 0.05, two digits."""
    count /= 1 << 30
    return f"{count:.{2 if digits and count < 0.05 else digits}f}"


def quantity(count: int, noun: str) -> str:
    """Return a number and what it counts: `1 row`, `2,000 rows`, `2 queries`; `noun` is in the singular."""
    if count != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count:,} {noun}"


def listed(words: Iterable[str], most: int, between: str = ", ") -> str:
    """Return the first `most` words, and how many there are besides: `a, b and 3 more`."""
    words = list(words)
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return between.join(words[:most]) + more


def excerpt(text: str, length: int) -> str:
    """Return the beginning of a text on one line: at most `length` characters, cut at a word, with "…" if cut.

    Runs of white space become a space. So do control characters, and those that turn the direction of other text round.
    """
    start = text[: 4 * length + 1000]  # enough, and not megabytes
    line = " ".join(CONTROL.sub(" ", writable(start)).split())
    if len(line) <= length and len(start) == len(text):
        return line
    cut = line[:length]
    at_word = cut.rpartition(" ")[0]
    return f"{at_word if len(at_word) > length // 2 else cut}…"
