"""Compiled passes on worker threads give what the model gives, whatever happens around them.

python -m pytest tests/models/test_model_runner.py
"""

import itertools
import json
import time

from mlx_retrieval.backend import device_memory, mx, nn

import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_retrieval import backend
from mlx_retrieval.backbones import lora, saved_products
from mlx_retrieval.backbones.gradient_checkpointing import checkpoint_blocks, seed
from mlx_retrieval.models import compiled as compiled_passes
from mlx_retrieval.models import cpu_model_runner
from mlx_retrieval.models.batching import MicroBatch
from mlx_retrieval.models.compiled import CompiledFunctions
from mlx_retrieval.models.cpu_model_runner import CpuModelRunner
from mlx_retrieval.models.loading import build
from mlx_retrieval.models.model_runner import ModelRunner
from mlx_retrieval.models.runners import make_runner
from mlx_retrieval.utils.errors import UserError

pytestmark = pytest.mark.compiled
compiled = pytest.mark.skipif(not backend.FUSED, reason="on this device passes are computed as they come")


def micro_batch(rows: int, length: int, start: int = 0) -> MicroBatch:
    rng = np.random.default_rng([rows, length, start])
    lengths = rng.integers(3, length + 1, rows).astype(np.int32)
    ids = rng.integers(10, 400, (rows, length)).astype(np.int32)
    return MicroBatch(mx.array(ids), mx.array(lengths), mx.array(np.ones_like(lengths)), mx.array(lengths - 1))


def adapted(folder, train_type: str = "lora"):
    """With LoRA, its matrices are both non-zero."""
    model = build(folder)[0]
    lora.adapt(model.backbone, train_type, rank=4)
    mx.random.seed(1)
    model.update(tree_map(lambda v: v + 0.05 * mx.random.normal(v.shape), model.trainable_parameters()))
    model.train()
    return model


@pytest.fixture
def model(small):
    return adapted(small)


@pytest.fixture
def rows() -> list[MicroBatch]:
    return [micro_batch(*shape) for shape in ((4, 30), (9, 7), (2, 64), (40, 12), (1, 5))]


def gradient(model, rows, cotangents) -> dict:
    value = nn.value_and_grad(model, lambda: sum((model(r) * c).sum() for r, c in zip(rows, cotangents, strict=True)))
    return value()[1]


def assert_close(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    found, expected = dict(tree_flatten(found)), dict(tree_flatten(expected))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = float(mx.abs(value).max())
        np.testing.assert_allclose(np.array(found[name]), np.array(value), atol=tolerance * largest, err_msg=name)


@pytest.mark.parametrize("merged", [False, True])
def test_passes_are_the_model_s(monkeypatch, model, rows, merged):
    """With adapters merged into the weights, and without."""
    monkeypatch.setattr(backend, "MICRO_BATCH_TOKENS", 1 if merged else 1 << 30)
    runner, seeds = make_runner(model), np.zeros(len(rows), int)
    cotangents = [mx.random.normal(model(part).shape) for part in rows]
    mx.eval(cotangents)
    for _ in range(2):  # and again after the weights have changed
        found = list(runner.representations(rows, seeds))
        for part, vectors in zip(rows, found, strict=True):
            np.testing.assert_allclose(np.array(vectors), np.array(model(part)), atol=3e-6)
        expected = gradient(model, rows, cotangents)  # its sums are in another order
        assert_close(runner.gradient(rows, seeds, cotangents), expected, 3e-5)
        model.update(tree_map(lambda v: v * 1.5, model.trainable_parameters()))


@compiled
@pytest.mark.parametrize("room", [0, 200_000, 1 << 30])
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_products_of_the_forward_pass_spare_the_second_and_change_no_bit(monkeypatch, small, rows, room, train_type):
    """None, some or all micro-batches keep theirs; what was kept is given back as it is used."""
    model = adapted(small, train_type)
    monkeypatch.setattr(backend, "MICRO_BATCH_TOKENS", 1)
    monkeypatch.setattr(device_memory, "for_products", lambda: room)
    runner, seeds, saved = make_runner(model), np.arange(len(rows)), {}
    plain = list(runner.representations(rows, seeds))
    noted = list(runner.representations(rows, seeds, saved))
    assert all(mx.array_equal(a, b) for a, b in zip(plain, noted, strict=True))
    tokens = sum(rows[i].ids.size for i in saved)
    size = saved_products.size(runner._adapters or saved_products.trained_layers(model.backbone))
    assert sum(array.nbytes for arrays in saved.values() for array in arrays) == tokens * size > 0 or not room
    assert {0: len(saved) == 0, 200_000: 0 < len(saved) < len(rows), 1 << 30: len(saved) == len(rows)}[room]
    cotangents = [mx.ones(part.shape) for part in plain]
    expected, found = runner.gradient(rows, seeds, cotangents), runner.gradient(rows, seeds, cotangents, saved)
    pairs = zip(tree_flatten(found), tree_flatten(expected), strict=True)
    assert not saved and all(mx.array_equal(a, b) for (_, a), (_, b) in pairs)
    assert_close(found, gradient(model, rows, cotangents), 3e-5)


def test_the_same_bits_every_time(model, rows):
    runner, seeds = make_runner(model), np.arange(len(rows))
    cotangents = [mx.ones((part.ids.shape[0], 1)) for part in rows]
    runs = [tree_flatten(runner.gradient(rows, seeds, cotangents)) for _ in range(3)]
    for run in runs[1:]:
        assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(run, runs[0], strict=True))


