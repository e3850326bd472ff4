"""The default number of tokens at once on Macs: what fits into the memory, measured where room is not ample.

python -m pytest tests/training/test_memory_on_macs.py
"""

from dataclasses import replace
from types import SimpleNamespace

from mlx_retrieval.backend import device_memory, mx

import numpy as np
import pytest

from mlx_retrieval import backend
from mlx_retrieval.backbones.activations import sizes_of
from mlx_retrieval.training import memory, memory_lines
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.cutting import Cutting
from mlx_retrieval.training.estimate import METAL, Job, estimate, step_memory
from mlx_retrieval.training.memory_lines import Outlook
from mlx_retrieval.training.step_memory import StepMemory

MINILM = {"model_type": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
MINILM |= {"num_hidden_layers": 6, "vocab_size": 30_522}
BERT_BASE = MINILM | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
QWEN = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
QWEN |= {"num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28, "vocab_size": 151_936}
SHAPES = {"MiniLM": (MINILM, 22_700_000, 4), "BERT-base": (BERT_BASE, 110_000_000, 4), "Qwen3": (QWEN, 596_000_000, 2)}


def job(name: str, length: int = 256, rows: int = 512) -> Job:
    """A LoRA run with a batch of 256 pairs and the sizes of a real model."""
    config, numbers, width = SHAPES[name]
    new = 16 * 14 * config["hidden_size"] * config["num_hidden_layers"]
    lengths = np.random.default_rng(0).integers(length // 4, length + 1, rows)
    sizes = {"parameters": numbers, "numbers": numbers, "checkpoint": width, "trained": new, "new": new, "rank": 16}
    more = {"unused": 0, "integers": 0, "merged": 0, "product": 0, "representation": 384, "token_vectors": False}
    return Job(sizes_of(config), lengths=(lengths,), open=True, **sizes, **more)


@pytest.fixture
def mac(as_metal, monkeypatch):
    """`mac(size)`: a Mac of so many GB, of which nothing is taken."""
    monkeypatch.setattr(device_memory, "_memory_level", lambda: None)
    for name in ("get_active_memory", "get_cache_memory"):
        monkeypatch.setattr(mx, name, lambda: 0)
    return lambda size: monkeypatch.setenv("MLX_RETRIEVAL_MEMORY", str(size))


@pytest.mark.parametrize("auto", [False, True], ids=["default", "auto"])
@pytest.mark.parametrize("name", SHAPES)
def test_macs_never_take_more_than_their_share(mac, monkeypatch, name, auto):
    """Regression: 16,384 tokens at once by default on every Mac: 5 to 7 GB of MiniLM, 44 of Qwen3-0.6B."""
    budgets, run = [], replace(job(name), auto=auto)
    texts = SimpleNamespace(lengths=run.lengths[0])
    samples = [SimpleNamespace(texts=texts, tokens=int(texts.lengths.sum()))]
    weights, step = estimate(run, METAL).weights, step_memory(run, METAL)
    monkeypatch.setattr(memory, "measure_passes", lambda *_: step)
    largest = memory.most() if auto else backend.MICRO_BATCH_TOKENS
    for size in (8, 16, 24, 36, 64):
        mac(size)
        monkeypatch.setattr(mx, "get_active_memory", lambda: weights)
        room = device_memory.share() * device_memory.free()
        fit = memory.fit(SimpleNamespace(cutting=Cutting(), budget=0), samples, largest)
        assert fit.estimate - weights == step.peak(texts.lengths, Cutting(budget=fit.budget)) <= room
        if fit.budget < min(largest, samples[0].tokens):  # the largest that fits
            assert step.peak(texts.lengths, Cutting(budget=2 * fit.budget)) > room
        budgets.append(fit.budget)
    assert budgets == sorted(budgets) and budgets[0] < 16_384
    mac(8)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 0)
    assert Outlook.of(run).job.cutting.budget == budgets[0]  # the estimate before the weights are read chooses the same
    if not auto:
        assert (name == "MiniLM") == (budgets[2] == 16_384)
    elif name == "MiniLM":
        assert budgets[-1] > 16_384


def test_on_macs_passes_are_measured_where_room_is_not_ample(settings, mac, monkeypatch):
    """As with auto, and the run, its lines and its state know the budget; without need nothing is measured."""
    mac(8)
    measured = []

    def measure(*_) -> StepMemory:
        measured.append(0)
        return StepMemory(lambda rows, width: rows * width * 1e7, lambda rows, width: rows * width * 1e7, 0)

    monkeypatch.setattr(memory, "measure_passes", measure)
    run = training_run.prepare(settings())
    assert not measured and run.trainer.grad_cache.budget == 0 and "memory" not in dict(run.headline)
    monkeypatch.setattr(memory_lines, "AMPLE", 0)
    run = training_run.prepare(settings())
    assert len(measured) == 1
    trainer = run.trainer
    assert trainer.grad_cache.budget == trainer.state.micro_batch_tokens == run.outlook.job.cutting.budget == 256
    assert "256 tokens at once; 5.33 GB are free" in dict(run.headline)["memory"]
    assert training_run.prepare(settings(micro_batch_tokens=512)).trainer.grad_cache.budget == 512
    assert len(measured) == 1


def test_other_devices_keep_their_default(settings, monkeypatch):
    monkeypatch.setattr(memory_lines, "AMPLE", 0)
    monkeypatch.setattr(memory, "measure_passes", None)
    monkeypatch.setattr(backend, "IS_METAL", False)
    monkeypatch.setattr(backend, "IS_GPU", False)
    assert training_run.prepare(settings()).trainer.grad_cache.budget == 0
    monkeypatch.setattr(backend, "IS_GPU", True)  # CUDA
    monkeypatch.setattr(device_memory, "free", lambda: 0)
    assert training_run.prepare(settings()).trainer.grad_cache.budget == 0
