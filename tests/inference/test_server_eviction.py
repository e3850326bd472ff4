"""The memory of a server's models: what counts, and that the limit holds while others compute, leave and take turns.

python -m pytest tests/inference/test_server_eviction.py
"""

import asyncio
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from mlx_retrieval.backend import device_memory, mx

import numpy as np
import pytest
import random_models
from mlx.utils import tree_map
from served import MB, Sized, Slow, loaded, sized_models, wait_until
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient
from trained_models import trained

from mlx_retrieval import backend
from mlx_retrieval.backbones.saved_products import Products
from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.serving.app import create_app
from mlx_retrieval.inference.serving.engine import LIMITS, Engine
from mlx_retrieval.inference.serving.model_thread import Job, ModelThread
from mlx_retrieval.inference.serving.requests import Embed, Vectors
from mlx_retrieval.inference.serving.served_models import ServedModels, Source
from mlx_retrieval.models.compiled import CompiledFunctions
from mlx_retrieval.models.shared_weights import SharedWeights
from mlx_retrieval.utils.errors import UserError

TEXTS = ["the boiler drips at night", "a bike squeaks", ""]


# --- models in use --------------------------------------------------------------------------------------------------


class Clients:
    """Requests to an engine, without HTTP."""

    def __init__(self, models: ServedModels):
        self.models, self.thread = models, ModelThread(4)
        self.engine = Engine(models, self.thread, LIMITS)

    def ask(self, name: str, texts: list[str]) -> tuple[asyncio.Task[Vectors], asyncio.Event]:
        """Return the task of a request, and the event at which its client leaves."""
        gone = asyncio.Event()

        async def receive() -> dict:
            await gone.wait()
            return {"type": "http.disconnect"}

        request = Embed(texts=texts, field="input", model=name)
        client = SimpleNamespace(receive=receive, scope={})
        return asyncio.create_task(self.engine.embed(client, request)), gone

    def play(self, scene: Callable) -> None:
        self.thread.start()
        try:
            asyncio.run(asyncio.wait_for(scene(), 30))
        finally:
            self.models.close()
            self.thread.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_a_model_that_computes_for_a_client_that_left_is_not_evicted():
    """Regression: it was, and the other model was loaded beside it, above the limit."""
    models = sized_models(3, a=2, b=2)
    clients = Clients(models)

    async def scene() -> None:
        async with models.using(models.all[0]) as model:
            model.gate.clear()
        first, gone = clients.ask("a", ["text"])
        await until(lambda: model.calls)
        gone.set()
        with pytest.raises(HTTPException) as error:
            await first
        assert error.value.status_code == 499
        second, _ = clients.ask("b", ["text"])
        await until(lambda: models._waits_for_room or loaded(models) != "a")
        assert loaded(models) == "a"
        model.gate.set()
        assert (await second).model == "b" and loaded(models) == "b"
        assert not models.all[0].users

    clients.play(scene)


def test_a_model_is_in_use_until_its_call_has_ended(monkeypatch):
    """Regression: an answered call still held the model when it was evicted, so that its memory was not freed."""
    models, gate, add = sized_models(3, a=2, b=2), threading.Event(), Job.add
    clients = Clients(models)

    def slow(job: Job, rows: np.ndarray) -> None:
        add(job, rows)
        assert gate.wait(20)

    async def scene() -> None:
        monkeypatch.setattr(Job, "add", slow)
        first, _ = clients.ask("a", ["text"])
        assert (await first).model == "a"
        second, _ = clients.ask("b", ["text"])
        await until(lambda: models._waits_for_room or loaded(models) != "a")
        assert loaded(models) == "a"
        gate.set()
        assert (await second).model == "b" and loaded(models) == "b"

    clients.play(scene)