def test_the_model_is_as_before_and_can_be_used_between(model, rows):
    before = dict(tree_flatten(model.parameters()))
    expected, runner = np.array(model(rows[0])), make_runner(model)
    for i, _ in enumerate(runner.representations(rows)):
        if i == 1:
            np.testing.assert_allclose(np.array(model(rows[0])), expected, atol=1e-6)
    after = dict(tree_flatten(model.parameters()))
    assert all(after[name] is value or mx.array_equal(after[name], value) for name, value in before.items())


def test_dropout_only_while_training_and_by_its_seed(small, rows):
    model = build(small)[0]
    lora.adapt(model.backbone, rank=4, dropout=0.4)
    model.update(tree_map(lambda v: v + 0.05, model.trainable_parameters()))
    runner = make_runner(model)

    def run(training: bool, number: int) -> np.ndarray:
        model.train(training)
        return np.concatenate([np.array(v) for v in runner.representations(rows, [number] * len(rows))])

    still = run(False, 0)
    assert np.array_equal(still, run(False, 1))
    assert np.array_equal(run(True, 3), run(True, 3))
    assert not np.allclose(run(True, 3), run(True, 4)) and not np.allclose(run(True, 3), still)
    assert np.array_equal(run(False, 3), still)
    seed(3)
    np.testing.assert_allclose(run(True, 3)[:4], np.array((model.train(), seed(3), model(rows[0]))[-1]), atol=1e-6)


@compiled
def test_graphs_of_many_shapes_are_not_kept_for_ever(monkeypatch, model):
    """The last used stay: a shape is met again without a new graph, and what was dropped is built again."""
    one = cpu_model_runner._workers()[:1]
    monkeypatch.setattr(cpu_model_runner, "_workers", lambda: one)
    monkeypatch.setattr(backend, "WORKERS", 1)
    monkeypatch.setattr(compiled_passes, "SHAPES_KEPT", 3)
    runner, built = make_runner(model), []
    forward = CompiledFunctions.forward
    monkeypatch.setattr(CompiledFunctions, "forward", lambda *args: (built.append(1), forward(*args))[1])
    for length, graphs in ((4, 1), (5, 2), (6, 3), (4, 3), (7, 4), (4, 4), (6, 4), (5, 5), (7, 6)):
        (found,) = runner.representations([micro_batch(2, length)])
        np.testing.assert_allclose(np.array(found), np.array(model(micro_batch(2, length))), atol=1e-6)
        assert len(built) == graphs and len(runner._functions[0]._compiled) == min(graphs, 3)


@compiled
def test_an_error_in_a_worker_reaches_the_caller(monkeypatch, model, rows):
    runner = make_runner(model)

    def fail(*_):
        raise UserError("no")

    with monkeypatch.context() as patched:
        patched.setattr(type(model.head), "__call__", fail)
        with pytest.raises(UserError, match="no"):
            list(runner.representations(rows))
    found = list(runner.representations(rows))  # and the worker lives on, with the model's own weights
    np.testing.assert_allclose(np.array(found[0]), np.array(model(rows[0])), atol=1e-6)


@compiled
def test_an_error_leaves_no_worker_behind(monkeypatch, model, rows):
    """Regression: the next worker was still building its graph, so that the model held tracers, not its weights."""
    calls = itertools.count()

    def fail(*_):
        time.sleep(0.3 if next(calls) else 0)
        raise UserError("no")

    monkeypatch.setattr(type(model.head), "__call__", fail)
    cotangents = [mx.zeros(1)] * 5
    for use in (lambda of: list(of.representations(rows)), lambda of: of.gradient(rows, range(5), cotangents)):
        calls = itertools.count()
        with pytest.raises(UserError, match="no"):
            use(make_runner(model))
        begun = next(calls)
        for _ in range(20):
            mx.eval(model.parameters())
            time.sleep(0.01)
        assert next(calls) == begun + 1


def test_the_device_and_checkpointing_choose_the_runner(monkeypatch, model):
    """Metal and CUDA take the plain runner, and so do checkpointed blocks, whose dropout a graph would freeze."""
    assert type(make_runner(model)) is (CpuModelRunner if backend.COMPILED else ModelRunner)
    checkpoint_blocks(model.backbone)
    assert type(make_runner(model)) is ModelRunner
    monkeypatch.setattr(backend, "COMPILED", False)
    assert type(make_runner(model)) is ModelRunner


@compiled
def test_fewer_shapes_are_this_runner_s_alone(model):
    """Regression: a server's limit on shapes was set for the whole process, training in a notebook included."""
    runner, other = make_runner(model), make_runner(model)
    runner.limit_shapes()
    assert {functions.shapes_kept for functions in runner._functions} == {24}
    runner.limit_shapes(models=3)
    assert {functions.shapes_kept for functions in runner._functions} == {8}
    runner.limit_shapes(models=40)
    assert {functions.shapes_kept for functions in runner._functions} == {6}
    assert {functions.shapes_kept for functions in other._functions} == {128}


@pytest.mark.slow
def test_the_loss_curve_does_not_depend_on_optimisations(tmp_path, run_python):
    """Twelve steps of the embedded default with everything that is done for CPUs, and with none of it."""
    code = (
        "import os, sys; os.environ['MLX_RETRIEVAL_PLAIN'] = sys.argv[1]\n"
        "import train\n"
        "flags = '--steps 12 --batch-size 24 --skip-eval-init --eval-steps 0 --save-steps 0 --output'\n"
        "sys.exit(train.main([*flags.split(), sys.argv[2]]))"
    )
    curves = []
    for plain in "01":
        output = tmp_path / f"plain-{plain}"
        done = run_python(code, plain, output)
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        curves.append([record["loss"] for record in records if "loss" in record])
    assert len(curves[0]) == 12 and curves[0][-1] < 0.9 * curves[0][0]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)
