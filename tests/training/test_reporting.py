"""Progress, metrics file, curves and W&B of a run, without network or a real terminal.

python -m pytest tests/training/test_reporting.py
"""

import io
import json
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from mlx_retrieval.training import reporting
from mlx_retrieval.training.reporting import Reporter, draw_curves, read_metrics
from mlx_retrieval.utils import console
from mlx_retrieval.utils.console import print_lines
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
METRICS = {"ndcg_at_10": 0.4321, "mrr_at_10": 0.4, "recall_at_100": 0.9, "precision_at_1": 0.3}


def record(step: int, **more) -> dict:
    """A step's record, as the trainer gives it."""
    numbers = {"loss": 2 / step, "learning_rate": 2e-5, "grad_norm": 0.9, "tokens_per_second": 5123.0}
    return {"step": step, **numbers, "padding": 0.021, "peak_memory_bytes": 1.2e9, "epoch": 0.3, **more}


@pytest.fixture
def screen(monkeypatch):
    """Replaces the console, by a terminal (`screen(width)`) or a file (`screen(None)`); returns its text."""

    def make(width: int | None) -> io.StringIO:
        stream = io.StringIO()
        out = Console(file=stream, width=width, force_terminal=width is not None, soft_wrap=True, markup=False)
        monkeypatch.setenv("TERM", "xterm")
        for module in (console, reporting):  # where it is defined, and where it is used
            monkeypatch.setattr(module, "console", lambda: out)
        return stream

    return make


@pytest.fixture(autouse=True)
def no_terminal(screen):
    return screen(None)


# --- metrics.jsonl ---


