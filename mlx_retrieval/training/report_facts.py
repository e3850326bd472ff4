"""What a run's report says of the run itself: time, settings, versions, and commands to repeat and use it.

settings_table(settings, model_defaults(settings, 22_000_000), model_values(retrieval_config))
"""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.dataset.sources import local
from mlx_retrieval.evaluation.reranking import DEPTH
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training.checkpoint import STATE
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.curves import read_metrics
from mlx_retrieval.training.defaults import resolve_defaults, resolve_weights
from mlx_retrieval.training.improvement import model_to_use
from mlx_retrieval.training.reporting import METRICS_FILE, without_secrets
from mlx_retrieval.utils.text import excerpt, gb, shell

PACKAGES = ("mlx-retrieval", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy")
LONGEST_VALUE = 400  # characters of a setting


def near_paths(settings: Settings) -> Callable[[str], str]:
    """Return a function that shortens the paths in a text for readers elsewhere.

    Below the current folder they are relative to it, as a resumed run has them in full; of the data's files elsewhere
    their names remain.
    """
    here = f"{Path.cwd()}/"
    files = [name for name in local(settings.data) if Path(name).is_absolute() and not name.startswith(here)]

    def near(text: str) -> str:
        for name in files:
            text = text.replace(name, Path(name).name)
        return text.replace(here, "")

    return near


def run_facts(folder: Path) -> list[tuple[str, str]]:
    """Return (name, text) about time, speed and memory, from the run's metrics."""
    steps = [record for record in read_metrics(folder / METRICS_FILE) if record["type"] == "train"]
    seconds = sum(record.get("seconds") or 0 for record in steps)
    tokens = sum(record.get("tokens") or 0 for record in steps)
    if not seconds:
        return []
    peak = max(record.get("peak_memory_bytes") or 0 for record in steps)
    return [
        ("time of the steps", duration(seconds)),
        ("speed", f"{tokens / seconds:,.0f} tokens a second, {tokens:,} tokens in all"),
        ("peak memory", f"{gb(peak, 2)} GB"),
    ]


def duration(seconds: float) -> str:
    """Return a time as people say it: 48 s, 3 min 4 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def model_defaults(settings: Settings, parameters: int, reranker: str = "") -> dict[str, Any]:
    """Return the defaults of settings that depend on the model; see defaults.py."""
    fresh = Settings(task=settings.task, train_type=settings.train_type)
    return {name: getattr(fresh, name) for name in resolve_defaults(fresh, parameters, reranker)}


def model_values(config: RetrievalConfig) -> dict[str, Any]:
    """Return what the model's files give to settings, if these apply to its task."""
    values = dataclasses.asdict(config) | {"reranker_type": config.reranker}
    applying = [f for f in dataclasses.fields(Settings) if config.task in (f.metadata.get("tasks") or (config.task,))]
    return {f.name: values[f.name] for f in applying if f.metadata["group"] == "model" and f.name in values}


def settings_table(
    settings: Settings, model_defaults: dict[str, Any], of_model: dict[str, Any]
) -> list[tuple[str, str, bool]]:
    """Return (name, value, whether it differs from the default) of every setting, without passwords.

    Args:
        model_defaults, of_model: as of `report.Report`.
    """
    defaults = Settings()
    resolve_weights(defaults)
    defaults = defaults.to_dict() | model_defaults
    values = without_secrets(settings.to_dict())

    def shown(name: str, value: Any) -> str:
        if value is not None:
            return _words(value)
        if name in of_model:
            return f"{_words(of_model[name])} (as the model's files say)"
        return "not given"

    return [(name, shown(name, value), value != defaults.get(name)) for name, value in values.items()]


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        value = " ".join(f"({_words(item)})" if isinstance(item, dict) else str(item) for item in value)
    text = str(value)
    return excerpt({"True": "yes", "False": "no", "": "none"}.get(text, text), LONGEST_VALUE)


def versions() -> list[tuple[str, str]]:
    """Return (name, version) of Python, the system and the libraries that decide a run's result."""
    lines = [("Python", platform.python_version()), ("system", f"{platform.system()} {platform.machine()}")]
    for package in PACKAGES:
        try:
            lines.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return lines


def commands(
    folder: Path,
    settings: Settings,
    eval_tasks: Sequence[str],
    compared: bool,
    next_lines: Sequence[tuple[str, str]],
) -> list[tuple[str, str]]:
    """Return (purpose, command) lines: to repeat the run, to evaluate and compare its model, and to use it.

    Args:
        eval_tasks, compared: as of `report.Report`.
        next_lines: of the run, see `run.Run`.
    """
    again = shell("python", "train.py", "--config", folder / "config.yaml", "--output", f"{folder}-again")
    final = folder / "final" / STATE
    # A run that was made longer has had the rates of its earlier end; see training/continuation.py.
    changed = settings.accept_changed_data or (final.is_file() and read_json(final).get("ends"))
    lines = [("start a new run with these settings" if changed else "repeat this run", again)]
    model = model_to_use(folder)
    if eval_tasks:
        how = ("--eval-tasks", *eval_tasks, *evaluation_flags(settings))
        lines.append(("evaluate the model", shell("python", "eval.py", "--model", model, *how)))
        if compared:
            # The figures that the run began with: the untrained model by itself has other lengths, prompts and pooling.
            both = ("--compare", folder / "before.json", model)
            lines.append(("compare it with the untrained model", shell("python", "eval.py", *how, *both)))
    uses = {"next": "use the model", "fuse": "fuse it with its base", "export": "export it"}
    return lines + [(uses[name], command) for name, command in next_lines if name in uses]


def evaluation_flags(settings: Settings) -> list[str]:
    """Return the flags by which eval.py evaluates as the run does."""
    flags = ["--depth", str(settings.rerank_depth)] if settings.rerank_depth != DEPTH else []
    flags += ["--strict"] if settings.strict else []
    return flags + (["--ignore-identical-ids"] if settings.ignore_identical_ids else [])
