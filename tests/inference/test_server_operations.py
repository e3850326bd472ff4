"""A server in operation: figures, access log, keys, web pages, documentation, and clients that are slow or mean harm.

python -m pytest tests/inference/test_server_operations.py
"""

import contextlib
import functools
import http.client
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn
from served import Model, Reranker, refused, rerank, wait_until
from starlette.testclient import TestClient

from mlx_retrieval.inference.serving.app import ServerSettings, create_app
from mlx_retrieval.inference.serving.engine import Limits
from mlx_retrieval.inference.serving.guard import ImpatientProtocol
from mlx_retrieval.inference.serving.run import listen
from mlx_retrieval.inference.serving.served_models import ServedModels

FIRST = {"query": "first", "documents": ["a", "b"]}


@contextlib.contextmanager
def client_of(model=None, reranker=None, **settings) -> Iterator[TestClient]:
    app = create_app(ServedModels.of(reranker or Reranker(), model or Model()), ServerSettings(**settings))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def figures(client: TestClient, name: str) -> dict[str, float]:
    """The figures of this name, by their labels."""
    lines = re.findall(rf"^mlx_retrieval_{name}(?:{{(.*)}})? (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return {labels: float(value) for labels, value in lines}


def test_figures_for_prometheus():
    with client_of() as client:
        for _ in range(3):
            client.post("/v1/embeddings", json={"input": ["one text", "two"]})
        rerank(client), client.post("/v1/rerank", json={}), client.get("/nowhere/1"), client.get("/nowhere/2")
        rerank(client, documents=["crash"])
        assert client.get("/metrics").headers["content-type"].startswith("text/plain")
        requests = figures(client, "requests_total")
        assert requests['model="a-model",path="/v1/embeddings",status="200"'] == 3
        assert requests['model="",path="/v1/rerank",status="400"'] == 1
        assert requests['model="a-reranker",path="/v1/rerank",status="500"'] == 1  # it was 0, as if the client had left
        assert requests['model="",path="other",status="404"'] == 2  # paths that strangers make up are no labels
        assert figures(client, "tokens_total")['model="a-model"'] == 15
        assert figures(client, "texts_total")['model="a-model"'] == 6
        assert figures(client, "request_seconds_count")['path="/v1/embeddings"'] == 3
        assert figures(client, "request_seconds_bucket")['le="+Inf",path="/v1/embeddings"'] == 3
        assert figures(client, "model_loaded") == {'model="a-model"': 1, 'model="a-reranker"': 1}
        assert figures(client, "queue") == {"": 0} and figures(client, "requests_in_progress") == {"": 1}
        assert figures(client, "mlx_memory_bytes").keys() == {'kind="active"', 'kind="cache"'}


def test_waiting_requests_are_in_the_figures():
    reranker = Reranker()
    with client_of(reranker=reranker) as client:
        thread = client.app.state.service.thread
        reranker.gate.clear()
        with ThreadPoolExecutor(4) as pool:
            try:
                posts = [pool.submit(client.post, "/v1/rerank", json=FIRST)]
                assert reranker.entered.acquire(timeout=10)
                posts += [pool.submit(client.post, "/v1/rerank", json=FIRST) for _ in range(3)]
                wait_until(lambda: thread.waiting == 3)
                assert figures(client, "queue") == {"": 3} and figures(client, "requests_in_progress") == {"": 5}
            finally:
                reranker.gate.set()
        assert [post.result().status_code for post in posts] == [200] * 4


def test_figures_are_there_when_too_many_requests_are_in_progress():
    """Regression: they got 503 as others do, and were missing just when they are looked at."""
    reranker = Reranker()
    with client_of(reranker=reranker, keys=("k",), limits=Limits(requests=1)) as client, ThreadPoolExecutor(1) as pool:
        refused(client.get("/metrics"), 401)
        client.headers["Authorization"] = "Bearer k"
        reranker.gate.clear()
        try:
            post = pool.submit(client.post, "/v1/rerank", json=FIRST)
            assert reranker.entered.acquire(timeout=10)
            refused(rerank(client), 503)
            assert figures(client, "requests_in_progress") == {"": 2}
        finally:
            reranker.gate.set()
        assert post.result().status_code == 200


def test_the_access_log_is_a_json_object_a_request():
    log = io.StringIO()
    with client_of(access_log=log, keys=("k",)) as client:
        client.get("/health")
        rerank(client)
        client.headers["Authorization"] = "Bearer k"
        answer = client.post("/v1/embeddings", json={"input": ["one text", "a\nsecret"]})
    assert "secret" not in log.getvalue() and "Bearer" not in log.getvalue()
    health, refusal, embeddings = map(json.loads, log.getvalue().splitlines())
    assert (health["method"], health["path"], health["status"]) == ("GET", "/health", 200)
    assert (refusal["path"], refusal["status"], refusal["model"]) == ("/v1/rerank", 401, "")
    assert embeddings["ms"] >= 0 and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", embeddings["time"])
    del embeddings["ms"], embeddings["time"]
    assert embeddings == {
        "client": "testclient",
        "method": "POST",
        "path": "/v1/embeddings",
        "status": 200,
        "bytes": len(answer.content),
        "model": "a-model",
        "texts": 2,
        "tokens": 6,
    }


def test_any_of_several_keys_opens():
    with client_of(keys=("first", "second")) as client:
        for key, status in (("first", 200), ("second", 200), ("third", 401), ("firs", 401), ("", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert client.post("/v1/rerank", json=FIRST, headers=headers).status_code == status
        assert [client.get(path).status_code for path in ("/health", "/ready")] == [200, 200]
        for path in ("/metrics", "/info", "/v1/models", "/docs", "/openapi.json"):
            refused(client.get(path), 401)


def test_the_documentation_can_be_turned_off():
    with client_of(docs=False) as client:
        for path in ("/docs", "/openapi.json", "/redoc"):
            refused(client.get(path), 404)


def test_web_pages_of_others_are_let_in_only_where_asked_for():
    ask = {"Origin": "https://a.org", "Access-Control-Request-Method": "POST"}
    with client_of(keys=("k",)) as client:
        refused(client.options("/v1/rerank", headers=ask), 401)
        assert "access-control-allow-origin" not in client.get("/health", headers={"Origin": "https://a.org"}).headers
    with client_of(keys=("k",), origins=("https://a.org",)) as client:
        answer = client.options("/v1/rerank", headers=ask | {"Access-Control-Request-Headers": "authorization"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://a.org"
        assert client.options("/v1/rerank", headers=ask | {"Origin": "https://b.org"}).status_code == 400
        assert client.post("/v1/rerank", json=FIRST, headers={"Origin": "https://a.org"}).status_code == 401


# --- over a socket --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(
    reranker=None, patience: int = 10, sent_bytes: int | None = None, **limits
) -> Iterator[tuple[int, uvicorn.Server]]:
    """A server in a thread, as `run` has it; gives its port. The system keeps `sent_bytes` that no client has taken."""
    limits = Limits(**limits)
    app = create_app(ServedModels.of(reranker or Reranker(), Model()), ServerSettings(limits=limits))
    protocol = functools.partial(ImpatientProtocol, limits=limits)
    config = uvicorn.Config(app, http=protocol, ws="none", log_level="critical", timeout_graceful_shutdown=patience)
    server, listener = uvicorn.Server(config), listen("127.0.0.1", 0)
    if sent_bytes is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sent_bytes)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1], server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def request_of(path: str = "/v1/rerank", body: bytes = json.dumps(FIRST).encode(), headers: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def answer_to(port: int, *pieces: bytes, pause: float = 0) -> bytes:
    """The first bytes of an answer to what is sent in pieces; empty = the server closed the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        with contextlib.suppress(ConnectionError):
            return connection.recv(100)
        return b""


def test_half_open_connections_and_slow_headers_are_closed():
    with listening(head=0.3) as (port, server):
        silent = socket.create_connection(("127.0.0.1", port), timeout=20)
        begun = socket.create_connection(("127.0.0.1", port), timeout=20)
        begun.sendall(b"POST /v1/rerank HTTP/1.1\r\nHo")
        slow = threading.Thread(
            target=answer_to, args=(port, *[b"GET /health HTTP/1.1\r\nX: a"] * 20), kwargs={"pause": 0.05}
        )
        slow.start()
        assert silent.recv(10) == b"" and begun.recv(10) == b""  # closed
        assert answer_to(port, request_of()).startswith(b"HTTP/1.1 200")
        kept = http.client.HTTPConnection("127.0.0.1", port, timeout=20)  # several requests on one connection
        for _ in range(2):
            kept.request("POST", "/v1/rerank", json.dumps(FIRST), {"Content-Type": "application/json"})
            assert kept.getresponse().read().startswith(b'{"id"')
        kept.sock.sendall(b"POST ")
        assert kept.sock.recv(10) == b""
        slow.join()
        wait_until(lambda: not server.server_state.connections)


@pytest.mark.slow
def test_a_slow_body_that_keeps_coming_is_answered():
    whole = request_of()
    middle = whole.index(b"\r\n\r\n") + 6
    pieces = [whole[:middle], *(whole[i : i + 4] for i in range(middle, len(whole), 4))]
    with listening(head=0.2, silence=0.5, rate=20) as (port, _):
        assert answer_to(port, *pieces, pause=0.1).startswith(b"HTTP/1.1 200")
        assert answer_to(port, whole[:-3]).startswith(b"HTTP/1.1 408")
    with listening(silence=0.5, rate=1_000) as (port, _):  # 40 bytes a second would hold a place for days
        assert answer_to(port, *pieces, pause=0.1).startswith(b"HTTP/1.1 408")


@pytest.mark.slow
def test_a_client_that_takes_no_answer_holds_no_place():
    """Its connection is closed once it has taken nothing for a time, and its request no longer counts."""
    with listening(silence=0.3, requests=1, documents=200_000, body=4 << 20, batch=200_000) as (port, _):
        body = json.dumps({"query": "a", "documents": ["b" * 9] * 150_000, "return_documents": True}).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as greedy:
            greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            greedy.sendall(request_of(body=body))
            wait_until(lambda: answer_to(port, request_of()).startswith(b"HTTP/1.1 200"), 20)


@pytest.mark.slow
def test_a_client_that_takes_its_answer_slowly_gets_it():
    """Regression: it was cut off, as it had 60 s for a megabyte. Here it takes 400 KB a second, and has one."""
    body = json.dumps({"query": "a", "documents": ["b" * 800] * 1_500, "return_documents": True}).encode()
    with listening(silence=1, sent_bytes=65_536) as (port, _), socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        slow.settimeout(20)
        slow.connect(("127.0.0.1", port))
        slow.sendall(request_of(body=body, headers="Connection: close\r\n"))
        answer = b""
        while piece := slow.recv(8_192):
            answer += piece
            time.sleep(len(piece) / 400_000)
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and len(json.loads(content)["results"]) == 1_500


@pytest.mark.slow
def test_a_hundred_megabytes_and_ten_thousand_headers():
    with listening() as (port, _):
        megabytes = 100 * [b" " * (1 << 20)]
        head = request_of(body=b"", headers="X: a\r\n").replace(b"Content-Length: 0", b"Content-Length: 104857600")
        assert answer_to(port, head, *megabytes)[:12] in (b"HTTP/1.1 413", b"")  # the answer, or a closed connection
        headers = "".join(f"X-{i}: {i}\r\n" for i in range(10_000))
        assert answer_to(port, request_of(headers=headers)).startswith(b"HTTP/1.1 400")
        assert answer_to(port, b"\xff\xfe\x00" * 1000 + b"\r\n\r\n").startswith(b"HTTP/1.1 400")
        deep = b'{"query": "a", "documents": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
        assert answer_to(port, request_of(body=deep)).startswith(b"HTTP/1.1 400")
        assert answer_to(port, request_of(body=b'{"query": "\xff\xfe", "documents": ["a"]}')).startswith(
            b"HTTP/1.1 400"
        )
        assert answer_to(port, request_of()).startswith(b"HTTP/1.1 200")  # and it is still up


@pytest.mark.parametrize(
    ("unit", "last", "words"),
    [
        (b"[],", b"[]", "lists and objects; at most 50,000"),
        (b"[1],", b"[1]", "lists and objects; at most 50,000"),
        (b"{},", b"{}", "lists and objects"),
        (b"[" * 90 + b"]" * 90 + b",", b"[]", "lists and objects"),
        (b'"",', b'""', "values; at most 2,000,000"),
        (b"1,", b"1", "values; at most 2,000,000"),
    ],
)
def test_millions_of_lists_are_refused_before_they_stop_the_server(unit, last, words):
    """Regression: 16 MB of them took 10 to 20 seconds to parse, in which no other request was answered."""
    with client_of() as client:
        count = ((16 << 20) - 40) // len(unit)
        body = b'{"input": [' + unit * count + last + b"]}"
        refused(client.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"}), 400, words)


def test_brackets_and_commas_in_texts_are_no_lists():
    text = '{"a": [1, 2]} \\\\ "quoted \\\\" and [more]' * 10
    with client_of(limits=Limits(structures=5, values=6)) as client:
        assert client.post("/v1/embeddings", json={"input": [text, text, "\\\\"], "user": text}).status_code == 200
        words = "the body has 6 lists and objects; at most 5"
        refused(client.post("/v1/embeddings", json={"input": [text, [], [], [], []]}), 400, words)
        refused(client.post("/v1/embeddings", json={"input": ["a"] * 8}), 400, "the body has 7 values; at most 6")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"[" * 200_000, "lists and objects"), (b"[" * 40_000, "nested too deeply"), (b'"\xff"', "UTF-8")],
)
def test_bodies_that_cannot_be_parsed(content, words):
    with client_of() as client:
        refused(
            client.post("/v1/embeddings", content=content, headers={"Content-Type": "application/json"}), 400, words
        )


def test_requests_that_take_too_long_at_the_end_are_told_so():
    """Regression: they got "Internal Server Error" in no API's form, and the log a traceback."""
    reranker = Reranker()
    reranker.gate.clear()
    with listening(reranker, patience=1) as (port, server):
        with ThreadPoolExecutor(1) as pool:
            asked = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            asked.request("POST", "/v1/rerank", json.dumps(FIRST), {"Content-Type": "application/json"})
            assert reranker.entered.acquire(timeout=10)
            server.should_exit = True
            answer = pool.submit(asked.getresponse).result(10)
            body = json.loads(answer.read())
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert body["message"] == body["error"]["message"] == "the server is ending"
        reranker.gate.set()


def test_requests_in_progress_are_answered_at_the_end():
    reranker = Reranker()
    reranker.gate.clear()
    with listening(reranker) as (port, server):
        answers: list[bytes] = []
        ask = [threading.Thread(target=lambda: answers.append(answer_to(port, request_of()))) for _ in range(3)]
        for each in ask:
            each.start()
        assert reranker.entered.acquire(timeout=10)
        wait_until(lambda: len(server.server_state.tasks) == 3)
        server.should_exit = True
        time.sleep(0.3)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=1)
        reranker.gate.set()
        for each in ask:
            each.join(20)
    assert [answer[:12] for answer in answers] == [b"HTTP/1.1 200"] * 3
