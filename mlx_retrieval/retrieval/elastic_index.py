"""An index with vectors of ours: written by `embed.py --to es://index`, searched by `search.py --store es://index`.

The mapping's `_meta` says of every field of vectors which model made it, of which texts.

from elastic.index import ElasticIndex
for hit in ElasticIndex("es://index", "vector").bm25("read line", 10): print(hit.path, hit.score)
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_retrieval.dataset.elastic.documents import Documents
from mlx_retrieval.dataset.elastic.fields import joined
from mlx_retrieval.dataset.elastic.server import Server, parse
from mlx_retrieval.retrieval.base import About, Hit, fuse_hits
from mlx_retrieval.utils.errors import UserError

if TYPE_CHECKING:
    from mlx_retrieval.inference.embedder import Model

META = "mlx-retrieval"
DEPTH = 100  # hits of either side that hybrid search fuses
CANDIDATES = 10  # times as many as are asked for are looked at in each shard, and at least 100


@dataclass
class Vectors:
    """What a field of vectors was made of."""

    model: str
    fingerprint: str
    dimensions: int
    texts: list[str]  # fields, joined by line breaks
    similarity: str  # Elasticsearch's name of it: cosine, or max_inner_product where lengths are not 1
    state: str = "complete"  # growing while documents wait for theirs, replacing while some may be another model's


def read_meta(server: Server) -> dict[str, Vectors]:
    """By field, what is known of the vectors in an index."""
    answer = server.call(server.client.indices.get_mapping, index=server.address.index)
    if len(answer) > 1:
        raise UserError(f"{server.address}: several indices ({', '.join(sorted(answer))}); one must be named")
    (only,) = answer.values()
    known = only["mappings"].get("_meta", {}).get(META, {})
    return {name: Vectors(**said) for name, said in known.items()}


def write_vectors(
    model: "Model",
    to: str,
    field: str,
    texts: Sequence[str],
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Embed the documents of an index, and write their vectors back into the field.

    What has a vector of this model keeps it, so that an interrupted run goes on, and new documents get theirs.

    Args:
        model: of one vector a text.
        to: es://INDEX.
        texts: fields of a document that are embedded, joined by line breaks.
        overwrite: replace the vectors of another model.
        progress: called with (documents done, all).

    Returns how many were written, and how many had no text. UserError where the field belongs to another model.
    """
    from mlx_retrieval.inference.embedder import embed

    if model.late:
        raise UserError(f"{model.name}: --to takes models of one vector a text, not late interaction")
    server = Server(parse(to))
    similarity = "cosine" if model.config.normalize else "max_inner_product"
    mine = Vectors(model.name, model.fingerprint(), model.dimensions, list(texts), similarity, "growing")
    if before := read_meta(server).get(field):
        differs = (before.fingerprint, before.texts) != (mine.fingerprint, mine.texts)
        if differs and not overwrite:
            raise UserError(
                f"{server.address}: {field} holds vectors of {before.model} of {'+'.join(before.texts)}; "
                "name another --field, or replace them with --overwrite"
            )
        if differs or before.state == "replacing":
            mine.state = "replacing"
    missing = {"bool": {"must_not": {"exists": {"field": field}}}}
    source = Documents(server.address, texts, None if mine.state == "replacing" else missing)
    absent, there = source.missing()
    if absent:
        raise UserError(f"{server.address}: no field {', '.join(sorted(absent))} (there: {', '.join(there)})")
    _put_mapping(server, field, mine)
    survey, done = source.survey(), 0
    try:
        for low, high in source.ranges(survey):
            hits = [hit for hit in source.read(low, high) if joined(hit["_source"], texts).strip()]
            if hits:
                _write(server, hits, field, embed(model, [joined(hit["_source"], texts) for hit in hits], "document"))
            done += len(hits)
            if progress:
                progress(done, survey.count)
    finally:
        source.close()
    server.open()
    server.call(server.client.indices.refresh, index=server.address.index)
    mine.state = "complete"
    _put_mapping(server, field, mine)
    return done, survey.count - done


