"""A server under load: 50 clients at once, every answer compared with the one that the same request got alone.

    python benchmarks/serve_load.py --model a=adapters/a/best b=adapters/b/best rank=adapters/cross/best
    python benchmarks/serve_load.py --model docs=FOLDER --peer sentence-transformers infinity --seconds 30
    python benchmarks/serve_load.py --model docs=FOLDER --seconds 10 -- --max-memory 2      # the rest is for serve.py

Starts `serve.py` in a process of its own and mixes all shapes and models. Scores and vectors may differ by
`--tolerance`, since they are computed beside those of other requests, and an order only where scores are that close.
The clients run on the same machine and take their part of it. Exit code 1: an error, or an answer that differs.

With --peer, only OpenAI's embeddings are asked for, of this server and then of each peer with the same model, a folder
that sentence-transformers loads: its `encode` behind FastAPI, one request after the other, or infinity's own server.
"""

import argparse
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "the boiler drips at night and no one knows why it rains on the grey town where a bike squeaks"
WORDS = SENTENCE.split()
START_S, ANSWER_S = 300, 300  # how long loading, and one answer, may take
OPENAI = "/v1/embeddings"
JSON = {"Content-Type": "application/json"}
PEER = """
import sys, threading, uvicorn
from fastapi import FastAPI, Request
from sentence_transformers import SentenceTransformer

app, lock = FastAPI(), threading.Lock()
model = SentenceTransformer(sys.argv[1], device="cpu" if sys.argv[3] == "cpu" else None)

@app.get("/health")
def health(): return {"status": "ok"}

@app.post("/v1/embeddings")
def embed(body: dict):
    with lock:
        vectors = model.encode_document(body["input"])
    return {"data": [{"index": i, "embedding": vector.tolist()} for i, vector in enumerate(vectors)]}

uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""


class Shape(NamedTuple):
    """A public shape: its path, a body for texts, and the numbers of an answer, a list for each text in their order."""

    path: str
    body: Callable[[str, str, list[str]], dict]
    numbers: Callable[[dict | list], list]


def _ranked(rows: list[dict], key: str) -> list:
    """The scores by the texts' order; [] where they do not fall, or a text is missing or there twice."""
    scores = [row[key] for row in rows]
    order = sorted((row["index"], [row[key]]) for row in rows)
    whole = [index for index, _ in order] == list(range(len(rows)))
    return [score for _, score in order] if whole and scores == sorted(scores, reverse=True) else []


SHAPES = {
    "embed": [
        Shape(OPENAI, lambda m, q, t: {"model": m, "input": t}, lambda a: [row["embedding"] for row in a["data"]]),
        Shape(
            "/v2/embed",
            lambda m, q, t: {"model": m, "texts": t, "input_type": "search_query"},
            lambda a: a["embeddings"]["float"],
        ),
        Shape("/v1/embed", lambda m, q, t: {"model": m, "texts": t}, lambda a: a["embeddings"]),
        Shape("/embed", lambda m, q, t: {"model": m, "inputs": t}, lambda a: a),
    ],
    "rerank": [
        Shape(
            path,
            lambda m, q, t: {"model": m, "query": q, "documents": t},
            lambda a: _ranked(a["results"], "relevance_score"),
        )
        for path in ("/v1/rerank", "/v2/rerank")
    ]
    + [Shape("/rerank", lambda m, q, t: {"model": m, "query": q, "texts": t}, lambda a: _ranked(a, "score"))],
}
SHAPES["late"] = SHAPES["rerank"]


@dataclass
class Request:
    """A request, and the numbers that answered it when it was alone."""

    shape: Shape
    body: str
    expected: list = field(default_factory=list)


@dataclass
class Tally:
    """The clients' answers and errors."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def requests(models: dict[str, str], count: int, documents: int, words: int, only: str | None) -> list[Request]:
    """`count` different requests of each model and shape, the same every time: 1 to `documents` texts."""
    rng, out = random.Random(0), []

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    for name, kind in models.items():
        for shape in SHAPES[kind]:
            for _ in range(count if only in (None, shape.path) else 0):
                texts = [text(words) for _ in range(rng.randint(1, documents))]
                out.append(Request(shape, json.dumps(shape.body(name, text(8), texts))))
    return out


def get(port: int, path: str) -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path)
    return json.loads(connection.getresponse().read())


def ask(connection: http.client.HTTPConnection, request: Request) -> tuple[list, str]:
    """Numbers of an answer by the texts' order, a list for each text, and what is wrong with it ("" = nothing)."""
    connection.request("POST", request.shape.path, request.body, JSON)
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        return [], f"{response.status} {body[:200].decode(errors='replace')}"
    return request.shape.numbers(json.loads(body)), ""


def difference(found: list, expected: list) -> float:
    """The largest between two answers; infinite where they have different shapes."""
    if [len(row) for row in found] != [len(row) for row in expected]:
        return float("inf")
    pairs = zip(found, expected, strict=True)
    return max(abs(a - b) for mine, yours in pairs for a, b in zip(mine, yours, strict=True))


def client(number: int, port: int, plan: list[Request], end: float, tolerance: float) -> Tally:
    """Ask one request after the other until `end`."""
    tally, rng, connection = Tally(), random.Random(number), None
    while time.monotonic() < end:
        request = rng.choice(plan)
        connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
        began = time.monotonic()
        try:
            found, error = ask(connection, request)
        except (OSError, http.client.HTTPException) as failure:
            tally.errors.append(repr(failure))
            connection.close()
            connection = None
            continue
        tally.seconds.append(time.monotonic() - began)
        if error:
            tally.errors.append(error)
        elif (off := difference(found, request.expected)) > tolerance:
            tally.wrong.append(f"{request.shape.path}: {off:.2g} from the first answer")
    return tally


