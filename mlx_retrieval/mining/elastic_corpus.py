"""An Elasticsearch index as a corpus: its documents are read once, and the server ranks them by BM25.

python mine.py negatives --data pairs.jsonl --corpus es://tickets --es-fields document=answer --by both --model M ...
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mlx_retrieval.dataset.columns import joined
from mlx_retrieval.dataset.elastic.documents import Documents
from mlx_retrieval.dataset.elastic.server import parse
from mlx_retrieval.retrieval.analyzer import analyzer
from mlx_retrieval.retrieval.elastic_fields import words_of
from mlx_retrieval.utils.errors import UserError

MORE = 100  # further hits, as known positives are among the hits and do not count


class ElasticCorpus:
    """The texts of an index's documents.

    Args:
        source: es://INDEX, or the index's URL.
        texts: the fields of a document's text, joined by line breaks.

    Raises UserError if the index lacks a field.
    """

    def __init__(self, source: str, texts: Sequence[str]):
        self.address, self.texts = parse(source), list(texts)
        self.documents = Documents(self.address, texts)
        absent, present = self.documents.missing()
        if absent:
            raise UserError(f"{self.address}: no field {', '.join(sorted(absent))} (there: {', '.join(present)})")
        self._numbers: dict[str, int] = {}  # index/id of a document -> its place in the order of reading

    def __iter__(self) -> Iterator[str]:
        """Yield every document's text, in the order of ranges; documents without a text are left out."""
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
        """Return a function from a query to the server's BM25 scores, (count,) float32; 0 for all but the best.

        The words are those that `embed.py --to` wrote for these fields; without them, the server's own analysis counts.

        Args:
            numbers: the collection's number of each text, in the order of reading.
            count: documents in the collection.
            depth: best documents to look at.
        """
        client, server = self.documents.server.client, self.documents.server
        words = words_of(server, self.texts)

        def scores(query: str) -> np.ndarray:
            out = np.zeros(count, np.float32)
            match = {"multi_match": {"query": query, "fields": self.texts, "type": "most_fields"}}
            if words:
                field, vectors = words
                match = vectors.query(field, analyzer(vectors.language).query_terms(query))
            size = min(depth + MORE, 10_000)
            answer = server.call(client.search, index=self.address.index, query=match, size=size, source=False)
            for hit in answer["hits"]["hits"]:
                if (place := self._numbers.get(f"{hit['_index']}/{hit['_id']}")) is not None:
                    out[numbers[place]] = max(out[numbers[place]], hit["_score"])
            return out

        return scores
