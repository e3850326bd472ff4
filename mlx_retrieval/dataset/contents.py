"""What a source of data held when it was read: by this a resumed run recognises its data.

contents = Rows(files).contents()
changes = differences(earlier_contents, contents)       # ["rows.jsonl: 40 rows then, 44 now"]
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.utils.files import sampled_blocks


class Content(NamedTuple):
    """Size and hash of one file or index."""

    name: str
    size: int
    unit: str  # of the size: rows, conversations or bytes; "" = an index, which has an identity instead of a size
    digest: str  # "" = not known, so not compared


def of_file(path: Path) -> Content:
    """Return the content of a file by its bytes; of more than 64 MiB, 16 MiB in blocks spread over the file count."""
    digest = hashlib.sha256()
    for block in sampled_blocks(path):
        digest.update(block)
    return Content(str(path.absolute()), path.stat().st_size, "bytes", digest.hexdigest())


def differences(then: Sequence[Content], now: Sequence[Content]) -> list[str]:
    """Return a line for each content that has changed. Equal content may have moved to another folder."""
    if len(then) == len(now):
        pairs = list(zip(then, now, strict=True))
    else:
        names = dict.fromkeys(content.name for content in (*then, *now))
        before, after = ({content.name: content for content in contents} for contents in (then, now))
        pairs = [(before.get(name), after.get(name)) for name in names]
    return [line for pair in pairs if (line := _difference(*pair))]


def _difference(then: Content | None, now: Content | None) -> str:
    """Return the change of one content as a line; "" = none."""
    if then is None:
        return f"{now.name}: was not read then"
    if now is None:
        return f"{then.name}: was read then, and is not now"
    if then.size != now.size:
        return f"{now.name}: {then.size:,} {then.unit} then, {now.size:,} now"
    if then.digest == now.digest or "" in (then.digest, now.digest):
        return ""
    if not now.unit:
        return f"{now.name}: another index of this name"
    return f"{now.name}: {now.size:,} {now.unit} as then, but not the same"
