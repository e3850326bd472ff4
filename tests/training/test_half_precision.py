"""Training in bfloat16 and float16: what is learnt is float32's, and weights that are not finite are never saved.

python -m pytest tests/training/test_half_precision.py
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from mlx_retrieval.backend import mx, nn

import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import train
from mlx_retrieval.backbones.hub import read_safetensors
from mlx_retrieval.training import base_trainer, checkpoint, loss_scale
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.chat.trainer import ChatTrainer
from mlx_retrieval.training.chat.tuning import loss_of, value_and_grad
from mlx_retrieval.training.config import for_task
from mlx_retrieval.training.gradient_cache import GradientCache
from mlx_retrieval.training.optimizer import AdamW, round_at_random
from mlx_retrieval.utils.errors import UserError

HALF = [mx.bfloat16, mx.float16]


@pytest.fixture(scope="module")
def half_folders(small, tmp_path_factory) -> dict[str, str]:
    """The small model with its weights rounded: by the name of the dtype, its folder."""
    root = tmp_path_factory.mktemp("half")
    folders = {}
    for name in ("bfloat16", "float16"):
        folder = shutil.copytree(small, root / name)
        weights = mx.load(str(folder / "model.safetensors"))
        weights = {key: value.astype(getattr(mx, name)) for key, value in weights.items()}
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        folders[name] = str(folder)
    return folders


@pytest.fixture
def make_trainer(as_metal, half_folders, settings) -> Callable:
    """`make_trainer(dtype)`: of a `full` run on short rows that computes in this dtype, from rounded weights."""

    def make(dtype: str, rounded: str = "", **changes):
        given = {"model": half_folders[rounded or dtype], "dtype": dtype, "train_type": "full"}
        given |= {"max_length": 16, "batch_size": 4}
        given |= {"weight_decay": 0.01, "learning_rate": 2e-5, "schedule": "constant"} | changes
        return training_run.prepare(settings(**given)).trainer

    return make


def flat(gradient: dict) -> np.ndarray:
    return np.concatenate([np.array(v.astype(mx.float32)).ravel() for _, v in sorted(tree_flatten(gradient))])


def cosine(a: dict, b: dict) -> float:
    a, b = flat(a).astype(np.float64), flat(b).astype(np.float64)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def is_rounded(weights: mx.array, masters: mx.array) -> bool:
    """Return whether weights are neighbours of their masters in their own dtype, or the masters themselves."""
    distance = mx.abs(weights.astype(mx.float32) - masters)
    ulp = {mx.float32: 0.0, mx.bfloat16: 2.0**-7, mx.float16: 2.0**-10}[weights.dtype]
    return mx.all(distance <= ulp * mx.abs(masters) + 6e-8).item()


# --- the optimizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_updates_below_half_an_ulp_add_up(dtype):
    """A hundred updates of 1e-4: none of them alone moves a weight of 1 in half precision."""
    weights = mx.array([1.0, -1.0, 0.5], dtype)
    gradients = [mx.array([1e-6, -3e-4, 2.0]) * (1 + k % 7) for k in range(100)]
    model, exact = nn.Module(), nn.Module()
    model.w, exact.w = weights, weights.astype(mx.float32)
    ours = AdamW(model.trainable_parameters(), 1e-4, 0.01)
    theirs = optim.AdamW(1e-4, weight_decay=0.01, bias_correction=True)
    for gradient in gradients:
        ours.update(model, {"w": gradient})
        theirs.update(exact, {"w": gradient})
    assert mx.array_equal(ours.state["w"]["master"], exact.w)
    assert model.w.dtype == dtype and is_rounded(model.w, exact.w)
    assert mx.all(mx.abs(model.w.astype(mx.float32) - weights.astype(mx.float32)) > 1e-3)
    assert {name for name, value in tree_flatten(ours.state) if value.dtype != mx.float32} == {"step"}


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounding_at_random_keeps_the_mean(dtype):
    """A third of the way between two neighbours, either of them comes out, the nearer twice as often."""
    ulp = 2.0**-7 if dtype == mx.bfloat16 else 2.0**-10
    values = mx.full((30_000,), -(1 + ulp / 3))
    rounded = round_at_random(values, dtype, mx.random.key(0)).astype(mx.float32)
    assert set(rounded.tolist()) == {-1.0, -1.0 - ulp}
    assert np.mean(np.array(rounded) == -1.0 - ulp) == pytest.approx(1 / 3, abs=0.02)
    again, other = (round_at_random(values, dtype, mx.random.key(seed)).astype(mx.float32) for seed in (0, 1))
    assert mx.array_equal(rounded, again) and not mx.array_equal(rounded, other)


def test_the_smallest_numbers_of_float16_keep_their_mean_too():
    for value in (0.4 * 2.0**-24, -5.25 * 2.0**-24, 700.5 * 2.0**-24):
        rounded = np.array(round_at_random(mx.full((30_000,), value), mx.float16, mx.random.key(0)), np.float64)
        assert len({*rounded.tolist()}) == 2 and rounded.mean() == pytest.approx(value, abs=0.02 * 2.0**-24)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounding_leaves_numbers_of_the_dtype_and_what_is_no_number(dtype):
    largest = mx.finfo(dtype).max
    kept = mx.array([0.0, 1.0, -1.5, 2.0**-14, 3 * 2.0**-24, largest, -largest, 1e39, -1e39])
    for seed in range(20):
        assert mx.array_equal(round_at_random(kept, dtype, mx.random.key(seed)).astype(mx.float32), kept)
    beyond = largest * (1 + 2.0**-14)  # nearer to the largest number than to what would come after it
    assert round_at_random(mx.full((1000,), beyond), dtype, mx.random.key(0)).astype(mx.float32).max().item() == largest
    no_numbers = mx.array([0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF, 0x7F800001], mx.uint32).view(mx.float32)
    assert mx.isnan(round_at_random(no_numbers, dtype, mx.random.key(0))).all().item()


def test_weights_of_a_shape_are_rounded_each_by_its_own_numbers():
    """And again by others in the next step."""
    model = nn.Module()
    model.a = model.b = mx.ones((64,), mx.bfloat16)
    optimizer = AdamW(model.trainable_parameters(), 1e-3, 0.0)
    seen = []
    for _ in range(2):
        optimizer.update(model, {"a": mx.ones((64,)), "b": mx.ones((64,))})
        seen += [model.a.tolist(), model.b.tolist()]
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])


def test_float32_weights_are_updated_as_by_mlx_and_take_no_more_memory():
    first = mx.random.normal((5, 3))
    ours, theirs = nn.Module(), nn.Module()
    ours.w = theirs.w = first
    optimizers = AdamW(ours.trainable_parameters(), 1e-3, 0.01), optim.AdamW(1e-3, [0.9, 0.999], 1e-8, 0.01, True)
    for _ in range(3):
        for optimizer, model in zip(optimizers, (ours, theirs), strict=True):
            optimizer.update(model, {"w": first.square()})
    assert mx.array_equal(ours.w, theirs.w) and not mx.array_equal(ours.w, first)
    states = [dict(tree_flatten(optimizer.state)) for optimizer in optimizers]
    assert states[0].keys() == states[1].keys() == {"step", "learning_rate", "w.m", "w.v"}
    assert all(mx.array_equal(states[0][name], value) for name, value in states[1].items())


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_full_run_in_half_precision_learns_as_much_as_in_float32(make_trainer, dtype):
    """Twenty steps at 2e-5, of which bfloat16 alone keeps a fifteenth."""
    losses = {}
    for computed in ("float32", dtype):
        trainer = make_trainer(computed, rounded=dtype, batch_size=16, max_length=32)
        batches = [trainer.batches.batch(k) for k in range(20)]
        trainer.model.eval()
        before = np.mean([trainer.grad_cache.loss(batch) for batch in batches[:4]])
        for step, batch in enumerate(batches, 1):
            trainer.update(batch, step)
        losses[computed] = np.mean([trainer.grad_cache.loss(batch) for batch in batches[:4]])
        state = dict(tree_flatten(trainer.optimizer.state))
        assert {name for name, value in state.items() if value.dtype != mx.float32} == {"step"}
        assert any(name.endswith(".master") for name in state) == (computed != "float32")
        for name, value in tree_flatten(trainer.model.trainable_parameters()):
            assert is_rounded(value, state.get(f"{name}.master", value))
    assert losses["float32"] < 0.92 * before
    assert losses[dtype] == pytest.approx(losses["float32"], rel=0.03)


def test_a_full_run_in_float16_stays_finite(make_trainer):
    trainer = make_trainer("float16")
    for step in (1, 2):
        trainer.update(trainer.batches.batch(step), step)
    arrays = tree_flatten([trainer.model.trainable_parameters(), trainer.optimizer.state])
    assert all(mx.isfinite(value).all().item() for _, value in arrays)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.compiled])])
def test_gradients_are_added_in_float32(make_trainer, compiled):
    trainer = make_trainer("bfloat16", gradient_accumulation_steps=3, compile="on" if compiled else "off")
    assert trainer.grad_cache.runner.compiled == compiled
    result = trainer.grad_cache(trainer.batches.batch(0), 0)
    assert {value.dtype for _, value in tree_flatten(result.grads)} == {mx.float32}
    exact = [value for _, value in tree_flatten(result.grads) if not mx.array_equal(value, value.astype(mx.bfloat16))]
    assert exact  # sums that bfloat16 could not hold


# --- float16's range --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [0.135, 1.0, 1.99, 3e-5, 7e4, 1e-37])
def test_the_scale_is_a_power_of_two_and_the_largest_number_about_1(largest):
    scale = loss_scale.scale_of(mx.array([[0.0, -largest], [largest / 3, 0.0]])).item()
    assert 1 <= scale * largest < 2.0001 and np.frexp(scale)[0] == 0.5


def test_the_scale_of_nothing_and_of_no_number():
    assert loss_scale.scale_of(mx.zeros((3,))).item() == 1
    for bad in (float("nan"), float("inf")):
        grad = mx.array([1.0, bad, 0.0])
        assert not mx.isfinite(grad * loss_scale.scale_of(grad)).all().item()


@pytest.mark.parametrize("parts", [0, 3])
def test_small_gradients_survive_in_float16(make_trainer, parts):
    """At a hundred-thousandth of the loss the gradient has float32's direction, in one pass and by gradient caching."""
    grads = {}
    for dtype in ("float32", "float16"):
        trainer = make_trainer(dtype, rounded="float16", gradient_accumulation_steps=parts)
        objective = trainer.grad_cache.objective
        trainer.grad_cache.objective = lambda vectors, batch, given=objective: given(vectors, batch) / 100_000
        result = trainer.grad_cache(trainer.batches.batch(0), 0)
        assert (result.micro_batches == 1) == (parts == 0)
        grads[dtype] = result.grads
        loss = result.loss.item()
    again = trainer.grad_cache.objective(result.representations, trainer.batches.batch(0))
    assert loss == pytest.approx(again.item())  # as reported, it is not scaled
    assert cosine(grads["float32"], grads["float16"]) > 0.999
    assert np.linalg.norm(flat(grads["float16"])) == pytest.approx(np.linalg.norm(flat(grads["float32"])), rel=0.01)


