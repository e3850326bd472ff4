"""What a search asks of Elasticsearch, against a stub; tests/dataset/test_elastic.py asks a real server.

python -m pytest tests/retrieval/test_elastic_index.py
"""

import json
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

import search
from mlx_retrieval.evaluation import index_tuning
from mlx_retrieval.inference.serving.engine import LIMITS
from mlx_retrieval.mining.elastic_corpus import ElasticCorpus
from mlx_retrieval.retrieval import elastic_index, lance_tables
from mlx_retrieval.retrieval.analyzer import ANALYSIS, is_cut_otherwise
from mlx_retrieval.retrieval.base import IndexInfo, Within
from mlx_retrieval.retrieval.elastic_fields import META, VectorField
from mlx_retrieval.retrieval.elastic_index import ElasticIndex
from mlx_retrieval.retrieval.fields import FIELDS, fields_of
from mlx_retrieval.retrieval.search_app import SearchService, ServedSearcher
from mlx_retrieval.retrieval.search_mcp import create_server
from mlx_retrieval.retrieval.searcher import Searcher
from mlx_retrieval.utils.errors import UserError

FIELD = VectorField("model", "fingerprint", 2, ["title", "body"], "cosine", language="english", weight=0.7)
BESIDES = {"name": ["title"], "path": ["file", "folder"]}
SOURCE = {"title": "a title", "body": "a body"}
MODEL = SimpleNamespace(late=False, name="model", fingerprint=lambda: "fingerprint", dimensions=2)
MODEL.config, MODEL.is_of = SimpleNamespace(normalize=True), lambda fingerprint: fingerprint == "fingerprint"


class Stub:
    """A server with an index `docs`; it notes the bodies of searches and of changes of the mapping."""

    def __init__(self, fields: dict[str, VectorField]):
        self.asked: list[dict] = []
        self.mapping = {"docs": {"mappings": {"_meta": {META: {name: asdict(each) for name, each in fields.items()}}}}}
        self.address = SimpleNamespace(index="docs")
        indices = SimpleNamespace(get_mapping=lambda **_: deepcopy(self.mapping), put_mapping=self._put)
        indices.refresh = lambda **_: None
        self.client = SimpleNamespace(indices=indices, search=self._search, count=self._count)

    @property
    def record(self) -> dict:
        """What is recorded of the field `vector`."""
        return self.mapping["docs"]["mappings"]["_meta"][META]["vector"]

    def open(self):
        pass

    def _put(self, **body):
        self._note(**body)
        self.mapping["docs"]["mappings"] = {"_meta": deepcopy(body["meta"])}

    def _note(self, **body):
        self.asked.append(deepcopy(body))

    def _search(self, **body):
        self._note(**body)
        return {"hits": {"hits": [{"_index": "docs", "_id": "7", "_source": SOURCE, "_score": 0.75}]}}

    def _count(self, **body):
        self._note(**body)
        return {"count": 3}

    def call(self, method, **body):
        return method(**body)


@pytest.fixture
def stub(monkeypatch) -> Stub:
    stub = Stub({"vector": FIELD})
    monkeypatch.setattr(elastic_index, "Server", lambda address: stub)
    return stub


def test_words_are_terms_that_the_server_only_splits(stub):
    index = ElasticIndex("es://docs")
    (hit,) = index.bm25("Where are readLine's caches?", 5)
    assert (hit.path, hit.text, hit.score) == ("7", "a title\na body", 0.75)
    match = {"match": {"vector_words": {"query": "readlin read line cach"}}}
    assert stub.asked[-1]["query"] == {"bool": {"must": [match], "filter": []}} and stub.asked[-1]["size"] == 5
    assert index.bm25("what is this", 5) == [] and len(stub.asked) == 1
    index.bm25("caches", 2, Within(ids=("7", "8")))
    assert stub.asked[-1]["query"]["bool"]["filter"] == [{"ids": {"values": ["7", "8"]}}]
    assert (index.info.language, index.info.weight) == ("english", 0.7)


