"""Models that need no time and know no meaning, and a server of them: for the tests of the server."""

import contextlib
import functools
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from mlx_retrieval.backend import mx, nn
from mlx_retrieval.backend.device_errors import DeviceError

import numpy as np
from starlette.testclient import TestClient

from mlx_retrieval.backbones import Backbone
from mlx_retrieval.inference.serving.app import ServerSettings, create_app
from mlx_retrieval.inference.serving.engine import Limits
from mlx_retrieval.inference.serving.served_models import ServedModel, ServedModels
from mlx_retrieval.utils.errors import UserError

MB = 1 << 20
DOCUMENTS = ["a hard piece of material", "a bike with a chain", "", "été 🚲", "a boiler"]


def score(query: str, document: str) -> float:
    """Any number that is always the same."""
    return zlib.crc32(f"{query}|{document}".encode()) / 2**32


class Slow:
    """Something that computes; it can be held up, and tells what it was given."""

    runner = SimpleNamespace(workers=1)

    def __init__(self):
        self.calls, self.entered, self.gate = [], threading.Semaphore(0), threading.Event()
        self.gate.set()
        self.model = SimpleNamespace(backbone=Backbone(), head=nn.Module())

    def limit_shapes(self, models) -> None:
        pass

    def compute(self, call: list, texts: list[str]) -> None:
        self.calls.append(call)
        self.entered.release()
        assert self.gate.wait(20)
        if "mistake" in texts:
            raise UserError("this text is a mistake")
        if "crash" in texts:
            raise RuntimeError("secret details")
        if "no memory" in texts:
            raise DeviceError("memory ran out")


class Reranker(Slow):
    name, kind, late = "a-reranker", "qwen3", None

    def count_tokens(self, query, documents):
        return sum(len(f"{query} {text}".split()) for text in documents)

    def score_groups(self, groups, raw=False):
        self.compute(list(groups), [text for query, texts in groups for text in (query, *texts)])
        scores = [np.array([score(query, text) for text in texts], np.float32) for query, texts in groups]
        for (_, texts), row in zip(groups, scores, strict=True):
            row *= 4 if raw else 1
            row[[text == "nan" for text in texts]] = np.nan
        return scores

    def activated(self, raw):
        return raw / 4


class Model(Slow):
    name, late, dimensions = "a-model", False, 4
    config = SimpleNamespace(prompts={"query": "q: ", "document": ""}, normalize=True, dimensions=4)

    def count_tokens(self, texts, prompt=None):
        return sum(len(text.split()) + 1 for text in texts)

    def encode(self, texts, prompt=None, show_progress=None, dimensions=None):
        self.compute([prompt, dimensions, *texts], texts)
        if prompt not in self.config.prompts:
            raise UserError(f"prompt {prompt!r} is unknown; known: query, document")
        if dimensions is not None and dimensions > self.dimensions:
            raise UserError(f"dimensions {dimensions}: the model has {self.dimensions}")
        rows = [[score(f"{prompt}{i}", text) for i in range(self.dimensions)] for text in texts]
        return np.array(rows, np.float32).reshape(-1, self.dimensions)[:, :dimensions]


class Sized(Model):
    """A model that takes room, knows its name and has vectors of its own."""

    def __init__(self, name: str, megabytes: int):
        super().__init__()
        self.name = name
        self.model.backbone.weight = mx.zeros(megabytes * MB, mx.uint8)  # not evaluated: only its size is real

    def encode(self, *args, **options):
        return super().encode(*args, **options) + np.float32(ord(self.name[0]))


def sized_models(most: int | None = None, **sizes: int) -> ServedModels:
    """Models of these sizes in MB, none of them loaded, and their most memory."""
    models = []
    for name, size in sizes.items():
        load = functools.partial(Sized, name, size)
        models.append(ServedModel(name, "embed", load, base=Path(name), base_size=size * MB))
    models = ServedModels(models, None if most is None else most * MB)
    models.ready = True
    return models


def loaded(models: ServedModels) -> str:
    return " ".join(each.name for each in models.all if each.model is not None)


@contextlib.contextmanager
def served(reranker=None, model=None, key: str | None = None, **limits) -> Iterator[TestClient]:
    settings = ServerSettings(keys=(key,) if key is not None else (), limits=Limits(**limits))
    app = create_app(ServedModels.of(reranker, model), settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def rerank(client, query="kidney", documents=DOCUMENTS, **rest):
    return client.post("/v1/rerank", json={"query": query, "documents": documents, **rest})


def refused(response, status: int, *words: str) -> str:
    """The message of an error, in the form of OpenAI, of Cohere, or of TEI."""
    assert response.status_code == status, response.text
    body = json.loads(response.content)
    if set(body) == {"error", "error_type"}:
        message = body["error"]
    else:
        assert set(body) in ({"error"}, {"error", "message"}) and set(body["error"]) == {"message", "type"}
        message = body["error"]["message"]
        assert body.get("message", message) == message
    assert "\n" not in message and "Traceback" not in message and all(word in message for word in words), message
    return message


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.002)
