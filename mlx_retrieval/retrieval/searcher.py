"""Search an index by meaning, by words or by both."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_retrieval.utils.errors import UserError

if TYPE_CHECKING:
    from mlx_retrieval.inference.embedder import Model
    from mlx_retrieval.inference.reranker import Reranker
    from mlx_retrieval.retrieval.base import Hit

# The first is the default: with trained models it found more than both fused (benchmarks/code_search.py).
MODES = ("semantic", "hybrid", "bm25")
DEPTH = 50  # hits that a reranker orders anew


class Searcher:
    """An index and, from the first search that needs it, the model that made it.

    Args:
        index: folder that `search.py index` made, or es://INDEX with vectors that `embed.py --to` wrote.
        model: the model's folder or name, where it is no longer found under the name that the index knows.
        reranker: a `rerank.Reranker`, or anything with its `score`, that orders the first hits anew; None = none does.
        field: of the vectors in Elasticsearch; None = the only one.

    Raises UserError where there is no index, and in searching where the model is not the one that made it.
    """

    def __init__(
        self,
        index: str | Path = ".index",
        model: str | None = None,
        reranker: "Reranker | None" = None,
        field: str | None = None,
    ):
        from mlx_retrieval.dataset.elastic.server import is_address

        if is_address(str(index)):
            from mlx_retrieval.retrieval.elastic_index import ElasticIndex

            self.index = ElasticIndex(str(index), field)
        else:
            from mlx_retrieval.retrieval.lance_index import Index

            self.index = Index.open(index)
        self._name, self.reranker = model, reranker

    @functools.cached_property
    def model(self) -> "Model":
        """The model, loaded."""
        from mlx_retrieval.inference import embedder

        name, about = self._name or self.index.about.model, self.index.about
        try:
            model = embedder.load(name)
        except UserError as error:
            hint = "" if self._name else "; --model-path names the place where the index's model is now"
            raise UserError(f"{error}{hint}") from error
        if model.fingerprint() != about.fingerprint:
            what = f"another model than {about.model}," if self._name else "no longer the model"
            raise UserError(
                f"{name} is {what} with which {self.index.folder} was made. To make it anew: {self.index.again(name)}"
            )
        return model

    def search(
        self, query: str, mode: str = MODES[0], top: int = 10, weight: float = 0.5, depth: int = DEPTH
    ) -> "list[Hit]":
        """The best chunks for a query, best first.

        Args:
            query: plain words; nothing in it is syntax.
            mode: "bm25", "semantic" or "hybrid", which fuses both by reciprocal ranks.
            top: most hits.
            weight: of semantic ranks in hybrid, from 0 (words alone) to 1 (meaning alone).
            depth: how many hits the reranker orders anew; `score` is then the reranker's, and others are not returned.
        """
        if self.reranker is None:
            return self._search(query, mode, top, weight)
        if depth < 1:
            raise UserError(f"--rerank-depth {depth}: at least 1")
        hits = self._search(query, mode, max(top, depth), weight)
        scores = self.reranker.score(query, [hit.text for hit in hits])
        order = (-scores).argsort(kind="stable")[:top].tolist()
        return [dataclasses.replace(hits[i], score=float(scores[i])) for i in order]

    def _search(self, query: str, mode: str, top: int, weight: float) -> "list[Hit]":
        from mlx_retrieval.inference.embedder import embed

        if mode not in MODES:
            raise UserError(f"mode {mode!r} is unknown; known: {', '.join(MODES)}")
        if not query.strip():
            raise UserError("the query is empty")
        if top < 1:
            raise UserError(f"--top {top}: at least 1")
        if not 0 <= weight <= 1:
            raise UserError(f"--weight {weight}: between 0 and 1")
        if mode == "bm25":
            return self.index.bm25(query, top)
        vector = embed(self.model, [query], "query")[0]
        if mode == "semantic":
            return self.index.semantic(vector, top)
        return self.index.hybrid(query, vector, top, weight)