def test_words_with_marks_of_an_earlier_version_are_written_again(stub, monkeypatch):
    """Only those, and nothing is embedded; until then a search for such words says so."""
    index = ElasticIndex("es://docs")
    assert len(index.bm25("caches", 5)) == 1
    with pytest.raises(
        UserError, match=r"this script otherwise. .* without embedding: python .*embed.py --model model"
    ):
        index.bm25("पुस्तक", 5)
    rows = [{"_id": "1", "_source": {"title": "a book"}}, {"_id": "2", "_source": {"title": "पुस्तक"}}]
    source = SimpleNamespace(survey=lambda: None, ranges=lambda _: [(0, 2)], read=lambda *_: rows, close=lambda: None)
    monkeypatch.setattr(elastic_index, "Documents", lambda *_: source)
    written = []
    monkeypatch.setattr(elastic_index, "_write", lambda server, hits, values: written.append((hits, values)))
    elastic_index._write_words(stub, "vector", FIELD, False, is_cut_otherwise)
    assert written == [(rows[1:], {"vector_words": ["पुस्तक"]})]
    stub.mapping["docs"]["mappings"]["_meta"][META]["vector"]["analysis"] = ANALYSIS
    assert len(ElasticIndex("es://docs").bm25("पुस्तक", 5)) == 1


def test_documents_that_are_named_are_compared_one_by_one(stub):
    """The filter names as many documents as are wanted, so the server compares all of them."""
    index = ElasticIndex("es://docs")
    (hit,) = index.semantic(np.array([0.6, 0.8]), 2, Within(ids=("7", "8")))
    knn = stub.asked[-1]["knn"]
    assert hit.score == 0.5 and knn["k"] == 2 and knn["filter"] == [{"ids": {"values": ["7", "8"]}}]
    index.semantic(np.array([0.6, 0.8]), 2)
    assert "filter" not in stub.asked[-1]["knn"]
    by_words, by_meaning = (lambda w: index.bm25("cache", 1, w)), (lambda w: index.semantic(np.zeros(2), 1, w))
    for find in (by_words, by_meaning, lambda w: index.unmatched(w.paths, [])):
        with pytest.raises(UserError, match="--language and --path: for an --index of files"):
            find(Within(paths=("src",)))
    with pytest.raises(UserError, match="--language and --path"):
        index.languages()


def test_an_index_without_words_says_how_to_add_them(stub):
    values = asdict(FIELD)
    del values["language"], values["weight"]  # as the version before wrote it
    stub.mapping["docs"]["mappings"]["_meta"][META]["vector"] = values
    index = ElasticIndex("es://docs")
    assert index.semantic(np.array([0.6, 0.8]), 1) and index.info.weight is None
    command = "embed.py --model model --to es://docs --field vector --es-fields document=title+body"
    with pytest.raises(UserError, match=f"without embedding again: .*{command.replace('+', '.')}$"):
        index.bm25("cache", 1)


def test_documents_are_opened_by_their_ids_and_counted(stub):
    index = ElasticIndex("es://docs")
    assert index.chunks_of("7") == [index.chunk("7")] and index.chunk("7").text == "a title\na body"
    assert stub.asked[-1]["query"] == {"ids": {"values": ["7"]}} and index.chunk("7").score == 0
    assert index.lines_of(["7"]) == {"7": [range(1, 2)]}
    assert index.count(Within(ids=("7",))) == 3
    assert stub.asked[-1]["query"] == {"bool": {"filter": [{"ids": {"values": ["7"]}}]}}
    assert index.refreshed() is index


@pytest.mark.parametrize(
    "change", [{"fingerprint": "another", "model": "another"}, {"language": "german"}, {"weight": 0.1}]
)
def test_a_process_that_goes_on_follows_the_store(stub, change):
    """Regression: vectors of another model met those of the old one, and words the stems of another language."""
    searcher = Searcher("es://docs", field="vector")
    searcher.__dict__["model"] = "the old one"
    assert not searcher.refresh()
    stub.mapping["docs"]["mappings"]["_meta"][META]["vector"] |= change
    assert searcher.refresh() and not searcher.refresh()
    info = vars(searcher.index.info)
    assert {name: info[name] for name in change} == change
    assert ("model" in vars(searcher)) == ("fingerprint" not in change)
    del stub.mapping["docs"]["mappings"]["_meta"][META]["vector"]
    with pytest.raises(UserError, match=r"no vectors vector; python .*embed\.py"):
        searcher.refresh()


