"""Vectors in an Elasticsearch index: written by `embed.py --to es://index`, searched by `search.py --store es://index`.

Beside each field of vectors stands one of words, `vector_words` of `vector`: the terms of the same texts, as
`analyzer` makes them for every index. Elasticsearch only splits them at white space. The mapping's `_meta` records, for
every field of vectors, the model and the texts that both were made from.

from mlx_retrieval.retrieval.elastic_index import ElasticIndex
for hit in ElasticIndex("es://index", "vector").bm25("read line", 10): print(hit.path, hit.score)
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_retrieval.dataset.columns import joined
from mlx_retrieval.dataset.elastic.documents import Documents
from mlx_retrieval.dataset.elastic.server import Server, parse
from mlx_retrieval.retrieval.analyzer import ANALYSIS, ENGLISH, analyzer, check_language, is_cut_otherwise
from mlx_retrieval.retrieval.base import EVERYWHERE, Hit, IndexInfo, Within
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import shell

if TYPE_CHECKING:
    from mlx_retrieval.inference.embedder import Model

META = "mlx-retrieval"
WORDS = "{}_words"  # name of the field of words that belongs to a field of vectors
IDS_AT_ONCE = 1_000
NO_FILTERS = "--language and --path: for an --index of files; documents in Elasticsearch have neither"
CANDIDATES = 10  # candidates in each shard for each requested hit, and at least 100 in all


@dataclass
class VectorField:
    """The origin of the vectors in a field."""

    model: str
    fingerprint: str
    dimensions: int
    texts: list[str]  # fields that were embedded, joined by line breaks
    similarity: str  # Elasticsearch's name: cosine, or max_inner_product if vectors are not of unit length
    state: str = "complete"  # "growing" while vectors are missing, "replacing" while some may be of another model
    language: str = ""  # of the words' stems and stop words; "" = there are no words yet, from an earlier version
    weight: float | None = None  # of the meaning in a search by both, as learnt; None = the default
    analysis: int = 1  # version of analyzer.ANALYSIS that made the words


def read_meta(server: Server) -> dict[str, VectorField]:
    """Return field -> origin of the vectors in an index. Raises UserError if the address matches several indices."""
    answer = server.call(server.client.indices.get_mapping, index=server.address.index)
    if len(answer) > 1:
        raise UserError(f"{server.address}: several indices ({', '.join(sorted(answer))}); one must be named")
    (index,) = answer.values()
    meta = index["mappings"].get("_meta", {}).get(META, {})
    return {name: VectorField(**values) for name, values in meta.items()}


def words_field(server: Server, texts: Sequence[str]) -> tuple[str, str] | None:
    """Return the field of words that were made of these texts, and their language; None = there is none."""
    if len(server.call(server.client.indices.get_mapping, index=server.address.index)) > 1:
        return None
    fields = read_meta(server).items()
    found = ((WORDS.format(name), v.language) for name, v in fields if v.texts == list(texts) and v.language)
    return next(found, None)


def write_vectors(
    model: "Model",
    to: str,
    field: str,
    texts: Sequence[str],
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    language: str | None = None,
) -> tuple[int, int]:
    """Embed the documents of an Elasticsearch index and write the vectors, and the words, into fields of it.

    Documents that have a vector of this model keep it, so an interrupted run continues, and new documents are added.
    Words that are missing, or of another language, are written without embedding anything.

    Args:
        model: a model of one vector a text.
        to: es://INDEX.
        field: name of the field.
        texts: fields of a document that are embedded, joined by line breaks.
        overwrite: replace the vectors of another model.
        progress: called with (documents done, total).
        language: of the words' stems and stop words, see analyzer.py; None = as before, or English.

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
    language = check_language(language or (before.language if before else "") or ENGLISH)
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
        else:
            vectors.weight = before.weight
    missing = {"bool": {"must_not": {"exists": {"field": field}}}}
    source = Documents(server.address, texts, None if vectors.state == "replacing" else missing)
    absent, present = source.missing()
    if absent:
        raise UserError(f"{server.address}: no field {', '.join(sorted(absent))} (there: {', '.join(present)})")
    if before and vectors.state == "growing":
        has_words = before.language == language
        state = {"analysis": before.analysis} if has_words else {"language": ""}
        _put_mapping(server, field, replace(vectors, **state))
        if has_words and before.analysis < ANALYSIS:
            _write_words(server, field, vectors, False, is_cut_otherwise)
        _write_words(server, field, vectors, has_words)
    _put_mapping(server, field, vectors)
    survey, done = source.survey(), 0
    try:
        for low, high in source.ranges(survey):
            hits = [hit for hit in source.read(low, high) if joined(hit["_source"], texts).strip()]
            if hits:
                places = [f"{server.address}, document {hit['_id']}" for hit in hits]
                contents = [joined(hit["_source"], texts) for hit in hits]
                embedded = embed(model, contents, "document", places.__getitem__)
                words = [analyzer(language).stream(text) for text in contents]
                _write(server, hits, {field: embedded.tolist(), WORDS.format(field): words})
            done += len(hits)
            if progress:
                progress(done, survey.count)
    finally:
        source.close()
    server.open()
    server.call(server.client.indices.refresh, index=server.address.index)
    vectors.state = "complete"
    _put_mapping(server, field, vectors)
    return done, survey.count - done


