"""The answers of a server: vectors in every form beside the library's, large answers, and those it owes at its end.

python -m pytest tests/inference/test_server_answers.py
"""

import asyncio
import base64
import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import served
from fastapi import Response
from served import refused, wait_until
from starlette.testclient import TestClient
from trained_models import trained

from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.inference.serving import app
from mlx_retrieval.inference.serving.engine import Limits
from mlx_retrieval.inference.serving.guard import Guard, Keys, json_response
from mlx_retrieval.inference.serving.requests import Token, Tokens, Vectors
from mlx_retrieval.inference.serving.served_models import ServedModels
from mlx_retrieval.inference.serving.shapes import tei

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["where is Kyoto", "a kidney stone forms in the kidney", "a"]
NUMBERS = np.random.default_rng(0).random((2_000, 64), np.float32)


@pytest.fixture(scope="module")
def late(small, tmp_path_factory) -> Reranker:
    _, folder = trained(small, tmp_path_factory.mktemp("late") / "model", task="late", projection=16)
    return Reranker(str(folder))


@pytest.fixture(scope="module")
def model(small) -> embedder.Model:
    return embedder.load(small)


@pytest.fixture(scope="module")
def client(model, late) -> Iterator[TestClient]:
    with TestClient(app.create_app(ServedModels.of(late, model)), raise_server_exceptions=False) as client:
        yield client


# --- vectors in every form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/embed", "/v2/embed"])
def test_cohere_s_types_are_the_library_s_vectors(client, model, path):
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    asked = {"model": "any", "texts": TEXTS, "input_type": "search_query", "embedding_types": types}
    answer = client.post(path, json=asked)
    assert answer.status_code == 200, answer.text
    found, vectors = answer.json()["embeddings"], model.encode(TEXTS, prompt="query")
    assert list(found) == types
    assert np.abs(np.float32(found["float"]) - vectors).max() < 1e-6
    floats = [np.frombuffer(base64.b64decode(text), "<f4") for text in found["base64"]]
    assert np.array_equal(floats, np.float32(found["float"]))
    scale = 127 * max(1, math.sqrt(vectors.shape[1]) / 8)
    assert np.abs(np.array(found["int8"]) - np.clip(scale * vectors, -128, 127)).max() <= 0.501
    assert np.array_equal(np.array(found["uint8"]) - 128, found["int8"])
    for name in ("binary", "ubinary"):
        assert np.array_equal(found[name], model.encode(TEXTS, prompt="query", precision=name))


@pytest.mark.parametrize("prompt", ["query", "document"])
def test_vectors_of_tokens_are_the_library_s(client, late, prompt):
    answer = client.post("/embed_all", json={"inputs": TEXTS, "prompt_name": prompt})
    assert answer.status_code == 200, answer.text
    expected = embedder.load(late.name).encode(TEXTS, prompt=prompt)
    assert [np.shape(rows) for rows in answer.json()] == [rows.shape for rows in expected]
    for rows, vectors in zip(answer.json(), expected, strict=True):
        assert vectors.shape[1] == 16 and np.abs(np.float32(rows) - vectors).max() < 1e-6
    assert (
        client.post("/embed_all", json={"inputs": TEXTS[0]}).json()
        == client.post("/embed_all", json={"inputs": TEXTS[:1], "prompt_name": "document"}).json()
    )


# --- large answers --------------------------------------------------------------------------------------------------


def test_too_many_vectors_of_tokens_are_refused_before_they_are_computed(late, monkeypatch):
    """Regression: 4 MB of texts demanded 79 million numbers, four gigabytes of memory."""
    numbers = 16 * late.late.count_tokens(TEXTS, "document")
    settings = app.ServerSettings(limits=Limits(numbers=numbers))
    with TestClient(app.create_app(ServedModels.of(late, None), settings), raise_server_exceptions=False) as client:
        assert client.post("/embed_all", json={"inputs": TEXTS}).status_code == 200
        monkeypatch.setattr(late.late, "encode", lambda *_, **__: pytest.fail("it was computed"))
        message = refused(client.post("/embed_all", json={"inputs": [*TEXTS, "a"]}), 400, "inputs: ", "16 numbers each")
        assert f"at most {numbers:,} numbers" in message


