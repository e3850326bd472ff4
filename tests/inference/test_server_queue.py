"""Many requests at once: what is computed together, in turns or not at all, and a server on a socket under load.

python -m pytest tests/inference/test_server_queue.py
"""

import asyncio
import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn
from served import DOCUMENTS, Model, Reranker, Slow, refused, rerank, score, served, wait_until
from starlette.testclient import TestClient

from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.serving import model_thread
from mlx_retrieval.inference.serving.app import ServerSettings, create_app
from mlx_retrieval.inference.serving.engine import Limits
from mlx_retrieval.inference.serving.model_thread import Job, ModelThread
from mlx_retrieval.inference.serving.run import listen
from mlx_retrieval.inference.serving.served_models import ServedModels, Source

ROOT = Path(__file__).resolve().parent.parent.parent

# --- batching -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held_up(part: Slow, client, request: dict, path: str = "/v1/rerank") -> Iterator[Callable[..., Future]]:
    """While a first request is being computed; gives a function that sends more and returns once all of them wait."""
    thread = client.app.state.service.thread
    part.calls.clear()
    part.gate.clear()
    with ThreadPoolExecutor(64) as pool:
        first = pool.submit(client.post, path, json=request)
        try:
            assert part.entered.acquire(timeout=10)

            def send(body: dict, path: str = path) -> Future:
                count = len(thread._jobs)
                answer = pool.submit(client.post, path, json=body)
                wait_until(lambda: len(thread._jobs) > count)
                return answer

            yield send
        finally:
            part.gate.set()
        assert first.result().status_code == 200


FIRST = {"query": "first", "documents": ["a"]}


def test_waiting_requests_are_computed_together():
    reranker = Reranker()
    with served(reranker) as client:
        with held_up(reranker, client, FIRST) as send:
            answers = [send({"query": f"query {i}", "documents": DOCUMENTS[: 1 + i % 5]}) for i in range(20)]
        for i, answer in enumerate(answers):
            assert (
                answer.result().json()["results"]
                == rerank(client, f"query {i}", DOCUMENTS[: 1 + i % 5]).json()["results"]
            )
    assert [len(call) for call in reranker.calls[:2]] == [1, 20]


def test_inputs_of_one_kind_are_embedded_together():
    model = Model()
    kinds = [{}, {"input_type": "query"}, {"dimensions": 2}, {"prompt": "document"}]
    with served(None, model) as client:
        with held_up(model, client, {"input": "a"}, "/v1/embeddings") as send:
            answers = [send({"input": [f"{i}", "b c"], **kinds[i % 4]}) for i in range(8)]
        bodies = [answer.result().json() for answer in answers]
        for i, body in enumerate(bodies):
            assert body == client.post("/v1/embeddings", json={"input": [f"{i}", "b c"], **kinds[i % 4]}).json()
            assert body["usage"]["total_tokens"] == 5
    assert [call[:2] for call in model.calls[1:4]] == [["document", None], ["query", None], ["document", 2]]
    assert [len(call) - 2 for call in model.calls[1:4]] == [8, 4, 4]


@pytest.mark.parametrize(("text", "status"), [("mistake", 400), ("crash", 500), ("no memory", 500)])
def test_a_bad_request_among_good_ones(text, status):
    reranker = Reranker()
    with served(reranker) as client:
        with held_up(reranker, client, FIRST) as send:
            good = [send({"query": "a", "documents": DOCUMENTS}) for _ in range(3)]
            bad = send({"query": "a", "documents": ["b", text]})
            good += [send({"query": "a", "documents": DOCUMENTS}) for _ in range(3)]
        refused(bad.result(), status)
        expected = rerank(client, "a").json()["results"]
        assert all(answer.result().json()["results"] == expected for answer in good)


def test_a_bad_input_counts_no_token_twice():
    model = Model()
    with served(None, model) as client:
        with held_up(model, client, {"input": "a"}, "/v1/embeddings") as send:
            good, bad = send({"input": ["a b"]}), send({"input": ["mistake"]})
        refused(bad.result(), 400)
        assert good.result().json()["usage"]["total_tokens"] == 3


def test_large_requests_take_turns_with_small_ones():
    reranker = Reranker()
    documents = [f"text {i}" for i in range(40)]
    with served(reranker, batch=4) as client:
        with held_up(reranker, client, FIRST) as send:
            large = send({"query": "large", "documents": documents})
            small = [send({"query": f"small {i}", "documents": ["b", "c"]}) for i in range(2)]
        results = large.result().json()["results"]
        assert all(answer.result().status_code == 200 for answer in small)
    sizes = [[(query, len(texts)) for query, texts in call] for call in reranker.calls]
    assert sizes[1:3] == [[("large", 4)], [("small 0", 2), ("small 1", 2)]] and len(sizes) == 12
    assert sorted(result["index"] for result in results) == list(range(40))
    assert all(abs(r["relevance_score"] - score("large", documents[r["index"]])) < 1e-6 for r in results)


