"""An Elasticsearch index as a source of rows, against a real server if one is installed.

python tools/elasticsearch_server.py fetch              once; without it these tests are skipped, and say so
python -m pytest -m slow tests/dataset/test_elastic.py
ES_TEST_VERSION=9.2.1 python -m pytest -m slow tests/dataset/test_elastic.py        another version
"""

import json
import math
import os
import sys
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

import embed
import mine
import search
import train
from mlx_retrieval.dataset import columns, sources
from mlx_retrieval.dataset.elastic import server
from mlx_retrieval.dataset.elastic.documents import RANGE
from mlx_retrieval.dataset.elastic.rows import BLOCK, ElasticRows
from mlx_retrieval.inference import embedder
from mlx_retrieval.retrieval import elastic_fields, elastic_index, fusion, indexer, lance_index, rewriting
from mlx_retrieval.retrieval import searcher as retrieval_searcher
from mlx_retrieval.retrieval.analyzer import analyzer
from mlx_retrieval.retrieval.base import Within
from mlx_retrieval.retrieval.fields import FIELDS, fields_of
from mlx_retrieval.retrieval.fusion import fuse_scores, hybrid
from mlx_retrieval.utils import errors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tools"))
import elasticsearch_server

pytestmark = pytest.mark.slow  # the server takes half a minute to start; test_elastic_calls.py is quick
ROOT = Path(__file__).resolve().parent.parent.parent
MEDQUAD = ROOT.parent / "shared" / "data" / "medquad" / "train.jsonl"
MAPPING = columns.parse("query=query,document=title+snippet,rank=rank")


def made_rows():
    """Rows of the real data if it is there, else as many synthetic ones."""
    if MEDQUAD.is_file():
        rows = (json.loads(line) for line in MEDQUAD.open(encoding="utf-8"))
        return [{"query": row["query"], "title": f"row {i}", "snippet": row["document"]} for i, row in enumerate(rows)]
    return [{"query": f"query {i}", "title": f"row {i}", "snippet": f"snippet {i} " * 20} for i in range(14_678)]


@pytest.fixture(scope="module")
def running():
    try:
        with elasticsearch_server.running(elasticsearch_server.new_folder(), security=True) as started:
            yield started
    except RuntimeError as error:
        pytest.skip(f"no real Elasticsearch: {error}")


@pytest.fixture
def login(running, monkeypatch):
    monkeypatch.setenv("ES_NODE", running.url)
    monkeypatch.setenv("ES_USER", elasticsearch_server.USER)
    monkeypatch.setenv("ES_PASSWORD", elasticsearch_server.PASSWORD)
    return running


def fill(running, index, rows, shards=1):
    types = {"query": "text", "title": "text", "snippet": "text", "rank": "integer"}
    body = {
        "settings": {"number_of_shards": shards, "number_of_replicas": 0},
        "mappings": {"properties": {name: {"type": kind} for name, kind in types.items()}},
    }
    running.ask("PUT", f"/{index}", body)
    client = server.Server(server.Address(running.url, index)).client
    from elasticsearch import helpers

    helpers.bulk(client, ({"_index": index, "_id": str(i), **row} for i, row in enumerate(rows)), refresh=True)


@pytest.fixture(scope="module")
def medquad(running):
    """14,678 rows in two shards."""
    os.environ.update(ES_USER=elasticsearch_server.USER, ES_PASSWORD=elasticsearch_server.PASSWORD)
    rows = made_rows()
    fill(running, "medquad", rows, shards=2)
    del os.environ["ES_USER"], os.environ["ES_PASSWORD"]
    return rows


@pytest.fixture
def small(login, request):
    """300 rows in an index of the test's own."""
    index = request.node.name.lower().translate(str.maketrans("[]", "__"))
    fill(
        login, index, [{"query": f"q{i}", "title": f"t{i}", "snippet": f"s{i}", "rank": 1 + i % 3} for i in range(300)]
    )
    return index


def rows_of(index, mapping=MAPPING, **options):
    return ElasticRows(server.parse(f"es://{index}"), mapping, **options)


def ids(rows, count, seed=0, position=0):
    """Ids of documents, in their order in the sequence."""
    return [rows.where(n).rpartition(" ")[2] for n in islice(rows.numbers(seed, position), count)]


