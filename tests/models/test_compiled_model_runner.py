"""Passes compiled as on GPUs (--compile on) give what the model gives, and keep no more graphs than they may.

python -m pytest tests/models/test_compiled_model_runner.py
"""

import gc
import threading

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_retrieval import backend
from mlx_retrieval.backbones import lora
from mlx_retrieval.backbones.gradient_checkpointing import checkpoint_blocks
from mlx_retrieval.models import compiled
from mlx_retrieval.models.batching import MicroBatch, Texts, rounded_rows
from mlx_retrieval.models.compiled import CompiledFunctions
from mlx_retrieval.models.compiled_model_runner import CompiledModelRunner, filled
from mlx_retrieval.models.cpu_model_runner import CpuModelRunner
from mlx_retrieval.models.loading import build
from mlx_retrieval.models.model_runner import ModelRunner
from mlx_retrieval.models.runners import make_runner

pytestmark = pytest.mark.usefixtures("as_metal")
SHAPES = ((4, 32), (5, 16), (7, 48))  # two of them have rows that are not on the grid


def micro_batch(rows: int, length: int) -> MicroBatch:
    rng = np.random.default_rng([rows, length])
    lengths = rng.integers(3, length + 1, rows).astype(np.int32)
    ids = rng.integers(10, 400, (rows, length)).astype(np.int32)
    return MicroBatch(mx.array(ids), mx.array(lengths), mx.array(np.ones_like(lengths)), mx.array(lengths - 1))


def adapted(folder: str, dtype: mx.Dtype = mx.float32, train_type: str = "lora", dropout: float = 0.0):
    """Return a model in training whose adapter's matrices are both non-zero."""
    model = build(folder)[0]
    model.backbone.set_dtype(dtype)
    lora.adapt(model.backbone, train_type, rank=4, dropout=dropout)
    mx.random.seed(1)
    if train_type != "full":
        model.update(tree_map(lambda v: v + 0.05 * mx.random.normal(v.shape), model.trainable_parameters()))
    model.train()
    mx.eval(model.parameters())
    return model


def cosine(a: dict, b: dict) -> float:
    a, b = (np.concatenate([np.array(v.astype(mx.float32)).ravel() for _, v in tree_flatten(g)]) for g in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_flag_chooses_the_runner(monkeypatch, small):
    model = build(small)[0]
    assert type(make_runner(model)) is type(make_runner(model, "off")) is ModelRunner
    assert type(make_runner(model, "on")) is CompiledModelRunner
    monkeypatch.setattr(backend, "COMPILED", False)  # restored after the test
    backend.set_compile("on")
    assert type(make_runner(model)) is CompiledModelRunner and type(make_runner(model, "off")) is ModelRunner
    backend.set_compile("auto")
    assert type(make_runner(model)) is CompiledModelRunner
    checkpoint_blocks(model.backbone)
    assert type(make_runner(model)) is ModelRunner
    monkeypatch.setattr(backend, "FUSED", True)  # a CPU
    assert type(make_runner(build(small)[0], "on")) is CpuModelRunner


def test_rows_are_rounded_to_few_numbers_and_filled_with_the_last():
    assert rounded_rows(np.arange(1, 18)).tolist() == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24]
    batch = micro_batch(5, 8)._replace(second=mx.arange(5))
    rows = filled(batch)
    assert rows.ids.shape == (6, 8) and rows.past is None
    for whole, part in zip(rows[:5], batch[:5], strict=True):
        assert np.array(whole).tolist() == [*np.array(part).tolist(), np.array(part)[-1].tolist()]
    assert filled(rows) is rows


def test_plans_of_compiled_passes_meet_few_shapes_and_little_padding(small):
    """Batches of 128 texts of 4 to 256 tokens: an exact number of rows would nearly always be a new shape."""
    rng = np.random.default_rng(0)
    model, shapes, padded, tokens = build(small)[0], {"on": set(), "off": set()}, {"on": 0, "off": 0}, 0
    for _ in range(40):
        lengths = np.r_[rng.integers(4, 30, 64), rng.integers(20, 257, 64)].astype(np.int32)
        texts = Texts(np.zeros(lengths.sum(), np.int32), lengths, np.zeros_like(lengths), lengths)
        tokens += lengths.sum()
        for mode in shapes:
            parts = [part for _, part in make_runner(model, mode).micro_batches(texts, backend.GPU_TOKENS)]
            parts = [filled(part) for part in parts] if mode == "on" else parts
            shapes[mode] |= {part.ids.shape for part in parts}
            padded[mode] += sum(part.ids.size for part in parts)
    assert len(shapes["on"]) < 60 < 90 < len(shapes["off"]) and padded["on"] < 1.06 * padded["off"]
    assert tokens < padded["off"]


