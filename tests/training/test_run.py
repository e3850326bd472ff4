"""A run on one page: the order of its events, with a toy trainer that only counts.

python -m pytest tests/training/test_run.py
"""

import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

from mlx_retrieval.backend import nn

import mlx.optimizers as optim
import pytest
import yaml

from mlx_retrieval.backbones.hub import save_tensors
from mlx_retrieval.dataset.contents import Content
from mlx_retrieval.models.loading import ADAPTER_CONFIG, ADAPTERS
from mlx_retrieval.training import checkpoint, continuation, improvement, reporting, run
from mlx_retrieval.training.base_trainer import AfterStep, BaseTrainer
from mlx_retrieval.training.chat.run import ChatRun
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.retrieval_run import RetrievalRun
from mlx_retrieval.training.settings_file import write_yaml
from mlx_retrieval.training.state import State
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes most of the time of a toy run."""
    monkeypatch.setattr(reporting, "draw_curves", lambda *_: None)


class ToyTrainer(BaseTrainer):
    """Counts steps. Its evaluations give `scores`, one after the other; `signals` sends itself one after a step."""

    def __init__(self, settings: Settings, scores: list[float], signals: dict[int, int]):
        model = nn.Linear(1, 1)
        optimizer = optim.SGD(0.1)
        optimizer.init(model.trainable_parameters())
        self.events: list[str] = []
        self.scores = iter(scores)
        self.signals = signals
        super().__init__(model, optimizer, State(), settings, self._save_model)

    def _save_model(self, folder: Path) -> None:
        self.events.append(f"save {folder.name.strip('.').removesuffix('.new')}")
        save_tensors(folder / ADAPTERS, self.model.trainable_parameters())
        (folder / ADAPTER_CONFIG).touch()
        write_yaml(self.settings, folder / "config.yaml")

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
        self.verdict = ""
        self.now = {"data": [Content("rows.jsonl", 40, "rows", "abc")]}

    def measure(self) -> dict:
        return {"measured": True}

    def begin(self) -> None:
        assert self.folder.is_dir()

    def contents(self) -> dict:
        return self.now

    def renew(self, changed: set[str]) -> None:
        if changed:
            self.trainer.events.append("renew")

    def restore(self, changed: set[str]) -> None:
        self.trainer.events.append("restore")

    def results(self) -> dict:
        return {"steps": self.trainer.state.step}

    def print_results(self) -> str:
        self.trainer.events.append("print")
        return self.verdict

    def report(self) -> None:
        return None

    def next_lines(self) -> list[tuple[str, str]]:
        return [("next", "nothing")]


@pytest.fixture
def toy(tmp_path):
    """A toy run in `tmp_path/run`, its settings changed by keyword."""

    def make(scores=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), signals=None, **changes) -> ToyRun:
        defaults = {
            "steps": 4,
            "eval_steps": 2,
            "save_steps": 2,
            "learning_rate": 1e-3,
            "output": str(tmp_path / "run"),
        }
        return ToyRun(ToyTrainer(Settings(**defaults | changes), list(scores), signals or {}))

    return make


def test_a_run_begins_evaluates_steps_saves_and_concludes(toy, capsys):
    job = toy()
    results = {"steps": 4, "improved": True}
    assert run.run(job) == results == json.loads((job.folder / "results.json").read_text())
    assert job.trainer.events == [
        *("evaluate 0", "step 1", "step 2", "evaluate 2", "save best", "save step-000002"),
        *("step 3", "step 4", "evaluate 4", "save best", "save step-000004", "save final", "print"),
    ]
    assert job.trainer.state.best_step == 4 and (job.folder / "config.yaml").is_file()
    assert "next" in capsys.readouterr().out


def test_a_run_that_is_finished_has_its_results(toy, monkeypatch):
    """Regression: a kill between `final` and results.json left a run without figures that no --resume could write."""
    write_file = files.write_file

    def killed(path: Path, text: str, name: str = "") -> None:
        if path.name == "results.json":
            raise KeyboardInterrupt
        write_file(path, text, name)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            run.run(toy())
    job = toy(resume=True)
    assert not (job.folder / "final").exists()
    assert run.run(job) == {"steps": 4, "improved": True} == json.loads((job.folder / "results.json").read_text())
    assert (job.folder / "final").is_dir()


@pytest.mark.parametrize("step, events", [
    (2, ["evaluate 2", "save best", "save step-000002", "step 3"]),
    (4, ["evaluate 4", "save best", "save step-000004", "save final"]),
])  # fmt: skip
def test_an_evaluation_that_the_gpu_ended_comes_first_in_the_resumed_run(toy, monkeypatch, step, events):
    """Regression: its step counted as evaluated, never became best, and early stopping did not see it."""
    evaluate = ToyTrainer.evaluate

    def fail(trainer: ToyTrainer, number: int) -> dict[str, float]:
        if number == step:
            raise RuntimeError("[METAL] Command buffer execution failed: Invalid Resource (00000009)")
        return evaluate(trainer, number)

    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"state after step {step} is saved"):
        patch.setattr(ToyTrainer, "evaluate", fail)
        run.run(toy())
    job = toy(resume=True, scores=(0.7, 0.8))
    run.run(job)
    assert job.trainer.events[2:6] == events and not job.trainer.state.evaluation_due
    assert job.trainer.state.best_step == 4


def test_a_stopped_run_continues_at_its_step(toy, capsys):
    assert run.run(toy(stop_after=3)) == {"steps": 3}  # not "improved": it has not ended
    job = toy(resume=True)
    run.run(job)
    assert job.trainer.events[:3] == ["load step-000003", "restore", "step 4"]
    capsys.readouterr()
    with pytest.raises(UserError, match="is finished"):
        run.run(toy(resume=True))
    assert capsys.readouterr().out == ""  # no headline of a run that does not begin, which may name another dtype


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
    job = toy(scores=(0.4, 0.5, 0.5), eval_steps=1, early_stopping=1)
    run.run(job)
    assert job.trainer.state.step == 2 and job.trainer.state.best_step == 1 and (job.folder / "final").is_dir()
    assert "no better for 1 evaluation: stopped at step 2" in capsys.readouterr().out


def test_a_run_that_took_all_its_steps_does_not_report_an_early_stop(toy, capsys):
    """Regression: retrieval runs reported one if the patience ended with the last step."""
    job = toy(scores=(0.4, 0.5, 0.5), eval_steps=2, early_stopping=1)
    run.run(job)
    assert job.trainer.state.step == 4 and "no better" not in capsys.readouterr().out


def test_a_nan_evaluation_is_not_the_best(toy):
    job = toy(scores=(0.4, 0.5, float("nan")))
    run.run(job)
    assert job.trainer.state.best_step == 2 and job.trainer.state.evaluations_since_best == 1


# --- longer -----------------------------------------------------------------------------------------------------------


def test_a_finished_run_goes_on_with_more_steps(toy, capsys):
    """`final` stays that of the earlier end until the new one is reached, which does not hide that the run goes on."""
    run.run(toy())
    job = toy(scores=(0.6,), resume=True, steps=8, stop_after=6)
    run.run(job)
    assert job.trainer.events[:3] == ["load step-000004", "restore", "step 5"]
    assert checkpoint.step_of(job.folder / "final") == 4 and checkpoint.last_step(job.folder).name == "step-000006"
    out = " ".join(capsys.readouterr().out.split())
    assert "steps 4 -> 8; the learning rate follows the cosine to step 8, so it rises from " in out
    assert "at step 5 step" in out and "stopped at step 6, saved" in out and "next" not in out.rpartition("stopped")[2]
    job = toy(scores=(0.7,), resume=True, steps=8)
    assert run.run(job)["improved"] and "->" not in (out := capsys.readouterr().out) and "next" in out
    assert job.trainer.events[-4:] == ["save best", "save step-000008", "save final", "print"]
    assert checkpoint.step_of(job.folder / "final") == 8 and job.trainer.state.ends == [[4, 4]]
    steps = [json.loads(line)["step"] for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_goes_on_from_final_if_its_steps_are_gone(toy):
    run.run(toy())
    for folder in toy().folder.glob("step-*"):
        shutil.rmtree(folder)
    job = toy(resume=True, steps=5)
    run.run(job)
    assert job.trainer.events[0] == "load final" and checkpoint.step_of(job.folder / "final") == 5


@pytest.mark.parametrize("steps, message", [
    (4, "is finished, after 4 steps. --steps N, above that, makes it longer; --model .*best begins a new run from"),
    (3, "--steps 3: the run in .*run has taken 4 steps already, and goes on with more than that"),
])  # fmt: skip
def test_a_finished_run_does_not_go_on_with_its_steps_or_fewer(toy, steps, message):
    run.run(toy())
    before = (toy().folder / "config.yaml").read_text()
    with pytest.raises(UserError, match=message):
        run.run(toy(resume=True, steps=steps))
    assert (toy().folder / "config.yaml").read_text() == before


def test_a_run_that_ended_early_says_how_to_go_on(toy, capsys):
    """With more steps the patience begins again, also if a kill comes before the next step is saved."""
    early = {"eval_steps": 1, "early_stopping": 1}
    run.run(toy(scores=(0.4, 0.5, 0.5), **early))
    message = "ended early, at step 2 of 4: no better for 1 evaluation. --early-stopping 0 goes on to step 4; --steps N"
    with pytest.raises(UserError, match=message):
        run.run(toy(resume=True, **early))
    run.begin(toy(resume=True, steps=6, **early))  # killed here
    job = toy(scores=(0.5,), resume=True, steps=6, **early)
    run.run(job)
    assert job.trainer.state.step == 3 and job.trainer.events[0] == "load step-000002"
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("patience the 1 evaluations of early stopping count from here") == 1
    with pytest.raises(UserError, match="ended early, at step 3 of 6"):
        run.run(toy(resume=True, steps=6, **early))
    job = toy(scores=(0.5, 0.5, 0.5), resume=True, steps=6, eval_steps=1)
    run.run(job)
    assert job.trainer.state.step == 6 and [*job.trainer.state.ends] == [[4, 2]]
    assert continuation.history(job.trainer.state, 6) == [
        ("steps", "planned were 4 at first, 6 from step 2 on; so was the learning rate")
    ]


def test_an_unfinished_run_may_end_earlier_or_later(toy, capsys):
    run.run(toy(stop_after=2))
    run.run(toy(scores=(0.5,), resume=True, steps=3, schedule="constant"))
    assert "4 -> 3; the learning rate stays constant" in capsys.readouterr().out
    assert checkpoint.step_of(toy().folder / "final") == 3


# --- better than untrained --------------------------------------------------------------------------------------------


def test_a_run_that_got_worse_names_no_step_best_and_says_so(toy, capsys):
    """Regression: 0.585 untrained and 0.559 at step 2 gave "best (step 2)", and early stopping went by that one."""
    job = toy(scores=(0.585, 0.559, 0.5601))
    assert run.run(job)["improved"] is False
    out = capsys.readouterr().out
    assert not (job.folder / "best").exists() and (job.folder / "final").is_dir() and "best   " not in out
    assert "worse     nDCG@10 0.5601 after training, 0.5850 before: no step was better than the untrained model" in out
    assert (job.trainer.state.best, job.trainer.state.best_step, job.trainer.state.untrained) == (0.585, 0, 0.585)
    job = toy(scores=(0.585, 0.559, 0.57, 0.58), eval_steps=1, early_stopping=2, overwrite=True)
    run.run(job)
    assert job.trainer.state.step == 2
    job = toy(scores=(0.5, 0.5, 0.5), overwrite=True)
    assert run.run(job)["improved"] is False and "no gain   nDCG@10 0.5000 after" in capsys.readouterr().out


def test_a_fall_within_the_interval_is_no_gain_and_the_model_of_before_is_named(toy, capsys):
    """Regression: the screen said "worse" and named final to go on with, the report "no difference is shown"."""
    job = toy(scores=(0.5568, 0.52, 0.5165))
    job.verdict = "no difference shown"
    assert run.run(job)["improved"] is False
    out = capsys.readouterr().out
    assert "no gain   nDCG@10 0.5165 after training, 0.5568 before" in out and "worse" not in out
    assert "next" not in out and "use       gemma-3-tiny-mlx, which the run began with: final is no better" in out
    began_with = "the model that it began with"
    ((name, line),) = improvement.conclusion(job.trainer.state, job.folder, "worse", began_with)
    assert name == "worse" and "no step was better than the model that it began with" in line


def test_a_run_whose_last_step_is_worse_than_its_start_names_the_better_one(toy, capsys):
    job = toy(scores=(0.5, 0.6, 0.4))
    assert run.run(job)["improved"] is True and (job.folder / "best").is_dir()
    out = capsys.readouterr().out
    assert "(step 2)\n" in out and "worse     nDCG@10 0.4000 after training, 0.5000 before" in out
    assert "step 2 was better than both" in out


def test_without_the_first_evaluation_it_is_not_known(toy, capsys):
    job = toy(scores=(0.5, 0.4), skip_eval_init=True)
    assert run.run(job)["improved"] is None and job.trainer.state.best_step == 2
    assert "(step 2); the untrained model was not evaluated, so it may be better" in capsys.readouterr().out


def test_a_resumed_run_remembers_the_untrained_score(toy, capsys):
    """And a best step that was saved before; states of earlier versions have no untrained score."""
    run.run(toy(scores=(0.585, 0.559), stop_after=3))
    job = toy(scores=(0.57,), resume=True)
    assert run.run(job)["improved"] is False and "0.5850 before" in capsys.readouterr().out
    assert not (job.folder / "best").exists()
    run.run(toy(scores=(0.5, 0.6), stop_after=3, overwrite=True))
    file = checkpoint.last_step(job.folder) / checkpoint.STATE
    state = json.loads(file.read_text())
    for name in ("metric", "untrained", "last"):
        del state[name]
    file.write_text(json.dumps(state))
    job = toy(scores=(0.55,), resume=True)
    assert run.run(job)["improved"] is None and job.trainer.state.best_step == 2


def test_other_evaluation_data_are_not_compared_with_the_first(toy):
    run.run(toy(scores=(0.9, 0.95), stop_after=3))
    job = toy(scores=(0.3,), resume=True, accept_changed_data=True)
    job.now["evaluation"] = [Content("corpus.jsonl", 5, "bytes", "new")]
    assert run.run(job)["improved"] is None
    assert (job.trainer.state.best, job.trainer.state.best_step) == (0.3, 4)


def test_a_kill_after_the_best_was_written_loses_nothing(toy):
    """Regression: the run went on from an older step, or began again, and kept a `best` of no step of its own."""
    run.run(toy(stop_after=2))
    shutil.rmtree(toy().folder / "step-000002")
    with pytest.raises(UserError, match="data: rows.jsonl: 40 rows then, 41 now"):
        job = toy(resume=True)
        job.now = {"data": [Content("rows.jsonl", 41, "rows", "new")]}
        run.run(job)
    job = toy(resume=True, scores=(0.1,))
    run.run(job)
    assert job.trainer.events[0] == "load best" and "evaluate 2" not in job.trainer.events
    assert job.trainer.state.best_step == checkpoint.step_of(job.folder / "best") == 2


@pytest.mark.parametrize("saved", [True, False])
def test_what_was_forgotten_stays_so_after_a_kill(toy, saved):
    """Regression: `best` stayed the one of other data, and the next resume compared with its figure."""
    run.run(toy(scores=(0.9, 0.95), stop_after=2))
    if not saved:
        shutil.rmtree(toy().folder / "step-000002")
    for accept in (True, False):  # killed in between
        job = toy(resume=True, accept_changed_data=accept)
        job.now["evaluation"] = [Content("corpus.jsonl", 5, "bytes", "new")]
        run.begin(job)
        state = job.trainer.state
        assert (state.step, state.best, state.best_step, state.untrained) == (2, None, 0, None)
        assert not (job.folder / "best").exists() and (job.folder / "step-000002").is_dir()
        assert job.trainer.events == (["renew"] if accept else []) + ["load step-000002" if saved or not accept else
                                                                      "load best", "restore"]  # fmt: skip


def test_with_other_guards_no_step_so_far_is_the_best(toy):
    run.run(toy(scores=(0.9, 0.95), stop_after=3))
    job = toy(scores=(0.92,), resume=True, accept_changed_data=True)
    job.now["guards"] = [Content("corpus.jsonl", 5, "bytes", "new")]
    assert run.run(job)["improved"] is True
    state = job.trainer.state
    assert (state.untrained, state.best, state.best_step) == (0.9, 0.92, 4)


def test_a_loss_counts_negative_and_metrics_without_the_run_s_own_decide_nothing():
    state = State()
    assert not improvement.note(state, {}) and not improvement.note(state, {"validation_loss": 2.0})
    state.step = 1
    assert improvement.note(state, {"validation_loss": 1.5}) and not improvement.note(state, {"ndcg_at_10": 0.9})
    assert (state.best, state.untrained, state.last, state.evaluations_since_best) == (-1.5, -2.0, -1.5, 0)
    assert not improvement.note(state, {"validation_loss": 1.5}) and state.evaluations_since_best == 1
    gain = [("gain", "validation loss 1.5000 after training, 2.0000 before")]
    assert improvement.conclusion(state, Path("nowhere")) == gain
    state.last, state.best_step = -2.5, 0
    assert improvement.conclusion(state, Path("nowhere"))[0][1].startswith("validation loss 2.5000 after training, 2.0")


def test_a_required_improvement_that_is_not_known_is_told(toy, capsys):
    results = run.run(toy(scores=(float("nan"), 0.5, 0.6), require_improvement=True))
    assert results["improved"] is None and "unknown   whether a step is better" in capsys.readouterr().out


def test_require_improvement_decides_the_exit_code():
    settings = Settings(require_improvement=True)
    for improved, code in ((True, 0), (False, 4), (None, 4)):
        assert improvement.exit_code(settings, {"improved": improved}) == code
        assert improvement.exit_code(Settings(), {"improved": improved}) == 0
    assert improvement.exit_code(settings, {}) == 0  # another rank, or a run that is to be continued
    with pytest.raises(UserError, match="--require-improvement: nothing is evaluated"):
        improvement.check_evaluated(Settings(require_improvement=True), False)
    with pytest.raises(UserError, match="--require-improvement: needs the evaluation before training, and --skip-eval"):
        Settings(require_improvement=True, skip_eval_init=True)


@pytest.mark.parametrize(
    ("evaluated", "eval_steps", "message"),
    [(False, None, "nothing is evaluated"), (True, 0, "with --eval-steps 0 nothing is evaluated between")],
)
def test_early_stopping_needs_evaluations_to_go_by(evaluated, eval_steps, message):
    """Regression: it was taken, and never stopped."""
    with pytest.raises(UserError, match=f"--early-stopping: {message}"):
        improvement.check_evaluated(Settings(early_stopping=2, eval_steps=eval_steps), evaluated)
    improvement.check_evaluated(Settings(early_stopping=2), True)


# --- the folder -------------------------------------------------------------------------------------------------------


def test_measurements_write_nothing(toy):
    for changes in ({"dry_run": True}, {"profile": 2}):
        job = toy(**changes)
        assert run.run(job) == {"measured": True} and not job.folder.exists() and not job.trainer.events
        job.trainer.state.step = 2  # Regression: a loss that was not finite saved the step, into a run that was there
        assert job.trainer.save_last_good() == "" and not job.folder.exists()


@pytest.mark.parametrize("kind", [ToyRun, RetrievalRun, ChatRun])
def test_every_run_has_the_methods_of_the_protocol(kind):
    methods = {name for name, value in vars(run.Run).items() if callable(value) and not name.startswith("_")}
    names = {"measure", "begin", "contents", "renew", "restore", "results", "print_results", "report", "next_lines"}
    assert names == methods
    assert all(callable(getattr(kind, name)) for name in methods)


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_the_next_line_names_the_best_model_and_texts_that_are_there(task, tmp_path, monkeypatch):
    """Regression: it named final, which may be worse than untrained, and a folder of the checkout's."""
    monkeypatch.chdir(tmp_path)
    data = SimpleNamespace(eval_tasks=["NanoNQRetrieval", str(tmp_path / "my eval")])
    job = SimpleNamespace(folder=tmp_path / "run", data=data, retrieval=SimpleNamespace(task=task))
    (job.folder / "final").mkdir(parents=True)
    ((name, line),) = RetrievalRun.next_lines(job)
    words = shlex.split(line, comments=True)  # Regression: it was no command where there is no file of texts
    assert name == "next" and words[0] == "python" and words[words.index("--model") + 1] == str(job.folder / "final")
    assert "FILE" in words and line.endswith("  # FILE: texts of your own")
    (tmp_path / "my eval").mkdir()
    (tmp_path / "my eval" / "corpus.jsonl").touch()
    for name in ("final", "best"):
        (job.folder / name).mkdir(exist_ok=True)
        ((_, command),) = RetrievalRun.next_lines(job)
        words = shlex.split(command)
        assert words[words.index("--model") + 1] == str(job.folder / name) and "my eval/corpus.jsonl" in words


def test_the_settings_of_a_resumed_run_serve_a_new_one(toy):
    """Regression: config.yaml of a resumed run said `resume: true`, so that --config with it found no run."""
    run.run(toy(stop_after=2, overwrite=True))
    run.run(toy(resume=True))
    saved = yaml.safe_load((toy().folder / "config.yaml").read_text())
    assert saved["steps"] == 4 and not saved["resume"] and not saved["overwrite"]