@pytest.mark.parametrize("parts", [0, 3])
def test_a_gradient_that_overflows_is_computed_again_with_a_smaller_scale(make_trainer, monkeypatch, parts):
    trainer = make_trainer("float16", gradient_accumulation_steps=parts)
    batch, scale_of, sizes = trainer.batches.batch(0), loss_scale.scale_of, []
    expected = trainer.grad_cache(batch, 0)

    def too_large(grad: mx.array, largest: float) -> mx.array:
        sizes.append(largest)
        return scale_of(grad, largest) * 2**15

    monkeypatch.setattr(loss_scale, "scale_of", too_large)
    result = trainer.grad_cache(batch, 0)
    assert sizes == list(loss_scale.LARGEST)
    assert cosine(result.grads, expected.grads) > 0.999


def test_a_smaller_scale_holds_chat_s_large_gradients_in_float16():
    """The gradient itself is finite, and in float16 only its scaled sum over 4,096 tokens is not."""

    class Model(nn.Module):
        def __init__(self, dtype: mx.Dtype):
            super().__init__()
            keys = mx.random.split(mx.random.key(0))
            self.embedding, self.last = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
            self.embedding.weight = (200 * mx.random.normal((50, 16), key=keys[0])).astype(mx.float16).astype(dtype)
            self.last.weight = (mx.random.normal((50, 16), key=keys[1]) / 600).astype(mx.float16).astype(dtype)

        def __call__(self, ids: mx.array) -> mx.array:
            return self.last(self.embedding(ids))

    batch = mx.random.randint(0, 3, (4, 1025), key=mx.random.key(2)), mx.ones((4, 1024), mx.bool_), mx.array(4096.0)
    first, second = loss_scale.LARGEST
    results = []
    for dtype, largest in ((mx.float32, first), (mx.float16, first), (mx.float16, second)):
        model = Model(dtype)
        (loss, _), grads = value_and_grad(model, loss_of, largest)(model, *batch)
        assert loss_scale.overflowed(loss, grads) == (dtype == mx.float16 and largest == first)
        results.append(grads)
    assert cosine(results[0], results[2]) > 0.999
    assert np.linalg.norm(flat(results[2])) == pytest.approx(np.linalg.norm(flat(results[0])), rel=0.01)