@pytest.mark.slow
def test_many_clients_of_more_models_than_fit_some_of_whom_leave(monkeypatch):
    """The limit holds at each load, what computes is loaded, and who stays gets the answer of the right model."""
    models, taken, strangers = sized_models(5, a=2, b=2, c=2, d=3), [], []
    clients, compute = Clients(models), Slow.compute
    asked = [("abcd"[n * 7 % 11 % 4], [f"{n} {i}" for i in range(1 + n % 6)]) for n in range(120)]
    expected = [Sized(name, 0).encode(texts, prompt="document") for name, texts in asked]

    def checked(model: Sized, call: list, texts: list[str]) -> None:
        compute(model, call, texts)
        if all(each.model is not model for each in models.all):
            strangers.append(model.name)

    for each in models.all:

        def load(load: Callable = each.load, size: int = each.size) -> Sized:
            taken.append(models.memory() + size)
            return load()

        each.load = load

    async def request(number: int) -> None:
        task, gone = clients.ask(*asked[number])
        if number % 3 == 0:
            await asyncio.sleep(0.001 * (number % 5))
            gone.set()
        try:
            result = await task
        except HTTPException as error:
            assert error.status_code == 499 and number % 3 == 0
            return
        assert np.array_equal(result.vectors, expected[number])

    async def scene() -> None:
        await asyncio.gather(*map(request, range(len(asked))))
        await until(lambda: not any(each.users for each in models.all))

    monkeypatch.setattr(Slow, "compute", checked)
    clients.play(scene)
    assert max(taken) <= models.max_memory == 5 * MB and models.evictions > 10 and not strangers


# --- adapters on one base -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(small, tmp_path_factory) -> dict[str, str]:
    """Two adapters on one base."""
    folder = tmp_path_factory.mktemp("adapters")
    trained(small, folder / "a")
    mx.random.seed(1)
    trained(small, folder / "b", keys=["q_proj", "v_proj"])
    return {name: str(folder / name) for name in "ab"}


def ask(client: TestClient, name: str) -> np.ndarray:
    answer = client.post("/v1/embeddings", json={"input": TEXTS, "model": name})
    assert answer.status_code == 200 and answer.json()["model"] == name
    return np.float32([row["embedding"] for row in answer.json()["data"]])


def opened(adapters: dict[str, str], most: Callable[[ServedModels], int]) -> ServedModels:
    models = ServedModels.open([Source(name, path) for name, path in adapters.items()])
    models.max_memory, models.ready = most(models), True
    return models


def test_an_adapter_takes_anothers_place_and_the_base_stays(adapters):
    """Regression: it was freed with the last adapter on it, and read from the disk again."""
    expected = {name: embedder.load(path).encode(TEXTS, prompt="document") for name, path in adapters.items()}
    models = opened(adapters, lambda models: max(each.size for each in models.all))
    before = []
    with TestClient(create_app(models)) as client:
        for name in "aba":
            assert np.abs(ask(client, name) - expected[name]).max() < 1e-5
            assert loaded(models) == name and models.memory() <= models.max_memory
            served = models.choose(name, ("embed",))
            same = {id(array) for array in before} & {id(array) for array in served.arrays}
            size = sum(array.nbytes for array in served.arrays if id(array) in same)
            assert size == (served.size - served.own if before else 0)
            before = served.arrays
    assert models.evictions == 2


def test_adapters_and_their_base_take_turns_at_many_requests(adapters, small):
    paths = adapters | {"base": small}
    expected = {name: embedder.load(path).encode(TEXTS, prompt="document") for name, path in paths.items()}
    models = opened(paths, lambda models: max(each.size for each in models.all))
    with TestClient(create_app(models)) as client, ThreadPoolExecutor(6) as pool:
        names = [name for _ in range(4) for name in paths]
        for name, found in zip(names, pool.map(lambda name: ask(client, name), names), strict=True):
            assert np.abs(found - expected[name]).max() < 1e-5
        wait_until(lambda: not any(each.users for each in models.all))
        assert models.evictions and models.memory() <= models.max_memory


def test_a_base_that_is_named_in_two_ways_is_one(adapters, small, monkeypatch):
    """Regression: a relative path was another base, and models on it were evicted for room that nothing needed."""
    monkeypatch.chdir(Path(small).parent)
    first, second = opened({"a": adapters["a"], "base": Path(small).name}, lambda _: 1 << 30).all
    assert first.base == second.base


