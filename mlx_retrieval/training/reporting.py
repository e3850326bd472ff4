"""Reports of a run in progress: progress bar, `metrics.jsonl`, `curves.png`, and Weights & Biases if asked for.

    with Reporter(folder, total_steps=1000) as report:
        report.step({"step": 1, "loss": 1.23, "learning_rate": 2e-5, "tokens_per_second": 5123.0})

run.py opens it, the trainers report to it. Tested by `python -m pytest tests/training/test_reporting.py`.
"""

import functools
import importlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from mlx_retrieval.training.curves import MAIN_METRICS, draw_curves, is_number, metric_name, read_metrics
from mlx_retrieval.utils import files, imports
from mlx_retrieval.utils.console import console
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import gb, shell


class NullReporter:
    """A reporter that reports nothing: on all ranks but the first, and outside a run."""

    def __enter__(self) -> "NullReporter":
        return self

    def __exit__(self, *_) -> None:
        pass

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_, **__: None


METRICS_FILE, CURVES_FILE = "metrics.jsonl", "curves.png"
# Errors of drawing, none of which may end a run.
DRAWING_ERRORS = (
    files.SaveError,
    ImportError,
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    ArithmeticError,
)
SECRET_KEY = re.compile(r"(api|access|private).?key|passw|secret|credential|(token|pwd|auth)$", re.IGNORECASE)