@pytest.fixture
def make_chat(as_metal, half_folders, tmp_path, write_rows) -> Callable:
    """`make_chat(**changes)`: the trainer of a `full` chat run of two steps in float16."""
    turns = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a kidney stone"}]
    data = str(write_rows([{"messages": turns}] * 4))

    def make(**changes) -> ChatTrainer:
        given = {"model": half_folders["float16"], "data": [data], "dtype": "float16", "train_type": "full", "steps": 2}
        given |= {"batch_size": 2, "learning_rate": 2e-5, "save_steps": 0, "output": str(tmp_path / "run")}
        return training_run.prepare(for_task("chat", given | changes)).trainer

    return make


@pytest.mark.slow
def test_a_full_chat_run_in_float16_repeats_a_step_that_overflows(make_chat, monkeypatch):
    """Regression: it ended the run. A resumed run knows the scale that it came to."""
    trainers, norms, power_of_two = [], [], loss_scale.power_of_two
    for factor in (1, 2**17):
        monkeypatch.setattr(loss_scale, "power_of_two", lambda share, factor=factor: power_of_two(share) * factor)
        trainers.append(make_chat())
        norms.append([])
        trainers[-1].train(2, lambda _: norms[-1].append(trainers[-1].optimizer.state["grad_norm"].item()))
    assert [trainer.state.largest for trainer in trainers] == list(loss_scale.LARGEST)
    assert norms[1] == pytest.approx(norms[0], rel=0.01) and len(norms[1]) == trainers[1].state.step == 2
    arrays = tree_flatten([trainers[1].model.trainable_parameters(), trainers[1].optimizer.state])
    assert all(mx.isfinite(value).all().item() for _, value in arrays)


