"""Say in a line how the rows of a source were read: which columns became what, and which were not read.

pairs.csv: question -> query, answer -> document (comma-separated, header); not read: id
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from mlx_retrieval.dataset.columns import Columns
from mlx_retrieval.dataset.row_formats import Reading
from mlx_retrieval.utils.text import listed, quantity

COLUMNS = 3  # of a role that are named
UNREAD = 5  # columns that are named
FILES = 3  # lines of one source
ROLES = ("prompt", "query", "document", "negatives", "label", "scores", "positive_scores", "negative_scores", "rank")


class ReadingCounter:
    """Counts how the rows of a file were read."""

    def __init__(self) -> None:
        self._counts: Counter[Reading] = Counter()
        self._pairs: dict[str, Counter[str]] = {role: Counter() for role in ROLES}
        self._unread: Counter[str] = Counter()
        self._rows = 0

    def add(self, reading: Reading) -> None:
        """Count a row."""
        self._counts[reading] += 1
        if len(self._counts) > 1000:
            self._fold()

    def _fold(self) -> None:
        for reading, count in self._counts.items():
            self._rows += count
            self._unread.update(dict.fromkeys(reading.unread, count))
            for role, counts in self._pairs.items():
                keys = getattr(reading, role) or ()
                counts.update(dict.fromkeys([keys] if isinstance(keys, str) else keys, count))
        self._counts.clear()

    def text(self, form: str, labels: Mapping[str, str], columns: Columns | None) -> str:
        """Return which columns became what, how they are stored (`form`), and which were not read.

        `labels`: keys -> what they are called where the rows come from; so does `columns`, of `--columns`.
        """
        self._fold()
        labels = {**labels, **{key: "+".join(group) for key, group in (columns or {}).items() if key not in labels}}
        pairs = [
            _pair([labels.get(key, key) for key in self._pairs[role]], role) for role in ROLES if self._pairs[role]
        ]
        stored = f" ({form})" if form else ""
        unread = [
            labels.get(key, key) + ("" if count == self._rows else f" ({quantity(count, 'row')})")
            for key, count in self._unread.most_common()
        ]
        rest = f"; not read: {listed(unread, UNREAD)}" if unread else ""
        return f"{', '.join(pairs)}{stored}{rest}"


def mapping(columns: Columns) -> str:
    """Return which fields of an index become what."""
    return ", ".join(_pair(["+".join(group)], key) for key, group in columns.items())


def lines(names: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Return a line for each way that files were read: `a.csv and 3 more: ...`."""
    files: dict[str, list[str]] = {}
    for name, text in zip(names, texts, strict=True):
        files.setdefault(text, []).append(name)
    out = [f"{listed(group, 1)}: {text}" for text, group in files.items()]
    return out[:FILES] + ([f"and {len(out) - FILES} more"] if len(out) > FILES else [])


def _pair(columns: list[str], role: str) -> str:
    role = role.replace("_", " ")
    return role if columns == [role] else f"{listed(columns, COLUMNS)} -> {role}"
