"""A run on one page: the order of its events, with a toy trainer that only counts.

python -m pytest tests/training/test_run.py
"""

import json
import os
import signal
from pathlib import Path

from mlx_retrieval.backend import nn

import mlx.optimizers as optim
import pytest
import yaml

from mlx_retrieval.models.loading import ADAPTER_CONFIG, ADAPTERS
from mlx_retrieval.training import run
from mlx_retrieval.training.base_trainer import AfterStep, BaseTrainer, State
from mlx_retrieval.training.chat.run import ChatRun
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.retrieval_run import RetrievalRun
from mlx_retrieval.utils.errors import UserError


class ToyTrainer(BaseTrainer):
    """Counts steps. Its evaluations give `scores`, one after the other; `signals` sends itself one after a step."""

    def __init__(self, settings: Settings, scores: list[float], signals: dict[int, int]):
        model = nn.Linear(1, 1)
        optimizer = optim.SGD(0.1)
        optimizer.init(model.trainable_parameters())
        self.events: list[str] = []
        self.scores = iter(scores)
        self.signals = signals
        super().__init__(model, optimizer, State(), settings, Path(settings.output), self._save_model)

    def _save_model(self, folder: Path) -> None:
        self.events.append(f"save {folder.name.strip('.').removesuffix('.new')}")
        for name in (ADAPTERS, ADAPTER_CONFIG):
            (folder / name).touch()

    def train(self, last: int, after_step: AfterStep) -> None:
        while self.state.step < last:
            self.state.step += 1
            self.events.append(f"step {self.state.step}")
            if self.state.step in self.signals:
                os.kill(os.getpid(), self.signals[self.state.step])
            if after_step({"step": self.state.step, "loss": 1.0}):
                break

    def evaluate(self, step: int) -> dict[str, float]:
        self.events.append(f"evaluate {step}")
        return {"ndcg_at_10": next(self.scores)}

    def load_weights(self, folder: Path) -> None:
        self.events.append(f"load {folder.name}")

    def restore_state(self, state: State) -> None:
        self.state = state

    def check_ranks(self) -> None:
        pass


class ToyRun:
    """The least that a run has."""

    def __init__(self, trainer: ToyTrainer):
        self.settings = trainer.settings
        self.folder = trainer.folder
        self.trainer = trainer
        self.headline = [("model", "toy")]

    def measure(self) -> dict:
        return {"measured": True}

    def restore(self) -> None:
        self.trainer.events.append("restore")

    def results(self) -> dict:
        return {"steps": self.trainer.state.step}

    def print_results(self) -> None:
        self.trainer.events.append("print")

    def next_lines(self) -> list[tuple[str, str]]:
        return [("next", "nothing")]


@pytest.fixture
def toy(tmp_path):
    """A toy run in `tmp_path/run`, its settings changed by keyword."""

    def make(scores=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), signals=None, **changes) -> ToyRun:
        defaults = {"steps": 4, "eval_steps": 2, "save_steps": 2, "output": str(tmp_path / "run")}
        return ToyRun(ToyTrainer(Settings(**defaults | changes), list(scores), signals or {}))

    return make


def test_a_run_begins_evaluates_steps_saves_and_concludes(toy, capsys):
    job = toy()
    assert run.run(job) == {"steps": 4} == json.loads((job.folder / "results.json").read_text())
    assert job.trainer.events == [
        *("evaluate 0", "step 1", "step 2", "evaluate 2", "save best", "save step-000002"),
        *("step 3", "step 4", "evaluate 4", "save best", "save step-000004", "save final", "print"),
    ]
    assert job.trainer.state.best_step == 4 and (job.folder / "config.yaml").is_file()
    assert "next" in capsys.readouterr().out


def test_a_stopped_run_continues_at_its_step(toy):
    assert run.run(toy(stop_after=3)) == {"steps": 3}
    job = toy(resume=True)
    run.run(job)
    assert job.trainer.events[:3] == ["load step-000003", "restore", "step 4"]
    with pytest.raises(UserError, match="is finished"):
        run.run(toy(resume=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_its_code(toy, number, capsys):
    job = toy(signals={3: number}, save_steps=0)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        run.run(job)
    assert stop.value.code == 128 + number and signal.getsignal(number) is before
    assert job.trainer.events[-2:] == ["step 3", "save step-000003"]
    out = capsys.readouterr().out
    assert f"stopped by signal {number:d}; step 3 is saved. Continue: python train.py --resume --output" in out


def test_evaluations_without_a_gain_end_the_run(toy, capsys):
    job = toy(scores=(0.5, 0.5, 0.4), eval_steps=1, early_stopping=1)
    run.run(job)
    assert job.trainer.state.step == 2 and job.trainer.state.best_step == 1 and (job.folder / "final").is_dir()
    assert "no better for 1 evaluations: stopped at step 2" in capsys.readouterr().out


def test_a_run_that_took_all_its_steps_does_not_report_an_early_stop(toy, capsys):
    """Regression: retrieval runs reported one if the patience ended with the last step."""
    job = toy(scores=(0.5, 0.5, 0.4), eval_steps=2, early_stopping=1)
    run.run(job)
    assert job.trainer.state.step == 4 and "no better" not in capsys.readouterr().out


def test_a_nan_evaluation_is_not_the_best(toy):
    job = toy(scores=(0.5, 0.5, float("nan")))
    run.run(job)
    assert job.trainer.state.best_step == 2 and job.trainer.state.evaluations_since_best == 1


def test_measurements_write_nothing(toy):
    for changes in ({"dry_run": True}, {"profile": 2}):
        job = toy(**changes)
        assert run.run(job) == {"measured": True} and not job.folder.exists() and not job.trainer.events


@pytest.mark.parametrize("kind", [ToyRun, RetrievalRun, ChatRun])
def test_every_run_has_the_methods_of_the_protocol(kind):
    methods = {name for name, value in vars(run.Run).items() if callable(value) and not name.startswith("_")}
    assert {"measure", "restore", "results", "print_results", "next_lines"} == methods
    assert all(callable(getattr(kind, name)) for name in methods)


def test_the_settings_of_a_resumed_run_serve_a_new_one(toy):
    """Regression: config.yaml of a resumed run said `resume: true`, so that --config with it found no run."""
    run.run(toy(stop_after=2, overwrite=True))
    run.run(toy(resume=True))
    saved = yaml.safe_load((toy().folder / "config.yaml").read_text())
    assert saved["steps"] == 4 and not saved["resume"] and not saved["overwrite"]
