"""The plan of micro-batches: complete, within the budget, little padding.

python -m pytest tests/models/test_batching.py
"""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_retrieval import backend
from mlx_retrieval.backbones import layer_size
from mlx_retrieval.models import loading
from mlx_retrieval.models.batching import (
    MEASURED_LAYER,
    MicroBatch,
    Texts,
    cpu_overhead,
    micro_batches,
    pad_rows,
    padded,
    plan,
    shares,
)
from mlx_retrieval.models.runners import make_runner
from mlx_retrieval.training.gradient_cache import GradientCache
from mlx_retrieval.utils.text import CHECKOUT


def texts_of(lengths) -> Texts:
    """Texts whose tokens are 1, 2, 3, ... throughout, pooled without their first and last token where they can be."""
    lengths = np.array(lengths, np.int32)
    start = np.minimum(1, lengths - 1)
    return Texts(np.arange(1, lengths.sum() + 1, dtype=np.int32), lengths, start, np.maximum(lengths - 1, start + 1))


def tokens(parts: list[np.ndarray], lengths: np.ndarray) -> int:
    """Tokens of all micro-batches, padding included."""
    return sum(len(part) * int(padded(lengths[part]).max()) for part in parts)


def cost(parts: list[np.ndarray], lengths: np.ndarray, budget: int) -> float:
    """What `plan` minimises: tokens, and a constant for every micro-batch."""
    return tokens(parts, lengths) + len(parts) * min(backend.MICRO_BATCH_OVERHEAD, budget / 8)


def greedy(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """The simple cut: sorted by length, each micro-batch as full as the budget allows."""
    order, parts = np.argsort(-lengths, kind="stable"), []
    while len(order):
        fits = max(1, int(budget // padded(lengths[order])[0]))
        parts.append(order[:fits])
        order = order[fits:]
    return parts


def check(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    parts = plan(lengths, budget)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * padded(lengths[part]).max() <= budget
    longest = [lengths[part].max() for part in parts]
    assert all(a >= b for a, b in pairwise(longest))
    assert all(lengths[a].min() >= lengths[b].max() for a, b in pairwise(parts))  # similar lengths together
    return parts


@pytest.fixture(autouse=True)
def _cpu(monkeypatch) -> None:
    """Plan as for CPUs, whatever the device; tests that need another grid set it."""
    monkeypatch.setattr(backend, "MICRO_BATCH_OVERHEAD", backend.CPU_OVERHEAD)
    monkeypatch.setattr(backend, "LENGTH_GRID", 4)


LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=60).map(np.array)


@given(lengths=LENGTHS, budget=st.integers(1, 3_000))
def test_plan_is_complete_within_budget_and_no_worse_than_the_simple_cut(lengths, budget):
    parts = check(lengths, budget)
    assert cost(parts, lengths, budget) <= cost(greedy(lengths, budget), lengths, budget) + 1e-6


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9).map(np.array), budget=st.integers(1, 150))
def test_no_cut_is_better(lengths, budget):
    """Against every way there is to cut the sorted texts."""
    order = np.argsort(-lengths, kind="stable")
    best = np.inf
    for mask in range(2 ** (len(order) - 1)):
        cuts = [i for i in range(1, len(order)) if mask >> (i - 1) & 1]
        parts = np.split(order, cuts)
        if all(len(part) == 1 or len(part) * padded(lengths[part]).max() <= budget for part in parts):
            best = min(best, cost(parts, lengths, budget))
    assert cost(plan(lengths, budget), lengths, budget) == pytest.approx(best)


def test_extremes():
    assert plan(np.array([], np.int32), 100) == []
    assert [part.tolist() for part in check(np.array([7]), 1)] == [[0]]
    assert len(check(np.full(64, 10), 10_000)) == 1
    assert len(check(np.full(64, 8), 128)) == 4
    # A text above the budget goes alone, and does not take others with it.
    parts = check(np.array([5, 500, 6, 5]), 100)
    assert parts[0].tolist() == [1] and len(parts) == 2


def test_equal_lengths_keep_their_order():
    assert np.concatenate(plan(np.full(20, 9), 60)).tolist() == list(range(20))


def waste(lengths: np.ndarray, budget: int) -> float:
    padding = tokens(check(lengths, budget), lengths)
    return 1 - lengths.sum() / padding


@pytest.mark.parametrize("grid", [1, 16])
@pytest.mark.parametrize("seed", range(3))
def test_little_padding(seed, grid, monkeypatch):
    """512 queries and 512 documents of ordinary lengths: below 3 % on CPUs; on GPUs the grid adds its own."""
    monkeypatch.setattr(backend, "LENGTH_GRID", grid)
    rng = np.random.default_rng(seed)
    queries, documents = rng.lognormal(2.5, 0.4, 512), rng.lognormal(5.0, 0.7, 512)
    lengths = np.clip(np.concatenate([queries, documents]), 4, 512).astype(np.int32)
    for budget in (4_096, 16_384):
        assert waste(lengths, budget) < (0.03 if grid == 1 else 0.08)
    random = rng.permutation(lengths).reshape(-1, 32)
    assert 1 - lengths.sum() / (random.max(axis=1).sum() * 32) > 0.5  # what it would be in the data's order


def test_little_padding_on_real_texts(shared_data, minilm):
    from mlx_retrieval.models.tokenizer import TextTokenizer

    with open(shared_data / "train.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(512), strict=False)]
    tokenizer = TextTokenizer(minilm, {}, {"query": 256, "document": 256})
    texts = Texts.join([tokenizer([row[name] for row in rows], name) for name in ("query", "document")])
    assert waste(texts.lengths, 4_096) < 0.03


# --- rows ---


def test_rows_are_padded_on_the_right(monkeypatch):
    monkeypatch.setattr(backend, "LENGTH_GRID", 4)
    texts = texts_of([3, 1, 6])
    batch = pad_rows(texts, np.array([2, 0]), pad_id=99)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 10, 99, 99], [1, 2, 3, 99, 99, 99, 99, 99]]
    assert batch.lengths.tolist() == [6, 3]
    assert (batch.start.tolist(), batch.end.tolist()) == ([1, 1], [5, 2])
    assert {str(part.dtype) for part in batch[:4]} == {"mlx.core.int32"} and batch.second is batch.past is None