def test_a_full_disk_loses_no_record(tmp_path, no_terminal, monkeypatch):
    """Nor does a log on it end the run: what found no room, half a line here, waits for the next record."""
    with Reporter(tmp_path, 5) as report:
        report.step(record(1))
        file, room = report._file, [10]

        def write(data: bytes) -> int:
            if not room[0]:
                raise OSError(28, "No space left on device")
            data, room[0] = data[: room[0]], max(0, room[0] - len(data))
            return file.write(data)

        monkeypatch.setattr(report, "_file", SimpleNamespace(write=write))
        report.step(record(2))
        report.step(record(3))
        assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1]
        room[0] = 100_000
        report.step(record(4))
        with monkeypatch.context() as patch:
            patch.setattr(no_terminal, "write", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            report.step(record(5))
            report.message("a line")
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert no_terminal.getvalue().count("metrics.jsonl could not be written") == 1


def test_metrics_file_holds_one_object_a_line_at_once(tmp_path):
    with Reporter(tmp_path, 2) as report:
        report.evaluation(0, METRICS, {"nq": {"ndcg_at_10": 0.5}})
        report.step(record(1, rows=64))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed, though the run goes on
    assert json.loads(lines[0]) == {
        "type": "eval", "step": 0, "metrics": METRICS, "tasks": {"nq": {"ndcg_at_10": 0.5}},
    }  # fmt: skip
    assert json.loads(lines[1]) == {"type": "train", **record(1, rows=64)}


def test_a_new_run_begins_a_new_file_and_removes_the_old_picture(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"type":"train","step":9}\n')
    (tmp_path / "curves.png").write_text("old")
    with Reporter(tmp_path, 2):
        pass
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert not (tmp_path / "curves.png").exists()


def test_non_finite_numbers_are_null_and_array_scalars_are_numbers(tmp_path):
    np = pytest.importorskip("numpy")
    mx = pytest.importorskip("mlx.core")
    odd = {
        "loss": float("nan"),
        "grad_norm": np.float32("inf"),
        "a": mx.array(1.5),
        "b": [np.int64(3), float("-inf")],
    }
    with Reporter(tmp_path, 1) as report:
        report.step({"step": np.int64(1), **odd, "where": Path("x")})
        report.evaluation(1, {"ndcg_at_10": float("nan")})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    rows = [json.loads(r, parse_constant=refuse) for r in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    nulls = {"loss": None, "grad_norm": None, "a": 1.5, "b": [3, None]}
    assert rows[0] == {"type": "train", "step": 1, **nulls, "where": "x"}
    assert rows[1]["metrics"] == {"ndcg_at_10": None}


@pytest.mark.parametrize("tail", ["", '{"type":"tra', '{"type":"train","step":4}', "\xff\n[1]\n7\n"])
def test_resume_cuts_what_an_interrupted_run_left(tmp_path, tail):
    with Reporter(tmp_path, 6) as report:
        for step in range(1, 6):
            report.step(record(step))
            report.evaluation(step, {"ndcg_at_10": step / 10})
    with open(tmp_path / "metrics.jsonl", "a", encoding="latin-1") as file:
        file.write(tail)
    with Reporter(tmp_path, 6, first_step=3) as report:
        assert [(r["type"], r["step"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
            (kind, step) for step in (1, 2, 3) for kind in ("train", "eval")
        ]
        assert "nDCG@10 0.3000" in report._figures()  # the bar remembers
        report.step(record(4))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0] == {"type": "train", **record(1)}
    assert [r["step"] for r in rows if r["type"] == "train"] == [1, 2, 3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_resume_without_a_file_begins_one(tmp_path):
    with Reporter(tmp_path / "new", 6, first_step=3) as report:
        report.step(record(4))
    assert len(read_metrics(tmp_path / "new" / "metrics.jsonl")) == 1


# --- the screen ---


@pytest.mark.parametrize("total, lines", [(1000, 11), (10, 10), (3, 3), (1, 1)])
def test_plain_output_is_about_ten_lines_without_control_codes(tmp_path, no_terminal, total, lines):
    with Reporter(tmp_path, total) as report:
        for step in range(1, total + 1):
            report.status("evaluating")
            report.step(record(step))
    text = no_terminal.getvalue()
    assert len(text.splitlines()) == lines
    assert "\x1b" not in text and "\r" not in text
    assert f"{total}/{total} 100%" in text.splitlines()[-1]
    assert "loss 2.000  lr 2.00e-05  5,123 tok/s  peak 1.1 GB" in text.splitlines()[0]


def test_plain_output_of_a_resumed_run(tmp_path, no_terminal):
    with Reporter(tmp_path, 100, first_step=55) as report:
        for step in range(56, 101):
            report.step(record(step))
    steps = [int(re.search(r"(\d+)/100", line)[1]) for line in no_terminal.getvalue().splitlines()]
    assert steps == [56, 60, 70, 80, 90, 100]


def test_validation_loss_is_shown_where_there_is_no_task(tmp_path):
    with Reporter(tmp_path, 100) as report:
        report.step(record(1))
        report.evaluation(1, {"validation_loss": 1.5})
        assert "validation loss 1.500" in report._figures()


def test_messages_are_taken_literally(tmp_path, no_terminal):
    with Reporter(tmp_path, 1) as report:
        report.message("saved [bold]adapters/step-000500 " + "x" * 200)
        report.warn("row 3 of [a] :smile:")
        report.evaluation(0, METRICS)
        report.evaluation(1, {"ndcg_at_10": 0.5})
    assert no_terminal.getvalue().splitlines() == [
        "saved [bold]adapters/step-000500 " + "x" * 200,
        "warning: row 3 of [a] :smile:",
        "eval 0: nDCG@10 0.4321  MRR@10 0.4000  Recall@100 0.9000  P@1 0.3000",
        "eval 1: nDCG@10 0.5000, best",
    ]


@pytest.mark.parametrize("width", [10, 80, *(pytest.param(n, marks=pytest.mark.slow) for n in (40, 120, 240))])
def test_the_bar_never_wraps(tmp_path, screen, width):
    stream = screen(width)
    big = {"loss": 12345.678, "tokens_per_second": 1.2e6, "peak_memory_bytes": 123.4e9, "epoch": 12.5}
    with Reporter(tmp_path, 1_234_567) as report:
        for step in (1, 617_283, 1_234_567):
            for more in ({}, big):
                report.step(record(step, **more))
                report.evaluation(step, METRICS if width > 70 else {})
                report.status("evaluating 13 tasks")
                report._started -= 40_000
                frame = console.console().render_lines(report, pad=False)
                text = ["".join(segment.text for segment in line) for line in frame]
                assert len(text) == 2
                assert all(cell_len(line) <= width for line in text)
                if width >= 40:  # whole figures only
                    assert set(text[1].split("  ")) <= set(report._figures())
                if width >= 80:
                    assert all(s in text[0] for s in ("evaluating", f"{step}/1234567", "%", "elapsed", "left"))
                    assert all(s in text[1] for s in ("loss", "lr", "tok/s", "peak", "nDCG@10 0.4321"))
                if width == 240:
                    assert all(s in text[1] for s in ("best 0.4321 at 1", "grad norm", "padding 2.1%", "epoch"))
    shown = ESCAPE.sub("", stream.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(cell_len, shown)) <= max(width, len("eval 1: " + "x" * 70))
    assert shown[-2].startswith("done"[:width])
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize("error, word", [(KeyboardInterrupt, "interrupted"), (ZeroDivisionError, "stopped")])
def test_a_failing_run_closes_bar_file_and_picture(tmp_path, screen, error, word):
    stream = screen(80)
    with pytest.raises(error), Reporter(tmp_path, 10) as report:
        report.step(record(1))
        raise error
    assert f"\n{word}" in ESCAPE.sub("", stream.getvalue()).replace("\r", "\n")
    assert stream.getvalue().endswith("\x1b[?25h")
    assert report._file.closed
    assert png_size(tmp_path / "curves.png") == (1200, 900)


def test_console_writes_no_codes_into_files(monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.console.cache_clear()
    console.console().print(Text("red", style="red"))
    print_lines([("adapter", "adapters/final"), ("log", "")])
    console.console.cache_clear()
    assert capsys.readouterr().out == "red\nadapter   adapters/final\nlog       \n"


# --- curves.png ---


def png_size(file: Path) -> tuple[int, int]:
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


NAN_LOSS = [{"type": "train", "step": s, "loss": None if s % 3 else 1.0, "learning_rate": 0} for s in range(1, 99)]
ODD_FILES = {
    "no file": None,
    "empty": [],
    "one step": [{"type": "train", **record(1)}],
    "one evaluation": [{"type": "eval", "step": 0, "metrics": METRICS}],
    "no evaluation": [{"type": "train", **record(s)} for s in range(1, 200)],
    "null losses": NAN_LOSS,
    "null score": [{"type": "eval", "step": 0, "metrics": {"ndcg_at_10": None}}],
    "other metrics": [{"type": "eval", "step": s, "metrics": {f"m{i}": 9.0 * i for i in range(9)}} for s in (1, 2)],
    "no learning rate": [{"type": "train", "step": 1, "loss": 1.0}],
    "long": [{"type": "train", "step": s, "loss": s % 7} for s in range(1, 30_000)],
}


@pytest.mark.parametrize("case", ODD_FILES)
def test_curves_of_odd_files(tmp_path, case):
    if (rows := ODD_FILES[case]) is not None:
        (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") == (1200, 900)
    assert 10_000 < (tmp_path / "a.png").stat().st_size < 400_000
    assert not list(tmp_path.glob("*.tmp"))


def test_validation_loss_is_drawn_with_the_loss_not_among_the_scores(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: (figures.append(figure), file.touch()))
    rows = [{"type": "train", **record(step)} for step in (1, 2)]
    rows.append({"type": "eval", "step": 2, "metrics": {"validation_loss": 7.0, **METRICS}})
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "a.png")
    lines = [{line.get_label(): list(line.get_ydata()) for line in panel.lines} for panel in figures[0].axes]
    assert lines[0] == {"each step": [2.0, 1.0], "validation": [7.0]}
    assert list(lines[1].values()) == [[2e-5, 2e-5]]
    assert lines[2] == {"nDCG@10": [0.4321], "MRR@10": [0.4], "Recall@100": [0.9], "P@1": [0.3]}


def test_long_runs_are_drawn_in_means_of_blocks(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: (figures.append(figure), file.touch()))
    rows = [{"type": "train", "step": step, "loss": step % 3} for step in range(4001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "a.png")
    raw, smooth = figures[0].axes[0].lines
    assert raw.get_label() == "mean of 3 steps" and len(raw.get_xdata()) == 1334
    assert list(raw.get_xydata()[0]) == [1.0, 1.0] and list(raw.get_xydata()[-1]) == [3999.5, 0.5]
    assert abs(smooth.get_ydata()[:-40] - 1).max() < 1e-9


def test_curves_are_the_same_each_time(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in ODD_FILES["one evaluation"]))
    for name in ("a.png", "b.png"):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_an_error_in_drawing_does_not_hide_the_runs_own(tmp_path, monkeypatch, no_terminal):
    def broken(*_):
        raise ValueError("no font")

    monkeypatch.setattr(reporting, "draw_curves", broken)
    with pytest.raises(ZeroDivisionError), Reporter(tmp_path, 10) as report:
        report.step(record(1))
        raise ZeroDivisionError
    assert "warning: curves.png could not be drawn: no font" in no_terminal.getvalue()


def test_matplotlib_and_wandb_are_imported_only_when_used():
    code = (
        "import sys; from mlx_retrieval.training import reporting\n"
        "print({'matplotlib', 'wandb.sdk', 'numpy.testing', 'torch.nn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- Weights & Biases ---


class FakeWandb:
    """Stands in for the package: logged in, with a server that does not answer."""

    def __init__(self):
        self.errors = SimpleNamespace(Error=Error, CommError=CommError, UsageError=Error)
        self.logged_in = True
        self.modes, self.logged, self.metrics, self.summary, self.config, self.code = (
            [],
            [],
            {},
            {},
            None,
            None,
        )
        self.Settings, self.setup, self.url, self.dir = dict, dict, "", "run/files"

    def login(self, prompt, verify):
        assert not prompt and not verify
        return self.logged_in

    def init(self, mode, config, dir, **_):
        self.modes.append(mode)
        self.config = config
        if mode == "online":
            raise CommError("no answer\nand more")
        return self

    def define_metric(self, name, **options):
        self.metrics[name] = options

    def log(self, values):
        if "train/boom" in values:
            raise Error("service is gone")
        self.logged.append(values)

    def finish(self, exit_code):
        self.code = exit_code


class Error(Exception):
    pass


class CommError(Error):
    pass


@pytest.fixture
def fake_wandb(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_goes_offline_where_the_server_does_not_answer(tmp_path, fake_wandb, no_terminal):
    with Reporter(tmp_path, 2, wandb=True) as report:
        report.evaluation(0, {"ndcg_at_10": 0.6}, {"nq": {"ndcg_at_10": 0.5}})
        report.step({"step": 1, "loss": 2.0, "grad_norm": float("nan"), "note": "x"})
        report.evaluation(1, {"ndcg_at_10": 0.4})
    assert fake_wandb.modes == ["online", "offline"]
    assert no_terminal.getvalue().startswith("warning: W&B keeps its record offline: no answer\nW&B offline;")
    assert fake_wandb.logged == [
        {"eval/ndcg_at_10": 0.6, "train/step": 0, "eval/nq/ndcg_at_10": 0.5},
        {"train/step": 1, "train/loss": 2.0},
        {"eval/ndcg_at_10": 0.4, "train/step": 1},
    ]
    assert fake_wandb.metrics["*"] == {"step_metric": "train/step"}
    assert fake_wandb.metrics["eval/ndcg_at_10"]["summary"] == "max"
    assert fake_wandb.summary == {"best_ndcg_at_10": 0.6, "best_step": 0}
    assert fake_wandb.code == 0


@pytest.mark.parametrize("mode, expected", [(None, "offline"), ("online", "offline"), ("disabled", "disabled")])
def test_wandb_without_login_never_goes_online(tmp_path, fake_wandb, monkeypatch, mode, expected):
    fake_wandb.logged_in = False
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    with Reporter(tmp_path, 2, wandb=True):
        pass
    assert fake_wandb.modes == [expected]


def test_wandb_failing_later_does_not_end_the_run(tmp_path, fake_wandb, no_terminal):
    with Reporter(tmp_path, 3, wandb=True) as report:
        for step in (1, 2, 3):
            report.step({"step": step, "boom" if step == 2 else "loss": 1.0})
    assert no_terminal.getvalue().count("warning: W&B failed, its record ends here: service is gone") == 1
    assert len(fake_wandb.logged) == 1 and len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_wandb_is_told_of_failure_and_gets_no_secrets(tmp_path, fake_wandb):
    settings = {
        "learning_rate": 2e-5, "max_tokens": 7, "tokenizer": "t", "es_api_key": "K", "hf_token": "K",
        "PASSWORD": "K", "source": {"url": "https://bob:K@host:9200/i", "secret": "K"}, "files": ["a@b", "s://u:K@h"],
    }  # fmt: skip
    with pytest.raises(ZeroDivisionError), Reporter(tmp_path, 1, settings=settings, wandb=True):
        raise ZeroDivisionError
    assert fake_wandb.code == 1
    assert fake_wandb.config == {
        "learning_rate": 2e-5, "max_tokens": 7, "tokenizer": "t",
        "source": {"url": "https://host:9200/i"}, "files": ["a@b", "s://h"],
    }  # fmt: skip


@pytest.mark.parametrize("module", [None, SimpleNamespace()])  # not installed; only a folder named wandb/
def test_wandb_not_installed_is_told_before_anything_is_lost(tmp_path, monkeypatch, module):
    (tmp_path / "metrics.jsonl").write_text('{"type":"train","step":9}\n')
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match="pip install wandb"), Reporter(tmp_path, 1, wandb=True):
        pass
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


RUN = """
import sys
from pathlib import Path
from mlx_retrieval.training.reporting import Reporter
with Reporter(Path("run"), 3, settings={"learning_rate": 0.5, "api_key": "HIDDEN"}, wandb=True) as report:
    for step in (1, 2, 3):
        report.step({"step": step, "loss": 1.0})
        report.evaluation(step, {"ndcg_at_10": 0.25})
assert sys.stdin.isatty() == (sys.argv[1] == "terminal")
"""


@pytest.mark.parametrize("stdin", ["terminal", pytest.param("nothing", marks=pytest.mark.slow)])
def test_wandb_offline_run_is_written_and_never_asks(tmp_path, stdin):
    pytest.importorskip("wandb")
    pty = pytest.importorskip("pty")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    home = dict.fromkeys(("HOME", "WANDB_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "NETRC"), str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    master, slave = pty.openpty()
    pipe = slave if stdin == "terminal" else subprocess.DEVNULL
    command = [sys.executable, "-c", RUN, stdin, "--password", "HIDDEN"]
    environment = {**kept, **home, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)
    os.close(slave)

    def drain() -> None:  # a terminal that nobody reads would block its writer
        try:
            while os.read(master, 4096):
                pass
        except OSError:
            return

    reader = threading.Thread(target=drain)
    reader.start()
    try:
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        reader.join()
        os.close(master)
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert b"train/loss" in content and b"eval/ndcg_at_10" in content and b"best_ndcg_at_10" in content
    assert b"learning_rate" in content and b"HIDDEN" not in content
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 6