def test_unscaled_gradients_have_the_bits_that_were_scaled():
    grads = {"w": mx.random.normal((100,), key=mx.random.key(0)), "layer": {"b": mx.array([1e-20, -3e9, 0.0])}}
    for power in (-8, 0, 13):
        scale = mx.array(2.0**power)
        again = loss_scale.unscaled(tree_map(lambda grad, scale=scale: grad * scale, grads), scale)
        for (name, grad), (_, other) in zip(tree_flatten(grads), tree_flatten(again), strict=True):
            assert mx.array_equal(grad.view(mx.int32), other.view(mx.int32)), name


def test_chat_s_small_gradients_survive_in_float16(as_metal, half_folders):
    """With a divisor of 100,000 tokens, as of a large batch."""
    from mlx_retrieval.backbones import load_backbone

    batch = mx.array([[5, 6, 7, 8, 9, 10]]), mx.ones((1, 5), mx.bool_), mx.array(100_000.0)
    results = {}
    for dtype in ("float32", "float16"):
        backbone = load_backbone(Path(half_folders["float16"]), bidirectional=False, dtype=dtype)
        backbone.adapted.unfreeze()
        (loss, count), grads = value_and_grad(backbone.adapted, loss_of)(backbone.adapted, *batch)
        assert count.item() == 5 and {value.dtype for _, value in tree_flatten(grads)} == {mx.float32}
        results[dtype] = loss.item(), grads
    assert results["float16"][0] == pytest.approx(results["float32"][0], rel=0.01)
    assert cosine(results["float32"][1], results["float16"][1]) > 0.999