def resident(pid: int) -> float:
    """MB of a process that are in memory; 0 where it has ended."""
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(told.stdout.strip() or 0) / 1024


def sample(pid: int, began: float, samples: list[tuple[float, float]], stop: threading.Event) -> None:
    """Add (seconds since `began`, MB) every second."""
    while not stop.wait(1):
        samples.append((time.monotonic() - began, resident(pid)))


def wait_for(port: int, path: str, server: subprocess.Popen) -> None:
    """Return as soon as the path is answered by 200."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"serve_load.py: the server ended with {server.returncode}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    sys.exit(f"serve_load.py: the server was not ready in {START_S} s")


def load(server: subprocess.Popen, port: int, plan: list[Request], args: argparse.Namespace) -> tuple[float, int]:
    """Ask, and print what came of it; answers a second, and 1 where anything was wrong."""
    samples, stop, began = [], threading.Event(), time.monotonic()
    sampler = threading.Thread(target=sample, args=(server.pid, began, samples, stop))
    sampler.start()
    with ThreadPoolExecutor(args.clients) as pool:
        settings = (port, plan, began + args.seconds, args.tolerance)
        tallies = [pool.submit(client, number, *settings) for number in range(args.clients)]
        tallies = [tally.result() for tally in tallies]
    passed = time.monotonic() - began
    samples.append((passed, resident(server.pid)))
    stop.set()
    sampler.join()

    seconds = sorted(second for tally in tallies for second in tally.seconds)
    errors, wrong = ([text for tally in tallies for text in getattr(tally, name)] for name in ("errors", "wrong"))
    rate = len(seconds) / passed
    print(f"{args.clients} clients, {passed:.1f} s, {len(seconds):,} answers, {rate:,.1f} a second")
    if seconds:
        p50, p95 = (1000 * seconds[min(len(seconds) - 1, int(len(seconds) * share))] for share in (0.5, 0.95))
        print(f"latency: p50 {p50:,.0f} ms, p95 {p95:,.0f} ms, longest {1000 * seconds[-1]:,.0f} ms")
    moments = [*range(20, int(args.seconds), 20), passed]
    memory = [(moment, min(samples, key=lambda sample: abs(sample[0] - moment))[1]) for moment in moments]
    print("memory: " + ", ".join(f"{mb:,.0f} MB at {moment:.0f} s" for moment, mb in memory))
    most = max(mb for _, mb in samples)
    print(f"growth from {memory[0][0]:.0f} s on: {memory[-1][1] / memory[0][1] - 1:+.1%}; {most:,.0f} MB at most")
    print(f"errors: {len(errors)}; wrong order or numbers: {len(wrong)} (tolerance {args.tolerance:g})")
    for text in sorted(set(errors + wrong))[:10]:
        print(f"  {text}")
    return rate, int(bool(errors or wrong or not seconds))


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen]:
    """A server's process, which is told to end."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            yield server
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                print("serve_load.py: the server did not end, and was killed", file=sys.stderr)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def peer_command(peer: str, folder: str, port: int) -> list[str]:
    """The command that starts another library's server with a model."""
    if peer == "infinity":
        flags = ["--model-id", folder, "--port", str(port), "--url-prefix", "/v1", "--device", "cpu"]
        return ["infinity_emb", "v2", *flags]
    return [sys.executable, "-c", PEER, folder, str(port), "cpu"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", required=True, metavar="NAME=PATH", help="as for serve.py")
    parser.add_argument("--peer", nargs="+", default=[], choices=("sentence-transformers", "infinity"))
    parser.add_argument("--clients", type=int, default=50, help="asking at once (default: 50)")
    parser.add_argument("--seconds", type=float, default=120, help="how long (default: 120)")
    parser.add_argument("--requests", type=int, default=10, help="requests of a model and shape (default: 10)")
    parser.add_argument("--documents", type=int, default=10, help="texts of a request, at most (default: 10)")
    parser.add_argument("--words", type=int, default=40, help="words of a text, at most (default: 40)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="between two answers (default: 1e-3)")
    parser.add_argument("rest", nargs="*", help="after --: more flags for serve.py")
    args = parser.parse_args()
    port, rates = free_port(), {}
    command = [sys.executable, str(ROOT / "serve.py"), "--port", str(port), "--model", *args.model, *args.rest]
    with started(command) as server:
        wait_for(port, "/ready", server)
        models = {each["id"]: each["kind"] for each in get(port, "/info")["models"]}
        plan = requests(models, args.requests, args.documents, args.words, OPENAI if args.peer else None)
        alone = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
        for request in plan:
            request.expected, error = ask(alone, request)
            if error or not request.expected:
                sys.exit(f"serve_load.py: {request.shape.path}, asked alone: {error or 'in a wrong order'}")
        alone.close()
        print(f"{len(plan)} requests answered alone; {resident(server.pid):,.0f} MB")
        rates["serve.py"], code = load(server, port, plan, args)
    print(f"server ended with {server.returncode}")
    for peer in args.peer:
        port, folder = free_port(), args.model[0].rpartition("=")[2]
        print(f"--- {peer}")
        with started(peer_command(peer, folder, port)) as server:
            wait_for(port, "/v1/health" if peer == "infinity" else "/health", server)
            rates[peer], wrong = load(server, port, plan, args)
        code = code or wrong
        print(f"serve.py: {rates['serve.py'] / rates[peer]:.2f} times the answers of {peer}")
    return code


if __name__ == "__main__":
    sys.exit(main())
