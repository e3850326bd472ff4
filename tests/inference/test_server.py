"""The server: shapes of requests and answers, their order, limits, keys, and one clear sentence for whatever is wrong.

python -m pytest tests/inference/test_server.py
"""

import base64
import json
import socket
from collections.abc import Iterator

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from served import DOCUMENTS, Model, Reranker, refused, rerank, score, served
from starlette.testclient import TestClient

from mlx_retrieval.inference.serving import run
from mlx_retrieval.inference.serving.app import ServerSettings, create_app
from mlx_retrieval.inference.serving.served_models import ServedModels
from mlx_retrieval.inference.serving.shapes import jina
from mlx_retrieval.utils.errors import UserError


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with served(Reranker(), Model(), documents=50, inputs=20, characters=1_000, body=100_000) as client:
        yield client


# --- answers --------------------------------------------------------------------------------------------------------


def test_rerank_by_hand(client):
    response = rerank(client)
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    body = response.json()
    scores = np.array([score("kidney", text) for text in DOCUMENTS], np.float32)
    order = sorted(range(5), key=lambda i: -scores[i])
    expected = [{"index": i, "relevance_score": float(scores[i])} for i in order]
    assert body.pop("results") == expected
    assert len(body.pop("id")) == 36
    assert body.pop("meta") == {"api_version": {"version": "1"}, "billed_units": {"search_units": 1}}
    tokens = sum(len(text.split()) + 1 for text in DOCUMENTS)
    assert body == {"model": "a-reranker", "object": "list", "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    assert rerank(client).json()["id"] != rerank(client).json()["id"]
    alias = client.post("/rerank", json={"query": "kidney", "documents": DOCUMENTS, "model": "any"})
    assert alias.json()["results"] == expected


@pytest.mark.parametrize(("top_n", "count"), [(1, 1), (3, 3), (5, 5), (1000, 5), (10**30, 5), (None, 5)])
def test_top_n_are_the_best(client, top_n, count):
    assert rerank(client, top_n=top_n).json()["results"] == rerank(client).json()["results"][:count]


def test_documents_come_back_where_asked_for(client):
    objects = [{"text": text, "id": 3} for text in DOCUMENTS]
    for documents in (DOCUMENTS, objects):
        results = rerank(client, documents=documents, return_documents=True).json()["results"]
        assert all(result["document"] == {"text": DOCUMENTS[result["index"]]} for result in results)
        assert rerank(client, documents=documents).json()["results"] == [
            {name: result[name] for name in ("index", "relevance_score")} for result in results
        ]


def test_half_a_surrogate_pair_is_a_replacement_character(client):
    """JSON can spell it, and no encoding can write it."""
    body = r'{"query": "kid\udfffney", "documents": ["a", "\ud800 b \ud83d\ude00"], "return_documents": true}'
    results = client.post("/v1/rerank", content=body, headers={"Content-Type": "application/json"}).json()["results"]
    scores = [score("kid\ufffdney", "a"), score("kid\ufffdney", "\ufffd b 😀")]
    assert {result["document"]["text"] for result in results} == {"a", "\ufffd b 😀"}
    assert np.allclose(sorted(result["relevance_score"] for result in results), sorted(scores))
    answer = client.post("/v1/embeddings", content=r'{"input": "\ud800"}', headers={"Content-Type": "application/json"})
    assert answer.json()["data"][0]["embedding"] == Model().encode(["\ufffd"], prompt="document")[0].tolist()


def test_scores_that_are_all_1_keep_the_ranking_of_their_logits():
    """The sigmoid of 18 and of 20 are the same number in float32, so they once came in the request's order."""

    class Sure(Reranker):
        def activated(self, raw):
            return np.ones_like(raw)

    with served(Sure()) as client:
        answer = client.post("/v1/rerank", json={"query": "kidney", "documents": DOCUMENTS}).json()
    expected = np.argsort([-score("kidney", document) for document in DOCUMENTS], kind="stable").tolist()
    assert [row["index"] for row in answer["results"]] == expected != sorted(expected)
    assert {row["relevance_score"] for row in answer["results"]} == {1.0}


def test_equal_scores_keep_the_order(client):
    documents = ["a boiler", "a bike"] * 25
    found = [result["index"] for result in rerank(client, documents=documents).json()["results"]]
    first = 0 if score("kidney", "a boiler") > score("kidney", "a bike") else 1
    assert found == [*range(first, 50, 2), *range(1 - first, 50, 2)]


def test_embeddings_by_hand(client):
    body = client.post("/v1/embeddings", json={"input": DOCUMENTS, "model": "any", "user": "me"}).json()
    vectors = Model().encode(DOCUMENTS, prompt="document")
    assert [row["index"] for row in body["data"]] == list(range(5))
    assert np.array_equal(np.array([row["embedding"] for row in body["data"]], np.float32), vectors)
    assert {row["object"] for row in body.pop("data")} == {"embedding"}
    tokens = sum(len(text.split()) + 1 for text in DOCUMENTS)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    assert body == {"object": "list", "model": "a-model", "usage": usage}


@pytest.mark.parametrize(
    ("asked", "prompt", "dimensions"),
    [
        ({}, "document", 4),
        ({"input_type": "query"}, "query", 4),
        ({"prompt": "query", "dimensions": 2}, "query", 2),
        ({"prompt": "document", "input_type": "document"}, "document", 4),
        ({"input_type": None, "dimensions": None, "encoding_format": None}, "document", 4),
    ],
)
def test_prompts_dimensions_and_base64(client, asked, prompt, dimensions):
    expected = Model().encode(["one text"], prompt=prompt)[0, :dimensions]
    row = client.post("/v1/embeddings", json={"input": "one text", **asked}).json()["data"][0]
    assert np.array_equal(np.float32(row["embedding"]), expected)
    asked = {"input": ["one text"], **asked, "encoding_format": "base64"}
    row = client.post("/v1/embeddings", json=asked).json()["data"][0]
    assert np.array_equal(np.frombuffer(base64.b64decode(row["embedding"]), "<f4"), expected)


def test_health_names_the_models():
    with served(Reranker(), Model(), key="abc") as client:
        assert client.get("/health").json() == {"status": "ok", "reranker": "a-reranker", "embeddings": "a-model"}
    with served(None, Model()) as client:
        assert client.get("/health").json() == {"status": "ok", "reranker": None, "embeddings": "a-model"}
        refused(rerank(client), 404, "no reranker")
    with served(Reranker()) as client:
        assert client.get("/health").json()["embeddings"] is None
        refused(client.post("/v1/embeddings", json={"input": "a"}), 404, "no embedding model")


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": 1}, ["query", "string"]),
        ({"query": None}, ["query"]),
        ({"query": ""}, ["query", "empty"]),
        ({"query": " \n"}, ["query", "empty"]),
        ({"query": ["a"]}, ["query"]),
        ({"query": "a" * 1001}, ["query", "1,001 characters", "1,000"]),
        ({"documents": []}, ["documents", "empty"]),
        ({"documents": "a text"}, ["documents", "list"]),
        ({"documents": None}, ["documents", "list"]),
        ({"documents": {"text": "a"}}, ["documents", "list"]),
        ({"documents": ["a", 2]}, ["documents[1]", "string"]),
        ({"documents": ["a", None, 3]}, ["documents[1]", "string"]),
        ({"documents": [{"image": "a"}]}, ["documents", "no images"]),
        ({"documents": [{"text": 1}]}, ["documents[0]", "string"]),
        ({"documents": ["a", "b" * 1001]}, ["documents[1]", "1,001 characters", "1,000"]),
        ({"documents": ["a"] * 51}, ["documents", "51 texts", "50"]),
        ({"top_n": 0}, ["top_n", "greater than or equal to 1"]),
        ({"top_n": -1}, ["top_n"]),
        ({"top_n": "3"}, ["top_n", "integer"]),
        ({"top_n": 1.5}, ["top_n", "integer"]),
        ({"top_n": True}, ["top_n", "integer"]),
        ({"return_documents": "yes"}, ["return_documents", "boolean"]),
        ({"model": 1}, ["model"]),
        ({"topn": 3}, ["'topn'", "unknown", "did you mean top_n?"]),
        ({"{}\n\ud800": 3}, ["unknown"]),
    ],
)
def test_wrong_rerank_requests(client, change, words):
    body = json.dumps({"query": "kidney", "documents": ["a", "b"]} | change)
    response = client.post("/v1/rerank", content=body, headers={"Content-Type": "application/json"})
    refused(response, 400, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": []}, ["input", "empty"]),
        ({"input": None}, ["input"]),
        ({"input": [[1, 2], ["a"]]}, ["input[1][0]", "integer"]),
        ({"input": ["a", [1]]}, ["input[1]", "string"]),
        ({"input": [{"image": "a"}]}, ["input", "no images"]),
        ({"input": [{"text": 1}]}, ["input[0]", "string"]),
        ({"input": ["a"] * 21}, ["input", "21 texts", "20"]),
        ({"input": "a" * 1001}, ["input[0]", "1,001 characters"]),
        ({"encoding_format": "int8"}, ["encoding_format", "float", "base64"]),
        ({"dimensions": 0}, ["dimensions"]),
        ({"dimensions": 5}, ["dimensions 5", "has 4"]),
        ({"input_type": "passage"}, ["'passage'", "known: query, document"]),
        ({"prompt": "query", "input_type": "document"}, ["input_type and prompt"]),
        ({"prompt": "a" * 101}, ["prompt", "100"]),
        ({"precision": "int8"}, ["'precision'", "unknown"]),
    ],
)
def test_wrong_embedding_requests(client, change, words):
    refused(client.post("/v1/embeddings", json={"input": "a text"} | change), 400, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"query": "a", ', ["broken JSON", "character"]),
        (b"", ["JSON object"]),
        (b"[]", ["JSON object"]),
        (b"3", ["JSON object"]),
        (b"null", ["JSON object"]),
        (b'{"query": "a"}', ["documents", "required"]),
        (b'{"query": "\xff", "documents": ["a"]}', ["body"]),
        (b"[" * 50_000, ["body"]),
        (b'{"a": ' * 10_000, ["body"]),
        (b'{"query": "a", "documents": ["a"], "top_n": ' + b"9" * 5_000 + b"}", ["body"]),
        (b'{"query": "a", "documents": ["a"], "top_n": NaN}', ["top_n"]),
        (b'{"query": "a", "documents": [' + b"1," * 40_000 + b"1]}", ["documents[0]"]),
        (b'{"a":0,' + b",".join(b'"%d":0' % i for i in range(8_000)) + b"}", ["'a'", "unknown"]),
    ],
)
def test_broken_bodies(client, content, words):
    for path in ("/v1/rerank", "/v1/embeddings"):
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
        refused(response, 400, *(words if path == "/v1/rerank" else ()))