def test_an_epoch_has_every_document_once_in_an_order_of_its_own(login, medquad):
    count = len(medquad)
    rows = rows_of("medquad")
    drawn = ids(rows, 2 * count)
    first, second = drawn[:count], drawn[count:]
    assert len(rows) == count and sorted(first, key=int) == sorted(second, key=int) == list(map(str, range(count)))
    assert first != second and first[: 2 * RANGE] != sorted(first[: 2 * RANGE], key=int)
    # Mixed well beyond a range: documents that were written one after the other are far apart.
    assert len({int(i) // RANGE for i in first[:RANGE]}) >= min(BLOCK, count // RANGE // 2) - 1
    assert ids(rows_of("medquad"), 500) == first[:500] != ids(rows_of("medquad"), 500, seed=1)


def test_a_row_is_what_its_document_says(login, medquad):
    rows = rows_of("medquad")
    for n in islice(rows.numbers(0, 0), 5):
        source = medquad[int(rows.where(n).rpartition(" ")[2])]
        assert rows[n].query == source["query"]
        assert rows[n].positive == f"{source['title']}\n{source['snippet']}" and rows[n].rank == 1


@pytest.mark.parametrize("position", [5_000, 14_677])
def test_a_cursor_continues_exactly(login, medquad, position):
    rows = rows_of("medquad")
    drawn = ids(rows, position + 700)
    cursor = json.loads(json.dumps(rows.cursor(position)))
    again = rows_of("medquad")
    again.restore(cursor, position)
    assert ids(again, 700, position=position) == drawn[position:]


def test_two_parts_share_an_index(login, medquad):
    parts = [rows_of("medquad", part=(r, 2)) for r in range(2)]
    halves = []
    for part in parts:
        drawn = []
        for n in part.numbers(0, 0):
            if part.cursor(n)["epoch"]:
                break
            drawn.append(part.where(n).rpartition(" ")[2])
        halves.append(set(drawn))
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == len(medquad)
    assert min(map(len, halves)) > 0.4 * len(medquad)


def test_a_server_that_is_killed_loses_and_doubles_nothing(login, medquad, capfd):
    rows, drawn, killed = rows_of("medquad"), [], False
    for n in islice(rows.numbers(7, 0), len(medquad)):
        drawn.append(rows.where(n).rpartition(" ")[2])
        if len(drawn) == 100:  # the second block is being read
            login.kill()
            killed = True
            threading.Thread(target=lambda: (time.sleep(3), login.start())).start()
    assert killed and max(Counter(drawn).values()) == 1 and len(drawn) == len(medquad)
    assert "trying again" in capfd.readouterr().err


def test_a_view_that_is_closed_behind_our_back_is_opened_again(login, medquad):
    rows = rows_of("medquad")
    drawn = []
    for n in islice(rows.numbers(3, 0), len(medquad)):
        drawn.append(rows.where(n).rpartition(" ")[2])
        if len(drawn) == 100:
            login.ask("DELETE", "/_pit", {"id": rows.documents.view._id})
    assert max(Counter(drawn).values()) == 1 and len(drawn) == len(medquad)


def test_documents_that_come_later_wait_for_the_next_epoch(login, small):
    rows = rows_of(small)
    drawn = ids(rows, 10)
    cursor = rows.cursor(10)
    login.ask("PUT", f"/{small}/_doc/new?refresh=true", {"query": "q", "title": "t", "snippet": "s"})
    again = rows_of(small)
    again.restore(cursor, 10)
    rest = ids(again, 290 + 301, position=10)
    assert "new" not in rest[:290] and len({*drawn, *rest[:290]}) == 300
    assert "new" in rest[290:] and len(set(rest[290:])) == 301


def test_what_is_written_while_an_epoch_is_used_is_in_the_next_one(login, small):
    """Regression: 301 documents are one block, and five written and one edited at example 50 missed two epochs."""
    rows = rows_of(small)
    numbers = rows.numbers(0, 0)
    drawn = [rows.where(next(numbers)).rpartition(" ")[2] for _ in range(50)]
    time.sleep(1)  # whatever is read ahead has been read
    late = [f"late{i}" for i in range(5)]
    for name in late:
        login.ask("PUT", f"/{small}/_doc/{name}?refresh=true", {"query": "q", "title": "t", "snippet": "s"})
    edited = next(name for name in map(str, range(300)) if name not in drawn)
    login.ask("PUT", f"/{small}/_doc/{edited}?refresh=true", {"query": "edited", "title": "t", "snippet": "s"})
    drawn += [rows.where(next(numbers)).rpartition(" ")[2] for _ in range(250)]
    assert sorted(drawn) == sorted(map(str, range(300)))
    for _ in range(2):
        epoch = list(islice(numbers, 305))
        names = [rows.where(n).rpartition(" ")[2] for n in epoch]
        assert sorted(names) == sorted([*map(str, range(300)), *late])
        assert [rows[n].query for n in epoch if rows.where(n).endswith(f" {edited}")] == ["edited"]


def test_changed_documents_are_told_and_begin_a_new_epoch(login, small, capfd):
    rows = rows_of(small)
    ids(rows, 10)
    cursor = rows.cursor(10)
    login.ask("DELETE", f"/{small}/_doc/5?refresh=true")
    again = rows_of(small)
    again.restore(cursor, 10)
    assert "changed or deleted" in capfd.readouterr().err
    drawn = ids(again, 299, position=10)
    assert len(set(drawn)) == 299 and "5" not in drawn


def test_a_query_chooses_documents(login, small):
    rows = rows_of(small, query={"term": {"rank": 2}})
    assert len(rows) == 100 and {int(i) % 3 for i in ids(rows, 100)} == {1}


def test_documents_that_make_no_row(login, small, capfd):
    login.ask("PUT", f"/{small}/_doc/empty?refresh=true", {"query": "", "title": "t", "snippet": "s"})
    with pytest.raises(errors.UserError, match=r"document empty: query is empty \(--skip-bad-rows"):
        ids(rows_of(small), 301)
    rows = rows_of(small, skip_bad=True)
    drawn = ids(rows, 310)
    assert len(set(drawn[:300])) == 300 and "empty" not in drawn
    assert "1 document left out; the first:" in capfd.readouterr().err


def test_no_document_is_left(login, small):
    rows = rows_of(small, mapping=columns.parse("query=query,document=title"))
    login.ask("PUT", f"/{small}/_settings", {"index.max_result_window": 10_000})
    with pytest.raises(errors.UserError, match="no document matches --es-query"):
        rows_of(small, query={"term": {"rank": 99}})
    assert rows.format == "pair" and "rank" not in rows.fields


@pytest.mark.parametrize(
    "environment, source, message",
    [
        ({"ES_API_KEY": "wrong", "ES_USER": "", "ES_PASSWORD": ""}, "es://medquad", "was refused (401)"),
        ({"ES_PASSWORD": "wrong"}, "es://medquad", "was refused (401)"),
        ({"ES_USER": "", "ES_PASSWORD": ""}, "es://medquad", "is needed (401)"),
        ({}, "es://nothing-there", "no index nothing-there"),
    ],
)
def test_what_is_refused_is_told_in_one_line(
    login, medquad, tmp_path, monkeypatch, capsys, environment, source, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train.main(["--data", source, "--output", str(tmp_path / "run"), "--eval-tasks"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "wrong" not in said
    assert not (tmp_path / "run").exists()


def test_a_field_that_the_index_lacks(login, medquad):
    with pytest.raises(errors.UserError, match=r"no field headline \(there: query, rank, snippet, title\)"):
        rows_of("medquad", mapping=columns.parse("query=query,document=headline"))


def settings_of(folder, index, *more):
    return [
        *("--data", f"es://{index}", "--output", str(folder), "--steps", "12", "--batch-size", "32"),
        *("--eval-tasks", "--save-steps", "4", "--lora-dropout", "0.1", *more),
    ]


def test_training_stopped_and_resumed_is_the_same_training(login, small, tmp_path):
    """12 steps of 32 cross the end of the first epoch, of 300 documents."""
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    assert train.main(settings_of(straight, small)) == 0
    assert train.main(settings_of(parted, small, "--stop-after", "7")) == 0
    assert train.main(["--resume", "--output", str(parted)]) == 0
    for name in ("adapters.safetensors", "optimizer.safetensors"):
        assert (straight / "final" / name).read_bytes() == (parted / "final" / name).read_bytes()
    saved = "".join(path.read_text(errors="replace") for path in parted.rglob("*") if path.suffix in (".json", ".yaml"))
    assert elasticsearch_server.PASSWORD not in saved


def test_an_index_that_is_made_again_under_its_name_is_another_one(login, small, tmp_path, capsys):
    """A resumed run refuses it; documents that come and go are another matter."""
    run = tmp_path / "run"
    assert train.main(settings_of(run, small, "--stop-after", "3")) == 0
    client = server.Server(server.parse(f"es://{small}")).client
    client.index(index=small, id="new", document={"query": "q", "title": "t", "snippet": "s"}, refresh=True)
    assert train.main(["--resume", "--output", str(run), "--stop-after", "4"]) == 0
    capsys.readouterr()
    client.indices.delete(index=small)
    fill(login, small, [{"query": f"q{i}", "title": f"t{i}", "snippet": f"s{i}", "rank": 1} for i in range(300)])
    assert train.main(["--resume", "--output", str(run)]) == 2
    assert f"{small}: another index of this name" in capsys.readouterr().err
    assert train.main(["--resume", "--output", str(run), "--accept-changed-data"]) == 0


def test_an_index_mixes_with_a_file(login, small, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"query": f"f{i}", "document": f"d{i}"}) + "\n" for i in range(50)))
    source = sources.open_source([f"es://{small}:3", f"{file}:1"])
    drawn = [source.where(n) for n in islice(source.numbers(0, 0), 80)]
    assert sum("rows.jsonl" in place for place in drawn) == 20
    cursor = json.loads(json.dumps(source.cursor(40)))
    again = sources.open_source([f"es://{small}:3", f"{file}:1"])
    again.restore(cursor, 40)
    assert [again.where(n) for n in islice(again.numbers(0, 40), 40)] == drawn[40:]


def test_vectors_written_back_are_searched(login, small, capsys):
    model = embedder.load("gemma-3-tiny-mlx")
    command = ["--model", "gemma-3-tiny-mlx", "--to", f"es://{small}", "--field", "meaning"]
    with pytest.raises(errors.UserError, match="no vectors"):
        retrieval_searcher.Searcher(f"es://{small}")
    assert embed.main(command) == 0 and "300 vectors of" in capsys.readouterr().out
    login.ask("PUT", f"/{small}/_doc/late?refresh=true", {"query": "q", "title": "a tall ship", "snippet": "at sea"})
    assert embed.main(command) == 0 and ": 1 vector of" in capsys.readouterr().out  # what is there is kept
    assert embed.main(command) == 0 and ": 0 vectors of" in capsys.readouterr().out

    searcher = retrieval_searcher.Searcher(f"es://{small}")
    texts = {str(i): f"t{i}\ns{i}" for i in range(300)} | {"late": "a tall ship\nat sea"}
    exact = model.encode(list(texts.values()), prompt="document") @ model.encode("a tall ship", prompt="query")
    found = searcher.search("a tall ship", "semantic", top=5)
    assert [hit.path for hit in found] == [list(texts)[i] for i in (-exact).argsort()[:5]]
    assert found[0].score == pytest.approx(exact.max(), abs=1e-4) and found[0].text == texts[found[0].path]
    assert [hit.path for hit in searcher.search("t17 s17", mode="bm25", top=3)] == ["17"]
    assert searcher.search("tall ship at sea", mode="hybrid", top=3)[0].path == "late"
    vector = searcher.model.encode("tall ship at sea", prompt="query")
    words, meaning = searcher.index.bm25("tall ship at sea", 9), searcher.index.semantic(vector, 400)
    assert len(words) == 1 and len(meaning) == 301
    named = ("late", "17", "200")
    some = searcher.index.semantic(vector, 3, Within(ids=named))  # exact, and the scores of an unrestricted search
    assert {hit.path: hit.score for hit in some} == pytest.approx(
        {hit.path: hit.score for hit in meaning if hit.path in named}, abs=1e-6
    )
    fused = fuse_scores(fusion.complete(searcher.index, "tall ship at sea", vector, words, meaning[:100]), 0.8)
    assert searcher.search("tall ship at sea", "hybrid", top=100, weight=0.8) == fused[:100]
    assert search.main(["search", "tall ship", "--store", f"es://{small}", "--bm25", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["path"] == "late"


TEXTS = ["def readLine(file): return next", "It reads lines of HTTPServer2, and caches nothing", "été café",
         "搜索引擎 finds read_line", "a reader of caches", "gradient caching", "cached gradients x86_64"]  # fmt: skip


CODE = {
    "harbour.txt": "A plan.\n",
    "ships.txt": "They leave the harbour.\n",
    "shapes/area.py": 'def area(width):\n    """Return the area."""\n    return width\n',
    "shapes/file.py": "def readLine(file):\n    # of a boiler\n    return file\n",
    "notes.md": "# Boiler\nIt drips.\n",
}


def test_lancedb_and_elasticsearch_hold_the_same_words(login, tmp_path):
    """Side by side: the terms, and the scores that both compute from them."""
    fill(login, "texts", [{"title": text, "snippet": ""} for text in TEXTS])
    model = embedder.load("gemma-3-tiny-mlx")
    elastic_index.write_vectors(model, "es://texts", "vector", ["title"])
    elastic = elastic_index.ElasticIndex("es://texts")
    (tmp_path / "corpus").mkdir()
    rows = (json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(TEXTS))
    (tmp_path / "corpus/corpus.jsonl").write_text("".join(rows))
    indexer.update(tmp_path / "corpus", tmp_path / "index", model)
    lance = lance_index.Index.open(tmp_path / "index")
    weights = dict.fromkeys(lance.info.fields, 0) | {"text": 1}
    lance = rewriting.rewrite(lance, fields=weights)  # documents of Elasticsearch have one field
    for i, text in enumerate(TEXTS):
        (row,) = lance.chunks.search().where(f"path = '{i}'").to_list()
        body = {"field": "vector_words", "text": analyzer().stream(text)}
        tokens = [token["token"] for token in login.ask("POST", "/texts/_analyze", body)["tokens"]]
        assert tokens == row["tokens"].split() == analyzer().terms(text)
    for query in ("readLine", "read line", "CACHED gradient", "ete", "引擎", "http server", "x86", "the", "zebra"):
        by_place = [{hit.path: hit.score for hit in index.bm25(query, 10)} for index in (lance, elastic)]
        assert by_place[0] == pytest.approx(by_place[1], rel=1e-4)
        vector = model.encode(query, prompt="query")
        fused = [{hit.path: hit.score for hit in hybrid(index, query, vector, 10)} for index in (lance, elastic)]
        assert fused[0] == pytest.approx(fused[1], abs=1e-4)


def test_fields_count_alike_in_lancedb_and_elasticsearch(login, tmp_path, capsys):
    """Side by side: path, name, doc and text of code, the terms of each, and BM25F for several weights.

    A term that one document has in its path and another in its text is rarer for Elasticsearch, which looks at the
    field where it is most frequent.
    """
    for name, text in CODE.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    model = embedder.load("gemma-3-tiny-mlx")
    indexer.update(tmp_path / "tree", tmp_path / "index", model)
    lance = lance_index.Index.open(tmp_path / "index")
    chunks = [
        {"chunk": row["id"]} | fields_of(*(row[name] for name in ("path", "name", "language", "context", "text")))
        for row in lance.chunk_texts()
    ]
    rows = [{"title": row["text"], "snippet": "", **row} for row in chunks]
    fill(login, "code", rows)
    flags = ["--model", "gemma-3-tiny-mlx", "--es-fields", "document=title"]
    besides = ["--word-fields", "path=path,name=name,doc=doc"]
    assert embed.main(["--to", "es://code", *flags, *besides]) == 0
    elastic = elastic_index.ElasticIndex("es://code")
    for row in chunks:
        for name in FIELDS:
            field = f"vector_words_{name}".removesuffix("_text")
            body = {"field": field, "text": analyzer().stream(row[name])}
            tokens = [token["token"] for token in login.ask("POST", "/code/_analyze", body)["tokens"]]
            assert tokens == analyzer().terms(row[name])
    mapping = login.ask("GET", "/code/_mapping")["code"]["mappings"]["properties"]
    assert {mapping[f"vector_words{each}"]["analyzer"] for each in ("", "_path", "_name", "_doc")} == {"whitespace"}
    for weights in ((1, 1, 1, 1), (0, 4, 2, 1), (2, 0, 0, 1), (0, 0, 0, 1)):
        named = dict(zip(FIELDS, weights, strict=True))
        lance, elastic = rewriting.rewrite(lance, fields=named), elastic.weighted(named)
        for query in ("area", "readLine", "file", "width", "shapes", "boiler line", "zebra"):
            by_place = [
                {hit.id: hit.score for hit in lance.bm25(query, 10)},
                {chunks[int(hit.id)]["chunk"]: hit.score for hit in elastic.bm25(query, 10)},
            ]
            assert by_place[0] == pytest.approx(by_place[1], rel=1e-4), (weights, query)
        lances = {hit.id: hit.score for hit in lance.bm25("harbour", 10)}
        elastics = {chunks[int(hit.id)]["chunk"]: hit.score for hit in elastic.bm25("harbour", 10)}
        count = len(lances)
        assert count == (2 if named["path"] else 1)
        idf = [math.log1p((len(chunks) - with_term + 0.5) / (with_term + 0.5)) for with_term in (1, count)]
        expected = {chunk: score * idf[0] / idf[1] for chunk, score in lances.items()}
        assert elastics == pytest.approx(expected, rel=1e-4), weights
    rows = [{"query": f"{word} of them", "path": str(n)} for n in range(len(chunks)) for word in ("area", "line")] * 2
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert search.main(["tune", str(tmp_path / "q.jsonl"), "--store", "es://code"]) == 0
    assert "path 1, name 1, doc 1, text 1" in capsys.readouterr().out


def test_fields_are_added_to_the_words_of_the_version_before(login, small, capsys):
    """Nothing is embedded for that, and a searcher follows; they can be taken away again."""
    to = ["--to", f"es://{small}", "--model", "gemma-3-tiny-mlx", "--es-fields", "document=title"]
    login.ask("PUT", f"/{small}/_doc/early?refresh=true", {"title": "a boat", "snippet": "the quay"})
    assert embed.main(to) == 0
    first = elastic_index.ElasticIndex(f"es://{small}")
    assert first.word_fields == [] and first.bm25("quay", 9) == []
    capsys.readouterr()
    assert embed.main([*to, "--word-fields", "name=snippet"]) == 0
    assert ": 0 vectors of" in capsys.readouterr().out
    second = first.refreshed()
    assert second is not first and [hit.path for hit in second.bm25("quay", 9)] == ["early"]
    login.ask("PUT", f"/{small}/_doc/late?refresh=true", {"title": "a ship", "snippet": "the harbour"})
    assert embed.main(to) == 0 and ": 1 vector of" in capsys.readouterr().out  # the fields are those of before
    assert [hit.path for hit in second.refreshed().bm25("harbour", 9)] == ["late"]
    assert embed.main([*to, "--word-fields", "none"]) == 0
    assert elastic_index.ElasticIndex(f"es://{small}").bm25("quay", 9) == []
    assert embed.main([*to, "--word-fields", "name=nothing"]) == 2
    assert "no field nothing" in capsys.readouterr().err


def test_a_field_that_the_mapping_lacks_counts_beside_finished_vectors(login, capsys):
    """Regression: it was looked for among documents without vectors, of which there were none."""
    fill(login, "notes", [{"title": "a boat", "snippet": ""}])
    login.ask("PUT", "/notes/_mapping", {"dynamic": False})
    login.ask("PUT", "/notes/_doc/late?refresh=true", {"title": "a ship", "note": "the quay"})
    to = ["--to", "es://notes", "--model", "gemma-3-tiny-mlx"]
    assert embed.main(to) == 0 and embed.main([*to, "--word-fields", "doc=note"]) == 0
    assert [hit.path for hit in elastic_index.ElasticIndex("es://notes").bm25("quay", 9)] == ["late"]
    assert embed.main([*to, "--word-fields", "doc=nothing"]) == 2
    assert "no field nothing" in capsys.readouterr().err


def test_words_are_added_to_vectors_of_the_version_before(login, small, capsys, monkeypatch):
    """Nothing is embedded for that; until then a search by words says how."""
    to = ["--to", f"es://{small}", "--model", "gemma-3-tiny-mlx"]
    assert embed.main(to) == 0
    client = server.Server(server.parse(f"es://{small}")).client
    meta = client.indices.get_mapping(index=small)[small]["mappings"]["_meta"]
    for name in ("language", "weight"):
        del meta[elastic_fields.META]["vector"][name]
    client.indices.put_mapping(index=small, meta=meta)
    searcher = retrieval_searcher.Searcher(f"es://{small}")
    with pytest.raises(errors.UserError, match=r"no words beside vector.* without embedding again: .*embed\.py"):
        searcher.search("t17 s17", "bm25")
    assert len(searcher.search("t17 s17", "semantic", top=3)) == 3
    with monkeypatch.context() as patch:
        patch.setattr(embedder.Model, "encode", lambda *_, **__: 1 / 0)
        assert embed.main(to) == 0
    assert retrieval_searcher.Searcher(f"es://{small}").search("t17 s17", "bm25")[0].path == "17"
    assert embed.main([*to, "--language", "none"]) == 0
    searcher = retrieval_searcher.Searcher(f"es://{small}")
    assert searcher.index.info.language == "none"
    searcher.index.keep_weight(0.3)
    assert embed.main(to) == 0  # both stay
    info = retrieval_searcher.Searcher(f"es://{small}").index.info
    assert (info.language, info.weight) == ("none", 0.3)
    capsys.readouterr()


def test_an_index_in_elasticsearch_is_tuned(login, small, tmp_path, capsys):
    assert embed.main(["--to", f"es://{small}", "--model", "gemma-3-tiny-mlx"]) == 0
    rows = [{"query": f"what of t{i} and s{i}", "path": str(i)} for i in range(0, 300, 20)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert search.main(["tune", str(tmp_path / "q.jsonl"), "--store", f"es://{small}"]) == 0
    out = capsys.readouterr().out
    weight = retrieval_searcher.Searcher(f"es://{small}").index.info.weight
    assert (f"kept         weight {weight:g}" in out) if weight is not None else ("unchanged" in out)
    assert search.main(["eval", str(tmp_path / "q.jsonl"), "--store", f"es://{small}"]) == 0
    assert "15 queries" in capsys.readouterr().out


def test_another_models_vectors_are_not_mixed_in(login, small, capsys, monkeypatch):
    to = ["--to", f"es://{small}", "--model", "gemma-3-tiny-mlx"]
    assert embed.main(to) == 0
    assert embed.main([*to, "--max-length", "8"]) == 2
    assert "vector holds vectors of gemma-3-tiny-mlx of title+snippet" in capsys.readouterr().err
    # A replacement that is interrupted leaves vectors of both, and the next run replaces all again.
    write, written = elastic_index._write, []

    def interrupted(server, hits, values):
        write(server, hits[:100], {name: column[:100] for name, column in values.items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(elastic_index, "_write", interrupted)
    assert embed.main([*to, "--max-length", "8", "--overwrite"]) == 130
    assert not elastic_index.ElasticIndex(f"es://{small}").info.complete
    monkeypatch.setattr(
        elastic_index, "_write", lambda server, hits, values: (written.extend(hits), write(server, hits, values))
    )
    assert embed.main([*to, "--max-length", "8"]) == 0
    assert len(written) == 300 and elastic_index.ElasticIndex(f"es://{small}").info.complete
    with pytest.raises(errors.UserError, match=r"embed\.py .*--overwrite"):
        _ = retrieval_searcher.Searcher(f"es://{small}", model="gemma-3-tiny-mlx").model


@pytest.mark.parametrize("by", ["bm25", "both"])
def test_negatives_are_mined_from_an_index(login, small, tmp_path, by):
    rows = [{"query": f"t{i} s{i + 1}", "positive": f"t{i}\ns{i}"} for i in range(0, 200, 10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "mined.jsonl"
    command = ["negatives", "--data", str(tmp_path / "rows.jsonl"), "--corpus", f"es://{small}", "--output", str(out)]
    assert mine.main([*command, "--by", by, "--model", "gemma-3-tiny-mlx", "--relative-margin", "off"]) == 0
    mined = [json.loads(line) for line in out.read_text().splitlines()]
    for i, row in zip(range(0, 200, 10), mined, strict=True):
        # The server finds two documents by words: the positive, which is known, and its neighbour.
        assert f"t{i + 1}\ns{i + 1}" in row["negatives"] and row["positive"] not in row["negatives"]
        assert len(row["negatives"]) == (1 if by == "bm25" else 4)
