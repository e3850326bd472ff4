"""Search an index by meaning, by words or by both."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlx_retrieval.retrieval.analyzer import NONE, analyzer
from mlx_retrieval.retrieval.base import Hit, Within
from mlx_retrieval.retrieval.fusion import FUSIONS, hybrid, weight_of
from mlx_retrieval.utils.errors import UserError, near_miss

if TYPE_CHECKING:
    from mlx_retrieval.inference.embedder import Model
    from mlx_retrieval.inference.reranker import Reranker

MODES = ("hybrid", "semantic", "bm25")  # the first is the default: see benchmarks/hybrid.py
DEPTH = 50  # hits that a reranker scores


class MissingModelError(UserError):
    """The model of an index cannot be loaded from where it was; its words can still be searched."""


class Searcher:
    """An index and the model that made it, which is loaded by the first search that needs it.

    Args:
        index: folder that `search.py index` made, or es://INDEX with vectors that `embed.py --to` wrote.
        model: the model's folder or name, if it has moved since indexing.
        reranker: a `reranker.Reranker`, or any object with its `score`, that sorts the first hits; None = no reranking.
        field: field of the vectors in Elasticsearch; None = the only one.
        dtype: that the model computes in: see `embedder.load`. It need not be that of the index.

    Raises UserError if there is no index, and in a search if the model is not the one that made the index.
    """

    def __init__(
        self,
        index: str | Path = ".index",
        model: str | None = None,
        reranker: "Reranker | None" = None,
        field: str | None = None,
        dtype: str | None = None,
    ):
        from mlx_retrieval.dataset.elastic.server import is_address

        self._is_store = is_address(str(index))
        if self._is_store:
            from mlx_retrieval.retrieval.elastic_index import ElasticIndex

            self.index = ElasticIndex(str(index), field)
        else:
            from mlx_retrieval.retrieval.lance_index import Index

            self.index = Index.open(index)
        self._model_name, self.reranker, self._dtype = model, reranker, dtype

    @property
    def source(self) -> str:
        """What is searched: the indexed folder, absolute, or the es:// address of the documents."""
        return str(self.index.folder if self._is_store else self.index.root)

    @property
    def unfinished(self) -> str:
        """Why hits may be missing, and the command that continues; "" = all is indexed."""
        if self.index.info.complete:
            return ""
        texts, command = ("documents", "embed.py --to") if self._is_store else ("files", "search.py index")
        return f"indexing was not finished, so some {texts} are missing ({command} continues)"

    @functools.cached_property
    def model(self) -> "Model":
        """The model of the index.

        Raises MissingModelError if it is no longer where it was, UserError if it is not the model that made the index.
        """
        from mlx_retrieval.inference import embedder

        info = self.index.info
        name = self._model_name or info.model
        try:
            model = embedder.load(name, dtype=self._dtype)
        except UserError as error:
            if self._model_name:
                raise
            raise MissingModelError(f"{error}; give the model's new place with --model-path") from error
        if not model.is_of(info.fingerprint):
            reason = f"is another model than {info.model}," if self._model_name else "is no longer the model"
            raise UserError(
                f"{name} {reason} with which {self.index.folder} was made. "
                f"To rebuild the index: {self.index.rebuild_command(name, model.late)}"
            )
        return model

    def search(
        self,
        query: str,
        mode: str = MODES[0],
        top: int = 10,
        weight: float | None = None,
        depth: int = DEPTH,
        fusion: str = FUSIONS[0],
        languages: Sequence[str] = (),
        paths: Sequence[str] = (),
        rerank: bool = True,
    ) -> list[Hit]:
        """Return the best chunks for a query, best first.

        Args:
            query: plain words; no character in it is an operator.
            mode: "hybrid", "semantic" or "bm25"; see fusion.py for the first, which takes both others together.
            top: maximum number of hits.
            weight: share of the meaning in hybrid, from 0 (words only) to 1 (meaning only); None = as `search.py tune`
                learnt it for this index, else fusion.WEIGHTS.
            depth: hits that the reranker scores, at least `top`; `score` is then the reranker's.
            fusion: "scores" or "ranks", for hybrid.
            languages: search only chunks in these, such as "python", "markdown" or "text".
            paths: search only these files or folders; * and ? stand for any characters.
            rerank: sort the first hits with the reranker, if there is one.

        Raises UserError for an empty query, for one of stop words in a search by words, for a language or path that the
        index does not have, and for values out of range.
        """
        within, reranks = Within(languages=tuple(languages), paths=tuple(paths)), rerank and self.reranker is not None
        if reranks and depth < 1:
            raise UserError(f"--rerank-depth {depth}: at least 1")
        hits = self._search(query, mode, max(top, depth) if reranks else top, weight, fusion, within)
        self._check_languages(languages, hits)
        self._check_paths(paths, hits)
        if not reranks:
            return hits
        from mlx_retrieval.inference.reranker import activated

        raw = self.scores(query, [hit.text for hit in hits])
        order, scores = (-raw).argsort(kind="stable")[:top].tolist(), activated(self.reranker, raw)
        return [dataclasses.replace(hits[i], score=float(scores[i])) for i in order]

    def vector(self, query: str) -> np.ndarray:
        """Return the query's vector (D,) float32; late interaction: the vectors of its tokens (L, D)."""
        from mlx_retrieval.inference.embedder import embed

        return embed(self.model, [query], "query")[0]

    def scores(self, query: str, texts: Sequence[str]) -> np.ndarray:
        """Return the reranker's scores (N,) float32 of texts for a query, before its activation."""
        from mlx_retrieval.inference.reranker import raw_scores

        if hasattr(self.reranker, "score_groups"):
            return raw_scores(self.reranker, [(query, texts)])[0]
        return self.reranker.score(query, texts)

    def refresh(self) -> bool:
        """Open the index again if it was written since, for a process that goes on. Return whether it was.

        The model is loaded again if the index is now of another one.
        """
        index = self.index.refreshed()
        if index is self.index:
            return False
        if index.info.fingerprint != self.index.info.fingerprint:
            vars(self).pop("model", None)
        self.index = index
        return True

    def _check_languages(self, languages: Sequence[str], hits: Sequence[Hit]) -> None:
        """Raise UserError for a language that no chunk has. The index is asked only if no hit has it."""
        rest = [name for name in languages if name not in {hit.language for hit in hits}]
        known = self.index.languages() if rest else []
        if unknown := [name for name in rest if name not in known]:
            near = near_miss(unknown[0], known)
            raise UserError(f"--language {unknown[0]}: not in {self.index.folder}; there: {', '.join(known)}{near}")

    def _check_paths(self, paths: Sequence[str], hits: Sequence[Hit]) -> None:
        """Raise UserError for a path that no file of the index matches."""
        if paths and (unmatched := self.index.unmatched(paths, hits)):
            place = f"{self.index.folder}, under {self.index.root}"
            raise UserError(f"--path {unmatched[0]}: no such file or folder in {place}")

    def _search(self, query: str, mode: str, top: int, weight: float | None, fusion: str, within: Within) -> list[Hit]:
        if mode not in MODES:
            raise UserError(f"mode {mode!r} is unknown; known: {', '.join(MODES)}")
        if not query.strip():
            raise UserError("the query is empty")
        if top < 1:
            raise UserError(f"--top {top}: at least 1")
        weight = weight_of(self.index.info, fusion, weight)
        if mode == "bm25":
            language = self.index.info.language
            if not analyzer(language).query_terms(query) and analyzer(NONE).query_terms(query):
                raise UserError(
                    f"the query has only stop words ({language}), which are not indexed: search by meaning, "
                    "with --semantic"
                )
            return self.index.bm25(query, top, within)
        vector = self.vector(query)
        if mode == "semantic":
            return self.index.semantic(vector, top, within)
        return hybrid(self.index, query, vector, top, weight, fusion, within)
