"""A server under load: 50 clients at once, every answer compared with the one that the same request got alone.

    python benchmarks/serve_load.py --model a=adapters/a/best b=adapters/b/best rank=adapters/cross/best
    python benchmarks/serve_load.py --model docs=FOLDER --peer batched one-by-one infinity --seconds 20 --rounds 3
    python benchmarks/serve_load.py --model docs=FOLDER --seconds 10 -- --max-memory 2      # the rest is for serve.py

Starts `serve.py` in a process of its own and mixes all shapes and models. Scores and vectors may differ by
`--tolerance`, since they are computed beside those of other requests, and an order only where scores are that close.
The clients run on the same machine and take their part of it. Exit code 1: an error, or an answer that differs.

With --peer, only OpenAI's embeddings are asked for, in turns of this server and of each peer, with the one model, a
folder that sentence-transformers loads: `batched` and `one-by-one` are serve_peer.py's, `infinity` is that library's
server, in an environment of its own (`pip install 'infinity-emb[server,torch]'`; --infinity names its command).
"""

import argparse
import base64
import http.client
import json
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "the boiler drips at night and no one knows why it rains on the grey town where a bike squeaks"
WORDS = SENTENCE.split()
START_S, ANSWER_S = 300, 300  # how long loading, and one answer, may take
OPENAI = "/v1/embeddings"
JSON = {"Content-Type": "application/json"}


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


def _unpacked(row: dict) -> list[float]:
    """The numbers of a vector in base64, which OpenAI's client asks for."""
    packed = base64.b64decode(row["embedding"])
    return [*struct.unpack(f"<{len(packed) // 4}f", packed)]


def _rows(answer: dict) -> list:
    return [row["embedding"] for row in answer["data"]]


def _embedding(path: str, field: str, numbers: Callable, **more) -> Shape:
    return Shape(path, lambda m, q, t: {"model": m, field: t, **more}, numbers)


def _reranking(path: str, field: str, numbers: Callable) -> Shape:
    return Shape(path, lambda m, q, t: {"model": m, "query": q, field: t}, numbers)


RERANK = [
    *(
        _reranking(path, "documents", lambda a: _ranked(a["results"], "relevance_score"))
        for path in ("/v1/rerank", "/v2/rerank", "/rerank", "/infinity/rerank")
    ),
    _reranking("/rerank", "texts", lambda a: _ranked(a, "score")),
]
SHAPES = {  # all of serving/shapes/table.py
    "embed": [
        _embedding(OPENAI, "input", _rows),  # the only one with --peer
        _embedding(OPENAI, "input", lambda a: [*map(_unpacked, a["data"])], encoding_format="base64"),
        _embedding(OPENAI, "input", _rows, task="retrieval.query", dimensions=16),
        _embedding("/v1/embed", "texts", lambda a: a["embeddings"]),
        _embedding("/v2/embed", "texts", lambda a: a["embeddings"]["float"], input_type="search_query"),
        _embedding("/embed", "inputs", lambda a: a),
        _embedding("/", "inputs", lambda a: a),
        _embedding("/infinity/embeddings", "input", _rows),
        _embedding("/tokenize", "inputs", lambda a: [[token["id"] for token in row] for row in a]),
        Shape(
            "/similarity",
            lambda m, q, t: {"model": m, "inputs": {"source_sentence": q, "sentences": t}},
            lambda a: [[score] for score in a],
        ),
    ],
    "rerank": RERANK,
    "late": [*RERANK, _embedding("/embed_all", "inputs", lambda a: [[x for token in row for x in token] for row in a])],
}


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


