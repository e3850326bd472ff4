"""The models of a server: chosen by name, loaded when needed, evicted for others, sharing the weights of their bases.

python -m pytest tests/inference/test_served_models.py
"""

import asyncio
import gc
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
import served
from served import MB, loaded, refused, sized_models, wait_until
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient
from trained_models import trained

from mlx_retrieval import backend
from mlx_retrieval.backbones.hub import weight_files
from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.serving import served_models
from mlx_retrieval.inference.serving.app import create_app
from mlx_retrieval.inference.serving.model_thread import alone
from mlx_retrieval.inference.serving.served_models import ServedModel, ServedModels, Source, arrays_of, weights_size
from mlx_retrieval.models.cpu_model_runner import CpuModelRunner
from mlx_retrieval.models.shared_weights import SharedWeights
from mlx_retrieval.utils.errors import UserError

# --- by name --------------------------------------------------------------------------------------------------------


def test_requests_choose_by_name():
    def load():
        raise AssertionError

    kinds = {"docs": "embed", "code": "embed", "rank": "rerank", "tokens": "late"}
    models = ServedModels([ServedModel(name, kind, load) for name, kind in kinds.items()])

    def chosen(name, *wanted):
        return models.choose(name, wanted).name

    assert [chosen("docs", "embed"), chosen("code", "embed"), chosen(None, "embed")] == ["docs", "code", "docs"]
    assert [chosen("tokens", "rerank", "late"), chosen("any", "late"), chosen(None, "late")] == ["tokens"] * 3
    for name, wanted, words in [
        ("cod", ("embed",), ["'cod'", "known: docs, code", "did you mean code?"]),
        ("text-embedding-3-small", ("embed",), ["known: docs, code"]),
        ("rank", ("embed",), ["rank is a reranker", "docs, code"]),
        ("docs", ("rerank", "late"), ["docs is an embedding model", "rank, tokens"]),
    ]:
        with pytest.raises(HTTPException) as error:
            models.choose(name, wanted)
        assert error.value.status_code == 404 and all(word in error.value.detail for word in words)


def test_a_single_model_answers_to_any_name():
    model = served.Model()
    with served.served(served.Reranker(), model) as client:
        for path, body in (
            ("/v1/embeddings", {"input": ["a"], "model": "text-embedding-3-small"}),
            ("/v1/rerank", {"query": "a", "documents": ["b"], "model": "rerank-v3.5"}),
        ):
            assert client.post(path, json=body).json()["model"] in ("a-model", "a-reranker")
        refused(client.post("/v1/embeddings", json={"input": ["a"], "model": "a-reranker"}), 404, "is a reranker")


# --- loading and eviction -------------------------------------------------------------------------------------------


def test_models_are_loaded_when_they_are_asked_for_and_the_oldest_is_evicted():
    models = sized_models(5, a=2, b=2, c=2)
    with TestClient(create_app(models)) as client:

        def ask(name: str) -> str:
            answer = client.post("/v1/embeddings", json={"input": ["text"], "model": name})
            assert answer.status_code == 200 and answer.json()["model"] == name
            return loaded(models)

        assert loaded(models) == ""
        assert [ask(name) for name in "abacbb"] == ["a", "a b", "a b", "a c", "b c", "b c"]
        assert (models.loads, models.evictions) == (4, 2)


def test_without_a_limit_models_stay():
    models = sized_models(a=2, b=2)
    models.ready = False
    with TestClient(create_app(models)) as client:
        wait_until(lambda: models.ready)
        assert loaded(models) == "a b"
        assert client.get("/ready").json() == {"status": "ready", "loaded": ["a", "b"]}


def test_at_the_start_as_many_are_loaded_as_fit():
    models = sized_models(5, a=2, b=4, c=2)
    models.ready = False
    with TestClient(create_app(models)):
        wait_until(lambda: models.ready)
        assert loaded(models) == "a c" and models.evictions == 0


def test_a_model_that_can_never_fit_is_refused():
    with pytest.raises(UserError, match=r"^b takes 0.01 GB, more than --max-memory allows \(0.00 GB\)"):
        sized_models(5, a=2, b=7)


def test_only_weights_that_a_loaded_model_really_holds_are_shared():
    """Regression: what full training replaced, and weights in another dtype, counted as nothing."""
    models = sized_models(5, a=2, b=2, c=2)
    a, b, c = models.all
    a.base = b.base = c.base
    a.model = a.load()
    assert (models._needed(b), models._needed(c)) == (0, 0)
    b.own = MB
    assert models._needed(b) == MB
    c.dtype = "bfloat16"
    assert models._needed(c) == 2 * MB
    a.replaces = True
    assert models._needed(b) == 2 * MB


