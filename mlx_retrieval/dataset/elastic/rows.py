"""Training rows from an Elasticsearch index, streamed in a seeded order with bounded memory.

An epoch's ranges of documents (see elastic/documents.py) are read in a seeded order, BLOCK of them together, which are
then shuffled. A document that is written during an epoch gets a number beyond the last range: it is never read twice in
an epoch, whatever happens to the server.
"""

import dataclasses
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_retrieval.dataset.elastic.documents import Documents, Survey
from mlx_retrieval.dataset.elastic.fields import Fields, row_of
from mlx_retrieval.dataset.elastic.server import Address, Closed
from mlx_retrieval.dataset.row_formats import Example, RowError, example_of, row_format
from mlx_retrieval.utils.errors import UserError

BLOCK = 16  # ranges that are shuffled together
KEPT_SKIPPED = 1000


@dataclass
class Mark:
    """Where a block begins: at which example of the run, and what to read it by."""

    start: int
    epoch: int
    block: int
    survey: Survey

    @classmethod
    def of(cls, saved: dict) -> "Mark":
        """From what `dataclasses.asdict` made of one."""
        return cls(**saved | {"survey": Survey(**saved["survey"])})


class ElasticRows:
    """The documents of an index as rows: a source of `data_loader.Batches`.

    Args:
        address: of the index.
        fields: what rows are made of, see elastic/fields.py.
        query: Elasticsearch's own; only documents that match are read.
        skip_bad: leave out documents that make no row; they are counted, and the first stand in `skipped`.
        part: (which, of how many): read only that part of the ranges, where several processes share an index.

    A row's number is its place in the run's sequence of examples; rows of the last blocks can be asked for by number.
    """

    def __init__(
        self,
        address: Address,
        fields: Fields,
        query: dict | None = None,
        skip_bad: bool = False,
        part: tuple[int, int] = (0, 1),
    ):
        self.address, self.fields, self.skip_bad, self.part = address, fields, skip_bad, part
        self.names = [str(address)]
        self.documents = Documents(address, [name for names in fields.values() for name in names], query)
        self.skipped: list[str] = []
        self.bad = 0
        self._recent: list[tuple[int, list[tuple[str, Example]]]] = []  # (start, documents) of the last blocks
        self.kind = self._check_fields()
        self.has_negatives = bool({"negative", "negatives", "documents"} & set(fields)) or self.kind == "anchor"
        self.has_scores = bool({"scores", "label"} & set(fields))
        self.score_range, self.without_positive = (0.0, 1.0), ""
        survey = self.documents.survey()
        if not survey.count:
            raise UserError(f"{address}: no document{' matches --es-query' if query else ''}")
        self._count = survey.count
        self._marks = [Mark(0, 0, 0, survey)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Example:
        return self._at(i)[1]

    def where(self, i: int) -> str:
        """The document that a row was made of."""
        try:
            return f"{self.address}: document {self._at(i)[0]}"
        except IndexError:
            return f"{self.address}: example {i:,} of the run"

    def _at(self, i: int) -> tuple[str, Example]:
        for start, documents in reversed(self._recent):
            if start <= i < start + len(documents):
                return documents[i - start]
        raise IndexError(f"row {i} was not read lately")

    def close(self) -> None:
        """Stop what is being read, and let the server forget the view."""
        self.documents.close()

    # --- the sequence -------------------------------------------------------------------------------------------------

    def numbers(self, seed: int, position: int) -> Iterator[int]:
        """The endless sequence of row numbers from a position on; the next block is read while one is used."""
        self.documents.server.open()
        mark = max((m for m in self._marks if m.start <= position), key=lambda m: m.start)
        start, fruitless = mark.start, 0
        with ThreadPoolExecutor(1, "elasticsearch") as reader:
            coming = reader.submit(self._block, seed, mark)
            try:
                while True:
                    documents, after = coming.result()
                    if start > self._marks[-1].start:
                        self._marks.append(dataclasses.replace(mark, start=start))
                    self._recent = [*self._recent[-2:], (start, documents)]
                    coming = reader.submit(self._block, seed, after)
                    yield from range(max(start, position), start + len(documents))
                    start += len(documents)
                    fruitless = 0 if documents else fruitless
                    if after.epoch > mark.epoch:
                        self._tell_bad()
                        fruitless += 1
                        if fruitless > 1:  # a whole epoch between two ends
                            raise UserError(f"{self.address}: no usable document is left")
                    mark = after
            except Closed:
                return
            finally:
                self.documents.server.close()

    def cursor(self, position: int) -> dict[str, Any]:
        """What `restore` needs, besides the position, to go on from there in another process."""
        return dataclasses.asdict(max((m for m in self._marks if m.start <= position), key=lambda m: m.start))

    def restore(self, cursor: dict[str, Any], position: int) -> None:
        """Go on as the process did that gave the cursor; where the documents have changed since, with a new epoch."""
        mark = Mark.of(cursor)
        if self.documents.survey(mark.survey.last) != mark.survey:
            print(
                f"{self.address}: documents were changed or deleted since the run was stopped: a new epoch begins, "
                "and what follows is not what would have followed",
                file=sys.stderr,
            )
            mark = Mark(position, mark.epoch + 1, 0, self.documents.survey())
        self._marks = [mark]

    def _block(self, seed: int, mark: Mark) -> tuple[list[tuple[str, Example]], Mark]:
        """A block's documents, with their ids, in their order; and the mark of the next, its start not yet known."""
        ranges = self.documents.ranges(mark.survey)
        order = np.random.default_rng([seed, mark.epoch]).permutation(len(ranges))[self.part[0] :: self.part[1]]
        hits = [
            hit
            for number in order[mark.block * BLOCK : (mark.block + 1) * BLOCK].tolist()
            for hit in self.documents.read(*ranges[number])
        ]
        hits.sort(key=lambda hit: (hit["sort"][0], hit["_index"], hit["_id"]))  # an order that no restart changes
        shuffled = np.random.default_rng([seed, mark.epoch, mark.block]).permutation(len(hits))
        documents = [(hits[i]["_id"], made) for i in shuffled if (made := self._example(hits[i])) is not None]
        if (mark.block + 1) * BLOCK < len(order):
            return documents, dataclasses.replace(mark, block=mark.block + 1)
        self.documents.view.close()  # the next epoch sees what is new
        return documents, Mark(0, mark.epoch + 1, 0, self.documents.survey())

    def _example(self, hit: dict) -> Example | None:
        try:
            return example_of(row_of(hit["_source"], self.fields), self.kind)[0]
        except RowError as error:
            place = f"{self.address}: document {hit['_id']}: {error}"
            if not self.skip_bad:
                raise UserError(f"{place} (--skip-bad-rows leaves such documents out)") from error
            self.bad += 1
            if len(self.skipped) < KEPT_SKIPPED:
                self.skipped.append(place)
            return None

    def _tell_bad(self) -> None:
        if self.bad:
            print(f"{self.address}: {self.bad:,} documents left out; the first: {self.skipped[0]}", file=sys.stderr)
            self.bad = 0

    def _check_fields(self) -> str:
        """The format of rows. UserError where the index lacks a field that is needed."""
        missing, there = self.documents.missing()
        if missing & set(self.fields.get("rank", ())):  # rows need none
            missing -= set(self.fields["rank"])
            self.fields = {key: names for key, names in self.fields.items() if key != "rank"}
        if missing:
            known = ", ".join(there) or "none"
            raise UserError(f"{self.address}: no field {', '.join(sorted(missing))} (there: {known}); see --es-fields")
        try:
            return row_format(dict.fromkeys(self.fields, ""))
        except RowError as error:
            raise UserError(f"--es-fields: {error}") from error
