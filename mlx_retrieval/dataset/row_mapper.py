"""Apply `--columns` and `--ignore-keys` to the rows of files, and notice columns that no row has.

mapper = RowMapper(columns.parse("query=frage,document=antwort"), ignore_keys=("label",))
for line in mapper.lines(file):
    row = mapper.row(line.data, file.columns)
mapper.check()                              # UserError if no row had a column of that name

Without `--columns`, the first rows of a file decide whether its columns are read by order (column_order.py).
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress

from mlx_retrieval.dataset.column_order import in_order, refusal
from mlx_retrieval.dataset.columns import Columns, has, mapped, missing, names, text_of
from mlx_retrieval.dataset.json_lines import Line, RowError, parse_object
from mlx_retrieval.dataset.row_files import RowFile
from mlx_retrieval.dataset.row_formats import ColumnsError, mapped_row, reading_for, without
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import shell

FIRST_ROWS, FIRST_BYTES = 100, 1 << 20  # of a file, by which the order is judged


class RowMapper:
    """See above.

    Args:
        columns: None = rows are read by their own names.
        ignore_keys: keys of rows that are treated as absent.

    Attributes:
        used: whether any row had one of the columns; set it to False before another file.
    """

    def __init__(self, columns: Columns | None = None, ignore_keys: Collection[str] = ()):
        self.ignore_keys = frozenset(ignore_keys)
        self._unseen = set(names(columns or {}))
        self._is_given = bool(columns)
        self._refusal = ""  # why the file is not read by order, for an error
        self.used = False
        self._keys: dict[str, None] = {}  # some keys that rows have, while columns are unseen

    def lines(self, file: RowFile) -> Iterator[Line]:
        """Yield the rows of a file. Its columns are set if it is read by order, and its form says so."""
        lines, first = file.lines(), []
        self._refusal = ""
        if not self._is_given:
            size = 0
            for line in itertools.islice(lines, FIRST_ROWS):
                first.append(line)
                if (size := size + len(line.data)) > FIRST_BYTES:
                    break
            self._choose_order(file, first)
        yield from itertools.chain(first, lines)

    def _choose_order(self, file: RowFile, first: Sequence[Line]) -> None:
        rows = []
        for line in first:
            with suppress(RowError):  # it is told, or left out, when its turn comes
                rows.append(without(parse_object(line.data), self.ignore_keys))
        reason = refusal(rows)
        if reason == "":
            file.columns = in_order(list(rows[0]))
            flag = shell("--columns", text_of(file.columns))
            by_order = f"by order, as no name is known; to choose: {flag}"
            file.form = f"{file.form}; {by_order}" if file.form else by_order
        self._refusal = reason or ""

    def row(self, data: bytes, columns: Columns | None) -> dict:
        """Return the row of a line of JSON. RowError if it is none.

        `columns`: those that apply to rows of the file; None where the file itself has applied them.
        """
        row = without(parse_object(data), self.ignore_keys)
        if columns is None:
            self._unseen.clear()
            if self._refusal:
                self._explain(row)
            return row
        if self._unseen:
            self._unseen -= {name for name in self._unseen if has(row, name)}
            self._keys |= dict.fromkeys(row)
        changed = mapped_row(row, columns) if self._is_given else mapped(row, columns, "by order")
        self.used |= changed is not row
        return changed

    def _explain(self, row: dict) -> None:
        """Raise the error of a row that fits no format, with the reason why it is not read by order."""
        try:
            reading_for(row)
        except ColumnsError as error:
            raise ColumnsError(f"{error.reason} (not read by order: {self._refusal})", error.hint) from error

    def check(self, others: Iterable["RowMapper"] = ()) -> None:
        """Raise UserError if there is a column that no row had, neither here nor in the rows of other sources."""
        mappers = [self, *others]
        if unseen := set.intersection(*(mapper._unseen for mapper in mappers)):
            keys = dict.fromkeys(key for mapper in mappers for key in mapper._keys)
            raise UserError(missing(sorted(unseen), list(keys)))