def test_what_is_not_sent_as_json(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "nonsense"):
        content = json.dumps({"query": "a", "documents": ["b"]})
        response = client.post("/v1/rerank", content=content, headers={"Content-Type": kind})
        refused(response, 400, "Content-Type: application/json")


def test_unknown_paths_and_methods(client):
    refused(client.get("/v1/rerank"), 405)
    refused(client.post("/v1/chat/completions", json={}), 404)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=5) | st.just("text"), values),
    max_leaves=8,
)
FIELDS = sorted({*jina.Rerank.model_fields, *jina.Embeddings.model_fields})
BODIES = st.builds(
    lambda known, extra: known | extra,
    st.fixed_dictionaries({}, optional={"query": st.text(max_size=9), "documents": st.lists(st.text(max_size=9))}),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4) | st.just({}),
)


@pytest.mark.slow
@hypothesis.settings(max_examples=300)
@hypothesis.given(body=BODIES.map(json.dumps).map(str.encode) | JSON.map(json.dumps).map(str.encode) | st.binary())
def test_any_body_is_answered_or_refused(client, body):
    for path in ("/v1/rerank", "/v1/embeddings"):
        response = client.post(path, content=body, headers={"Content-Type": "application/json"})
        if response.status_code != 200:
            refused(response, 400)


