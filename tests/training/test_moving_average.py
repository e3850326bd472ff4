"""--ema: the average of the weights is evaluated and saved, and training goes on from the weights themselves.

python -m pytest tests/training/test_moving_average.py
"""

from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import train
from mlx_retrieval.backbones.hub import read_safetensors
from mlx_retrieval.models import loading
from mlx_retrieval.training import distributed, moving_average
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import for_task
from mlx_retrieval.training.moving_average import MovingAverage
from mlx_retrieval.training.optimizer import AdamW
from mlx_retrieval.training.signals import Signals
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError


def test_the_average_is_that_of_the_formula():
    """The decay is (1 + t) / (10 + t) at first, and never more than what is asked for."""
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(40, 3))
    average = MovingAverage(0.7, {"a": {"w": mx.array(steps[0])}})
    expected = steps[0]
    for step, value in enumerate(steps[1:], 1):
        average.update({"a": {"w": mx.array(value)}}, {}, step)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        np.testing.assert_allclose(np.array(average.values["a.w"]), expected, atol=1e-6)
    assert (1 + 20) / (10 + 20) == 0.7  # both kinds of decay were met


def test_where_it_began_is_forgotten():
    average = MovingAverage(0.999, {"w": mx.array([1e3])})
    for step in range(1, 30):
        average.update({"w": mx.array([1.0])}, {}, step)
    assert abs(average.values["w"].item() - 1.0) < 1e-3


def test_half_precision_is_averaged_by_its_masters_and_rounded_at_random():
    parameters = {"w": mx.ones((1_000,), mx.bfloat16)}
    optimizer = AdamW(parameters, 1e-3, 0.0)
    optimizer.state["w"]["master"] = mx.full((1_000,), 1.001)
    average = MovingAverage(0.5, parameters)
    for step in range(1, 30):
        average.update(parameters, optimizer.state, step)
    np.testing.assert_allclose(np.array(average.values["w"]), 1.001, atol=1e-6)
    weights = [average.weights(parameters, step)["w"] for step in (7, 7, 8)]
    assert weights[0].dtype == mx.bfloat16 and mx.array_equal(weights[0], weights[1])
    assert not mx.array_equal(weights[0], weights[2])
    assert abs(weights[0].astype(mx.float32).mean().item() - 1.001) < 3e-4


def trained(settings, **changes):
    """A prepared run after two steps."""
    run = training_run.prepare(settings(**{"ema": 0.9, "learning_rate": 1e-2} | changes))
    for step in (1, 2):
        run.trainer.update(run.trainer.batches.batch(step), step)
    return run


def flat(tree: dict) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def test_the_average_is_saved_and_evaluated_and_training_keeps_its_weights(settings, tmp_path):
    trainer = trained(settings).trainer
    own = tree_map(lambda value: value, trainer.model.trainable_parameters())
    batch = trainer.batches.batch(0)
    with trainer.averaged():
        loss = trainer.grad_cache.loss(batch)
        for name, value in flat(trainer.model.trainable_parameters()).items():
            assert mx.array_equal(value, trainer.average.values[name]), name
    assert all(mx.array_equal(value, flat(own)[n]) for n, value in flat(trainer.model.trainable_parameters()).items())
    assert loss != trainer.grad_cache.loss(batch)
    files.write_folder(tmp_path / "best", trainer.write)
    saved = read_safetensors(tmp_path / "best" / loading.ADAPTERS)
    changed = 0
    for name, value in saved.items():
        average = trainer.average.values[_named(trainer.average, name)]
        assert mx.array_equal(value, average)
        changed += not mx.array_equal(value, flat(own)[_named(trainer.average, name)])
    assert changed
    again, _, _ = loading.open_model(None, str(tmp_path / "best"))
    with trainer.averaged():
        ids, lengths = mx.array([[5, 6, 7, 8]]), mx.array([4])
        expected = np.array(trainer.model.backbone.hidden_states(ids, lengths))
    np.testing.assert_array_equal(np.array(again.backbone.hidden_states(ids, lengths)), expected)