@given(lengths=LENGTHS, budget=st.integers(1, 3_000))
def test_micro_batches_hold_every_token_once(lengths, budget):
    texts = texts_of(lengths)
    found: dict[int, list[int]] = {}
    for index, rows in micro_batches(texts, budget, pad_id=-1):
        ids = np.array(rows.ids)
        for row, i in enumerate(index):
            length = lengths[i]
            found[int(i)] = ids[row, :length].tolist()
            assert (ids[row, length:] == -1).all() and rows.lengths[row].item() == length
    assert [token for i in range(len(lengths)) for token in found[i]] == texts.ids.tolist()


def test_joined_texts():
    first, second = texts_of([2, 3]), texts_of([1])
    both = Texts.join([first, second])
    assert both.ids.tolist() == [1, 2, 3, 4, 5, 1] and both.lengths.tolist() == [2, 3, 1]
    assert both.offsets.tolist() == [0, 2, 5, 6] and len(both) == 3
    assert both.ids.dtype == both.start.dtype == both.end.dtype == both.lengths.dtype == np.int32


def test_a_grid_other_than_the_device_s():
    texts = Texts(np.zeros(22, np.int32), np.array([13, 9]), np.zeros(2, np.int32), np.array([13, 9]))
    (index, rows), *others = micro_batches(texts, budget=1000, grid=8)
    assert not others and rows.ids.shape == (2, 16) and index.tolist() == [0, 1]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 5))
def test_shares_hold_everything_once_and_are_even(sizes, count):
    rows = [MicroBatch(np.empty((1, size)), None, None, None) for size in sizes]
    chosen = shares(rows, count)
    assert len(chosen) == count and sorted(i for share in chosen for i in share) == list(range(len(sizes)))
    work = [sum(sizes[i] for i in share) for share in chosen]
    assert max(work) - min(work) <= max(sizes)


def test_on_metal_a_micro_batch_counts_for_512_tokens(as_metal, monkeypatch):
    """Regression: Macs planned with the 32 tokens of a CPU: more micro-batches, whose launches take longer."""
    lengths = np.random.default_rng(0).integers(16, 257, 128)
    counts = [len(plan(lengths, backend.GPU_TOKENS)), len(plan(lengths, backend.GPU_TOKENS, overhead=32))]
    assert backend.MICRO_BATCH_OVERHEAD == backend.METAL_OVERHEAD == 512
    assert counts[0] <= counts[1] / 2


def test_on_a_cpu_small_layers_make_fewer_micro_batches(monkeypatch):
    """Regression: a pass of the toolkit's model cost as much as 200 tokens, and counted for 32: ten passes a step."""
    assert [cpu_overhead(MEASURED_LAYER * n // 4) for n in (1, 2, 4, 8)] == [128, 64, 32, 32]
    monkeypatch.setattr(backend, "IS_GPU", False)
    model, _, _ = loading.build(str(CHECKOUT / "gemma-3-tiny-mlx"))
    assert layer_size(model.backbone) == 3 * 256 * 128 + 3 * 256 * 256 + 4 * 256 + 2 * 64
    runner, lengths = make_runner(model), np.random.default_rng(0).integers(4, 80, 128)
    assert runner.overhead == cpu_overhead(layer_size(model.backbone)) > 150
    expected = [part.tolist() for part in plan(lengths, 1024, overhead=runner.overhead)]
    assert len(expected) < 0.8 * len(plan(lengths, 1024))
    assert [index.tolist() for index, _ in runner.micro_batches(texts_of(lengths), 1024)] == expected  # to embed
    cutting = GradientCache(model, None, budget=1024).cutting  # to train
    assert [index.tolist() for index in cutting.indices(lengths)] == expected
    monkeypatch.setattr(backend, "IS_GPU", True)
    assert runner.overhead == backend.MICRO_BATCH_OVERHEAD
