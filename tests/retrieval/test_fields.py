"""The fields of a chunk and their weights: BM25F by hand, and the same from an index.

python -m pytest tests/retrieval/test_fields.py
"""

import math

import numpy as np
import pytest

from mlx_retrieval.dataset.chunks import Chunk
from mlx_retrieval.retrieval import fields
from mlx_retrieval.retrieval.analyzer import analyzer
from mlx_retrieval.retrieval.base import FileRecord, IndexInfo, Within
from mlx_retrieval.retrieval.bm25 import bm25_scorer
from mlx_retrieval.retrieval.bm25f import FieldedBm25
from mlx_retrieval.retrieval.fields import doc_of, fields_of, stream
from mlx_retrieval.retrieval.lance_index import Index

WEIGHTS = {"path": 2, "name": 4, "doc": 0, "text": 1}
CODE = {
    "io/reader.py": ("readLine", 'def readLine(file):\n    """Give a line."""\n    return file.next()  # of text'),
    "io/writer.py": ("write", "def write(file, line):\n    # appends\n    file.append(line)"),
    "web/server.py": ("serve", "def serve(port):\n    listen(port)"),
    "web/empty.py": ("", "()"),
}


def test_docs_are_docstrings_and_comments():
    text = CODE["io/reader.py"][1]
    assert doc_of(text, "python") == "Give a line."  # a comment behind code belongs to its line
    assert doc_of(CODE["io/writer.py"][1], "python") == "    # appends"
    assert doc_of("/** Adds.\n * Twice. */\nint f(); // no", "c") == "/** Adds.\n * Twice. */"
    assert doc_of("# A heading\n", "markdown") == doc_of(text, "text") == ""
    assert doc_of("def f():\n  r'''raw\n  text'''\n", "python") == "raw\n  text"


def test_terms_stand_as_often_as_the_weight_of_their_field():
    texts = fields_of("a/b.py", "readLine", "python", "class A:", 'def readLine(): """x"""')
    assert stream(texts, WEIGHTS | {"text": 0}, analyzer()) == "b py b py" + " readlin read line" * 4
    with_text = stream(texts, dict.fromkeys(fields.FIELDS, 0) | {"text": 1}, analyzer())
    assert with_text == "class def readlin read line x"
    for weights, message in (({}, "path, name, doc, text"), (WEIGHTS | {"doc": 9}, "from 0 to 8")):
        with pytest.raises(ValueError, match=message):
            fields.check_weights(weights)
    with pytest.raises(ValueError, match="no word would count"):
        fields.check_weights(dict.fromkeys(fields.FIELDS, 0))


def bm25f(query: str, documents: list[dict[str, list[str]]], weights: dict[str, int]) -> list[float]:
    """The formula, a document at a time."""

    def tf(document: dict[str, list[str]], term: str) -> int:
        return sum(weights[field] * words.count(term) for field, words in document.items())

    lengths = [sum(weights[field] * len(words) for field, words in document.items()) for document in documents]
    mean, scores = sum(lengths) / len(lengths), []
    for document, length in zip(documents, lengths, strict=True):
        total = 0.0
        for term in analyzer().query_terms(query):
            n = sum(tf(other, term) > 0 for other in documents)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            total += idf * 2.2 * tf(document, term) / (tf(document, term) + 1.2 * (0.25 + 0.75 * length / mean))
        scores.append(total)
    return scores


@pytest.fixture
def index(tmp_path) -> Index:
    info = IndexInfo("/", False, "", "", 2, 2_000, 200, fields=WEIGHTS)
    index = Index.create(tmp_path / "index", info)
    files = [
        (FileRecord(path, 1, 1, "", 1, ""), [Chunk(1, 3, "python", "function", name, "", text)])
        for path, (name, text) in CODE.items()
    ]
    index.add(files, np.eye(2, dtype=np.float32)[[0, 1, 0, 1]], set())
    index.finish()
    return index


@pytest.mark.parametrize("query", ["readLine", "write a line to a file", "io port", "reader server", "listen twice"])
def test_an_index_scores_by_bm25f(index, query):
    texts = [fields_of(path, name, "python", "", text) for path, (name, text) in CODE.items()]
    documents = [{field: analyzer().terms(text) for field, text in each.items()} for each in texts]
    expected = bm25f(query, documents, WEIGHTS)
    in_memory = FieldedBm25(texts, [query], analyzer())
    assert in_memory.scorer(WEIGHTS).scores(query) == pytest.approx(expected, rel=1e-9)
    found = {hit.path: hit.score for hit in index.bm25(query, 10)}
    assert found == pytest.approx({p: s for p, s in zip(CODE, expected, strict=True) if s}, rel=1e-4)
    # The same scores if only some chunks are looked at: the others still count in the statistics.
    some = index.bm25(query, 10, Within(ids=("io/reader.py#0", "web/server.py#0")))
    assert {hit.path: hit.score for hit in some} == pytest.approx(
        {path: score for path, score in found.items() if path in ("io/reader.py", "web/server.py")}, rel=1e-6
    )


def test_weights_decide_the_order(index):
    texts = [fields_of(path, name, "python", "", text) for path, (name, text) in CODE.items()]
    in_memory = FieldedBm25(texts, ["line"], analyzer())
    by_name = in_memory.scorer(dict.fromkeys(fields.FIELDS, 0) | {"name": 1}).scores("line")
    assert np.flatnonzero(by_name).tolist() == [0]  # readLine
    assert in_memory.empty_fields == set()
    assert FieldedBm25([texts[3]], ["line"], analyzer()).empty_fields == {"name", "doc", "text"}


def test_one_text_a_document_is_plain_bm25():
    """As evaluation and mining rank, to a digit of bm25s' float32."""
    texts = [text for _, text in CODE.values()]
    fielded = FieldedBm25([fields_of("", "", "text", "", text) for text in texts], ["return a line"], analyzer())
    scores = fielded.scorer(fields.WEIGHTS).scores("return a line")
    ours = bm25_scorer(texts)("return a line")
    assert ours[ours > 0] * (scores[ours > 0] / ours[ours > 0])[0] == pytest.approx(scores[ours > 0], rel=1e-5)
    assert ((ours > 0) == (scores > 0)).all()
