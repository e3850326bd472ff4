"""Apply `--columns` and `--ignore-keys` to the rows of files, and notice columns that no row has.

mapper = RowMapper(columns.parse("query=frage,document=antwort"), ignore_keys=("label",))
row = mapper.row(line.data, file.columns)
mapper.check()                              # UserError if no row had a column of that name
"""

from collections.abc import Collection, Iterable

from mlx_retrieval.dataset.columns import Columns, has, missing, names
from mlx_retrieval.dataset.json_lines import parse_object
from mlx_retrieval.dataset.row_formats import mapped_row, without
from mlx_retrieval.utils.errors import UserError


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
        self.used = False
        self._keys: dict[str, None] = {}  # some keys that rows have, while columns are unseen

    def row(self, data: bytes, columns: Columns | None) -> dict:
        """Return the row of a line of JSON. RowError if it is none.

        `columns`: those that apply to rows of the file; None where the file itself has applied them.
        """
        row = without(parse_object(data), self.ignore_keys)
        if columns is None:
            self._unseen.clear()
            return row
        if self._unseen:
            self._unseen -= {name for name in self._unseen if has(row, name)}
            self._keys |= dict.fromkeys(row)
        changed = mapped_row(row, columns)
        self.used |= changed is not row
        return changed

    def check(self, others: Iterable["RowMapper"] = ()) -> None:
        """Raise UserError if there is a column that no row had, neither here nor in the rows of other sources."""
        mappers = [self, *others]
        if unseen := set.intersection(*(mapper._unseen for mapper in mappers)):
            keys = dict.fromkeys(key for mapper in mappers for key in mapper._keys)
            raise UserError(missing(sorted(unseen), list(keys)))