def test_bodies_over_the_limit(client):
    refused(client.post("/v1/rerank", content=b" " * 100_001), 413, "100,000 bytes")
    assert client.post("/v1/rerank", content=b" " * 100_000).status_code == 400


def test_mistakes_crashes_and_numbers_that_are_none(client):
    refused(rerank(client, documents=["a", "mistake"]), 400, "this text is a mistake")
    for text in ("crash", "nan"):
        message = refused(rerank(client, documents=["a", text]), 500)
        assert "secret" not in message and ("rerank.py --check a-reranker" in message) == (text == "nan")
    assert rerank(client).status_code == 200


# --- keys -----------------------------------------------------------------------------------------------------------


def test_the_key_opens(capfd):
    key = "k-7f3a"
    with served(Reranker(), key=key) as client:
        wrong = ["", "Bearer", "Bearer ", key, f"Basic {key}", "Bearer other", f"Bearer {key}x", f"Bearer {key[:-1]}"]
        for header in wrong:
            response = client.post("/v1/rerank", json={"query": "a"}, headers={"Authorization": header})
            assert key not in refused(response, 401, "API key") and response.headers["www-authenticate"] == "Bearer"
        refused(rerank(client), 401)
        refused(client.post("/v1/rerank", content=b"broken"), 401)
        refused(client.get("/openapi.json"), 401)
        for header in (f"Bearer {key}", f"bearer {key}"):
            client.headers["Authorization"] = header
            assert rerank(client).status_code == 200
        assert key not in client.get("/openapi.json").text
    assert key not in "".join(capfd.readouterr())