# --- what is saved ----------------------------------------------------------------------------------------------------


def arguments(settings) -> list[str]:
    """The flags of a run on the small model."""
    given = settings()
    return ["--model", given.model, "--data", *given.data, "--output", given.output, "--batch-size", "4",
            "--max-length", "16", "--steps", "4", "--save-steps", "1", "--holdout", "0"]  # fmt: skip


def assert_all_finite(run: Path) -> None:
    files = list(run.rglob("*.safetensors"))
    assert files
    for file in files:
        assert all(mx.isfinite(value).all().item() for value in read_safetensors(file).values()), file


@pytest.mark.slow
def test_an_update_to_nan_ends_the_run_and_is_not_saved(settings, tmp_path, monkeypatch, capsys):
    original = AdamW.apply_single

    def spoilt(self, gradient, parameter, state):
        updated = original(self, gradient, parameter, state)
        return updated + mx.where(self.step == 3, float("nan"), 0.0)

    monkeypatch.setattr(AdamW, "apply_single", spoilt)
    assert train.main(arguments(settings)) == 2
    error = capsys.readouterr().err
    assert "step 3: the update made " in error and "the last good state is in " in error and "step-000002" in error
    assert_all_finite(tmp_path / "run")
    assert checkpoint.last_step(tmp_path / "run").name == "step-000002" and not (tmp_path / "run" / "final").exists()


def test_no_folder_is_written_whose_weights_are_not_finite(settings, tmp_path):
    trainer = training_run.prepare(settings()).trainer
    trainer.state.step = 5
    trainer.model.update(tree_map(lambda value: value + float("inf"), trainer.model.trainable_parameters()))
    with pytest.raises(UserError, match=r"step 5: the update made .*lora_a and \d+ more .*; no step was saved before"):
        trainer.save()
    assert "not saved" in trainer.save_last_good()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_tenth_skipped_batch_in_a_row_ends_the_run(settings):
    trainer = training_run.prepare(settings(skip_bad_batches=True)).trainer
    about = "step 3: loss nan", "Examples", ["rows.jsonl:1"], "A lower {learning_rate} may help"
    for _ in range(2):
        trainer.watch(1.0, 1.0)  # a good step
        for _ in range(base_trainer.MOST_SKIPPED - 1):
            trainer.skip_or_refuse(*about)
    with pytest.raises(UserError, match=r"loss nan, as in the 9 batches before: the run ends. A lower --learning-rate"):
        trainer.skip_or_refuse(*about)