def _write_words(
    server: Server, field: str, vectors: VectorField, has_words: bool, chosen: Callable[[str], bool] = bool
) -> None:
    """Write the words of documents that have a vector, of all or, if `has_words`, of those without any.

    Args:
        chosen: returns whether the words of a text are to be written; the default leaves out empty texts.
    """
    clauses: dict[str, Any] = {"filter": [{"exists": {"field": field}}]}
    if has_words:
        clauses["must_not"] = [{"exists": {"field": WORDS.format(field)}}]
    source = Documents(server.address, vectors.texts, {"bool": clauses})
    try:
        for low, high in source.ranges(source.survey()):
            hits = source.read(low, high)
            texts = {hit["_id"]: joined(hit["_source"], vectors.texts) for hit in hits}
            if hits := [hit for hit in hits if chosen(texts[hit["_id"]])]:
                words = [analyzer(vectors.language).stream(texts[hit["_id"]]) for hit in hits]
                _write(server, hits, {WORDS.format(field): words})
    finally:
        source.close()
    server.open()


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


def _put_mapping(server: Server, field: str, vectors: VectorField) -> None:
    """Create the fields of vectors and words if they are missing, and record their origin."""
    index = next(iter(server.call(server.client.indices.get_mapping, index=server.address.index).values()))
    meta = index["mappings"].get("_meta", {})
    meta |= {META: meta.get(META, {}) | {field: asdict(vectors)}}
    # Full precision: newer servers would quantise to a byte or a bit a dimension by default.
    options = {"type": "hnsw", "m": 16, "ef_construction": 100}
    kind = {"type": "dense_vector", "dims": vectors.dimensions, "index": True, "similarity": vectors.similarity}
    kind |= {"index_options": options}
    words = {"type": "text", "analyzer": "whitespace", "index_options": "freqs"}
    fields = {field: kind, WORDS.format(field): words}
    server.call(server.client.indices.put_mapping, index=server.address.index, properties=fields, meta=meta)


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
        self.info = replace(
            info, complete=vectors.state == "complete", language=vectors.language or ENGLISH, weight=vectors.weight
        )

    def rebuild_command(self, model: str) -> str:
        """Return the command that embeds the documents again with a model."""
        return self._command(model, "--overwrite")

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
        """Return the best documents by BM25 over the words of the fields that were embedded.

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
        match = {"match": {WORDS.format(self.field): {"query": " ".join(terms)}}}
        return self._hits(float, query={"bool": {"must": [match], "filter": _filter(within)}}, size=top)

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

    def keep_weight(self, weight: float) -> None:
        """Record the share of the meaning in a search by both."""
        self.vectors.weight = self.info.weight = weight
        _put_mapping(self.server, self.field, self.vectors)


def _filter(within: Within) -> list[dict[str, Any]]:
    """Return Elasticsearch's filters. Raises UserError for those of languages and paths: its documents have none."""
    if within.languages or within.paths:
        raise UserError(NO_FILTERS)
    return [] if within.ids is None else [{"ids": {"values": list(within.ids)}}]
