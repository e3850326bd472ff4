"""The fields beside the vectors of an Elasticsearch index: their words, the query for these, and where both come from.

Beside `vector` stands `vector_words`: the terms of the texts that were embedded, as `analyzer` makes them for every
index. Elasticsearch only splits them at white space. Path, name and doc of a document (see fields.py) are further
fields, `vector_words_name` of a name. The server's BM25F adds up a term's occurrences in all of them, each times the
weight of its field, so that other weights need no other words. How rare a term is depends on the documents that have it
in one field, the one where they are most; LanceDB's index counts those that have it in any. The mapping's `_meta`
records, for every field of vectors, the model and the texts that all were made from.

read_meta(server)["vector"].words("vector", {"title": "readLine", "body": "It reads a line."})
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from mlx_retrieval.dataset.columns import joined
from mlx_retrieval.dataset.elastic.server import Server
from mlx_retrieval.retrieval.analyzer import analyzer
from mlx_retrieval.retrieval.fields import FIELDS, WEIGHTS
from mlx_retrieval.utils.errors import UserError

META = "mlx-retrieval"
WORDS = "{}_words"  # name of the field of words that belongs to a field of vectors
TEXT = "text"  # one of FIELDS: what was embedded
BESIDES = tuple(name for name in FIELDS if name != TEXT)


@dataclass
class VectorField:
    """The origin of the vectors in a field, and of the words beside them."""

    model: str
    fingerprint: str
    dimensions: int
    texts: list[str]  # fields that were embedded, joined by line breaks
    similarity: str  # Elasticsearch's name: cosine, or max_inner_product if vectors are not of unit length
    state: str = "complete"  # "growing" while vectors are missing, "replacing" while some may be of another model
    language: str = ""  # of the words' stems and stop words; "" = there are no words yet, from an earlier version
    weight: float | None = None  # of the meaning in a search by both, as learnt; None = the default
    analysis: int = 1  # version of analyzer.ANALYSIS that made the words
    word_fields: dict[str, list[str]] = field(default_factory=dict)  # one of BESIDES -> the document's fields
    weights: dict[str, int] = field(default_factory=WEIGHTS.copy)  # of FIELDS in a search by words
    planned: dict[str, Any] = field(default_factory=dict)  # language and word_fields of words that are being written

    @property
    def intended(self) -> "VectorField":
        """The same as it will be once all words are written, which an interrupted run did not come to."""
        return replace(self, **self.planned, planned={})

    @property
    def basis(self) -> tuple[Any, ...]:
        """What weights are learnt of: they suit no other vectors and words."""
        words = (self.language, self.analysis, self.word_fields)
        return self.fingerprint, self.texts, self.state == "replacing", *words

    @property
    def sources(self) -> list[str]:
        """The fields of a document that vectors and words are made of."""
        return list(dict.fromkeys([*self.texts, *(name for group in self.word_fields.values() for name in group)]))

    def contents(self, source: Mapping[str, Any]) -> dict[str, str]:
        """Return the text of every field of words of a document."""
        besides = {name: joined(source, self.word_fields[name]) for name in BESIDES if name in self.word_fields}
        return besides | {TEXT: joined(source, self.texts)}

    def words(self, name: str, source: Mapping[str, Any]) -> dict[str, str]:
        """Return field -> terms of a document, separated by spaces. `name`: of the field of vectors."""
        terms = analyzer(self.language)
        return {words_name(name, each): terms.stream(text) for each, text in self.contents(source).items()}

    def query(self, name: str, terms: Sequence[str]) -> dict[str, Any]:
        """Return Elasticsearch's query for any of these terms: BM25, or BM25F if several fields count."""
        weighted = {words_name(name, each): self.weights[each] for each in (*self.word_fields, TEXT)}
        weighted = {each: weight for each, weight in weighted.items() if weight}
        if len(weighted) == 1:
            return {"match": {next(iter(weighted)): {"query": " ".join(terms)}}}
        return {"combined_fields": {"query": " ".join(terms), "fields": [f"{n}^{w}" for n, w in weighted.items()]}}


def words_name(name: str, each: str = TEXT) -> str:
    """Return the field that holds the terms of one of FIELDS, beside the field `name` of vectors."""
    return WORDS.format(name) + ("" if each == TEXT else f"_{each}")


def read_meta(server: Server) -> dict[str, VectorField]:
    """Return field -> origin of the vectors in an index.

    Raises UserError if the address matches several indices, or if a later version wrote them.
    """
    answer = server.call(server.client.indices.get_mapping, index=server.address.index)
    if len(answer) > 1:
        raise UserError(f"{server.address}: several indices ({', '.join(sorted(answer))}); one must be named")
    (index,) = answer.values()
    meta, known = index["mappings"].get("_meta", {}).get(META, {}), {each.name for each in fields(VectorField)}
    if unknown := sorted({key for values in meta.values() for key in values} - known):
        reason = f"vectors of a later version of this toolkit, which records {', '.join(unknown)} of them"
        raise UserError(f"{server.address}: {reason}")
    return {name: VectorField(**values) for name, values in meta.items()}


def words_of(server: Server, texts: Sequence[str]) -> tuple[str, VectorField] | None:
    """Return the field of vectors that were made of these texts and have words beside them; None = there is none."""
    if len(server.call(server.client.indices.get_mapping, index=server.address.index)) > 1:
        return None
    return next((each for each in read_meta(server).items() if each[1].texts == list(texts) and each[1].language), None)


def put_mapping(server: Server, name: str, vectors: VectorField, besides: Iterable[str] = ()) -> None:
    """Create the fields of vectors and words if they are missing, and record their origin.

    `besides`: further fields of words to create, which do not count yet.
    """
    index = next(iter(server.call(server.client.indices.get_mapping, index=server.address.index).values()))
    meta = index["mappings"].get("_meta", {})
    meta |= {META: meta.get(META, {}) | {name: asdict(vectors)}}
    # Full precision: newer servers would quantise to a byte or a bit a dimension by default.
    options = {"type": "hnsw", "m": 16, "ef_construction": 100}
    kind = {"type": "dense_vector", "dims": vectors.dimensions, "index": True, "similarity": vectors.similarity}
    words = {"type": "text", "analyzer": "whitespace", "index_options": "freqs"}
    properties = {words_name(name, each): words for each in (TEXT, *vectors.word_fields, *besides)}
    properties[name] = kind | {"index_options": options}
    server.call(server.client.indices.put_mapping, index=server.address.index, properties=properties, meta=meta)
