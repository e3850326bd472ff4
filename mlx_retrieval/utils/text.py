"""Text that can be written: without halves of surrogate pairs, quoted for the shell.

JSON can spell half of a pair as an escape. Python also reads a byte of a file's name or of the command line that is not
UTF-8 as one.
"""

import shlex
from pathlib import Path
from typing import Any

REPLACEMENT = "\ufffd"


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
    """Return a command to be pasted into a shell: words that need it are quoted."""
    return shlex.join(map(str, words))