def _write(server: Server, hits: Sequence[dict], field: str, vectors: np.ndarray) -> None:
    """Add vectors to documents; those that were deleted meanwhile need none."""
    from elasticsearch import helpers

    actions = [
        {"_op_type": "update", "_index": hit["_index"], "_id": hit["_id"], "doc": {field: vector.tolist()}}
        for hit, vector in zip(hits, vectors, strict=True)
    ]
    _, errors = server.call(helpers.bulk, client=server.client, actions=actions, max_retries=5, raise_on_error=False)
    if refused := [error["update"] for error in errors if error["update"].get("status") != 404]:
        reason = refused[0].get("error", {})
        raise UserError(f"{server.address}: {len(refused)} documents were refused: {reason.get('reason', reason)}")


def _put_mapping(server: Server, field: str, mine: Vectors) -> None:
    """Make the field where there is none, and note what it holds."""
    whole = next(iter(server.call(server.client.indices.get_mapping, index=server.address.index).values()))
    meta = whole["mappings"].get("_meta", {})
    meta |= {META: meta.get(META, {}) | {field: asdict(mine)}}
    # Vectors as they are, not in a byte or a bit a dimension as newer servers would keep them.
    options = {"type": "hnsw", "m": 16, "ef_construction": 100}
    kind = {"type": "dense_vector", "dims": mine.dimensions, "index": True, "similarity": mine.similarity}
    kind |= {"index_options": options}
    server.call(server.client.indices.put_mapping, index=server.address.index, properties={field: kind}, meta=meta)


class ElasticIndex:
    """What `search.Searcher` asks of an index, answered by Elasticsearch.

    Args:
        store: es://INDEX.
        field: of the vectors; None = the only one that there is.
    """

    def __init__(self, store: str, field: str | None = None):
        address = parse(store)
        self.server, self.folder, self.root = Server(address), store, Path(".")
        known = read_meta(self.server)
        if not known or (field and field not in known):
            named = f" {field}" if field else ""
            raise UserError(f"{address}: no vectors{named}; python embed.py --model MODEL --to {store} --field vector")
        if field is None and len(known) > 1:
            raise UserError(f"{address}: vectors in {', '.join(known)}; --field names one")
        self.field = field or next(iter(known))
        said = known[self.field]
        self.texts, self._similarity = said.texts, said.similarity
        self.about = About(".", True, said.model, said.fingerprint, said.dimensions, 0, 0)
        self.about.complete = said.state == "complete"

    def again(self, model: str) -> str:
        """The command that embeds the documents anew with a model."""
        words = ["python", "embed.py", "--model", model, "--to", self.folder, "--field", self.field, "--overwrite"]
        return shlex.join(words)

    def _hits(self, score: Callable[[float], float], **body: Any) -> list[Hit]:
        body |= {"index": self.server.address.index, "source": self.texts, "allow_partial_search_results": False}
        answer = self.server.call(self.server.client.search, **body)
        return [
            Hit(hit["_id"], hit["_id"], 1, 1, "", "", "", joined(hit["_source"], self.texts), score(hit["_score"]))
            for hit in answer["hits"]["hits"]
        ]

    def bm25(self, query: str, top: int) -> list[Hit]:
        """The best documents by Elasticsearch's BM25 over the fields that were embedded."""
        match = {"multi_match": {"query": query, "fields": self.texts, "type": "most_fields"}}
        return self._hits(float, query=match, size=top)

    def semantic(self, vector: np.ndarray, top: int) -> list[Hit]:
        """The nearest documents by cosine, or dot product where the model compares by that; approximately (HNSW)."""
        knn = {
            "field": self.field,
            "query_vector": np.asarray(vector, float).tolist(),
            "k": top,
            "num_candidates": min(10_000, max(100, CANDIDATES * top)),
        }
        return self._hits(self._similarity_of, knn=knn, size=top)

    def _similarity_of(self, score: float) -> float:
        """What Elasticsearch made its positive score of."""
        if self._similarity == "cosine":
            return 2 * score - 1
        return score - 1 if score >= 1 else 1 - 1 / score

    def hybrid(self, query: str, vector: np.ndarray, top: int, weight: float = 0.5) -> list[Hit]:
        """Both, fused here by reciprocal ranks."""
        depth = max(top, DEPTH)
        return fuse_hits(self.bm25(query, depth), self.semantic(vector, depth), weight)[:top]
