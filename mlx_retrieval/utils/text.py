"""Text that can be written: without halves of surrogate pairs, quoted for the shell."""

import re
import shlex
from pathlib import Path
from typing import Any

REPLACEMENT = "\ufffd"
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON writes one as an escape; a byte of argv that is not UTF-8 becomes one


def writable(text: str) -> str:
    """Return the text with U+FFFD for each half of a surrogate pair, which no encoding can write."""
    return text if text.isascii() else SURROGATE.sub(REPLACEMENT, text)


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
    """Return a command to be pasted into a shell: words that need it are quoted."""
    return shlex.join(map(str, words))
