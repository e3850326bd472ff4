"""No run is lost: stopped, killed, on a full disk or with sick numbers, it goes on, and as the same run bit for bit.

python -m pytest tests/training/test_resume.py
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from mlx_retrieval.backend import mx

import pytest
from mlx.utils import tree_map

import train
from mlx_retrieval import backend
from mlx_retrieval.training import reporting
from mlx_retrieval.training.checkpoint import last_step
from mlx_retrieval.training.gradient_cache import GradientCache
from mlx_retrieval.training.reporting import Reporter
from mlx_retrieval.training.settings_file import write_yaml
from mlx_retrieval.training.trainer import Trainer
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few shapes, as each is compiled, and no pictures: most of the time that these runs would take."""
    monkeypatch.setattr(backend, "LENGTH_GRID", 64)
    monkeypatch.setattr(reporting, "draw_curves", lambda *_: None)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "config.yaml"}


def metrics_of(folder: Path, kind: str = "train") -> list[dict]:
    """What metrics.jsonl tells of steps or evaluations, but for wall times and memory."""
    wall = ("seconds", "tokens_per_second", "peak_memory_bytes")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in wall} for r in records if r["type"] == kind]


def resume(folder: Path) -> dict:
    return train.train(train.resumed_settings({"output": str(folder), "resume": True}))


