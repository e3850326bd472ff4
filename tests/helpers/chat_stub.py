"""A chat server of OpenAI's shape whose answers a test decides.

stub = Stub()
stub.answer = lambda number, body: completion(f"What is number {number}?")
...
stub.close()

with mlx_lm_server(folder, tmp_path) as address: ...     # a real one
"""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def number_in(message: str) -> int:
    """Return the number of the chunk that a message is about: its text has `number 7 `."""
    return int(message.split("number ")[1].split()[0])


def completion(text: str | None, finish: str = "stop") -> tuple[int, dict]:
    """Return a response with a model's answer."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


ROOT = Path(__file__).parents[2]


@contextmanager
def mlx_lm_server(model: Path, work: Path) -> Iterator[str]:
    """Run mlx_lm's server of a model, with our BLAS, and yield its address; its hub is empty, in `work`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import runpy; from mlx_retrieval import backend; runpy.run_module('mlx_lm.server', run_name='__main__')"
    command = [sys.executable, "-c", program, "--model", str(model), "--port", str(port)]
    (work / "hub").mkdir()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(work / "hub")}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


class Stub:
    """A chat server. `answer(number of the chunk, body)` gives (status, JSON or bytes, headers)."""

    def __init__(self, number_in: Callable[[str], Any] = number_in):
        self.asked, self.headers, self.models = [], [], (200, {"data": [{"id": "toy"}]})
        self.now = self.most = 0
        self.answer = lambda number, body: completion(f"What is number {number}?")
        self.number_in = number_in
        self.lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(*stub.models if self.path == "/v1/models" else (404, {}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    stub.now += 1
                    stub.most = max(stub.most, stub.now)
                    stub.asked.append(body)
                    stub.headers.append(dict(self.headers))
                number = stub.number_in(body["messages"][0]["content"])
                answer = stub.answer(number, body) if self.path == "/v1/chat/completions" else (404, {})
                with stub.lock:
                    stub.now -= 1
                self.reply(*answer)

            def reply(self, status, content, headers=None):
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64  # connections that wait; with fewer, TCP itself pauses for a second

        self.server = Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def count(self, number: int) -> int:
        """How often this chunk was asked for."""
        return sum(self.number_in(body["messages"][0]["content"]) == number for body in self.asked)