def test_a_model_in_use_is_not_evicted_and_every_model_has_its_turn():
    models, order = sized_models(3, a=2, b=2), []

    async def hold(name: str, until: asyncio.Event) -> None:
        async with models.using(models.choose(name, ("embed",))) as model:
            order.append(f"{name}: {loaded(models)}")
            assert model.name == name
            await until.wait()
            assert models.choose(name, ("embed",)).model is model

    async def play() -> None:
        first, rest = asyncio.Event(), asyncio.Event()
        rest.set()
        tasks = [asyncio.create_task(hold("a", first))]
        while not order:
            await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(hold("b", rest)))  # has to wait for a
        while not models._waits_for_room:
            await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(hold("a", rest)))  # a is loaded, but b was first
        await asyncio.sleep(0.05)
        assert order == ["a: a"]
        first.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 10)

    asyncio.run(play())
    assert order == ["a: a", "b: b", "a: a"]


def test_a_loaded_model_answers_while_another_is_loaded():
    models, begun, gate = sized_models(a=1, b=1), threading.Event(), threading.Event()
    load = models.all[1].load

    def slow():
        begun.set()
        assert gate.wait(10)
        return load()

    models.all[1].load = slow
    with TestClient(create_app(models)) as client, ThreadPoolExecutor(1) as pool:
        assert client.post("/v1/embeddings", json={"input": ["text"], "model": "a"}).status_code == 200
        waiting = pool.submit(client.post, "/v1/embeddings", json={"input": ["text"], "model": "b"})
        assert begun.wait(10)
        assert client.post("/v1/embeddings", json={"input": ["text"], "model": "a"}).status_code == 200
        gate.set()
        assert waiting.result().json()["model"] == "b"


def test_a_model_that_cannot_be_loaded_later_is_an_error_of_the_server(caplog):
    """Clients are told its name; its folder, which they were told as well, is the log's."""
    models = sized_models(a=1)

    def fail():
        raise UserError("a/model.safetensors: truncated")

    load, models.all[0].load = models.all[0].load, fail
    with TestClient(create_app(models)) as client:
        message = refused(client.post("/v1/embeddings", json={"input": ["b"]}), 500, "a cannot be loaded")
        assert "a/model" not in message and "a/model.safetensors: truncated" in caplog.text
        models.all[0].load = load
        assert client.post("/v1/embeddings", json={"input": ["b"]}).status_code == 200


def test_a_model_that_cannot_be_loaded_at_the_start_ends_the_server():
    models = sized_models(a=1)
    models.ready, stopped = False, threading.Event()

    def fail():
        raise UserError("a/model.safetensors: truncated")

    models.all[0].load = fail
    app = create_app(models)
    app.state.service.stop = stopped.set
    with TestClient(app) as client:
        assert stopped.wait(10)
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
    assert isinstance(models.failure, UserError) and "truncated" in str(models.failure)


# --- real models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(small, tmp_path_factory) -> dict[str, str]:
    """Two adapters on one base, and the base."""
    folder = tmp_path_factory.mktemp("adapters")
    trained(small, folder / "a")
    mx.random.seed(1)
    _, second = trained(small, folder / "b", keys=["q_proj", "v_proj"])
    return {"a": str(folder / "a"), "b": str(second), "base": small}


TEXTS = ["the boiler drips at night", "a bike squeaks", ""]


def test_adapters_on_one_base_share_its_weights(adapters):
    shared = SharedWeights()
    models = {name: embedder.load(path, shared=shared) for name, path in adapters.items()}
    arrays = {name: {id(array): array.nbytes for array in arrays_of(model)} for name, model in models.items()}
    base = sum(arrays["base"].values())
    together = sum({key: size for each in arrays.values() for key, size in each.items()}.values())
    own = sum(sum(arrays[name].values()) - base for name in "ab")
    assert arrays["base"].keys() <= arrays["a"].keys() & arrays["b"].keys()
    assert together == base + own < 1.2 * base
    for name, path in adapters.items():  # as alone, to the bit
        assert np.array_equal(models[name].encode(TEXTS), embedder.load(path).encode(TEXTS))
    del models
    gc.collect()
    assert not shared._weights


def test_weights_of_other_files_or_dtypes_are_not_shared(adapters, tmp_path):
    shared = SharedWeights()
    copy = str(shutil.copytree(adapters["base"], tmp_path / "copy"))
    models = [embedder.load(copy, shared=shared), embedder.load(adapters["base"], shared=shared)]
    models.append(embedder.load(adapters["base"], shared=shared, dtype="bfloat16"))
    assert len(shared._weights) == 3


def test_the_size_of_weights_is_known_before_they_are_read(adapters):
    model = embedder.load(adapters["base"], dtype="float32")
    size = sum(array.nbytes for array in arrays_of(model))
    files = weight_files(Path(adapters["base"]))
    assert weights_size(files, "float32") == size and weights_size(files, "bfloat16") == size // 2


