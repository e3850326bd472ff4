"""Read the documents of an index in ranges of `_seq_no` through a point in time.

`_seq_no` is the number that Elasticsearch gives to every write of a shard. Splitting it into ranges needs only counts,
so memory does not grow with the documents. A later write gets a number beyond the last range. Numbers survive a restart
of the server; a point in time does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_retrieval.dataset.columns import value_at
from mlx_retrieval.dataset.elastic.server import Address, Server, View, ViewLost
from mlx_retrieval.utils.errors import UserError

RANGE = 512  # documents of a range, roughly
PAGE = 1000  # documents of one response
BUCKETS = 1000  # of the histogram from which ranges are made
VIEWS = 10  # points in time that may be lost in a row


@dataclass
class Survey:
    """Statistics of the matching documents up to a `_seq_no`; if they are equal, so are the documents."""

    last: int  # the highest _seq_no
    count: int
    total: float  # sum of all _seq_no


class Documents:
    """The documents of an index that match a query, and some of their fields.

    Args:
        address: of the index.
        wanted: names of the fields.
        query: a query of Elasticsearch.
    """

    def __init__(self, address: Address, wanted: Sequence[str], query: dict | None = None):
        self.address, self.wanted, self.query = address, sorted(set(wanted)), query
        self.server = Server(address)
        self.view = View(self.server)
        self.sample: list[
            tuple[str, dict]
        ] = []  # id and fields of the first documents, once `missing` has looked at them
        self._cut: tuple[Survey, list[tuple[int, int]]] | None = None

    def close(self) -> None:
        """Stop reading, and release the view on the server."""
        self.server.close()
        self.view.close()

    def missing(self) -> tuple[set[str], list[str]]:
        """Return the wanted fields that the index lacks, and the names of all fields that it has."""
        there = self.server.call(self.server.client.field_caps, index=self.address.index, fields="*")["fields"]
        sample = self.search(size=100, query=self.filter(), source=self.wanted)["hits"]["hits"]
        self.sample = [(hit["_id"], hit["_source"]) for hit in sample]
        absent = {
            name
            for name in self.wanted
            if name not in there  # fields may be stored without being indexed
            and all(value_at(hit["_source"], name) is None for hit in sample)
        }
        return absent, sorted(name for name in there if not name.startswith("_"))

    def first(self) -> dict:
        """Return all fields of a document that matches; {} = there is none."""
        hits = self.search(size=1, query=self.filter())["hits"]["hits"]
        return hits[0]["_source"] if hits else {}

    def identity(self) -> str:
        """Return the ids of the indices that the address names; "" if the key or user may not read them."""
        try:
            names = {"index": self.address.index, "name": "index.uuid"}
            answer = self.server.call(self.server.client.indices.get_settings, **names)
        except UserError:
            return ""
        return " ".join(sorted(f"{name} {index['settings']['index']['uuid']}" for name, index in answer.items()))

    def filter(self, low: int | None = None, high: int | None = None) -> dict:
        """Return the query for the documents with numbers from `low` to `high` - 1."""
        bounds = {name: value for name, value in (("gte", low), ("lt", high)) if value is not None}
        wanted = [self.query] if self.query else []
        return {"bool": {"filter": [*wanted, {"range": {"_seq_no": bounds}}] if bounds else wanted}}

    def survey(self, last: int | None = None) -> Survey:
        """Count the documents up to a number; None = all."""
        query = self.filter(high=None if last is None else last + 1)
        stats = self.search(size=0, query=query, aggs={"all": {"stats": {"field": "_seq_no"}}})["aggregations"]["all"]
        if not stats["count"]:
            return Survey(-1, 0, 0.0)
        return Survey(int(stats["max"]) if last is None else last, stats["count"], stats["sum"])

    def ranges(self, survey: Survey) -> list[tuple[int, int]]:
        """Return (first, last + 1) `_seq_no` of ranges with about RANGE documents each, in ascending order."""
        if not survey.count:
            return []
        if self._cut and self._cut[0] == survey:
            return self._cut[1]
        width = -(-(survey.last + 1) // BUCKETS)
        histogram = {"histogram": {"field": "_seq_no", "interval": width, "min_doc_count": 1}}
        query = self.filter(high=survey.last + 1)
        buckets = self.search(size=0, query=query, aggs={"all": histogram})["aggregations"]["all"]["buckets"]
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
        """Return all documents of a range."""
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
            except ViewLost:  # a new view may sort a shard's documents differently: start the range again
                self.view.reopen()
        raise UserError(f"{self.address}: the server loses its points in time as soon as they are opened")

    def search(self, **body: Any) -> dict:
        """Return one response, from a new view if the current one is lost."""
        for _ in range(VIEWS):
            try:
                return self.view.search(**body)
            except ViewLost:
                self.view.reopen()
        raise UserError(f"{self.address}: the server loses its points in time as soon as they are opened")
