"""As on GPUs, without compiled passes: any thread may use a model, and too much at once is computed in parts.

python -m pytest tests/inference/test_on_gpus.py
"""

from concurrent.futures import ThreadPoolExecutor

from mlx_retrieval.backend.device_errors import DeviceError

import numpy as np
import pytest
from random_rerankers import DOCUMENTS, QUERY, causal

import embed
from mlx_retrieval import backend
from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.inference.serving.model_thread import Job, ModelThread

TEXTS = [f"{'bike ' * (1 + i)}{i}" for i in range(12)]
WATCHDOG = "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackError"


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """As with MLX_RETRIEVAL_PLAIN=1."""
    monkeypatch.setattr(backend, "COMPILED", False)


def elsewhere(function, *args):
    """What a function returns in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


# Regression: RuntimeError "There is no Stream(gpu, 0) in current thread", in Gradio, FastAPI and thread pools.


def test_an_embedding_model_is_used_in_other_threads_than_it_was_loaded_in(small):
    vectors = elsewhere(embedder.load(small).encode, TEXTS)  # before this thread has used it
    assert np.allclose(vectors, embedder.load(small).encode(TEXTS), atol=1e-6)
    assert np.allclose(vectors, elsewhere(embedder.load, small).encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
def test_a_reranker_is(tmp_path, qwen_tokenizer, changes):
    _, folder = causal("qwen3", tmp_path / "model", qwen_tokenizer, **changes)
    scores = elsewhere(Reranker(str(folder)).score, QUERY, DOCUMENTS)
    assert np.allclose(scores, Reranker(str(folder)).score(QUERY, DOCUMENTS), atol=1e-6)


def test_a_server_s_thread_needs_no_request_in_another_first(small):
    thread = ModelThread(batch=8)
    thread.start()
    try:
        assert thread.submit(Job(embedder.load(small), TEXTS, prompt="document")).result(60).shape == (12, 32)
    finally:
        thread.close()


def test_weights_of_a_vocabulary_that_no_pass_needs_stay_unread(tmp_path, qwen_tokenizer, monkeypatch):
    _, folder = causal("qwen3", tmp_path / "model", qwen_tokenizer, tie_word_embeddings=False)
    before = backend.mx.get_active_memory()
    model = embedder.load(str(folder), task="embed")
    read = backend.mx.get_active_memory() - before
    head = model.model.backbone.adapted.lm_head.weight
    backend.mx.eval(head)
    assert read > 0 and backend.mx.get_active_memory() - before >= read + head.nbytes


# --- errors of the device -------------------------------------------------------------------------------------------


@pytest.fixture
def weak(monkeypatch):
    """`weak(model, tokens)`: the device fails at more tokens at once than these; returns the sizes that were tried."""

    def make(model, most: int) -> list[int]:
        kind, sizes = type(model.model), []
        original = kind.__call__

        def call(self, batch):
            sizes.append(batch.ids.size)
            if sizes[-1] > most:
                raise RuntimeError(WATCHDOG)
            return original(self, batch)

        monkeypatch.setattr(kind, "__call__", call)
        return sizes

    return make


def test_vectors_are_computed_in_parts_where_the_device_fails(small, weak, caplog):
    """Regression: a traceback."""
    model = embedder.load(small)
    expected = model.encode(TEXTS)
    sizes = weak(model, 40)
    assert np.allclose(model.encode(TEXTS), expected, atol=1e-6)
    assert "repeated with half as much at once" in caplog.text and max(sizes) > 40
    sizes.clear()
    assert np.allclose(model.encode(TEXTS), expected, atol=1e-6) and max(sizes) <= 40  # it is not tried again


def test_the_limit_falls_only_when_the_device_fails(small, weak):
    """Regression: each batch that was split lowered it, down to single texts."""
    model = embedder.load(small)
    weak(model, 40)
    model.encode(TEXTS)
    limit = model.runner.most_tokens
    for count in range(2, 12):
        model.encode(["a bike"] * count)
    assert model.runner.most_tokens == limit > 20


def test_scores_are(tmp_path, qwen_tokenizer, weak):
    """With a common beginning of all rows, which the parts share."""
    _, folder = causal("qwen3", tmp_path / "model", qwen_tokenizer)
    ours = Reranker(str(folder))
    expected = ours.score(QUERY, TEXTS)
    sizes = weak(ours, 150)
    assert np.allclose(ours.score(QUERY, TEXTS), expected, atol=1e-6) and max(sizes) > 150


def test_one_text_that_is_too_much_is_an_error_in_one_line(small, weak, tmp_path, capsys):
    model = embedder.load(small)
    weak(model, 3)
    with pytest.raises(DeviceError, match="took too long at once .*A lower --max-length"):
        model.encode(TEXTS)
    texts = tmp_path / "texts.txt"
    texts.write_text("a bike\n")
    assert embed.main(["--model", small, "--input", str(texts), "--output", str(tmp_path / "v.npy")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("embed.py: the system ended the GPU's work")
