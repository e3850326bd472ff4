"""Vectors in an Elasticsearch index: written by `embed.py --to es://index`, searched by `search.py --store es://index`.

The mapping's `_meta` records, for every field of vectors, the model and the texts they were made from.

from mlx_retrieval.retrieval.elastic_index import ElasticIndex
for hit in ElasticIndex("es://index", "vector").bm25("read line", 10): print(hit.path, hit.score)
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_retrieval.dataset.columns import joined
from mlx_retrieval.dataset.elastic.documents import Documents
from mlx_retrieval.dataset.elastic.server import Server, parse
from mlx_retrieval.retrieval.base import Hit, IndexInfo, fuse_hits
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import shell

if TYPE_CHECKING:
    from mlx_retrieval.inference.embedder import Model

META = "mlx-retrieval"
DEPTH = 100  # hits of each search that hybrid search fuses
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


def read_meta(server: Server) -> dict[str, VectorField]:
    """Return field -> origin of the vectors in an index. Raises UserError if the address matches several indices."""
    answer = server.call(server.client.indices.get_mapping, index=server.address.index)
    if len(answer) > 1:
        raise UserError(f"{server.address}: several indices ({', '.join(sorted(answer))}); one must be named")
    (index,) = answer.values()
    meta = index["mappings"].get("_meta", {}).get(META, {})
    return {name: VectorField(**values) for name, values in meta.items()}


def write_vectors(
    model: "Model",
    to: str,
    field: str,
    texts: Sequence[str],
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Embed the documents of an Elasticsearch index and write the vectors into a field of it.

    Documents that have a vector of this model keep it, so an interrupted run continues, and new documents are added.

    Args:
        model: a model of one vector a text.
        to: es://INDEX.
        field: name of the field.
        texts: fields of a document that are embedded, joined by line breaks.
        overwrite: replace the vectors of another model.
        progress: called with (documents done, total).

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
    vectors = VectorField(model.name, model.fingerprint(), model.dimensions, list(texts), similarity, "growing")
    if before := read_meta(server).get(field):
        differs = (before.fingerprint, before.texts) != (vectors.fingerprint, vectors.texts)
        if differs and not overwrite:
            raise UserError(
                f"{server.address}: {field} holds vectors of {before.model} of {'+'.join(before.texts)}; "
                "name another --field, or replace them with --overwrite"
            )
        if differs or before.state == "replacing":
            vectors.state = "replacing"
    missing = {"bool": {"must_not": {"exists": {"field": field}}}}
    source = Documents(server.address, texts, None if vectors.state == "replacing" else missing)
    absent, present = source.missing()
    if absent:
        raise UserError(f"{server.address}: no field {', '.join(sorted(absent))} (there: {', '.join(present)})")
    _put_mapping(server, field, vectors)
    survey, done = source.survey(), 0
    try:
        for low, high in source.ranges(survey):
            hits = [hit for hit in source.read(low, high) if joined(hit["_source"], texts).strip()]
            if hits:
                places = [f"{server.address}, document {hit['_id']}" for hit in hits]
                contents = [joined(hit["_source"], texts) for hit in hits]
                _write(server, hits, field, embed(model, contents, "document", places.__getitem__))
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


def _write(server: Server, hits: Sequence[dict], field: str, vectors: np.ndarray) -> None:
    """Add vectors to documents. Documents that were deleted meanwhile (status 404) are skipped."""
    from elasticsearch import helpers

    actions = [
        {"_op_type": "update", "_index": hit["_index"], "_id": hit["_id"], "doc": {field: vector.tolist()}}
        for hit, vector in zip(hits, vectors, strict=True)
    ]
    _, errors = server.call(helpers.bulk, client=server.client, actions=actions, max_retries=5, raise_on_error=False)
    if rejected := [error["update"] for error in errors if error["update"].get("status") != 404]:
        reason = rejected[0].get("error", {})
        raise UserError(f"{server.address}: {len(rejected)} documents were rejected: {reason.get('reason', reason)}")


def _put_mapping(server: Server, field: str, vectors: VectorField) -> None:
    """Create the field if it is missing, and record the origin of its vectors."""
    index = next(iter(server.call(server.client.indices.get_mapping, index=server.address.index).values()))
    meta = index["mappings"].get("_meta", {})
    meta |= {META: meta.get(META, {}) | {field: asdict(vectors)}}
    # Full precision: newer servers would quantise to a byte or a bit a dimension by default.
    options = {"type": "hnsw", "m": 16, "ef_construction": 100}
    kind = {"type": "dense_vector", "dims": vectors.dimensions, "index": True, "similarity": vectors.similarity}
    kind |= {"index_options": options}
    server.call(server.client.indices.put_mapping, index=server.address.index, properties={field: kind}, meta=meta)


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
        vectors = fields[self.field]
        self.texts, self._similarity = vectors.texts, vectors.similarity
        self.info = IndexInfo(".", True, vectors.model, vectors.fingerprint, vectors.dimensions, 0, 0)
        self.info.complete = vectors.state == "complete"

    def rebuild_command(self, model: str) -> str:
        """Return the command that embeds the documents again with a model."""
        words = ["python", "embed.py", "--model", model, "--to", self.folder, "--field", self.field, "--overwrite"]
        return shell(*words)

    def _hits(self, score: Callable[[float], float], **body: Any) -> list[Hit]:
        body |= {"index": self.server.address.index, "source": self.texts, "allow_partial_search_results": False}
        answer = self.server.call(self.server.client.search, **body)
        return [
            Hit(hit["_id"], hit["_id"], 1, 1, "", "", "", joined(hit["_source"], self.texts), score(hit["_score"]))
            for hit in answer["hits"]["hits"]
        ]

    def bm25(self, query: str, top: int) -> list[Hit]:
        """Return the best documents by Elasticsearch's BM25 over the fields that were embedded."""
        match = {"multi_match": {"query": query, "fields": self.texts, "type": "most_fields"}}
        return self._hits(float, query=match, size=top)

    def semantic(self, vector: np.ndarray, top: int) -> list[Hit]:
        """Return the nearest documents by the model's similarity, cosine or dot product; approximate (HNSW)."""
        knn = {
            "field": self.field,
            "query_vector": np.asarray(vector, float).tolist(),
            "k": top,
            "num_candidates": min(10_000, max(100, CANDIDATES * top)),
        }
        return self._hits(self._similarity_of, knn=knn, size=top)

    def _similarity_of(self, score: float) -> float:
        """Return the similarity that Elasticsearch turned into a positive score."""
        if self._similarity == "cosine":
            return 2 * score - 1
        return score - 1 if score >= 1 else 1 - 1 / score

    def hybrid(self, query: str, vector: np.ndarray, top: int, weight: float = 0.5) -> list[Hit]:
        """Return the hits of both searches, fused by reciprocal ranks."""
        depth = max(top, DEPTH)
        return fuse_hits(self.bm25(query, depth), self.semantic(vector, depth), weight)[:top]
