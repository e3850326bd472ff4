"""The JSON of the search page: the hits of a search, one line for what is wrong, nothing but the index to read.

python -m pytest tests/retrieval/test_search_app.py
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from indexed import SCRIPT, TEXTS, LastLetters, make_index
from random_rerankers import cross_encoder
from starlette.testclient import TestClient

import search
from mlx_retrieval.inference.serving.engine import Limits
from mlx_retrieval.retrieval import base, search_app
from mlx_retrieval.retrieval.analyzer import Analyzer
from mlx_retrieval.retrieval.base import FileRecord
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.retrieval.search_app import ServedSearcher, content_policy, create_app
from mlx_retrieval.retrieval.searcher import MODES, Searcher

LOCAL = "http://127.0.0.1:8080"


@pytest.fixture(scope="module")
def index(small, tmp_path_factory) -> Path:
    return make_index(tmp_path_factory.mktemp("page"), small)


@pytest.fixture(scope="module")
def client(index) -> Iterator[TestClient]:
    app = create_app(ServedSearcher(index, reranker=LastLetters()))
    with TestClient(app, base_url=LOCAL, raise_server_exceptions=False) as client:
        yield client


def ask(client: TestClient, query: str, **rest) -> dict:
    answer = client.post("/search", json={"query": query, "rerank": False, **rest})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer, status: int, *words: str) -> str:
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    assert "\n" not in message and all(word in message for word in words), message
    return message


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_hits_are_those_of_a_search(client, index, mode):
    expected = Searcher(index).search("read the boiler", mode, 3)
    answer = ask(client, "read the boiler", mode=mode, top=3)
    assert [row["id"] for row in answer["results"]] == [hit.id for hit in expected]
    assert [row["score"] for row in answer["results"]] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    first = answer["results"][0]
    assert {name: first[name] for name in ("path", "line", "text")} == {
        name: getattr(expected[0], name) for name in ("path", "line", "text")
    }
    assert (answer["mode"], answer["query"], answer["reranked"]) == (mode, "read the boiler", False)
    assert answer["root"] == str(index.parent / "tree") and answer["ms"] > 0


def test_words_are_marked_by_characters_of_the_whole_text(client):
    (hit,) = ask(client, "reading on 🚲", mode="bm25", paths=["read.txt"])["results"]
    assert [hit["text"][first:last] for first, last in hit["spans"]] == ["read", "read", "read"]  # by stems
    (hit,) = ask(client, "gives file", mode="bm25")["results"]
    assert [hit["text"][first:last] for first, last in hit["spans"]] == ["file", "gives", "file"]
    assert hit["best"] == [0, 1]


def test_filters_and_weight(client, index):
    assert {row["path"] for row in ask(client, "read", languages=["python"])["results"]} == {"src/reader.py"}
    assert {row["path"] for row in ask(client, "read", paths=["b*.md"])["results"]} == {
        "docs/boiler.md",
        "docs/bike.md",
    }
    expected = Searcher(index).search("read", weight=0.0)
    assert [row["id"] for row in ask(client, "read", weight=0.0)["results"]] == [hit.id for hit in expected]


def test_the_reranker_is_a_switch(client):
    plain = ask(client, "read the boiler")
    reranked = ask(client, "read the boiler", rerank=True)
    assert reranked["reranked"] and {row["id"] for row in plain["results"]} == {
        row["id"] for row in reranked["results"]
    }
    assert [row["score"] for row in reranked["results"]] == sorted(
        (r["score"] for r in reranked["results"]), reverse=True
    )
    assert reranked["results"][0]["score"] == -float(min(ord(text.strip()[-1]) for text in TEXTS.values()))
    assert ask(client, "zebra", mode="bm25", rerank=True)["results"] == []


def test_a_chunk_by_its_id(client):
    hit = ask(client, "boiler", mode="bm25")["results"][0]
    chunk = client.get("/chunk", params={"id": hit["id"], "query": "boiler"}).json()
    assert chunk == hit | {"score": 0.0}
    assert client.get("/chunk", params={"id": hit["id"]}).json()["spans"] == []
    refused(client.get("/chunk", params={"id": "docs/gone.md#0"}), 404, "docs/gone.md#0")


def test_what_can_be_searched(client, index, small):
    about = client.get("/about").json()
    assert about["chunks"] == len(TEXTS) and about["languages"] == ["markdown", "python", "text"]
    assert (about["root"], about["reranker"]) == (str(index.parent / "tree"), "last-letters")
    assert about["modes"] == dict.fromkeys(MODES, "") and about["is_complete"] and not about["is_corpus"]
    assert client.get("/health").json() == {"status": "ok"}


# --- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"query": " "}, ["query is empty"]),
        ({"query": 1}, ["query", "string"]),
        ({}, ["query"]),
        ({"query": "a", "mode": "fuzzy"}, ["mode", "hybrid"]),
        ({"query": "a", "top": 0}, ["top"]),
        ({"query": "a", "top": 101}, ["top"]),
        ({"query": "a", "weight": 2}, ["weight"]),
        ({"query": "a", "tops": 3}, ["tops", "did you mean top?"]),
        ({"query": "a", "languages": ["pyton"]}, ["pyton", "did you mean python?"]),
        ({"query": "what is this", "mode": "bm25"}, ["only stop words"]),
        ({"query": "a" * 1_000_001}, ["1,000,001 characters"]),
    ],
)
def test_bad_requests_are_one_line(client, body, words):
    refused(client.post("/search", json=body), 400, *words)


def test_other_requests_are_refused(client):
    refused(client.post("/search", content="{", headers={"Content-Type": "application/json"}), 400, "broken JSON")
    refused(client.post("/search", content='{"query": "a"}', headers={"Content-Type": "text/plain"}), 400, "JSON")
    refused(client.get("/search"), 405)
    refused(client.get("/chunk"), 400, "id")
    for name in ("/docs", "/openapi.json"):
        refused(client.get(name), 404)


def test_a_megabyte_is_answered_and_half_a_surrogate_pair_is_a_replacement_character(client):
    text = "boiler " + " ".join(f"w{i}" for i in range(130_000))
    assert ask(client, text, mode="bm25")["results"][0]["path"] == "docs/boiler.md"
    body = r'{"query": "boiler \ud800", "mode": "bm25"}'
    answer = client.post("/search", content=body, headers={"Content-Type": "application/json"}).json()
    assert answer["query"] == "boiler \ufffd" and answer["results"][0]["path"] == "docs/boiler.md"


@pytest.mark.parametrize("mode", MODES)
def test_a_query_is_analysed_once_a_request(client, monkeypatch, mode):
    """Regression: twice for every hit as well, 201 times in all: seconds for a megabyte of a few different words."""
    query, texts, iterate = f"boiler read chain in {mode} " * 20, [], Analyzer._iterate

    def noting(self: Analyzer, text: str) -> Iterator[str]:
        texts.append(text)
        return iterate(self, text)

    monkeypatch.setattr(Analyzer, "_iterate", noting)
    assert len(ask(client, query, mode=mode)["results"]) > 2
    assert texts.count(query) == 1


def test_words_are_searched_when_the_model_is_gone(index, tmp_path):
    moved = shutil.copytree(index, tmp_path / "index")
    about = json.loads((moved / base.FILE).read_text())
    (moved / base.FILE).write_text(json.dumps(about | {"model": str(tmp_path / "gone")}))
    with TestClient(create_app(ServedSearcher(moved)), base_url=LOCAL) as client:
        modes = client.get("/about").json()["modes"]
        assert modes["bm25"] == "" and "gone" in modes["hybrid"] == modes["semantic"]
        assert ask(client, "boiler", mode="bm25")["results"][0]["path"] == "docs/boiler.md"
        for mode in ("hybrid", "semantic"):
            refused(client.post("/search", json={"query": "boiler", "mode": mode}), 409, "gone", "--model-path")


def test_a_damaged_table_is_one_line(index, tmp_path):
    damaged = shutil.copytree(index, tmp_path / "index")
    with TestClient(create_app(ServedSearcher(damaged)), base_url=LOCAL, raise_server_exceptions=False) as client:
        assert ask(client, "boiler", mode="bm25")["results"]
        for file in (damaged / "chunks.lance" / "data").iterdir():
            file.unlink()
        message = refused(client.post("/search", json={"query": "night drips again", "mode": "semantic"}), 400)
        assert "--rebuild replaces it" in message and ".rs:" not in message
        assert client.get("/health").status_code == 200


def test_the_index_is_followed(index, tmp_path):
    """A process that goes on answers from the index as it is now, and with the weight that tune has kept."""
    followed = shutil.copytree(index, tmp_path / "index")
    with TestClient(create_app(ServedSearcher(followed)), base_url=LOCAL) as client:
        before = ask(client, "read the boiler")
        other = Index.open(followed)
        other.remove(["docs/boiler.md"])
        other.record([FileRecord("docs/boiler.md", 1, 1, "", 0, "")])
        other.finish()
        assert len(ask(client, "read the boiler")["results"]) == len(before["results"]) - 1
        Index.open(followed).keep_weight(0.0)
        hits = Searcher(followed).search("read the boiler", weight=0.0)
        assert [row["id"] for row in ask(client, "read the boiler")["results"]] == [hit.id for hit in hits]


# --- what it lets nobody do -------------------------------------------------------------------------------------------


def test_only_the_index_can_be_read(client, index):
    secret = index.parent / "tree" / "later.md"
    secret.write_text("written after the index\n")
    for name in (
        "later.md",
        "../tree/later.md",
        str(secret),
        "/etc/passwd",
        "docs/../../etc/passwd",
        "' OR 1=1 --",
        "#0",
    ):
        refused(client.get("/chunk", params={"id": name}), 404)
        refused(client.get("/chunk", params={"id": f"{name}#0"}), 404)
    for path in ("/later.md", "/../later.md", "/%2e%2e/%2e%2e/etc/passwd", "/search_page.html", "/index.json"):
        refused(client.get(path), 404)
    secret.unlink()


def test_other_names_of_this_machine_are_refused(client, index):
    """A page of the web whose name is resolved to this machine sends its own name."""
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", ""):
        assert client.get("/about", headers={"Host": host}).status_code == 400
    for host in ("localhost:8080", "127.0.0.1", "[::1]:8080"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    with TestClient(create_app(ServedSearcher(index), ("*",)), base_url="http://search.example") as other:
        assert other.get("/health").status_code == 200
    hosts = {"127.0.0.1": True, "::1": True, "localhost": True, "0.0.0.0": False, "::": False, "search.example": False}
    assert {host: search_app.is_loopback(host) for host in hosts} == hosts


def test_pages_of_others_may_not_read_answers(client):
    answer = client.get("/about", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert client.options("/search", headers=preflight).status_code == 405


def test_every_answer_has_the_headers_of_a_safe_page(client):
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    for answer in (page, client.get("/about"), client.get("/nothing"), client.post("/search", json={})):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
    with pytest.raises(ValueError, match="unpack"):
        content_policy("<style></style><script></script><script></script>")  # one script, or nothing runs


def test_the_page_loads_nothing_and_writes_no_markup():
    html = search_app.PAGE.read_text(encoding="utf-8")
    urls = set(re.findall(r"https?://[^'\" )]+", html))
    assert urls == {"http://www.w3.org/2000/svg"}  # a name, which nothing fetches
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|<link[^>]+stylesheet|\son\w+=", html
    )


def test_markup_in_texts_and_queries_stays_text(client):
    answer = client.post("/search", json={"query": SCRIPT, "rerank": False, "mode": "bm25"})
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert found["query"] == SCRIPT and SCRIPT in found["results"][0]["text"]


# --- limits and the command -------------------------------------------------------------------------------------------


def test_limits_are_those_of_serve(index):
    app = create_app(ServedSearcher(index), limits=Limits(body=200, characters=50))
    with TestClient(app, base_url=LOCAL, raise_server_exceptions=False) as client:
        refused(client.post("/search", json={"query": "a" * 51}), 400, "51 characters", "at most 50")
        refused(client.post("/search", json={"query": "a" * 300}), 413, "200 bytes")


def test_the_command(index, monkeypatch, capsys, tmp_path):
    started, reranks = [], ["--rerank", str(tmp_path / "model"), "--depth", "7"]
    cross_encoder("bert", tmp_path / "model")
    monkeypatch.setattr(search_app, "run", lambda *settings: started.append(settings))
    assert search.main(["serve", "--index", str(index), "--port", "0", "--host", "::1", *reranks]) == 130
    ((searcher, host, port),) = started
    assert (searcher.depth, host, port, searcher.index.folder) == (7, "::1", 0, index)
    assert search.main(["serve", "--index", str(index)]) == 130 and started[1][1:] == ("127.0.0.1", 8080)
    capsys.readouterr()
    for flags, words in (
        (["--index", str(tmp_path / "none")], "no index there"),
        (["--index", str(index), "--depth", "0"], "--rerank-depth 0"),
        (["--index", str(index), "--field", "a"], "--field is for --store"),
        (["--index", str(index), "--rerank", "nowhere-at-all"], "no folder"),
    ):
        assert search.main(["serve", *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert len(started) == 2


def test_an_address_that_cannot_be_listened_on_is_one_line(index, capsys):
    assert search.main(["serve", "--index", str(index), "--port", "70000"]) == 2
    assert "between 0 and 65,535" in capsys.readouterr().err