def test_calls_of_long_texts_are_short(monkeypatch):
    """Regression: a call of 256 long texts took half a minute, for which others and the server's end had to wait."""
    monkeypatch.setattr(model_thread, "CALL", 100)
    monkeypatch.setattr(model_thread, "LONG", 40)
    model, texts = Model(), ["a" * 30, "b" * 90, "c" * 30, "d" * 500, "e" * 60, "f"]
    with served(None, model) as client:
        with held_up(model, client, {"input": "first"}, "/v1/embeddings") as send:
            large, small = send({"input": texts}, "/v1/embeddings"), send({"input": ["g"]}, "/v1/embeddings")
        assert small.result().json()["usage"]["total_tokens"] == 2
        vectors = [row["embedding"] for row in large.result().json()["data"]]
    assert [[text[0] for text in call[2:]] for call in model.calls[1:]] == [["a", "b", "c"], ["g", "d", "e", "f"]]
    assert np.array_equal(np.float32(vectors), model.encode(texts, prompt="document"))


def test_listwise_requests_are_never_cut():
    reranker = Reranker()
    reranker.kind = "listwise"
    with served(reranker, batch=4) as client:
        with held_up(reranker, client, FIRST) as send:
            answers = [send({"query": str(n), "documents": ["a"] * n}) for n in (2, 9, 1, 3)]
        assert all(answer.result().status_code == 200 for answer in answers)
    assert [[len(texts) for _, texts in call] for call in reranker.calls[1:]] == [[2, 1], [9], [3]]


def test_work_that_nobody_waits_for_is_left_out():
    reranker = Reranker()
    reranker.gate.clear()
    thread = ModelThread(4)
    thread.start()
    first = thread.submit(Job(reranker, ["a"] * 10, "first"))
    assert reranker.entered.acquire(timeout=10)
    left, last = thread.submit(Job(reranker, ["a"], "left")), thread.submit(Job(reranker, ["a"], "last"))
    assert left.cancel() and first.cancel()  # the second in waiting, the first between two of its pieces
    reranker.gate.set()
    assert len(last.result(10)) == 1
    assert [[query for query, _ in call] for call in reranker.calls] == [["first"], ["last"]]
    thread.close()


def test_threads_that_use_mlx_outlive_the_server(small):
    """Regression: mlx takes Python's lock when such a thread ends; if Python is ending, that aborts the process."""
    before = set(threading.enumerate())
    models = ServedModels.open([Source("docs", small)])
    with TestClient(create_app(models)) as client:
        assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 200
    lasting = [thread for thread in set(threading.enumerate()) - before if thread.is_alive()]
    assert {"loader", "model"} <= {thread.name for thread in lasting} and all(thread.daemon for thread in lasting)


def test_closing_ends_with_the_call_that_is_computed():
    reranker = Reranker()
    reranker.gate.clear()
    thread = ModelThread(4)
    thread.start()
    answers = [thread.submit(Job(reranker, ["a"] * 10, "first"))]
    assert reranker.entered.acquire(timeout=10)
    answers.append(thread.submit(Job(reranker, ["a"], "second")))
    closing = threading.Thread(target=thread.close)
    closing.start()
    wait_until(lambda: thread._closing)
    reranker.gate.set()
    closing.join(10)
    assert not closing.is_alive() and thread._running.done()
    assert len(reranker.calls) == 1 and all(answer.cancelled() for answer in answers)


def test_too_many_requests():
    reranker = Reranker()
    with served(reranker, requests=3) as client:
        with held_up(reranker, client, FIRST) as send:
            waiting = [send(FIRST), send(FIRST)]
            response = rerank(client)
            refused(response, 503, "3 requests are in progress")
            assert response.headers["retry-after"] == "1"
            assert client.get("/health").status_code == 200
        assert [answer.result().status_code for answer in waiting] == [200, 200]
        assert rerank(client).status_code == 200


def test_too_large_requests_together():
    reranker = Reranker()
    with served(reranker, bodies=1_500) as client:
        large = {"query": "a", "documents": ["b" * 800]}
        with held_up(reranker, client, large):
            response = client.post("/v1/rerank", json=large)
            refused(response, 503, "too large together")
            assert response.headers["retry-after"] == "1"
        assert client.post("/v1/rerank", json=large).status_code == 200


def test_bodies_that_stop_coming():
    app = create_app(ServedModels.of(Reranker(), None), ServerSettings(limits=Limits(silence=0.05)))
    scope = {"type": "http", "method": "POST", "path": "/v1/rerank", "query_string": b"", "http_version": "1.1"}
    scope |= {"headers": [(b"content-type", b"application/json")], "scheme": "http", "root_path": ""}
    messages = iter([{"type": "http.request", "body": b'{"query"', "more_body": True}])
    sent = []

    async def receive() -> dict:
        return next(messages, None) or await asyncio.sleep(60)

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    refused(SimpleNamespace(status_code=sent[0]["status"], content=sent[1]["body"], text=""), 408, "0.05 seconds")


