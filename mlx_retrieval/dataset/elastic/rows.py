"""Training rows from an Elasticsearch index, streamed in a seeded order with bounded memory.

An epoch's ranges of documents (see elastic/documents.py) are read in a seeded order; the documents of BLOCK ranges are
shuffled together. A document that is written during an epoch gets a number beyond the last range, so no document is
read twice in an epoch, even if the server restarts. The next epoch has it: an epoch is surveyed only when the one
before is used up, so nothing is read ahead across its end.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_retrieval.dataset.column_hints import suggestion
from mlx_retrieval.dataset.columns import Columns, listing, row_of
from mlx_retrieval.dataset.contents import Content
from mlx_retrieval.dataset.elastic.documents import Documents, Survey
from mlx_retrieval.dataset.elastic.server import Address, Closed
from mlx_retrieval.dataset.readings import mapping
from mlx_retrieval.dataset.roles import role_of
from mlx_retrieval.dataset.row_formats import Example, RowError, common_parts, examples_of, reading_of
from mlx_retrieval.utils.errors import UserError, near_miss
from mlx_retrieval.utils.text import quantity

BLOCK = 16  # ranges that are shuffled together
KEPT_SKIPPED = 1000


@dataclass
class Cursor:
    """The start of a block, and all that is needed to read it again."""

    start: int  # its first example's position in the run
    epoch: int
    block: int
    survey: Survey

    @classmethod
    def of(cls, saved: dict) -> "Cursor":
        """Build a cursor from the dictionary that `dataclasses.asdict` made of one."""
        return cls(**saved | {"survey": Survey(**saved["survey"])})


class ElasticRows:
    """A `sources.Source`: the documents of an index as rows.

    Args:
        address: of the index.
        fields: the fields that rows are made of, see columns.py.
        query: a query of Elasticsearch; only documents that match are read.
        skip_bad: leave out documents that make no row; they are counted, and `skipped` lists the first.
        part: (index, count): read only that part of the ranges, where several processes share an index.

    An example's number is its position in the run. Only examples of the last blocks can be read by number.
    """

    def __init__(
        self,
        address: Address,
        fields: Columns,
        query: dict | None = None,
        skip_bad: bool = False,
        part: tuple[int, int] = (0, 1),
    ):
        self.address, self.fields, self.skip_bad, self.part = address, fields, skip_bad, part
        self.names = [str(address)]
        self.documents = Documents(address, [name for names in fields.values() for name in names], query)
        self.skipped: list[str] = []
        self.ignored: Counter[str] = Counter()
        self.bad = 0
        self._recent: list[tuple[int, list[tuple[str, Example]]]] = []  # (start, examples) of the last blocks
        self.format = self._check_fields()
        roles = {role_of(key) for key in fields}
        self.readings = [f"{address}: {mapping(self.fields)}"]
        self.constant = self._common_parts()
        self.has_negatives = bool({"negatives", "documents"} & roles)
        self.has_scores = self.has_some_scores = bool({"scores", "positive scores", "label"} & roles)
        self.score_range, self.without_positive = (0.0, 1.0), None
        survey = self.documents.survey()
        if not survey.count:
            raise UserError(f"{address}: no document{' matches --es-query' if query else ''}")
        self._count = survey.count
        self._cursors = [Cursor(0, 0, 0, survey)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Example:
        return self._at(i)[1]

    def where(self, i: int) -> str:
        try:
            return f"{self.address}: document {self._at(i)[0]}"
        except IndexError:
            return f"{self.address}: example {i:,} of the run"

    def _at(self, i: int) -> tuple[str, Example]:
        for start, documents in reversed(self._recent):
            if start <= i < start + len(documents):
                return documents[i - start]
        raise IndexError(f"row {i} was not read lately")

    def preview(self, count: int) -> list[tuple[str, Example]]:
        """Return (place, example) of the first documents, a hundred at most, that make a row."""
        rows: list[tuple[str, Example]] = []
        for name, source in self.documents.sample[:count]:
            try:
                examples = examples_of(row_of(source, self.fields), self.format)[0]
            except RowError:
                continue
            rows += [(f"{self.address}: document {name}", example) for example in examples]
        return rows

    def contents(self) -> list[Content]:
        """Return the identity of the index. Its documents may change; `restore` deals with that."""
        self.documents.server.open()  # rows may have been drawn before, for the estimate of memory
        return [Content(str(self.address), 0, "", self.documents.identity())]

    def close(self) -> None:
        self.documents.close()

    # --- the sequence -------------------------------------------------------------------------------------------------

    def numbers(self, seed: int, position: int) -> Iterator[int]:
        """Yield row numbers from a position on; an epoch's next block is read while one is used."""
        self.documents.server.open()
        cursor = max((m for m in self._cursors if m.start <= position), key=lambda m: m.start)
        start, fruitless = cursor.start, 0
        with ThreadPoolExecutor(1, "elasticsearch") as reader:
            coming = reader.submit(self._block, seed, cursor)
            try:
                while True:
                    documents, following = coming.result()
                    if start > self._cursors[-1].start:
                        self._cursors.append(dataclasses.replace(cursor, start=start))
                    self._recent = [*self._recent[-2:], (start, documents)]
                    if following:
                        coming = reader.submit(self._block, seed, following)
                    yield from range(max(start, position), start + len(documents))
                    start += len(documents)
                    fruitless = 0 if documents else fruitless
                    if not following:
                        self._report_bad()
                        fruitless += 1
                        if fruitless > 1:  # a whole epoch without a usable document
                            raise UserError(f"{self.address}: no usable document is left")
                        following = self._next_epoch(cursor)
                        coming = reader.submit(self._block, seed, following)
                    cursor = following
            except Closed:
                return
            finally:
                self.documents.server.close()

    def cursor(self, position: int) -> dict[str, Any]:
        """Return the cursor of the block that a position lies in."""
        return dataclasses.asdict(max((m for m in self._cursors if m.start <= position), key=lambda m: m.start))

    def restore(self, cursor: dict[str, Any], position: int) -> None:
        """Continue at a cursor. If documents have changed since, say so and begin a new epoch instead."""
        self.documents.server.open()
        block = Cursor.of(cursor)
        if self.documents.survey(block.survey.last) != block.survey:
            print(
                f"{self.address}: documents were changed or deleted since the run was stopped: a new epoch begins, "
                "and the rows that follow differ from those of an uninterrupted run",
                file=sys.stderr,
            )
            block = Cursor(position, block.epoch + 1, 0, self.documents.survey())
        self._cursors = [block]

    def _next_epoch(self, cursor: Cursor) -> Cursor:
        """Return the cursor of the epoch after this one, with all documents that the index has by now."""
        self.documents.view.close()
        return Cursor(0, cursor.epoch + 1, 0, self.documents.survey())

    def _block(self, seed: int, cursor: Cursor) -> tuple[list[tuple[str, Example]], Cursor | None]:
        """Return a block's (id, example)s, shuffled by document, and the epoch's next block; None if it is the last.

        The start of the next block is still unknown.
        """
        ranges = self.documents.ranges(cursor.survey)
        order = np.random.default_rng([seed, cursor.epoch]).permutation(len(ranges))[self.part[0] :: self.part[1]]
        hits = [
            hit
            for number in order[cursor.block * BLOCK : (cursor.block + 1) * BLOCK].tolist()
            for hit in self.documents.read(*ranges[number])
        ]
        hits.sort(key=lambda hit: (hit["sort"][0], hit["_index"], hit["_id"]))  # an order that no restart changes
        shuffled = np.random.default_rng([seed, cursor.epoch, cursor.block]).permutation(len(hits))
        documents = [(hits[i]["_id"], example) for i in shuffled for example in self._examples(hits[i])]
        is_last = (cursor.block + 1) * BLOCK >= len(order)
        return documents, None if is_last else dataclasses.replace(cursor, block=cursor.block + 1)

    def _examples(self, hit: dict) -> list[Example]:
        try:
            return examples_of(row_of(hit["_source"], self.fields), self.format)[0]
        except RowError as error:
            place = f"{self.address}: document {hit['_id']}: {error}"
            if not self.skip_bad:
                raise UserError(f"{place} (--skip-bad-rows leaves such documents out)") from error
            self.bad += 1
            if len(self.skipped) < KEPT_SKIPPED:
                self.skipped.append(place)
            return []

    def _common_parts(self) -> dict[str, str]:
        """Return query, positive and label that the first documents share; those that make no row do not count here."""
        common, count = None, 0
        for _, example in self.preview(len(self.documents.sample)):
            common = common_parts(common, example, self.format)
            count += 1
        return common if common and count > 1 else {}

    def _report_bad(self) -> None:
        if self.bad:
            count = quantity(self.bad, "document")
            print(f"{self.address}: {count} left out; the first: {self.skipped[0]}", file=sys.stderr)
            self.bad = 0

    def _check_fields(self) -> str:
        """Return the format of rows. UserError if the index lacks a field that rows need."""
        missing, there = self.documents.missing()
        if missing & set(self.fields.get("rank", ())):  # a rank is optional
            missing -= set(self.fields["rank"])
            self.fields = {key: names for key, names in self.fields.items() if key != "rank"}
        if missing:
            near = next(filter(None, (near_miss(name, there) for name in sorted(missing))), "")
            hint = suggestion(self.documents.first(), by_name=False)
            raise UserError(
                f"{self.address}: no field {', '.join(sorted(missing))} (there: {listing(there)}){near}; "
                f"{f'try {hint}' if hint else '--columns names the fields'}"
            )
        try:
            return reading_of(tuple(self.fields)).kind
        except RowError as error:
            raise UserError(f"--columns: {error}") from error