@pytest.mark.parametrize("key", ["", " ", "a ", "a\n", "clé"])
def test_keys_that_no_header_can_hold(key):
    with pytest.raises(UserError, match="API key"):
        create_app(ServedModels.of(Reranker(), None), ServerSettings(keys=(key,)))


def test_what_cannot_be_served():
    with pytest.raises(UserError, match="neither a reranker nor"):
        ServedModels.of(None, None)
    late = Model()
    late.late = True
    with pytest.raises(UserError, match="a-model makes a vector a token"):
        ServedModels.of(Reranker(), late)


def test_a_server_meets_few_shapes(monkeypatch, capfd):
    """Before anything is computed; see the test of what it does in test_reranker_scores.py."""
    done = []
    monkeypatch.setattr(Reranker, "limit_shapes", lambda self, models: done.append("few"))
    monkeypatch.setattr(Reranker, "score_groups", lambda self, groups: done.append("scored"))
    monkeypatch.setattr(run.uvicorn.Server, "run", lambda self, sockets: [s.close() for s in sockets])
    run.run(ServedModels.of(Reranker(), None), port=0)
    assert done == ["few", "scored"] and "serving a-reranker" in capfd.readouterr().out


def test_addresses_that_cannot_be_had():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="already in use"):
        run.run(ServedModels.of(Reranker(), None), port=taken.getsockname()[1])
    for host, port, message in (
        ("", 70_000, "port 70000"),
        ("", -1, "port -1"),
        ("no such host", 0, "no such host:0: "),
    ):
        with pytest.raises(UserError, match=message):
            run.run(ServedModels.of(Reranker(), None), host=host, port=port)