@pytest.mark.parametrize("task, steps, stop", [
    ({"max_length": 60}, 16, 7),
    pytest.param({}, 40, 17, marks=pytest.mark.slow),
    pytest.param({"task": "late"}, 40, 17, marks=pytest.mark.slow),
    pytest.param({"task": "rerank", "loss": "ranknet"}, 40, 17, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_a_resumed_run_is_the_same_bit_for_bit(settings, rows, tmp_path, monkeypatch, task, steps, stop):
    """Weights, optimizer, metrics, the order of the data: with dropout, gradient caching, and over epochs."""
    (tmp_path / "data").mkdir()
    lines = Path(rows).read_text().splitlines(keepends=True)
    (tmp_path / "data" / "train.jsonl").write_text("".join(lines[:50]))
    (tmp_path / "data" / "valid.jsonl").write_text("".join(lines[50:]))
    same = {"lora_dropout": 0.2, "gradient_accumulation_steps": 3, "schedule": "linear", "weight_decay": 0.01}
    same |= {
        "data": [str(tmp_path / "data")],
        "steps": steps,
        "batch_size": 4,
        "eval_steps": steps // 2,
        "max_length": 250,
        **task,
    }
    order, update = [], Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda *a: order.append(a[1].rows.tolist()) or update(*a))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train.train(settings(**same, output=str(whole)))
    train.train(settings(**same, output=str(broken), stop_after=stop))
    assert last_step(broken).name == f"step-{stop:06}"
    resume(broken)
    assert folder_bytes(whole / "final") == folder_bytes(broken / "final")
    improved = (whole / "best").is_dir()  # on these random rows, not in every task
    assert improved == (broken / "best").is_dir() and (improved or "task" in task)
    assert not improved or folder_bytes(whole / "best") == folder_bytes(broken / "best")
    assert metrics_of(whole) == metrics_of(broken) and len(metrics_of(whole)) == steps
    assert metrics_of(whole, "eval") == metrics_of(broken, "eval") and len(metrics_of(whole, "eval")) == 3
    assert order[:steps] == order[steps:] and min(r["micro_batches"] for r in metrics_of(whole)) > 1


@pytest.mark.parametrize("changes", [
    {"lora_dropout": 0.2},
    pytest.param({"task": "late", "train_type": "full"}, marks=pytest.mark.slow),
    pytest.param({"task": "rerank", "loss": "ranknet", "max_length": 200}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_a_longer_run_is_the_same_however_often_it_is_stopped(settings, tmp_path, changes):
    """Step k of a finished run that goes on depends on k alone, and the rate on the new end."""

    def go_on(name: str, **more) -> None:
        given = {"output": str(tmp_path / name), "resume": True}
        train.train(train.resumed_settings(given | more))

    same = {"max_length": 32, "batch_size": 4, **changes}
    train.train(settings(**same, steps=2, output=str(tmp_path / "once")))
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    go_on("once", steps=4)
    go_on("twice", steps=4, stop_after=3)
    go_on("twice")
    assert folder_bytes(tmp_path / "once" / "final") == folder_bytes(tmp_path / "twice" / "final")
    records = metrics_of(tmp_path / "once")
    assert records == metrics_of(tmp_path / "twice") and [r["step"] for r in records] == [1, 2, 3, 4]
    rates = [r["learning_rate"] / records[0]["learning_rate"] for r in records]
    assert rates == pytest.approx([1, 0.5, 0.5, 0.146], abs=1e-3)
    assert json.loads((tmp_path / "twice" / "final" / "trainer_state.json").read_text())["ends"] == [[2, 2]]


def test_a_run_that_was_killed_while_it_stopped_early_trains_no_further(settings, tmp_path, rows):
    """The state that is saved with the last step says already that it is over."""
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(Path(rows).read_text())
    changes = {"eval_steps": 1, "early_stopping": 2, "learning_rate": 1e-12, "steps": 9}
    train.train(settings(data=[str(tmp_path / "data")], **changes))
    run, last = tmp_path / "run", last_step(tmp_path / "run").name
    before = folder_bytes(run / "final")
    shutil.rmtree(run / "final")
    resume(run)
    assert folder_bytes(run / "final") == before and last_step(run).name == last != "step-000009"


@pytest.mark.slow
def test_bad_batches_are_skipped_counted_and_told(settings, tmp_path, monkeypatch, capsys):
    """--skip-bad-batches: no update, the step goes on, the count survives a resume, which is still exact."""
    original, sick = GradientCache.__call__, {2: "loss", 3: "gradient", 5: "loss"}

    def spoilt(self, batch, seed):
        result = original(self, batch, seed)
        if sick.get(seed) == "loss":
            return result._replace(loss=result.loss * mx.array(float("inf")))
        return result._replace(grads=tree_map(lambda v: v / 0, result.grads)) if seed in sick else result

    monkeypatch.setattr(GradientCache, "__call__", spoilt)
    changes = {"skip_bad_batches": True, "lora_dropout": 0.2, "seed": 0}
    assert train.train(settings(**changes, output=str(tmp_path / "whole")))["skipped_batches"] == 3
    told = [line for line in capsys.readouterr().out.splitlines() if "the batch is skipped" in line]
    assert len(told) == 3 and told[0].startswith("warning: step 2: loss inf") and "gradient norm inf" in told[1]
    assert all("rows.jsonl:" in line for line in told) and "and 6 more" in told[2]
    records = metrics_of(tmp_path / "whole")
    assert [r["skipped_batches"] for r in records] == [0, 1, 2, 2, 3, 3]
    assert [r["loss"] is None for r in records] == [False, True, False, False, True, False]
    train.train(settings(**changes, stop_after=3))
    before, after = ((tmp_path / "run" / "step-000003"), (tmp_path / "whole"))
    assert json.loads((before / "trainer_state.json").read_text())["skipped_batches"] == 2
    assert resume(tmp_path / "run")["skipped_batches"] == 3
    assert folder_bytes(tmp_path / "run" / "final") == folder_bytes(after / "final")
    # A run that was begun without it stops at step 2, and may go on with it.
    train_without = settings(output=str(tmp_path / "strict"), lora_dropout=0.2)
    with pytest.raises(UserError, match="state after step 1 is saved"):
        train.train(train_without)
    given = {"output": str(tmp_path / "strict"), "resume": True, "skip_bad_batches": True}
    assert train.train(train.resumed_settings(given))["skipped_batches"] == 3
    assert folder_bytes(tmp_path / "strict" / "final") == folder_bytes(after / "final")


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(names)`: folders of these names cannot be written; returns the list, which may change."""

    def make(*names: str) -> list[str]:
        full, write = list(names), Trainer.write

        def fail(self, folder: Path) -> None:
            write(self, folder)
            if any(name in folder.name for name in full):
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Trainer, "write", fail)
        return full

    return make


@pytest.mark.slow
def test_a_full_disk_ends_no_run(settings, tmp_path, rows, full_disk, capsys):
    """The step that could not be saved is told, older ones stay whole, the next one works; best is what is kept."""
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(Path(rows).read_text())
    changes = {"data": [str(tmp_path / "data")], "save_steps": 1, "eval_steps": 2, "learning_rate": 5e-3}
    train.train(settings(**changes, output=str(tmp_path / "whole")))
    capsys.readouterr()
    full_disk("step-000002", "step-000003", "best")
    run = tmp_path / "run"
    train.train(settings(**changes))
    told = capsys.readouterr().out
    assert told.count("No space left on device; what was saved before is whole; the run goes on") == 5
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == [
        "final", "step-000001", "step-000004", "step-000005", "step-000006",
    ]  # fmt: skip
    states = [json.loads((folder / "final" / "trainer_state.json").read_text()) for folder in (run, tmp_path / "whole")]
    assert (states[0]["best"], states[0]["best_step"]) == (states[0]["untrained"], 0) and states[1]["best_step"] > 0
    for name in ("adapters.safetensors", "optimizer.safetensors"):
        assert (run / "final" / name).read_bytes() == (tmp_path / "whole" / "final" / name).read_bytes()


@pytest.mark.slow
def test_what_must_be_saved_must(settings, tmp_path, full_disk, monkeypatch):
    """The last step of a process that stops, and `final`: there a full disk is an error, and nothing older is lost."""
    full = full_disk("step-000003")
    with pytest.raises(UserError, match=r"step-000003.*what was saved before is whole"):
        train.train(settings(stop_after=3, save_steps=2))
    assert last_step(tmp_path / "run").name == "step-000002"
    full[:] = ["final", "step-000006"]
    with pytest.raises(UserError, match="could not save .*final"):
        resume(tmp_path / "run")
    assert last_step(tmp_path / "run").name == "step-000004" and not (tmp_path / "run" / "final").exists()
    full.clear()
    original = Reporter.step
    note = lambda self, record: original(self, record) or os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "step", note)
        full[:] = ["step-000005"]
        with pytest.raises(UserError, match="step-000005"):
            resume(tmp_path / "run")
        full.clear()
        with pytest.raises(SystemExit) as stopped:
            resume(tmp_path / "run")
    assert stopped.value.code == 143 and last_step(tmp_path / "run").name == "step-000005"
    resume(tmp_path / "run")
    train.train(settings(output=str(tmp_path / "whole")))
    assert folder_bytes(tmp_path / "run" / "final") == folder_bytes(tmp_path / "whole" / "final")


def test_a_lost_terminal_saves_the_run_unless_nohup_ignores_it(settings, tmp_path, monkeypatch):
    original = Reporter.step
    note = lambda self, record: original(self, record) or os.kill(os.getpid(), signal.SIGHUP)  # noqa: E731
    monkeypatch.setattr(Reporter, "step", note)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests, too, may run under nohup
    try:
        with pytest.raises(SystemExit) as stopped:
            train.train(settings(steps=3))
        assert stopped.value.code == 129 and last_step(tmp_path / "run").name == "step-000001"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        resume(tmp_path / "run")
        assert (tmp_path / "run" / "final").is_dir() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_signal_finishes_the_step_saves_and_says_how_to_continue(settings, tmp_path, monkeypatch):
    """And continued, the run ends as one that nobody stopped."""
    monkeypatch.undo()  # the processes below compute with the usual shapes
    monkeypatch.setattr(backend, "COMPILED", backend.FUSED)  # as these processes, where quick tests do without
    common = {"steps": 50, "lora_dropout": 0.2, "save_steps": 1000}
    train.train(settings(**common, output=str(tmp_path / "whole")))
    expected = folder_bytes(tmp_path / "whole" / "final"), metrics_of(tmp_path / "whole")
    assert len(expected[1]) == 50
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        run = tmp_path / number.name
        write_yaml(settings(**common, output=str(run)), tmp_path / "settings.yaml")
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests, too, may run under nohup
        process = subprocess.Popen(
            [sys.executable, "train.py", "--config", str(tmp_path / "settings.yaml")],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        signal.signal(signal.SIGHUP, before)
        metrics, deadline = run / "metrics.jsonl", time.time() + 60
        while time.time() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") > 1):
            time.sleep(0.1)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == code
        assert "--resume" in out
        saved = json.loads((last_step(run) / "trainer_state.json").read_text())["step"]
        assert saved == len(metrics_of(run)) < 50
        resume(run)
        assert (folder_bytes(run / "final"), metrics_of(run)) == expected