def requests(models: dict[str, str], count: int, documents: int, words: int, first: bool) -> list[Request]:
    """`count` different requests of each model and shape, or its first one: 1 to `documents` texts; always the same."""
    rng, out = random.Random(0), []

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    for name, kind in models.items():
        for shape in SHAPES[kind][: 1 if first else None]:
            for _ in range(count):
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
    growth = f"{memory[-1][1] / memory[0][1] - 1:+.1%}" if len(memory) > 1 else "not known in 20 s"
    print(f"growth from 20 s on: {growth}; {most:,.0f} MB at most")
    print(f"errors: {len(errors)}; wrong order or numbers: {len(wrong)} (tolerance {args.tolerance:g})")
    for text in sorted(set(errors + wrong))[:10]:
        print(f"  {text}")
    return rate, int(bool(errors or wrong or not seconds))


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen]:
    """A server's process, which is told to end."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"DO_NOT_TRACK": "1"}) as server:
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


def peer_command(peer: str, model: str, port: int, infinity: str) -> list[str]:
    """The command that starts another library's server with a model, NAME=PATH or a path."""
    name, _, folder = model.partition("=")
    folder = folder or name
    if peer == "infinity":
        address = ["--host", "127.0.0.1", "--port", str(port), "--url-prefix", "/v1"]
        return [infinity, "v2", "--model-id", folder, "--served-model-name", name, *address, "--device", "cpu"]
    one = ["--one-by-one"] if peer == "one-by-one" else []
    return [sys.executable, str(ROOT / "benchmarks" / "serve_peer.py"), folder, "--port", str(port), *one]


def alone(port: int, plan: list[Request]) -> list[list]:
    """Return the numbers of each request, asked alone; which also warms the server up."""
    answers, connection = [], http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    for request in plan:
        numbers, error = ask(connection, request)
        if error or not numbers:
            sys.exit(f"serve_load.py: {request.shape.path}, asked alone: {error or 'in a wrong order'}")
        answers.append(numbers)
    connection.close()
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", required=True, metavar="NAME=PATH", help="as for serve.py")
    parser.add_argument("--peer", nargs="+", default=[], choices=("batched", "one-by-one", "infinity"))
    parser.add_argument("--infinity", default="infinity_emb", metavar="FILE", help="command (default: infinity_emb)")
    parser.add_argument("--clients", type=int, default=50, help="asking at once (default: 50)")
    parser.add_argument("--seconds", type=float, default=120, help="how long (default: 120)")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each server (default: 1)")
    parser.add_argument("--requests", type=int, default=10, help="requests of a model and shape (default: 10)")
    parser.add_argument("--documents", type=int, default=10, help="texts of a request, at most (default: 10)")
    parser.add_argument("--words", type=int, default=40, help="words of a text, at most (default: 40)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="between two answers (default: 1e-3)")
    parser.add_argument("rest", nargs="*", help="after --: more flags for serve.py")
    args = parser.parse_args()
    if args.peer and len(args.model) > 1:
        parser.error("--peer: one model")
    ports, code = {"serve.py": free_port()}, 0
    flags = ["--port", str(ports["serve.py"]), "--model", *args.model, *args.rest]
    with ExitStack() as stack:
        servers = {"serve.py": stack.enter_context(started([sys.executable, str(ROOT / "serve.py"), *flags]))}
        wait_for(ports["serve.py"], "/ready", servers["serve.py"])
        models = {each["id"]: each["kind"] for each in get(ports["serve.py"], "/info")["models"]}
        plan = requests(models, args.requests, args.documents, args.words, first=bool(args.peer))
        for request, numbers in zip(plan, alone(ports["serve.py"], plan), strict=True):
            request.expected = numbers
        print(f"{len(plan)} requests answered alone; {resident(servers['serve.py'].pid):,.0f} MB")
        for peer in args.peer:  # all are there before anything is timed; those whose turn it is not are idle
            ports[peer] = free_port()
            command = peer_command(peer, args.model[0], ports[peer], args.infinity)
            servers[peer] = stack.enter_context(started(command))
            wait_for(ports[peer], "/health", servers[peer])
            alone(ports[peer], plan)
        rates: dict[str, list[float]] = {name: [] for name in servers}
        for _ in range(args.rounds):
            for name, server in servers.items():
                print(f"--- {name}")
                rate, wrong = load(server, ports[name], plan, args)
                rates[name].append(rate)
                code = code or wrong
    for name in args.peer:
        ratios = [ours / theirs for ours, theirs in zip(rates["serve.py"], rates[name], strict=True)]
        spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
        print(f"serve.py: {statistics.median(ratios):.2f} times the answers of {name} ({spread}, {args.rounds} rounds)")
    print(f"server ended with {servers['serve.py'].returncode}")
    return code


if __name__ == "__main__":
    sys.exit(main())
