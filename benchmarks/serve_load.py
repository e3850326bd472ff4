"""A server under load: 50 clients at once, every answer compared with the one that the same request got alone.

    python benchmarks/serve_load.py --model adapters/final
    python benchmarks/serve_load.py --model adapters/final --embedding-model gemma-3-tiny-mlx --seconds 10
    python benchmarks/serve_load.py --model adapters/final -- --max-length 256        # the rest is for rerank.py

Starts `rerank.py --serve` in a process of its own. Scores and vectors may differ by `--tolerance`, since they are
computed beside those of other requests, and an order only where scores are that close. The clients run on the same
machine and take their part of it. RERANK_API_KEY, if set, is sent. Exit code 1: an error, or an answer that differs.
"""

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "the boiler drips at night and no one knows why it rains on the grey town where a bike squeaks"
WORDS = SENTENCE.split()
START_S, ANSWER_S = 300, 300  # how long loading, and one answer, may take


@dataclass
class Request:
    """A request, and the numbers that answered it when it was alone."""

    path: str
    body: str
    expected: list = field(default_factory=list)


@dataclass
class Tally:
    """The clients' answers and errors."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def requests(kinds: list[str], count: int, documents: int, words: int) -> list[Request]:
    """`count` different requests of each kind, the same every time: 1 to `documents` texts of up to `words` words."""
    rng, out = random.Random(0), []

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    for _ in range(count):
        texts = [text(words) for _ in range(rng.randint(1, documents))]
        shapes = {"/v1/rerank": {"query": text(8), "documents": texts}, "/v1/embeddings": {"input": texts}}
        out += [Request(path, json.dumps(shapes[path])) for path in kinds]
    return out


def ask(connection: http.client.HTTPConnection, request: Request, key: str | None) -> tuple[list, str]:
    """Numbers of an answer by the texts' order, a list for each text, and what is wrong with it ("" = nothing)."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection.request("POST", request.path, request.body, headers)
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        return [], f"{response.status} {body[:200].decode(errors='replace')}"
    answer, texts = json.loads(body), json.loads(request.body)
    if request.path == "/v1/embeddings":
        indices = [row["index"] for row in answer["data"]]
        return [row["embedding"] for row in answer["data"]], "" if indices == list(
            range(len(texts["input"]))
        ) else "order"
    scores = {row["index"]: row["relevance_score"] for row in answer["results"]}
    falling = list(scores.values()) == sorted(scores.values(), reverse=True)
    whole = sorted(scores) == list(range(len(texts["documents"]))) and len(answer["results"]) == len(scores)
    return [[scores[i]] for i in sorted(scores)], "" if falling and whole else "order"


def difference(found: list, expected: list) -> float:
    """The largest between two answers; infinite where they have different shapes."""
    if [len(row) for row in found] != [len(row) for row in expected]:
        return float("inf")
    pairs = zip(found, expected, strict=True)
    return max(abs(a - b) for mine, yours in pairs for a, b in zip(mine, yours, strict=True))


def client(number: int, port: int, plan: list[Request], key: str | None, end: float, tolerance: float) -> Tally:
    """Ask one request after the other until `end`."""
    tally, rng, connection = Tally(), random.Random(number), None
    while time.monotonic() < end:
        request = rng.choice(plan)
        connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
        began = time.monotonic()
        try:
            found, wrong = ask(connection, request, key)
        except (OSError, http.client.HTTPException) as error:
            tally.errors.append(repr(error))
            connection.close()
            connection = None
            continue
        tally.seconds.append(time.monotonic() - began)
        if wrong and wrong != "order":
            tally.errors.append(wrong)
        elif wrong or (off := difference(found, request.expected)) > tolerance:
            tally.wrong.append(f"{request.path}: {wrong or f'{off:.2g} from the first answer'}")
    return tally


def resident(pid: int) -> float:
    """MB of a process that are in memory; 0 where it has ended."""
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(told.stdout.strip() or 0) / 1024


def sample(pid: int, began: float, samples: list[tuple[float, float]], stop: threading.Event) -> None:
    """Add (seconds since `began`, MB) every second."""
    while not stop.wait(1):
        samples.append((time.monotonic() - began, resident(pid)))