class Reporter:
    """Progress of one training run, on screen and on disk; a context manager.

    A terminal shows a two-line bar; elsewhere, a plain line is printed after every tenth of the steps.

    Args:
        folder: receives `metrics.jsonl` and `curves.png`, and `wandb/`.
        first_step: the step that the run continues from; records of later steps, by an interrupted run, are removed.
        settings: go to W&B only, without keys and passwords.

    Raises UserError on entering if W&B is asked for but not installed.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        first_step: int = 0,
        settings: dict[str, Any] | None = None,
        wandb: bool = False,
        wandb_project: str = "mlx-retrieval",
        run_name: str | None = None,
    ):
        self.folder = Path(folder)
        self.total_steps = total_steps
        self.first_step = first_step
        self.settings = settings or {}
        self.run_name = run_name
        self.wandb_project = wandb_project if wandb else None
        self._step = first_step
        self._status = "training"
        self._shown: dict[str, Any] = {}
        self._main = MAIN_METRICS[0]  # that the run goes by
        self._best: tuple[float, int] | None = None  # nDCG@10 or Spearman, and its step
        self._average: dict[str, tuple[float, float]] = {}
        self._warm: tuple[float, int] | None = None  # the end of this run's first step, which compiles
        self._run: Any = None  # the W&B run
        self._undrawn = False
        self._unwritten = b""

    def __enter__(self) -> "Reporter":
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:  # closed in reverse order, after errors too: bar, file, picture, W&B
            if self.wandb_project is not None:
                self._start_wandb(self.wandb_project)
                stack.push(lambda kind, *_: self._finish_wandb(kind is not None))
            stack.callback(lambda: self._undrawn and self.draw())
            self._begin_file()
            self._started = self._stepped = time.monotonic()
            self._file = stack.enter_context(open(self.folder / METRICS_FILE, "ab", buffering=0))
            self._plain = not console().is_terminal or console().is_dumb_terminal
            if not self._plain:
                stack.enter_context(Live(self, console=console(), refresh_per_second=4))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        finished = kind is None and self._step >= self.total_steps
        self._status = "done" if finished else "interrupted" if kind is KeyboardInterrupt else "stopped"
        self._stack.__exit__(kind, error, trace)

    def step(self, record: dict[str, Any]) -> None:
        """Report one optimizer step.

        Shown are step, loss, learning_rate, tokens_per_second (of real tokens), peak_memory_bytes, grad_norm, padding
        (a fraction) and epoch; all keys go to `metrics.jsonl`.
        """
        record = _clean(record)
        before = self._step
        self._step = record["step"]
        self._status = "training"
        self._stepped = time.monotonic()
        self._warm = self._warm or (self._stepped, self._step)
        self._shown |= record
        for key in ("loss", "tokens_per_second"):
            self._shown[key] = self._smooth(key, record.get(key))
        self._record({"type": "train", **record}, {f"train/{key}": value for key, value in record.items()})
        tenths = [10 * step // max(self.total_steps, 1) for step in (before, self._step)]
        first_or_last = before == self.first_step or self._step >= self.total_steps
        if self._plain and (first_or_last or tenths[0] != tenths[1]):
            self.message("  ".join(["step" + self._counts(), *self._figures()[:4], *self._times()]))

    def evaluation(
        self,
        step: int,
        metrics: dict[str, float],
        per_task: dict[str, dict[str, float]] | None = None,
        guards: dict[str, float] | None = None,
        fallen: Sequence[str] = (),
    ) -> None:
        """Report an evaluation after `step` steps (0 = untrained): the mean over tasks, and each task's. Draw it.

        Args:
            guards: what each guard's nDCG@10, or Spearman, has changed by.
            fallen: those that lost too much, so that this is not the best step.
        """
        metrics, tasks = _clean(metrics), _clean(per_task or {})
        values = {f"eval/{key}": value for key, value in metrics.items()} | {"train/step": step}
        for task, scores in tasks.items():
            values |= {f"eval/{task}/{key}": value for key, value in scores.items()}
        record = {"type": "eval", "step": step, "metrics": metrics, "tasks": tasks}
        if guards:
            values |= {f"guard/{task}": change for task, change in guards.items()}
            record |= {"guards": guards, "fallen": [*fallen]}
        self._record(record, values)
        better, self._status = self._note_evaluation(step, metrics, bool(fallen)), "training"
        shown = [f"{metric_name(key)} {value:.4f}" for key, value in metrics.items() if is_number(value)]
        self.message(f"eval {step}: " + "  ".join(shown) + (", best" if better else ""))
        if guards:
            changes = [f"{task} {change:+.4f}" + " fell" * (task in fallen) for task, change in guards.items()]
            self.message(f"guards {step}: " + "  ".join(changes) + ", not kept as best" * bool(fallen))
        if step:  # a single point needs no curve, and matplotlib is slow
            self.draw()

    def status(self, text: str) -> None:
        """Show the current activity in the bar, such as "evaluating", until the next report; "" clears it."""
        self._status = text or "training"

    def message(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self._print(Text(text))

    def warn(self, text: str) -> None:
        """Print a warning, above the bar where there is one."""
        self._print(Text.assemble(("warning: ", "yellow"), text))

    @staticmethod
    def _print(text: Text) -> None:
        with suppress(OSError):  # a log on a full disk or a closed pipe must not end a run
            console().print(text)

    def draw(self) -> None:
        """Draw `curves.png` from the metrics so far. A failure is only a warning."""
        self._undrawn = False
        try:
            draw_curves(self.folder / METRICS_FILE, self.folder / CURVES_FILE)
        except DRAWING_ERRORS as error:
            self.warn(f"{CURVES_FILE} could not be drawn: {error}")

    # --- the metrics file ---

    def _begin_file(self) -> None:
        """Begin a new file, or remove the old one's records after `first_step`; atomically, as a kill may come."""
        file = self.folder / METRICS_FILE
        records = [r for r in read_metrics(file) if r["step"] <= self.first_step] if self.first_step else []
        for record in records:
            if record["type"] == "eval":
                self._note_evaluation(record["step"], record.get("metrics", {}), bool(record.get("fallen")))
        files.write_file(file, "".join(json.dumps(_clean(r)) + "\n" for r in records))
        if not self.first_step:
            (self.folder / CURVES_FILE).unlink(missing_ok=True)

    def _record(self, record: dict[str, Any], wandb_values: dict[str, Any]) -> None:
        self._write(json.dumps(record, allow_nan=False) + "\n")
        self._undrawn = True
        if self._run is not None:
            try:
                self._run.log({key: value for key, value in wandb_values.items() if is_number(value)})
            except self._wandb_errors as error:
                self.warn(f"W&B failed, its record ends here: {error}")
                self._run = None

    def _write(self, text: str) -> None:
        """Append to the metrics file. If the disk is full, the rest is written with the next record."""
        first = not self._unwritten
        self._unwritten += text.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if first:
                self.warn(f"{METRICS_FILE} could not be written: {error.strerror}; it waits for room")

    def _note_evaluation(self, step: int, metrics: dict[str, Any], fallen: bool = False) -> bool:
        """Keep the last and the best evaluation. Return True if this one is better than an earlier one.

        `fallen`: whether a guard has fallen, so that it is not the best one.
        """
        self._main = next((name for name in MAIN_METRICS if name in metrics), self._main)
        self._shown |= {key: metrics.get(key) for key in (self._main, "validation_loss")}
        score = metrics.get(self._main)
        before = self._best
        if not is_number(score) or fallen:
            return False
        if before is None or score > before[0]:
            self._best = (score, step)
            self._shown["best"] = f"{score:.4f} at {step}"
        return before is not None and score > before[0]

    # --- the screen ---

    def __rich_console__(self, out: Console, options: ConsoleOptions) -> Iterator[Text]:
        width = options.max_width
        right = "  ".join([self._counts(), *self._times()])
        if (space := width - 12 - len(right)) < 8:
            right = self._counts()
            space = max(width - 12 - len(right), 0)
        done = round(space * min(self._step / max(self.total_steps, 1), 1.0))
        full, empty = "#-" if options.ascii_only else "━─"
        bar = (full * done, "cyan"), (empty * (space - done), "bright_black")
        second = ""
        for figure in self._figures():
            if len(second) + 2 + len(figure) > width:
                break
            second += "  " + figure if second else figure
        for line in (Text.assemble((f"{self._status:<11.11} ", "bold"), *bar, right), Text(second)):
            line.truncate(width)
            yield line

    def _figures(self) -> list[str]:
        """Return the known figures, most important first; the bar shows as many as fit."""
        formats = {
            "loss": "loss {:#.4g}",
            "learning_rate": "lr {:.2e}",
            "tokens_per_second": "{:,.0f} tok/s",
            "peak_memory": "peak {} GB",
            **{name: f"{metric_name(name)} {{:.4f}}" for name in MAIN_METRICS},
            "validation_loss": "validation loss {:#.4g}",
            "best": "best {}",
            "grad_norm": "grad norm {:.3g}",
            "padding": "padding {:.1%}",
            "epoch": "epoch {:.2f}",
        }
        peak = self._shown.get("peak_memory_bytes")
        values = self._shown | {"peak_memory": gb(peak) if peak else None}
        return [text.format(values[key]) for key, text in formats.items() if values.get(key) is not None]

    def _counts(self) -> str:
        percent = 100 * min(self._step, self.total_steps) // max(self.total_steps, 1)
        return f" {self._step:>{len(str(self.total_steps))}}/{self.total_steps} {percent:3d}%"

    def _times(self) -> list[str]:
        """Return the time so far, and the time left at the mean pace since the first step, evaluations included."""
        now, left = time.monotonic(), "-:--"
        if self._step >= self.total_steps:
            left = "0:00"
        elif self._warm is not None and self._step > self._warm[1]:
            pace = (self._stepped - self._warm[0]) / (self._step - self._warm[1])
            left = _clock(pace * (self.total_steps - self._step) - (now - self._stepped))
        return [f"{_clock(now - self._started)} elapsed", f"{left} left"]

    def _smooth(self, key: str, value: float | None) -> float | None:
        """Return the exponential mean over about five steps, without bias towards its start."""
        total, weight = self._average.get(key, (0.0, 0.0))
        if value is not None:
            total, weight = self._average[key] = 0.8 * total + 0.2 * value, 0.8 * weight + 0.2
        return total / weight if weight else None

    # --- Weights & Biases ---

    def _start_wandb(self, project: str) -> None:
        """Start a W&B run without questions and without hanging: offline if not logged in or W&B does not answer."""
        try:
            imports.reveal("wandb")
            wandb = importlib.import_module("wandb")
            settings = wandb.Settings(
                init_timeout=20,
                finish_timeout=30,
                console="off",
                silent=True,
                reinit="create_new",
                x_disable_meta=True,  # it holds the command line, which may have passwords
            )
        # AttributeError: not the package, but a folder wandb/ that its runs have left behind.
        except (ImportError, AttributeError) as error:
            raise UserError("W&B is asked for but not installed: pip install wandb") from error
        self._wandb_errors = (wandb.errors.Error, OSError)
        config = without_secrets(_clean(self.settings))
        start = functools.partial(
            wandb.init, project=project, name=self.run_name, config=config, dir=self.folder, settings=settings
        )
        mode = os.environ.get("WANDB_MODE")
        try:
            if mode not in ("offline", "disabled"):
                wandb.setup(wandb.Settings(silent=True))
                mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
            self._run = start(mode=mode)
        except (wandb.errors.CommError, wandb.errors.UsageError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            self.warn(f"W&B keeps its record offline: {reason}")
            self._run = start(mode=(mode := "offline"))
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")
        for name in MAIN_METRICS:
            self._run.define_metric(f"eval/{name}", step_metric="train/step", summary="max")
        upload = f"offline; to upload: {shell('wandb', 'sync', Path(self._run.dir).parent)}"
        self.message(f"W&B {self._run.url if mode == 'online' else upload if mode == 'offline' else mode}")

    def _finish_wandb(self, failed: bool) -> None:
        """Write the summary and wait for uploads, 30 s at most; `wandb sync` can send the rest."""
        try:
            if self._run is not None and self._best:
                self._run.summary.update({f"best_{self._main}": self._best[0], "best_step": self._best[1]})
            if self._run is not None:
                self._run.finish(exit_code=int(failed))
        except self._wandb_errors as error:
            self.warn(f"W&B could not be closed: {error}")


# --- small things ---


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(int(seconds), 0), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _clean(value: Any) -> Any:
    """Return a copy for JSON: arrays as numbers or lists, non-finite numbers as null, other objects as text."""
    if hasattr(value, "tolist"):  # numpy's and mlx's arrays and scalars
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def without_secrets(value: Any) -> Any:
    """Return a copy without keys that name a secret, and without the user and password of addresses."""
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items() if not SECRET_KEY.search(key)}
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return re.sub(r"(?<=://)[^/@\s]+@", "", value) if isinstance(value, str) else value