@pytest.mark.compiled
def test_passes_are_the_plain_ones_whatever_rows_are_filled(small):
    model = adapted(small)
    rows, plain, runner = [micro_batch(*shape) for shape in SHAPES], ModelRunner(model), make_runner(model, "on")
    for _ in range(2):  # and again after the weights have changed
        expected = list(plain.representations(rows, [1, 2, 3]))
        results = list(runner.representations(rows, [1, 2, 3]))
        for vectors, exact in zip(results, expected, strict=True):
            np.testing.assert_allclose(np.array(vectors), np.array(exact), atol=1e-6)
        cotangents = [mx.random.normal(each.shape) for each in expected]
        exact = dict(tree_flatten(plain.gradient(rows, [1, 2, 3], cotangents)))
        for name, value in tree_flatten(runner.gradient(rows, [1, 2, 3], cotangents)):
            largest = float(mx.abs(exact[name]).max())
            np.testing.assert_allclose(np.array(value), np.array(exact[name]), atol=1e-5 * largest, err_msg=name)
        model.update(tree_map(lambda v: v * 1.5, model.trainable_parameters()))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "train_type"), [("bfloat16", "lora"), ("float16", "dora"), ("bfloat16", "full")])
def test_half_precision_is_the_plain_path_s(small, dtype, train_type):
    model = adapted(small, getattr(mx, dtype), train_type)
    rows, plain, runner = [micro_batch(*shape) for shape in SHAPES], ModelRunner(model), make_runner(model, "on")
    expected, results = (list(each.representations(rows, [1, 2, 3])) for each in (plain, runner))
    for vectors, exact in zip(results, expected, strict=True):
        np.testing.assert_allclose(np.array(vectors), np.array(exact), atol=0.02 if dtype == "bfloat16" else 0.003)
    cotangents = [mx.random.normal(each.shape) for each in expected]
    assert cosine(*(each.gradient(rows, [1, 2, 3], cotangents) for each in (plain, runner))) > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["dora", "full"])
def test_float32_is_the_plain_path_s(small, train_type):
    model = adapted(small, train_type=train_type)
    rows, plain, runner = [micro_batch(*shape) for shape in SHAPES], ModelRunner(model), make_runner(model, "on")
    cotangents = [mx.random.normal(each.shape) for each in plain.representations(rows)]
    exact = dict(tree_flatten(plain.gradient(rows, [1, 2, 3], cotangents)))
    for name, value in tree_flatten(runner.gradient(rows, [1, 2, 3], cotangents)):
        largest = float(mx.abs(exact[name]).max())
        np.testing.assert_allclose(np.array(value), np.array(exact[name]), atol=1e-5 * largest, err_msg=name)


@pytest.mark.slow
def test_dropout_is_the_seed_s_and_the_plain_path_s_where_no_row_is_added(small):
    model = adapted(small, dropout=0.4)
    rows, plain, runner = [micro_batch(4, 32), micro_batch(5, 16)], ModelRunner(model), make_runner(model, "on")

    def run(which: ModelRunner, number: int) -> list[np.ndarray]:
        return [np.array(vectors) for vectors in which.representations(rows, [number, number])]

    first, again, other = run(runner, 3), run(runner, 3), run(runner, 4)
    assert all(np.array_equal(a, b) and not np.allclose(a, c) for a, b, c in zip(first, again, other, strict=True))
    np.testing.assert_allclose(first[0], run(plain, 3)[0], atol=1e-6)
    # Both passes drop the same inputs: the gradient of a small step is the change of the sum.
    cotangents = [mx.ones(part.shape) for part in first]
    gradient = runner.gradient(rows, [3, 3], cotangents)
    before = sum(part.sum() for part in first)
    squares = sum(float(v.square().sum()) for _, v in tree_flatten(gradient))
    step = 1e-3 * abs(before) / squares
    model.update(tree_map(lambda w, g: w + step * g, model.trainable_parameters(), gradient))
    after = sum(part.sum() for part in run(runner, 3))
    assert after - before == pytest.approx(step * squares, rel=0.1)
    model.eval()
    assert np.array_equal(run(runner, 3)[0], run(runner, 4)[0])


@pytest.mark.compiled
def test_graphs_of_many_shapes_are_not_kept(monkeypatch, small):
    """What a dropped graph holds is freed: here a constant of a megabyte, one in each graph."""
    monkeypatch.setattr(compiled, "SHAPES_KEPT", 3)
    model, built = build(small)[0], []
    forward = CompiledFunctions.forward

    def heavy(*args) -> mx.array:
        constant = mx.zeros(1 << 18)
        mx.eval(constant)
        built.append(1)
        return forward(*args) + constant[0]

    monkeypatch.setattr(CompiledFunctions, "forward", heavy)
    runner = make_runner(model, "on")
    list(runner.representations([micro_batch(2, 4)]))
    mx.clear_cache()
    before = mx.get_active_memory()
    for length in range(5, 15):
        list(runner.representations([micro_batch(2, length)]))
    gc.collect()
    assert len(built) == 11 and mx.get_active_memory() - before < 3 << 20
    list(runner.representations([micro_batch(2, 14)]))
    assert len(built) == 11  # the last used stay
    runner.limit_shapes()
    assert runner._functions.shapes_kept == compiled.SHAPES_SERVED
    del runner
    gc.collect()
    assert mx.get_active_memory() < before


@pytest.mark.compiled
def test_each_thread_has_graphs_of_its_own(small):
    """A graph computes on the stream of the thread that built it, which another thread cannot use."""
    model = build(small)[0]
    runner, results = make_runner(model, "on"), []

    def work() -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            results.append(np.array(next(runner.representations([micro_batch(2, 8)]))))

    work()
    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(results) == 3 and all(np.array_equal(result, results[0]) for result in results)