def wait_for(port: int, server: subprocess.Popen) -> dict:
    """Return the answer of /health, as soon as there is one."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"serve_load.py: the server ended with {server.returncode}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read())
        except OSError:
            time.sleep(0.2)
    sys.exit(f"serve_load.py: the server said nothing in {START_S} s")


def load(server: subprocess.Popen, port: int, args: argparse.Namespace, key: str | None) -> int:
    """Ask, print what came of it; 1 where anything was wrong."""
    print(f"server: {wait_for(port, server)}")
    kinds = ["/v1/rerank"] * bool(args.model) + ["/v1/embeddings"] * bool(args.embedding_model)
    plan = requests(kinds, args.requests, args.documents, args.words)
    alone = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    for request in plan:
        request.expected, wrong = ask(alone, request, key)
        if wrong:
            sys.exit(f"serve_load.py: {request.path}, asked alone: {wrong}")
    alone.close()
    print(f"{len(plan)} requests answered alone; {resident(server.pid):,.0f} MB")

    samples, stop, began = [], threading.Event(), time.monotonic()
    sampler = threading.Thread(target=sample, args=(server.pid, began, samples, stop))
    sampler.start()
    with ThreadPoolExecutor(args.clients) as pool:
        settings = (port, plan, key, began + args.seconds, args.tolerance)
        tallies = [pool.submit(client, number, *settings) for number in range(args.clients)]
        tallies = [tally.result() for tally in tallies]
    passed = time.monotonic() - began
    samples.append((passed, resident(server.pid)))
    stop.set()
    sampler.join()

    seconds = sorted(second for tally in tallies for second in tally.seconds)
    errors, wrong = ([text for tally in tallies for text in getattr(tally, name)] for name in ("errors", "wrong"))
    print(f"{args.clients} clients, {passed:.1f} s, {len(seconds):,} answers, {len(seconds) / passed:,.1f} a second")
    if seconds:
        p50, p95 = (1000 * seconds[min(len(seconds) - 1, int(len(seconds) * share))] for share in (0.5, 0.95))
        print(f"latency: p50 {p50:,.0f} ms, p95 {p95:,.0f} ms, longest {1000 * seconds[-1]:,.0f} ms")
    moments = [*range(10, int(args.seconds), 10), passed]
    memory = [(moment, min(samples, key=lambda sample: abs(sample[0] - moment))[1]) for moment in moments]
    print("memory: " + ", ".join(f"{mb:,.0f} MB at {moment:.0f} s" for moment, mb in memory))
    most = max(mb for _, mb in samples)
    print(f"growth from {memory[0][0]:.0f} s on: {memory[-1][1] / memory[0][1] - 1:+.1%}; {most:,.0f} MB at most")
    print(f"errors: {len(errors)}; wrong order or numbers: {len(wrong)} (tolerance {args.tolerance:g})")
    for text in sorted(set(errors + wrong))[:10]:
        print(f"  {text}")
    return 1 if errors or wrong or not seconds else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="reranker, as for rerank.py")
    parser.add_argument("--embedding-model", help="embedding model, as for rerank.py")
    parser.add_argument("--clients", type=int, default=50, help="asking at once (default: 50)")
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: 60)")
    parser.add_argument("--requests", type=int, default=20, help="different requests of a kind (default: 20)")
    parser.add_argument("--documents", type=int, default=10, help="texts of a request, at most (default: 10)")
    parser.add_argument("--words", type=int, default=40, help="words of a text, at most (default: 40)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="between two answers (default: 1e-3)")
    parser.add_argument("rest", nargs="*", help="after --: more flags for rerank.py")
    args = parser.parse_args()
    if not (args.model or args.embedding_model):
        parser.error("--model, --embedding-model or both")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "rerank.py"), "--serve", "--port", str(port), *args.rest]
    for flag, value in (("--model", args.model), ("--embedding-model", args.embedding_model)):
        command += [flag, value] if value else []
    with subprocess.Popen(command) as server:
        try:
            code = load(server, port, args, os.environ.get("RERANK_API_KEY") or None)
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                print("serve_load.py: the server did not end, and was killed", file=sys.stderr)
    print(f"server ended with {server.returncode}")
    return code


if __name__ == "__main__":
    sys.exit(main())
