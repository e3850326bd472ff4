"""The documents of an index, read in ranges of `_seq_no` through a point in time.

`_seq_no` is the number that Elasticsearch gives to every write of a shard. The cut into ranges needs only counts, so
its memory does not grow with the documents; what is written later gets a number beyond the last range; and numbers
survive a restart of the server, which a point in time does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_retrieval.dataset.elastic.fields import value_at
from mlx_retrieval.dataset.elastic.server import Address, Server, View, ViewLost
from mlx_retrieval.utils.errors import UserError

RANGE = 512  # documents, about
PAGE = 1000  # documents of one answer
BUCKETS = 1000  # of the histogram by which ranges are cut
VIEWS = 10  # points in time that may be lost one after the other


@dataclass
class Survey:
    """What the matching documents of an index are, up to a `_seq_no`: the same figures, the same documents."""

    last: int  # the highest _seq_no
    count: int
    total: float  # sum of all _seq_no


class Documents:
    """The documents of an index that match a query, and some of their fields.

    Args:
        address: of the index.
        wanted: names of the fields.
        query: Elasticsearch's own.
    """

    def __init__(self, address: Address, wanted: Sequence[str], query: dict | None = None):
        self.address, self.wanted, self.query = address, sorted(set(wanted)), query
        self.server = Server(address)
        self.view = View(self.server)
        self._cut: tuple[Survey, list[tuple[int, int]]] | None = None

    def close(self) -> None:
        """Stop what is being read, and let the server forget the view."""
        self.server.close()
        self.view.close()

    def missing(self) -> tuple[set[str], list[str]]:
        """Wanted fields that the index lacks, and the names of those that it has."""
        there = self.server.call(self.server.client.field_caps, index=self.address.index, fields="*")["fields"]
        sample = self.search(size=100, query=self.filter(), source=self.wanted)["hits"]["hits"]
        absent = {
            name
            for name in self.wanted
            if name not in there  # fields may be stored without being indexed
            and all(value_at(hit["_source"], name) is None for hit in sample)
        }
        return absent, sorted(name for name in there if not name.startswith("_"))

    def filter(self, low: int | None = None, high: int | None = None) -> dict:
        """The documents that are read, of those numbers: `low` included, `high` not."""
        bounds = {name: value for name, value in (("gte", low), ("lt", high)) if value is not None}
        wanted = [self.query] if self.query else []
        return {"bool": {"filter": [*wanted, {"range": {"_seq_no": bounds}}] if bounds else wanted}}

    def survey(self, last: int | None = None) -> Survey:
        """Count the documents, up to a number or all that there are."""
        query = self.filter(high=None if last is None else last + 1)
        found = self.search(size=0, query=query, aggs={"all": {"stats": {"field": "_seq_no"}}})["aggregations"]["all"]
        if not found["count"]:
            return Survey(-1, 0, 0.0)
        return Survey(int(found["max"]) if last is None else last, found["count"], found["sum"])

    def ranges(self, survey: Survey) -> list[tuple[int, int]]:
        """(first, one beyond the last) `_seq_no` of ranges with about RANGE documents each, in rising order."""
        if not survey.count:
            return []
        if self._cut and self._cut[0] == survey:
            return self._cut[1]
        width = -(-(survey.last + 1) // BUCKETS)
        asked = {"histogram": {"field": "_seq_no", "interval": width, "min_doc_count": 1}}
        query = self.filter(high=survey.last + 1)
        buckets = self.search(size=0, query=query, aggs={"all": asked})["aggregations"]["all"]["buckets"]
        ranges, low, count = [], 0, 0
        for bucket in buckets:
            first, inside = int(bucket["key"]), bucket["doc_count"]
            pieces = max(1, min(inside // RANGE, width))
            if pieces > 1 and count:
                ranges.append((low, first))
                low, count = first, 0
            count += inside
            if count >= RANGE or pieces > 1:
                ends = [first + width * (i + 1) // pieces for i in range(pieces)]
                ranges += zip([low, *ends[:-1]], ends, strict=True)
                low, count = ends[-1], 0
        if count:
            ranges.append((low, survey.last + 1))
        self._cut = (survey, ranges)
        return ranges

    def read(self, low: int, high: int) -> list[dict]:
        """All documents of a range."""
        body = {
            "query": self.filter(low, high),
            "sort": [{"_seq_no": "asc"}, {"_shard_doc": "asc"}],
            "size": PAGE,
            "source": self.wanted,
            "track_total_hits": False,
        }
        for _ in range(VIEWS):
            hits: list[dict] = []
            try:
                while True:
                    after = {"search_after": hits[-1]["sort"]} if hits else {}
                    page = self.view.search(**body, **after)["hits"]["hits"]
                    hits += page
                    if len(page) < PAGE:
                        return hits
            except ViewLost:  # another view may sort a shard's documents differently: the range is read anew
                self.view.reopen()
        raise UserError(f"{self.address}: the server loses its points in time as soon as they are opened")

    def search(self, **body: Any) -> dict:
        """One answer, whichever view it is of."""
        for _ in range(VIEWS):
            try:
                return self.view.search(**body)
            except ViewLost:
                self.view.reopen()
        raise UserError(f"{self.address}: the server loses its points in time as soon as they are opened")