@pytest.mark.slow
def test_ten_skipped_batches_in_a_row_end_the_run(settings, tmp_path, monkeypatch, capsys):
    """After two good batches and nine bad ones, a good one; then ten."""
    good = (1, 2, 12)
    original = GradientCache.__call__

    def spoilt(self, batch, seed):
        result = original(self, batch, seed)
        return result if seed in good else result._replace(loss=result.loss * float("nan"))

    monkeypatch.setattr(GradientCache, "__call__", spoilt)
    flags = [*arguments(settings), "--steps", "30", "--save-steps", "0", "--skip-bad-batches"]
    assert train.main(flags) == 2
    captured = capsys.readouterr()
    assert captured.out.count("the batch is skipped") == 2 * (base_trainer.MOST_SKIPPED - 1)
    assert "step 22: loss nan" in captured.err and "as in the 9 batches before: the run ends" in captured.err
    saved = checkpoint.last_step(tmp_path / "run")
    assert saved.name == "step-000021" and str(saved.name)[-2:] in captured.err
    assert json.loads((saved / "trainer_state.json").read_text())["skipped_batches"] == 18
    assert_all_finite(tmp_path / "run")


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task",
    [{}, pytest.param({"task": "rerank", "loss": "ranknet", "max_length": 200}, marks=pytest.mark.slow)],
    ids=str,
)
def test_masters_are_saved_and_resumed_bit_for_bit(make_trainer, tmp_path, task):
    whole = make_trainer("bfloat16", **task)
    for step in (1, 2, 3):
        whole.update(whole.batches.batch(step - 1), step)
        if step == 1:
            whole.save()
    broken = make_trainer("bfloat16", output=str(tmp_path / "broken"), **task)
    folder = checkpoint.last_step(tmp_path / "run")
    broken.resume(folder)
    assert {value.dtype for value in read_safetensors(folder / "adapters.safetensors").values()} == {mx.bfloat16}
    for step in (2, 3):
        broken.update(broken.batches.batch(step - 1), step)
    states = [
        dict(tree_flatten([trainer.model.trainable_parameters(), trainer.optimizer.state]))
        for trainer in (whole, broken)
    ]
    assert states[0].keys() == states[1].keys() and any(name.endswith("master") for name in states[0])
    assert all(mx.array_equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("there, here", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")])
def test_a_full_run_is_not_continued_in_another_dtype(make_trainer, tmp_path, there, here):
    trainer = make_trainer(there, rounded="float16")
    trainer.update(trainer.batches.batch(0), 1)
    trainer.save()
    other = make_trainer(here, rounded="float16", output=str(tmp_path / "other"))
    with pytest.raises(UserError, match=rf"trained in {there}, and here .* in {here}. --dtype {there} continues"):
        other.resume(checkpoint.last_step(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_compiled_update_is_the_plain_one(dtype):
    """With --compile on. Its state is as of any other, so that a run may be resumed without it."""
    states = []
    for compiled in (False, True):
        model = nn.Linear(4, 3)
        model.update({"weight": mx.arange(12.0).reshape(3, 4).astype(dtype), "bias": mx.ones(3, dtype)})
        optimizer = AdamW(model.trainable_parameters(), 1e-3, 0.1, compiled)
        for step in range(1, 4):
            optimizer.learning_rate = 1e-3 * step
            optimizer.update(model, {"weight": mx.full((3, 4), 0.5 * step), "bias": mx.full(3, -0.2)})
            mx.eval(model.parameters(), optimizer.state)
        states.append(dict(tree_flatten([model.parameters(), optimizer.state])))
    plain, result = states
    assert plain.keys() == result.keys() and all(plain[name].dtype == result[name].dtype for name in plain)
    for name, value in plain.items():
        exact = np.array(value.astype(mx.float32))
        np.testing.assert_allclose(np.array(result[name].astype(mx.float32)), exact, rtol=1e-5, err_msg=name)