@pytest.mark.slow
def test_models_that_were_trained_whole_keep_to_the_limit(small, tmp_path):
    """Regression: two of them took twice what --max-memory allows, as if they shared their base."""
    for name in "ab":
        trained(small, tmp_path / name, train_type="full")
    trained(small, tmp_path / "c")
    models = ServedModels.open([Source(name, str(tmp_path / name)) for name in "abc"])
    a, _, c = models.all
    assert a.replaces and 0 < a.own <= a.size and not c.replaces and c.size > c.own > 0
    models.max_memory, models.ready = a.size * 3 // 2, True
    with TestClient(create_app(models)) as client:
        for name in "abca":
            answer = client.post("/v1/embeddings", json={"input": TEXTS, "model": name})
            assert answer.status_code == 200 and models.memory() <= models.max_memory
    assert models.evictions > 1


def test_adapters_are_served_beside_each_other(adapters):
    """Requests for two adapters and their base at once: each gets its own model's vectors."""
    expected = {name: embedder.load(path).encode(TEXTS, prompt="document") for name, path in adapters.items()}
    models = ServedModels.open([Source(name, path) for name, path in adapters.items()])
    with TestClient(create_app(models)) as client, ThreadPoolExecutor(6) as pool:
        wait_until(lambda: models.ready, 60)
        asked = [name for _ in range(6) for name in adapters]
        posts = [pool.submit(client.post, "/v1/embeddings", json={"input": TEXTS, "model": name}) for name in asked]
        for name, answer in zip(asked, posts, strict=True):
            body = answer.result().json()
            found = np.float32([row["embedding"] for row in body["data"]])
            assert body["model"] == name and np.abs(found - expected[name]).max() < 1e-5


def test_a_folder_that_changes_is_read_again_only_when_its_model_is_loaded_again(adapters, tmp_path, caplog):
    """And the description of a server loads nothing."""
    paths = {name: Path(shutil.copytree(adapters[name], tmp_path / name)) for name in "ab"}
    models = ServedModels.open([Source(name, str(path)) for name, path in paths.items()])
    models.ready = True  # as with --lazy
    ask = {"input": TEXTS, "model": "a"}
    with TestClient(create_app(models)) as client:
        info = client.get("/info").json()
        assert (info["model_id"], info["model_dtype"], info["max_input_length"]) == ("a", None, None)
        assert not models.loads and client.get("/ready").json()["loaded"] == []
        before = client.post("/v1/embeddings", json=ask).json()
        assert client.get("/info").json()["model_dtype"] == "float32"
        shutil.rmtree(paths["a"])
        shutil.copytree(adapters["b"], paths["a"])  # as a new training run replaces it
        shutil.rmtree(paths["b"])
        assert client.post("/v1/embeddings", json=ask).json() == before
        refused(client.post("/v1/embeddings", json=ask | {"model": "b"}), 500, "b cannot be loaded")
        assert "no folder" in caplog.text
        models._evict(models.all[0])
        other = embedder.load(adapters["b"]).encode(TEXTS, prompt="document")
        found = [row["embedding"] for row in client.post("/v1/embeddings", json=ask).json()["data"]]
        assert np.abs(np.float32(found) - other).max() < 1e-5


@pytest.mark.compiled
@pytest.mark.skipif(not backend.FUSED, reason="on this device passes are computed as they come")
def test_a_first_pass_is_as_large_as_any(adapters, monkeypatch):
    """Else memory would grow until, by chance, all workers compute a whole micro-batch at the same time."""
    shapes, runner = [], CpuModelRunner.representations

    def recorded(self, micro_batches, *rest):
        shapes.append([part.ids.shape for part in micro_batches])
        return runner(self, micro_batches, *rest)

    monkeypatch.setattr(CpuModelRunner, "representations", recorded)
    (model,) = ServedModels.open([Source("a", adapters["a"])]).all
    model.load()
    assert shapes == [[(4, 256)] * backend.WORKERS]
    monkeypatch.setattr(served_models, "SMALL", 0)
    model.load()
    assert shapes[1:] == [[(1, 8)]]


def test_on_a_gpu_a_model_is_loaded_while_no_other_computes(small, monkeypatch):
    monkeypatch.setattr("mlx_retrieval.backend.IS_GPU", True)
    (served_model,) = ServedModels.open([Source("a", small)]).all
    with ThreadPoolExecutor(1) as pool:
        with alone():
            loading = pool.submit(served_model.load)
            time.sleep(0.3)
            assert not loading.done()
        assert loading.result(20).dimensions == 32


def test_paths_that_no_model_can_be_loaded_from_are_refused_at_the_start(tmp_path, small):
    for path, words in ((tmp_path / "nowhere", "no folder"), (tmp_path, "no config.json")):
        with pytest.raises(UserError, match=words):
            ServedModels.open([Source("a", small), Source("b", str(path))])