def test_what_searches_a_store_names_it_and_the_command_that_fills_it(stub, capsys):
    """Regression: "Search the source code and texts of .", and search.py index was to continue embed.py's work."""
    stub.mapping["docs"]["mappings"]["_meta"][META]["vector"]["state"] = "growing"
    reason = "indexing was not finished, so some documents are missing (embed.py --to continues)"
    assert search.main(["search", "caches", "--store", "es://docs", "--bm25", "--json"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["root"] == "es://docs" and error == f"search.py: {reason}\n"
    searcher = ServedSearcher("es://docs")
    about = SearchService(searcher, LIMITS).about()
    assert (about["root"], about["unfinished"], about["is_complete"]) == ("es://docs", reason, False)
    assert create_server(searcher).instructions == "Search the documents of es://docs by meaning and by words."


def test_a_weight_is_not_kept_beside_other_vectors(stub):
    """Regression: after minutes of tuning, the record of what another process had written meanwhile was undone."""
    index = ElasticIndex("es://docs")
    stub.mapping["docs"]["mappings"]["_meta"][META]["vector"]["fingerprint"] = "another"
    with pytest.raises(UserError, match="vector was written meanwhile; run the same command again$"):
        index.keep_weight(0.25)
    assert stub.asked == [] and stub.mapping["docs"]["mappings"]["_meta"][META]["vector"]["weight"] == 0.7


def test_a_weight_is_kept_beside_the_vectors(stub):
    index = ElasticIndex("es://docs")
    index.keep_weight(0.25)
    body = stub.asked[-1]
    assert body["meta"][META]["vector"] == asdict(FIELD) | {"weight": 0.25} and index.info.weight == 0.25
    assert body["properties"]["vector_words"] == {"type": "text", "analyzer": "whitespace", "index_options": "freqs"}


@pytest.mark.parametrize(("texts", "by_terms"), [(["title", "body"], True), (["title"], False)])
def test_mining_ranks_by_the_same_words(stub, texts, by_terms):
    """If they were made of the same fields; otherwise the server's own analysis counts."""
    corpus = ElasticCorpus.__new__(ElasticCorpus)
    corpus.address, corpus.texts, corpus._numbers = stub.address, texts, {"docs/7": 0}
    corpus.documents = SimpleNamespace(server=stub)
    scores = corpus.words([1], 2, 10)("the caches")
    assert scores.tolist() == [0.0, 0.75]
    query = stub.asked[-1]["query"]
    assert query == {"match": {"vector_words": {"query": "cach"}}} if by_terms else "multi_match" in query


def test_fields_are_added_up_by_their_weights(stub):
    """BM25F of the server; a field of weight 0 does not count, and one field alone needs no sum."""
    stub.mapping["docs"]["mappings"]["_meta"][META]["vector"] |= {"word_fields": BESIDES}
    index = ElasticIndex("es://docs")
    assert index.word_fields == ["name", "path"] and set(index.info.fields.values()) == {1}

    def asked(**weights: int) -> dict:
        index.weighted(dict.fromkeys(FIELDS, 0) | weights).bm25("the readLine", 5)
        return stub.asked[-1]["query"]["bool"]["must"][0]

    terms, words = "readlin read line", "vector_words"
    expected = {"query": terms, "fields": [f"{words}_name^4", f"{words}_path^2", f"{words}^1"]}
    assert asked(text=1, name=4, path=2, doc=8) == {"combined_fields": expected}
    assert asked(text=1, path=1) == {"combined_fields": expected | {"fields": [f"{words}_path^1", f"{words}^1"]}}
    assert asked(name=3, doc=1) == {"match": {f"{words}_name": {"query": terms}}}
    assert index.vectors.weights == index.info.fields == dict.fromkeys(FIELDS, 1)  # those were not kept
    index.keep_weight(0.4, dict.fromkeys(FIELDS, 2))
    kept = stub.asked[-1]
    assert kept["meta"][META]["vector"]["weights"] == index.info.fields == dict.fromkeys(FIELDS, 2)
    assert kept["properties"].keys() == {"vector", words, f"{words}_name", f"{words}_path"}
    assert index_tuning.forget(index)[0] == (0.4, (2, 2, 2, 2)) and index.info.weight is None
    record = stub.asked[-1]["meta"][META]["vector"]
    assert record["weight"] is None and record["weights"] == dict.fromkeys(FIELDS, 1)


@pytest.mark.parametrize("language", ["english", "german", "none"])
def test_a_document_has_the_words_of_a_chunk_in_lancedb(language):
    """The terms of each field, as often as its weight says, are those that LanceDB's index holds."""
    text = 'def readLine(files):\n    """Return the next lines, été."""\n    return x86(files)  # of HTTPServer2'
    chunk = {
        "path": "src/read_lines.py",
        "name": "readLine",
        "language": "python",
        "context": "import io",
        "text": text,
    }
    texts = fields_of(*(chunk[name] for name in ("path", "name", "language", "context", "text")))
    source = {f"my_{name}": texts[name] for name in FIELDS}
    besides = {name: [f"my_{name}"] for name in FIELDS if name != "text"}
    vectors = VectorField("m", "f", 2, ["my_text"], "cosine", language=language, word_fields=besides)
    words = vectors.words("vector", source)
    names = ("vector_words_path", "vector_words_name", "vector_words_doc", "vector_words")
    for weights in ((1, 1, 1, 1), (0, 4, 2, 1)):
        info = IndexInfo("/", False, "", "", 2, 9, 9, language=language, fields=dict(zip(FIELDS, weights, strict=True)))
        stored = [words[name] for name, weight in zip(names, weights, strict=True) for _ in range(weight)]
        assert lance_tables.word_stream(chunk, info) == " ".join(stored)


def test_words_of_further_fields_are_written_without_embedding(stub, monkeypatch):
    """What counts meanwhile are the fields that stay; the server knows the new ones before they are written."""
    stub.mapping["docs"]["mappings"]["_meta"][META]["vector"] |= {
        "analysis": ANALYSIS,
        "word_fields": {"doc": ["comment"], "path": ["uri"]},
        "weights": dict.fromkeys(FIELDS, 2),
    }
    rows = [{"_id": "1", "_source": {"title": "readLine", "file": "a.py", "folder": "src", "comment": "caches"}}]

    def source(address, wanted, query=None):
        found = rows if query and {"exists": {"field": "vector"}} in query["bool"].get("filter", []) else []
        read = {"ranges": lambda _: [(0, 1)] if found else [], "read": lambda *_: found, "close": lambda: None}
        survey = SimpleNamespace(count=len(found))
        assert {*wanted} == {"title", "body", "file", "folder", "comment"}
        return SimpleNamespace(missing=lambda: (set(), []), survey=lambda: survey, **read)

    monkeypatch.setattr(elastic_index, "Documents", source)
    monkeypatch.setattr(elastic_index, "_write", lambda server, hits, values: stub.asked.append(values))
    besides = BESIDES | {"doc": ["comment"]}
    assert elastic_index.write_vectors(MODEL, "es://docs", "vector", FIELD.texts, word_fields=besides) == (0, 0)
    before, words, _, after = stub.asked
    assert before["meta"][META]["vector"]["word_fields"] == {"doc": ["comment"]}
    fields = {"vector_words", "vector_words_name", "vector_words_path", "vector_words_doc"}
    assert words.keys() == fields and before["properties"].keys() == fields | {"vector"}
    assert words["vector_words_path"] == ["py src"] and words["vector_words_doc"] == ["cach"]
    kept = after["meta"][META]["vector"]
    assert kept["word_fields"] == besides and (kept["state"], kept["language"]) == ("complete", "english")
    assert kept["weight"] == 0.7 and kept["weights"] == dict.fromkeys(FIELDS, 2)
    # The same again, and without naming the fields: nothing is written but the origin.
    for again in (besides, None):
        stub.mapping["docs"]["mappings"] = {"_meta": after["meta"]}
        stub.asked.clear()
        monkeypatch.setattr(elastic_index, "_write_words", lambda *args: stub.asked.append(args[-1]))
        elastic_index.write_vectors(MODEL, "es://docs", "vector", FIELD.texts, word_fields=again)
        assert stub.asked[1] is True and stub.asked[-1]["meta"] == after["meta"]


@pytest.fixture
def documents(stub, monkeypatch) -> dict:
    """Nothing to embed. `survey` is called instead of embedding, `words` of writing words, `missing` with a query."""
    called = {"survey": lambda: None, "words": lambda *_: None, "missing": lambda query: set()}

    def source(address, wanted, query=None):
        def survey():
            called["survey"]()
            return SimpleNamespace(count=0)

        read = {"ranges": lambda _: [], "close": lambda: None}
        return SimpleNamespace(missing=lambda: (called["missing"](query), []), survey=survey, **read)

    monkeypatch.setattr(elastic_index, "Documents", source)
    monkeypatch.setattr(elastic_index, "_write_words", lambda *args: called["words"](*args))
    stub.record["analysis"] = ANALYSIS
    return called


def test_embedding_and_tuning_leave_the_record_of_each_other(stub, documents):
    """Regression: embed.py put back the weights of its start, and new documents made tune.py's work void."""
    index, weights = ElasticIndex("es://docs"), dict.fromkeys(FIELDS, 2)

    def tuned():
        assert stub.record["state"] == "growing"
        index.keep_weight(0.25, weights)
        assert stub.record["state"] == "growing"

    documents["survey"] = tuned
    elastic_index.write_vectors(MODEL, "es://docs", "vector", FIELD.texts)
    expected = asdict(FIELD) | {"weight": 0.25, "weights": weights, "analysis": ANALYSIS}
    assert stub.record == expected and index.refreshed() is index
    another = SimpleNamespace(**vars(MODEL) | {"fingerprint": lambda: "another", "is_of": lambda _: False})
    documents["survey"] = lambda: None
    elastic_index.write_vectors(another, "es://docs", "vector", FIELD.texts, overwrite=True)
    assert stub.record == expected | {"fingerprint": "another", "weight": None}  # it was learnt of other vectors


@pytest.mark.parametrize("change", [{"language": "german"}, {"word_fields": BESIDES}, {"state": "replacing"}])
def test_weights_are_not_kept_beside_other_words(stub, change):
    index = ElasticIndex("es://docs")
    stub.record.update(change)
    with pytest.raises(UserError, match="vector was written meanwhile; run the same command again$"):
        index.keep_weight(0.25)
    assert stub.asked == []


def test_a_field_is_looked_for_in_documents_with_vectors_too(stub, documents):
    """Regression: with finished vectors, a field that the mapping lacks was refused, because no document was left."""
    documents["missing"] = lambda query: {"comment"} if query else set()
    elastic_index.write_vectors(MODEL, "es://docs", "vector", FIELD.texts, word_fields={"doc": ["comment"]})
    assert stub.record["word_fields"] == {"doc": ["comment"]}


def test_a_run_that_goes_on_writes_the_words_that_were_asked_for(stub, documents):
    """Regression: after a kill, the same command without --language and --word-fields wrote words as before."""

    def killed(*_):
        raise KeyboardInterrupt

    documents["words"] = killed
    settings = {"language": "german", "word_fields": BESIDES}
    with pytest.raises(KeyboardInterrupt):
        elastic_index.write_vectors(MODEL, "es://docs", "vector", FIELD.texts, **settings)
    assert (stub.record["language"], stub.record["word_fields"]) == ("", {})  # what counts until then
    with pytest.raises(KeyboardInterrupt):
        elastic_index.write_vectors(MODEL, "es://docs", "vector", FIELD.texts)
    written = []
    documents["words"] = lambda *args: written.append(args[2:])
    elastic_index.write_vectors(MODEL, "es://docs", "vector", FIELD.texts, word_fields={})  # a flag comes first
    ((vectors, has_words),) = written
    assert (vectors.language, vectors.word_fields, has_words) == ("german", {}, False)
    assert stub.record == asdict(FIELD) | {"language": "german", "analysis": ANALYSIS}
    for flags in ({"word_fields": BESIDES}, {}):
        documents["words"] = killed if flags else lambda *_: None
        with pytest.raises(KeyboardInterrupt) if flags else nullcontext():
            elastic_index.write_vectors(MODEL, "es://docs", "vector", FIELD.texts, **flags)
    assert stub.record == asdict(FIELD) | {"language": "german", "analysis": ANALYSIS, "word_fields": BESIDES}


def test_vectors_of_a_later_version_are_one_line(stub):
    """Regression: a record with a key that this version does not know was a traceback."""
    stub.mapping["docs"]["mappings"]["_meta"][META]["vector"]["shape"] = "round"
    with pytest.raises(UserError, match=r"vectors of a later version of this toolkit, which records shape of them$"):
        ElasticIndex("es://docs")
