"""An index as the corpus of `mine.py negatives`: its documents are read once, and BM25 is asked of the server.

python mine.py negatives --data pairs.jsonl --corpus es://tickets --es-fields document=answer --by both --model M ...
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mlx_retrieval.dataset.elastic.documents import Documents
from mlx_retrieval.dataset.elastic.fields import joined
from mlx_retrieval.dataset.elastic.server import parse
from mlx_retrieval.utils.errors import UserError

MORE = 100  # hits beyond those that are looked at: known positives are among them


class ElasticCorpus:
    """The texts of an index's documents.

    Args:
        source: es://INDEX.
        texts: fields, joined by line breaks.
    """

    def __init__(self, source: str, texts: Sequence[str]):
        self.address, self.texts = parse(source), list(texts)
        self.documents = Documents(self.address, texts)
        absent, there = self.documents.missing()
        if absent:
            raise UserError(f"{self.address}: no field {', '.join(sorted(absent))} (there: {', '.join(there)})")
        self._numbers: dict[str, int] = {}  # of the documents in the order in which they were read, by index and id

    def __iter__(self) -> Iterator[str]:
        """Every document's text, in the order of ranges; those without one are left out."""
        for low, high in self.documents.ranges(self.documents.survey()):
            for hit in self.documents.read(low, high):
                if (text := joined(hit["_source"], self.texts)).strip():
                    self._numbers[f"{hit['_index']}/{hit['_id']}"] = len(self._numbers)
                    yield text
        if not self._numbers:
            raise UserError(f"{self.address}: no document with a text")
        self.documents.close()
        self.documents.server.open()  # for the searches

    def words(self, numbers: Sequence[int], count: int, depth: int) -> Callable[[str], np.ndarray]:
        """What gives, for a query, the server's BM25 scores (count,) float32 of documents; 0 beyond the best of them.

        Args:
            numbers: the number in the collection of each text that was read, in that order.
            count: documents of the collection.
            depth: best documents that are looked at.
        """
        client, server = self.documents.server.client, self.documents.server

        def scores(query: str) -> np.ndarray:
            out = np.zeros(count, np.float32)
            match = {"multi_match": {"query": query, "fields": self.texts, "type": "most_fields"}}
            size = min(depth + MORE, 10_000)
            answer = server.call(client.search, index=self.address.index, query=match, size=size, source=False)
            for hit in answer["hits"]["hits"]:
                if (place := self._numbers.get(f"{hit['_index']}/{hit['_id']}")) is not None:
                    out[numbers[place]] = max(out[numbers[place]], hit["_score"])
            return out

        return scores