def test_large_answers_are_written_while_others_are_answered(monkeypatch):
    """Regression: nobody else was answered while numbers became JSON."""
    others, threads, answer = threading.Event(), [], tei.Embed.answer

    def slow(self, result):
        threads.append(threading.current_thread())
        assert others.wait(10)
        return answer(self, result)

    with served.served(None, served.Model()) as client, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(app, "LARGE", 4)  # numbers, of one text
        monkeypatch.setattr(tei.Embed, "answer", slow)
        large = pool.submit(client.post, "/embed", json={"inputs": ["a", "b"]})
        wait_until(lambda: threads)
        assert client.get("/health").status_code == 200
        others.set()
        assert large.result().json() == served.Model().encode(["a", "b"], prompt="document").tolist()
        assert client.post("/embed", json={"inputs": ["a"]}).status_code == 200
    assert threads[0] != threads[1]  # a small one needs no thread


@pytest.mark.parametrize(
    ("body", "result"),
    [
        (tei.Embed(inputs=["a"]), Vectors("a", ["a"], NUMBERS, 1)),
        (tei.EmbedAll(inputs=["a"]), Vectors("a", ["a"], [NUMBERS], 1)),
        (tei.Tokenize(inputs=["a"]), Tokens("a", [[Token(1, "a", False, 0, 1)] * 18_000])),
    ],
)
def test_large_answers_are_written_a_row_at_a_time(body, result):
    """Regression: a list of all numbers took 32 bytes each beside their JSON, and held up all threads while it grew."""
    assert result.size > app.LARGE or isinstance(body, tei.Tokenize)
    tracemalloc.start()
    response = json_response(body.answer(result))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * len(response.body)
    found = json.loads(response.body)
    if isinstance(body, tei.Tokenize):
        assert found == [[{"id": 1, "text": "a", "special": False, "start": 0, "stop": 1}] * 18_000]
    else:
        assert np.array_equal(np.float32(found).reshape(NUMBERS.shape), NUMBERS)


def test_answers_are_sent_in_pieces_that_a_slow_client_can_take():
    """Regression: a client that did not take a megabyte in 60 s was cut off; see also test_server_operations.py."""
    sent, content = [], bytes(300_000)

    async def send(message: dict) -> None:
        sent.append(message)

    guard = Guard(Response(content), Keys(), Limits())
    scope = {"type": "http", "method": "POST", "path": "/v1/rerank", "headers": []}
    asyncio.run(guard(scope, None, send))
    assert b"".join(message["body"] for message in sent[1:]) == content
    assert max(len(message["body"]) for message in sent[1:]) <= 65_536
    assert [message["more_body"] for message in sent[1:]] == [True] * (len(sent) - 2) + [False]


# --- at the server's end --------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import served
from mlx_retrieval.inference.serving.app import ServerSettings
from mlx_retrieval.inference.serving.run import run
from mlx_retrieval.inference.serving.served_models import ServedModels

class Held(served.Reranker):
    def compute(self, call, texts):
        if "held" in texts:
            sys.stdin.readline()

run(ServedModels.of(Held(), None), ServerSettings(keys=("k3y",)), port=0)
"""


@pytest.mark.slow
def test_sigterm_lets_requests_in_flight_be_answered():
    """One that is computed and one that waits, of clients with a key; then the process ends by the signal."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers")))}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, text=True, **pipes)
    try:
        line = process.stdout.readline()
        assert "with an API key" in line
        port = int(line.split("127.0.0.1:")[1].split(",")[0])

        def asked(method: str, path: str, body: dict | None = None, key: str = "k3y") -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
            connection.request(method, path, body and json.dumps(body), headers)
            return connection.getresponse()

        def figure(name: str) -> float:
            page = asked("GET", "/metrics").read().decode()
            return float(page.partition(f"\nmlx_retrieval_{name} ")[2].split()[0])

        def refuses() -> bool:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
            except ConnectionRefusedError:
                return True
            return False

        body = {"query": "held", "documents": ["a", "b"]}
        assert asked("POST", "/v1/rerank", body, key="other").status == 401
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(asked, "POST", "/v1/rerank", body)]
            wait_until(lambda: figure("requests_in_progress") == 2 and figure("queue") == 0)
            answers.append(pool.submit(asked, "POST", "/v1/rerank", body))
            wait_until(lambda: figure("requests_in_progress") == 3 and figure("queue") == 1)
            process.send_signal(signal.SIGTERM)
            wait_until(refuses)
            process.stdin.write("\n\n")
            process.stdin.flush()
            for answer in answers:
                assert answer.result(30).status == 200
                assert len(json.loads(answer.result().read())["results"]) == 2
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (-signal.SIGTERM, "", "")
    finally:
        process.kill()
        process.wait()