# --- over a socket --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(*parts, **limits) -> Iterator[int]:
    """A server of uvicorn's in a thread; gives its port."""
    app = create_app(ServedModels.of(*parts), ServerSettings(limits=Limits(**limits)))
    server, listener = uvicorn.Server(uvicorn.Config(app, log_level="warning")), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def post(connection: http.client.HTTPConnection, path: str, body, **headers) -> tuple[int, dict]:
    body = json.dumps(body) if isinstance(body, dict) else body
    connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_fifty_clients():
    reranker, model, requests = Reranker(), Model(), 4
    failures = []

    def client(number: int, port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for i in range(requests):
            query, texts = f"{number} {i}", [f"{number} {i} {j}" for j in range(1 + (number + i) % 7)]
            scores = np.array([score(query, text) for text in texts], np.float32)
            if i % 3:
                status, body = post(connection, "/v1/rerank", {"query": query, "documents": texts})
                expected = [(j, float(scores[j])) for j in np.argsort(-scores, kind="stable").tolist()]
                found = [(row["index"], row["relevance_score"]) for row in body.get("results", ())]
            else:
                status, body = post(connection, "/v1/embeddings", {"input": texts})
                expected = [[np.float32(score(f"document{k}", text)) for k in range(4)] for text in texts]
                found = [[np.float32(x) for x in row["embedding"]] for row in body.get("data", ())]
            if status != 200 or found != expected:
                failures.append((status, body))

    with listening(reranker, model) as port, ThreadPoolExecutor(50) as pool:
        for answer in [pool.submit(client, number, port) for number in range(50)]:
            answer.result()
    assert not failures
    assert len(reranker.calls) + len(model.calls) < 50 * requests


def test_a_body_over_the_limit_that_does_not_tell_its_length():
    sent = itertools.count()

    def parts():
        for _ in range(10):
            next(sent)
            yield b" " * 100_000

    with listening(Reranker(), None, body=250_000) as port:
        for content in (parts(), b" " * 1_000_000):
            status, body = post(http.client.HTTPConnection("127.0.0.1", port), "/v1/rerank", content)
            assert status == 413 and "250,000 bytes" in body["error"]["message"]
        connection = http.client.HTTPConnection("127.0.0.1", port)
        assert post(connection, "/v1/rerank", FIRST)[0] == 200


def test_a_client_that_leaves_is_not_computed_for():
    reranker = Reranker()
    with listening(reranker, None) as port:
        reranker.gate.clear()
        connections = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(3)]
        for connection, query in zip(connections, ("first", "leaves", "stays"), strict=True):
            body = json.dumps({"query": query, "documents": ["a"]})
            connection.request("POST", "/v1/rerank", body, {"Content-Type": "application/json"})
            if query == "first":
                assert reranker.entered.acquire(timeout=10)
            time.sleep(0.1)  # so that they come in this order
        connections[1].close()
        time.sleep(0.3)
        reranker.gate.set()
        assert [connections[i].getresponse().status for i in (0, 2)] == [200, 200]
    assert [query for call in reranker.calls for query, _ in call] == ["first", "stays"]


def test_answers_are_sent_at_once():
    """Held back until the client acknowledged their headers, they took 40 ms."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# Plain mode computes in the thread that asks, as on GPUs: what another thread left uncomputed fails there.
SCRIPT = """
import sys
import embed
from mlx_retrieval.inference.serving.app import ServerSettings
from mlx_retrieval.inference.serving.run import run
from mlx_retrieval.inference.serving.served_models import ServedModels
try:
    run(ServedModels.of(None, embed.load(sys.argv[1])), ServerSettings(keys=("k3y",)), port=0)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.slow
def test_the_command_with_a_real_model_until_ctrl_c(small):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLX_RETRIEVAL_PLAIN": "1"}
    command = [sys.executable, "-c", SCRIPT, small]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"serving {small} at http://127.0.0.1:") and "with an API key" in line
        port = int(line.split("127.0.0.1:")[1].split(",")[0])
        texts = ["the boiler drips", "a bike", ""]
        connection = http.client.HTTPConnection("127.0.0.1", port)
        status, body = post(connection, "/v1/embeddings", {"input": texts}, Authorization="Bearer k3y")
        assert status == 200
        model = embedder.load(small)
        expected = model.encode(texts, prompt="document")
        assert np.abs(np.array([row["embedding"] for row in body["data"]]) - expected).max() < 1e-4
        assert body["usage"]["total_tokens"] == model.tokenizer(texts, "document").lengths.sum()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (130, "", "")
    finally:
        process.kill()
        process.wait()