def test_what_full_training_replaced_does_not_stay_in_memory(small, tmp_path):
    """Regression: it did, and counted as nothing, once an adapter on the same base had been loaded."""
    trained(small, tmp_path / "full", train_type="full")
    shared = SharedWeights()
    base = embedder.load(small, shared=shared)
    model = embedder.load(tmp_path / "full", shared=shared)
    del base
    gc.collect()
    assert model.dimensions == 32 and not shared._weights


def test_a_graph_that_is_being_built_changes_no_figure(adapters):
    """Regression: the tracers that a model then holds counted beside its base, and an idle model was evicted."""
    models = opened(adapters, lambda _: 1 << 30)
    with TestClient(create_app(models)) as client:
        for name in adapters:
            ask(client, name)
        before, (a, b) = models.memory(), models.all
        assert before < 1.2 * (a.size + b.size) / 2
        model = a.model.model
        tracers = tree_map(lambda array: array + 0, model.parameters())
        assert CompiledFunctions(model)._with(tracers, [], Products(), models.memory) == before


# --- quantised weights on CPUs --------------------------------------------------------------------------------------

on_cpus = pytest.mark.skipif(not backend.FUSED, reason="this device computes with packed weights")


def size_of(folder: Path, wanted: str, monkeypatch) -> int:
    monkeypatch.setattr(backend, "DEQUANTIZED", wanted)
    (served,) = ServedModels.open([Source("a", str(folder))]).all
    served.take(served.load())
    assert served.size == sum(array.nbytes for array in served.arrays)
    return served.size


@on_cpus
def test_quantised_weights_count_as_what_is_computed_with(base_folders, monkeypatch):
    """Regression: they counted as packed, and their copies took up to eight times --max-memory."""
    packed, copies = (
        size_of(base_folders["4-bit"], "off", monkeypatch),
        size_of(base_folders["4-bit"], "on", monkeypatch),
    )
    assert copies > 4 * packed
    assert size_of(base_folders["4-bit"], "blocks", monkeypatch) == packed
    assert size_of(base_folders["4-bit"], "auto", monkeypatch) == copies
    sources = [Source("a", str(base_folders["4-bit"]))]
    (served,) = ServedModels.open(sources, copies // 2).all  # auto: no copies then
    assert served.size == packed
    monkeypatch.setattr(backend, "DEQUANTIZED", "on")
    with pytest.raises(UserError, match="more than --max-memory allows"):
        ServedModels.open(sources, copies // 2)


@on_cpus
def test_copies_of_several_bases_take_half_of_the_free_memory_together(base_folders, tmp_path, monkeypatch):
    folders = [base_folders["4-bit"], random_models.quantised(base_folders["qwen3"], tmp_path / "8-bit", bits=8)]
    packed, copies = size_of(folders[0], "off", monkeypatch), size_of(folders[0], "on", monkeypatch)
    monkeypatch.setattr(backend, "DEQUANTIZED", "auto")
    monkeypatch.setattr(device_memory, "free", lambda: 2 * copies)
    models = ServedModels.open([Source(folder.name, str(folder)) for folder in folders])
    assert models.all[0].size == copies and packed < models.all[1].size < copies


@on_cpus
def test_an_adapter_shares_a_quantised_base_though_less_memory_is_free(base_folders, tmp_path, monkeypatch):
    """Regression: it found no room for copies, computed in blocks, and took the packed base beside the copies."""
    for name in "ab":
        trained(base_folders["4-bit"], tmp_path / name)
    a, b = ServedModels.open([Source(name, str(tmp_path / name)) for name in "ab"]).all
    a.take(a.load())
    monkeypatch.setattr(device_memory, "free", lambda: 0)
    b.take(b.load())
    same = {id(array) for array in a.arrays} & {id(array) for array in b.arrays}
    assert sum(array.nbytes for array in b.arrays if id(array) in same) == b.size - b.own
    alone = embedder.load(tmp_path / "b", dequantize="on")
    assert np.array_equal(b.model.encode(TEXTS), alone.encode(TEXTS))
