"""How long a run is: steps and epochs, the defaults for the toolkit's and for a user's data, very small data.

python -m pytest tests/training/test_length.py
"""

import pytest

from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.flags import from_flags
from mlx_retrieval.training.length import describe_length, length_warnings, resolve_length
from mlx_retrieval.training.settings_file import write_yaml
from mlx_retrieval.utils.errors import UserError

OWN = ["pairs.jsonl"]  # need not exist here


def resolved(per_epoch: float, **changes) -> tuple[int, float | None, str]:
    settings = Settings(**{"data": OWN} | changes)
    resolve_length(settings, per_epoch)
    return settings.steps, settings.epochs, describe_length(settings, per_epoch)


def test_one_epoch_of_own_data_and_150_steps_of_the_toolkit_s():
    assert resolved(12_000 / 64) == (188, 1.0, "1 epoch = 188 steps")
    assert resolved(3353 / 64, data=["train-data.jsonl"]) == (150, None, "150 steps = 2.9 epochs")


def test_steps_from_epochs_and_epochs_of_steps():
    assert resolved(187.5, epochs=3) == (563, 3, "3 epochs = 563 steps")
    assert resolved(187.5, epochs=0.5) == (94, 0.5, "0.5 epochs = 94 steps")
    assert resolved(30, epochs=0.1)[0] == 3  # 0.1 * 30 is a little above 3 in floating point
    assert resolved(10, epochs=0.01) == (1, 0.01, "0.01 epochs = 1 step")
    assert resolved(187.5, steps=2000) == (2000, None, "2,000 steps = 10.7 epochs")
    assert resolved(187.5, epochs=3, data=["train-data.jsonl"])[0] == 563


def test_steps_and_epochs_have_to_agree():
    assert resolved(6, steps=18, epochs=3) == (18, 3, "3 epochs = 18 steps")
    assert resolved(187.5, steps=562, epochs=3)[0] == 562  # rounded down
    with pytest.raises(
        UserError, match="--steps 4 and --epochs 1 disagree: an epoch is 16 steps, .* --epochs 0.2; give"
    ):
        resolved(16, steps=4, epochs=1)  # Regression: any step of the last epoch would do
    with pytest.raises(UserError, match="--steps 6 and --epochs 3 disagree: an epoch is 6 steps, .* --epochs 1; give"):
        resolved(6, steps=6, epochs=3)
    for value in (0, -1, 1e7):
        with pytest.raises(UserError, match=f"--epochs {value}: must be above 0"):
            Settings(epochs=value)


def test_a_resumed_run_keeps_its_steps():
    """An index may have grown since the run was begun."""
    assert resolved(400, steps=188, epochs=1.0, resume=True)[0] == 188


def test_a_run_s_config_takes_its_epochs_to_other_data(tmp_path):
    """The number of steps is saved for --resume; with --config it is that of the epochs, or of a flag."""
    settings = Settings(data=OWN)
    resolve_length(settings, 187.5)
    write_yaml(settings, tmp_path / "config.yaml")
    assert "steps: 188\nepochs: 1.0\n" in (tmp_path / "config.yaml").read_text()
    for flags, length in (
        ([], (None, 1.0)),
        (["--steps", "7"], (7, None)),
        (["--epochs", "2"], (None, 2.0)),
    ):
        made, _ = from_flags("", argv=["--config", str(tmp_path / "config.yaml"), *flags])
        assert (made.steps, made.epochs) == length
    write_yaml(Settings(steps=30), tmp_path / "config.yaml")
    made, _ = from_flags("", argv=["--config", str(tmp_path / "config.yaml"), "--epochs", "2"])
    assert (made.steps, made.epochs) == (None, 2)


def test_evaluations_are_spread_over_runs_of_any_length():
    """The toolkit's run of 150 steps is evaluated every 50, as ever."""
    lengths = {1: 1, 11: 11, 20: 10, 30: 10, 100: 34, 150: 50, 151: 51, 500: 50, 501: 51, 20_000: 2_000}
    assert {steps: Settings(steps=steps).steps_per_evaluation for steps in lengths} == lengths
    assert Settings(steps=1000, eval_steps=7).steps_per_evaluation == 7
    assert Settings(steps=1000, eval_steps=0).steps_per_evaluation == 0


def test_small_data_and_short_runs_are_named():
    def lines(count: int, **changes) -> list[str]:
        settings = Settings(data=OWN, **changes)
        resolve_length(settings, count / min(count, settings.batch_size))
        return [text for _, text in length_warnings(settings, count)]

    assert lines(9)[0] == "--batch-size 64 is more than 9 rows: a batch holds all"
    assert lines(9)[1] == "9 rows are too few to learn much from" and len(lines(9)) == 2
    assert lines(640) == ["10 steps are few to learn from: --epochs 10 would be about 100"]
    assert lines(640, steps=3) == lines(6400) == []
