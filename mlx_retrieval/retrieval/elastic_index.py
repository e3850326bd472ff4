"""Vectors in an Elasticsearch index: written by `embed.py --to es://index`, searched by `search.py --store es://index`.

The words beside the vectors, and what the index records of both: see elastic_fields.py.

from mlx_retrieval.retrieval.elastic_index import ElasticIndex
for hit in ElasticIndex("es://index", "vector").bm25("read line", 10): print(hit.path, hit.score)
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_retrieval.dataset.columns import joined
from mlx_retrieval.dataset.elastic.documents import Documents
from mlx_retrieval.dataset.elastic.server import Server, parse
from mlx_retrieval.retrieval.analyzer import ANALYSIS, ENGLISH, analyzer, check_language, is_cut_otherwise
from mlx_retrieval.retrieval.base import EVERYWHERE, Hit, IndexInfo, Within
from mlx_retrieval.retrieval.elastic_fields import VectorField, put_mapping, read_meta, words_name
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import shell

if TYPE_CHECKING:
    from mlx_retrieval.inference.embedder import Model

IDS_AT_ONCE = 1_000
NO_FILTERS = "--language and --path: for an --index of files; documents in Elasticsearch have neither"
CANDIDATES = 10  # candidates in each shard for each requested hit, and at least 100 in all


def write_vectors(
    model: "Model",
    to: str,
    field: str,
    texts: Sequence[str],
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    language: str | None = None,
    word_fields: Mapping[str, Sequence[str]] | None = None,
) -> tuple[int, int]:
    """Embed the documents of an Elasticsearch index and write the vectors, and the words, into fields of it.

    Documents that have a vector of this model keep it, so an interrupted run continues, and new documents are added.
    Words that are missing, of another language or of other fields, are written without embedding anything.

    Args:
        model: a model of one vector a text.
        to: es://INDEX.
        field: name of the field.
        texts: fields of a document that are embedded, joined by line breaks.
        overwrite: replace the vectors of another model.
        progress: called with (documents done, total).
        language: of the words' stems and stop words, see analyzer.py; None = as before, or English.
        word_fields: path, name or doc -> fields of a document whose words a search finds it by as well, see fields.py;
            None = as before, or no others.

    Returns the number of documents written, and the number without text. Raises UserError if the field holds vectors
    of another model or of other texts.
    """
    from mlx_retrieval.inference.embedder import embed

    if model.late:
        raise UserError(
            f"{model.name}: --to takes models of one vector a text, not late interaction: search.py index takes it"
        )
    server = Server(parse(to))
    similarity = "cosine" if model.config.normalize else "max_inner_product"
    before = read_meta(server).get(field)
    intended = before and before.intended
    language = check_language(language or (intended.language if intended else "") or ENGLISH)
    origin = (model.name, model.fingerprint(), model.dimensions, list(texts), similarity)
    vectors = VectorField(*origin, "growing", language, analysis=ANALYSIS)
    if before:
        differs = not model.is_of(before.fingerprint) or before.texts != vectors.texts
        if differs and not overwrite:
            raise UserError(
                f"{server.address}: {field} holds vectors of {before.model} of {'+'.join(before.texts)}; "
                "name another --field, or replace them with --overwrite"
            )
        if differs or before.state == "replacing":
            vectors.state = "replacing"
        vectors.word_fields, vectors.weights = intended.word_fields, before.weights
    if word_fields is not None:
        vectors.word_fields = {name: list(group) for name, group in word_fields.items()}
    missing = {"bool": {"must_not": {"exists": {"field": field}}}}
    absent = set(vectors.sources)
    for some in (None, missing):  # a field may be in old documents alone, or in new ones
        with closing(Documents(server.address, vectors.sources, some)) as documents:
            lacking, present = documents.missing()
            absent &= lacking
    if absent:
        raise UserError(f"{server.address}: no field {', '.join(sorted(absent))} (there: {', '.join(present)})")
    if before and vectors.state == "growing":
        has_words = before.language == language
        same = {name: group for name, group in vectors.word_fields.items() if before.word_fields.get(name) == group}
        state = {"analysis": before.analysis} if has_words else {"language": ""}
        planned = {"language": language, "word_fields": vectors.word_fields}
        # What counts until all words are written. The server would choose an analyzer for fields that it does not know.
        started = replace(vectors, word_fields=same, planned=planned, **state)
        _record(server, field, started, vectors.word_fields)
        if has_words and before.analysis < ANALYSIS:
            _write_words(server, field, vectors, False, is_cut_otherwise)
        _write_words(server, field, vectors, has_words and same == vectors.word_fields)
    if vectors.state == "replacing":
        put_mapping(server, field, vectors)  # the weight that was learnt is of the vectors before
    else:
        _record(server, field, vectors)
    source = Documents(server.address, vectors.sources, None if vectors.state == "replacing" else missing)
    survey, done = source.survey(), 0
    try:
        for low, high in source.ranges(survey):
            hits = [hit for hit in source.read(low, high) if joined(hit["_source"], texts).strip()]
            if hits:
                places = [f"{server.address}, document {hit['_id']}" for hit in hits]
                contents = [joined(hit["_source"], texts) for hit in hits]
                embedded = embed(model, contents, "document", places.__getitem__)
                _write(server, hits, {field: embedded.tolist()} | _words(field, vectors, hits))
            done += len(hits)
            if progress:
                progress(done, survey.count)
    finally:
        source.close()
    server.open()
    server.call(server.client.indices.refresh, index=server.address.index)
    _record(server, field, replace(vectors, state="complete"))
    return done, survey.count - done


def _record(server: Server, field: str, vectors: VectorField, besides: Iterable[str] = ()) -> None:
    """Record the origin of vectors as `put_mapping` does, with what `tune` has learnt, perhaps since this run began."""
    learnt = read_meta(server).get(field, vectors)
    put_mapping(server, field, replace(vectors, weight=learnt.weight, weights=learnt.weights), besides)


def _write_words(
    server: Server, field: str, vectors: VectorField, has_words: bool, chosen: Callable[[str], bool] = bool
) -> None:
    """Write the words of documents that have a vector, of all or, if `has_words`, of those without any.

    Args:
        chosen: returns whether the words of a text are to be written; the default leaves out empty texts.
    """
    clauses: dict[str, Any] = {"filter": [{"exists": {"field": field}}]}
    if has_words:
        clauses["must_not"] = [{"exists": {"field": words_name(field)}}]
    source = Documents(server.address, vectors.sources, {"bool": clauses})
    try:
        for low, high in source.ranges(source.survey()):
            hits = source.read(low, high)
            if hits := [hit for hit in hits if chosen("\n".join(vectors.contents(hit["_source"]).values()).strip())]:
                _write(server, hits, _words(field, vectors, hits))
    finally:
        source.close()
    server.open()


def _words(field: str, vectors: VectorField, hits: Sequence[dict]) -> dict[str, list[str]]:
    """Return the fields of words of documents, with a value for each document."""
    rows = [vectors.words(field, hit["_source"]) for hit in hits]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _write(server: Server, hits: Sequence[dict], values: dict[str, Sequence[Any]]) -> None:
    """Set fields of documents to these values. Documents that were deleted meanwhile (status 404) are skipped."""
    from elasticsearch import helpers

    actions = [
        {"_op_type": "update", "_index": hit["_index"], "_id": hit["_id"], "doc": dict(zip(values, row, strict=True))}
        for hit, *row in zip(hits, *values.values(), strict=True)
    ]
    _, errors = server.call(helpers.bulk, client=server.client, actions=actions, max_retries=5, raise_on_error=False)
    if rejected := [error["update"] for error in errors if error["update"].get("status") != 404]:
        reason = rejected[0].get("error", {})
        raise UserError(f"{server.address}: {len(rejected)} documents were rejected: {reason.get('reason', reason)}")


class ElasticIndex:
    """The index interface of `searcher.Searcher` over Elasticsearch.

    Args:
        store: es://INDEX.
        field: field of the vectors; None = the only one.

    Raises UserError if there are no such vectors, or several fields of vectors and no `field`.
    """

    def __init__(self, store: str, field: str | None = None):
        address = parse(store)
        self.server, self.folder, self.root = Server(address), store, Path(".")
        fields = read_meta(self.server)
        if not fields or (field and field not in fields):
            named = f" {field}" if field else ""
            command = shell("python", "embed.py", "--model", "MODEL", "--to", store, "--field", "vector")
            raise UserError(f"{address}: no vectors{named}; {command}")
        if field is None and len(fields) > 1:
            raise UserError(f"{address}: vectors in {', '.join(fields)}; choose one with --field")
        self.field = field or next(iter(fields))
        self.vectors = vectors = fields[self.field]
        self.texts, self._similarity = vectors.texts, vectors.similarity
        info = IndexInfo(".", True, vectors.model, vectors.fingerprint, vectors.dimensions, 0, 0)
        state = {"complete": vectors.state == "complete", "language": vectors.language or ENGLISH}
        self.info = replace(info, **state, weight=vectors.weight, fields=vectors.weights)

    def rebuild_command(self, model: str, late: bool) -> str:
        """Return the command that embeds the documents again with a model; MODEL for late interaction, refused here."""
        return self._command("MODEL" if late else model, "--overwrite")

    def _command(self, model: str, *flags: str) -> str:
        fields = ["--es-fields", f"document={'+'.join(self.texts)}"]
        words = ["python", "embed.py", "--model", model, "--to", self.folder, "--field", self.field, *fields, *flags]
        return shell(*words)

    def _hits(self, score: Callable[[float], float], **body: Any) -> list[Hit]:
        body |= {"index": self.server.address.index, "source": self.texts, "allow_partial_search_results": False}
        answer = self.server.call(self.server.client.search, **body)
        return [
            Hit(hit["_id"], hit["_id"], 1, 1, "", "", "", joined(hit["_source"], self.texts), score(hit["_score"]))
            for hit in answer["hits"]["hits"]
        ]

    def bm25(self, query: str, top: int, within: Within = EVERYWHERE) -> list[Hit]:
        """Return the best documents by BM25 over the words of the fields that were embedded, and of `word_fields`.

        Raises UserError if there are no words, which an earlier version did not write.
        """
        if not self.vectors.language:
            command = self._command(self.vectors.model)
            raise UserError(
                f"{self.server.address}: no words beside {self.field}, which an earlier version wrote. To add them, "
                f"without embedding again: {command}"
            )
        if self.vectors.analysis < ANALYSIS and is_cut_otherwise(query):
            raise UserError(
                f"{self.server.address}: the words beside {self.field} are of an earlier version, which cut words of "
                f"this script otherwise. To write them again, without embedding: {self._command(self.vectors.model)}"
            )
        if not (terms := analyzer(self.info.language).query_terms(query)):
            return []
        words = self.vectors.query(self.field, terms)
        return self._hits(float, query={"bool": {"must": [words], "filter": _filter(within)}}, size=top)

    def semantic(self, vector: np.ndarray, top: int, within: Within = EVERYWHERE) -> list[Hit]:
        """Return the nearest documents by the model's similarity, cosine or dot product; approximate (HNSW).

        Documents that are named are compared one by one.
        """
        knn = {
            "field": self.field,
            "query_vector": np.asarray(vector, float).tolist(),
            "k": top,
            "num_candidates": min(10_000, max(100, CANDIDATES * top)),
        }
        if filters := _filter(within):
            knn["filter"] = filters
        return self._hits(self._similarity_of, knn=knn, size=top)

    def _similarity_of(self, score: float) -> float:
        """Return the similarity that Elasticsearch turned into a positive score."""
        if self._similarity == "cosine":
            return 2 * score - 1
        return score - 1 if score >= 1 else 1 - 1 / score

    def languages(self) -> list[str]:
        """Raise UserError: documents have no programming language."""
        raise UserError(NO_FILTERS)

    def refreshed(self) -> "ElasticIndex":
        """Return this index, opened again if another process has written vectors, words or a weight since."""
        return self if read_meta(self.server).get(self.field) == self.vectors else ElasticIndex(self.folder, self.field)

    def chunks_of(self, path: str) -> list[Hit]:
        """Return the document with this id, with a score of 0, as a list; [] if there is no such one."""
        return self._hits(lambda score: 0.0, query={"ids": {"values": [path]}}, size=1)

    def chunk(self, name: str) -> Hit | None:
        """Return the document with this id, with a score of 0; None if there is no such one."""
        return next(iter(self.chunks_of(name)), None)

    def lines_of(self, paths: Sequence[str]) -> dict[str, list[range]]:
        """Return id -> the lines of its document, which counts as one, for those of these ids that documents have."""
        return {name: [range(1, 2)] for name in self.known(paths)}

    def unmatched(self, paths: Sequence[str], hits: Sequence[Hit]) -> list[str]:
        """Raise UserError: documents have no paths."""
        raise UserError(NO_FILTERS)

    def count(self, within: Within = EVERYWHERE) -> int:
        """Return the number of documents."""
        query = {"bool": {"filter": _filter(within)}}
        return self.server.call(self.server.client.count, index=self.server.address.index, query=query)["count"]

    def known(self, wanted: Sequence[str]) -> list[str]:
        """Return those of the `wanted` ids that documents have."""
        known: list[str] = []
        for first in range(0, len(wanted), IDS_AT_ONCE):
            block = list(wanted[first : first + IDS_AT_ONCE])
            hits = self._hits(float, query={"ids": {"values": block}}, size=len(block))
            known += [hit.path for hit in hits]
        return known

    @property
    def word_fields(self) -> list[str]:
        """The fields besides the text that a search by words looks at, each with a weight of its own."""
        return list(self.vectors.word_fields)

    def weighted(self, weights: Mapping[str, int]) -> "ElasticIndex":
        """Return this index with other weights of the fields, which are not kept."""
        other = copy.copy(self)
        other.vectors = replace(self.vectors, weights=dict(weights))
        other.info = replace(self.info, fields=other.vectors.weights)
        return other

    def keep_weight(self, weight: float | None, weights: Mapping[str, int] | None = None) -> None:
        """Record the share of the meaning in a search by both, None = the default, and other weights of the fields.

        Raises UserError if another process has replaced vectors or words meanwhile, which they do not suit. More
        documents are no obstacle.
        """
        recorded = read_meta(self.server).get(self.field)
        if recorded is None or recorded.basis != self.vectors.basis:
            raise UserError(f"{self.server.address}: {self.field} was written meanwhile; run the same command again")
        learnt = {"weight": weight, "weights": dict(weights or self.vectors.weights)}
        put_mapping(self.server, self.field, replace(recorded, **learnt))
        self.vectors = replace(self.vectors, **learnt)
        self.info.weight, self.info.fields = weight, self.vectors.weights


def _filter(within: Within) -> list[dict[str, Any]]:
    """Return Elasticsearch's filters. Raises UserError for those of languages and paths: its documents have none."""
    if within.languages or within.paths:
        raise UserError(NO_FILTERS)
    return [] if within.ids is None else [{"ids": {"values": list(within.ids)}}]