def _named(average: MovingAverage, name: str) -> str:
    """Return the name that the whole model has for a weight of the backbone."""
    return next(known for known in average.values if known.endswith(name))


def test_the_weights_come_back_after_an_error(settings):
    trainer = trained(settings).trainer
    own = flat(trainer.model.trainable_parameters())
    with pytest.raises(RuntimeError), trainer.averaged():
        raise RuntimeError
    assert all(mx.array_equal(value, own[name]) for name, value in flat(trainer.model.trainable_parameters()).items())


def test_a_resumed_trainer_goes_on_to_the_bit(settings, tmp_path):
    run = trained(settings)
    files.write_folder(tmp_path / "step", run.trainer.write)
    again = training_run.prepare(settings(ema=0.9, learning_rate=1e-2)).trainer
    again.resume(tmp_path / "step")
    for trainer in (run.trainer, again):
        trainer.update(trainer.batches.batch(3), 3)
    for name, value in run.trainer.average.values.items():
        assert mx.array_equal(value, again.average.values[name])


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_a_resumed_run_is_the_same_to_the_bit(settings, tmp_path, train_type):
    given = {"ema": 0.9, "steps": 4, "train_type": train_type, "learning_rate": 1e-3}
    train.train(settings(**given, output=str(tmp_path / "whole")))
    train.train(settings(**given, stop_after=2))
    train.train(train.resumed_settings({"resume": True, "output": str(tmp_path / "run")}))
    for name in (loading.ADAPTERS, moving_average.FILE):
        one, other = ((tmp_path / run / "final" / name).read_bytes() for run in ("whole", "run"))
        assert one == other
    plain = tmp_path / "whole" / "final"
    weights, average = read_safetensors(plain / moving_average.FILE), read_safetensors(plain / loading.ADAPTERS)
    assert len(weights) == 2 * len(average)


def test_evaluations_of_a_run_are_of_the_average(settings, monkeypatch):
    seen = []
    run = trained(settings)
    trainer = run.trainer
    weights = flat(trainer.model.trainable_parameters())

    def evaluate(step):
        seen.append(all(mx.array_equal(v, weights[n]) for n, v in flat(trainer.model.trainable_parameters()).items()))
        return {}

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.state.evaluation_due = True
    training_run.after_step(trainer, None, 5, Signals())
    assert seen == [False]


def test_the_first_lines_and_the_estimate_know_of_it(settings):
    run, plain = trained(settings, train_type="full"), training_run.prepare(settings(train_type="full"))
    assert dict(run.headline)["average"] == "of the weights, decay 0.9; it is evaluated and saved"
    assert "average" not in dict(plain.headline) and plain.trainer.average is None
    trained_numbers = run.outlook.job.trained
    assert run.outlook.expected.total - plain.outlook.expected.total == 4 * trained_numbers


def test_other_ranks_keep_no_average(settings, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    assert training_run.prepare(settings(ema=0.9)).trainer.average is None


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_decays_that_cannot_be(settings, decay):
    with pytest.raises(UserError, match="--ema"):
        settings(ema=decay)


def test_chat_is_refused(write_rows, small, tmp_path):
    data = str(write_rows([{"text": f"one two {i}"} for i in range(8)]))
    given = {"model": small, "data": [data], "steps": 2, "ema": 0.9, "output": str(tmp_path / "run")}
    with pytest.raises(UserError, match="--ema is for --task embed or late or rerank, and this is chat"):
        training_run.prepare(for_task("chat", given))


def test_a_damaged_average_is_an_error(settings, tmp_path):
    trainer = trained(settings).trainer
    files.write_folder(tmp_path / "step", trainer.write)
    mx.save_safetensors(str(tmp_path / "step" / moving_average.FILE), {"weights.x": mx.zeros(1)})
    with pytest.raises(UserError, match=r"average.safetensors"):
        trainer.resume(Path(tmp_path / "step"))
