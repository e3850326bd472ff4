"""Rerankers under the class names that users of other MLX code import, over the code of rerank.py and train.py.

from mlx_cross_encoder import Qwen3RerankerConfig, Qwen3RerankerTrainer, TriBridMLXReranker
trainer = Qwen3RerankerTrainer(Qwen3RerankerConfig(model_name="Qwen/Qwen3-Reranker-0.6B", adapter_path="adapters/mine"))
trainer.train(train_data, eval_data)     # [{"query", "document", "label": 0 or 1}], or train.py's other row formats
reranker = TriBridMLXReranker("qwen3", adapter_path="adapters/mine_best")     # or from_env()
reranker.rerank("where is Kyoto", documents, top_n=2)       # [{"index", "score", "document"}], best first

Training is train.py's, step for step. The run's folder is `adapter_path` + "_run": it has the rows, the curves and all
that `python train.py --resume --output` needs. `adapter_path` gets the last weights, `adapter_path` + "_best" those of
the lowest loss on `eval_data`. Bad input raises `utils.errors.UserError`, which names the parameter, row or environment
variable at fault.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.models import kinds
from mlx_retrieval.training import checkpoint, rerank_batches
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.defaults import resolve_weights
from mlx_retrieval.utils import files as utils_files
from mlx_retrieval.utils.console import print_lines
from mlx_retrieval.utils.errors import Place, SettingError, UserError
from mlx_retrieval.utils.outputs import entries

QWEN3 = "Qwen/Qwen3-Reranker-0.6B"
TYPES = {"qwen3": "qwen3", "cross-encoder": "cross-encoder", "cross_encoder": "cross-encoder"}
TYPES |= {"listwise": "listwise", "jina": "listwise", "late": "late"}
# The environment variables of `from_env`, by parameter.
VARIABLES = {"reranker_type": "MLX_RERANKER_TYPE", "model_name": "MLX_RERANKER_MODEL"}
VARIABLES |= {"adapter_path": "MLX_RERANKER_ADAPTER", "max_length": "MLX_RERANKER_MAX_LENGTH"}
# Parameters by the settings they stand for, where the two names differ.
PARAMETERS = {"lora_keys": "lora_target_modules", "warmup": "warmup_ratio", "instruction": "task_instruction"}
LOADING = {"model": "model_name", "adapter": "adapter_path"}
FILES = {"train_data": "train.jsonl", "eval_data": "valid.jsonl"}
# Settings that the trainers choose themselves.
RESERVED = ("data", "dry_run", "model", "output", "profile", "reranker_type", "resume", "steps", "task")


@contextmanager
def _parameters(
    names: Mapping[str, str], about: str | None = None, rows: Mapping[Path, str] | None = None
) -> Iterator[None]:
    """Let UserErrors name parameters where commands name flags, and rows where they name lines of files.

    Args:
        names: parameters by the settings they stand for; any other parameter has its setting's name.
        about: the setting at fault in errors that do not say which one is.
        rows: the parameter that a file was written from: its first line is `parameter[0]`.
    """

    def row(place: Place) -> str:
        name = (rows or {}).get(Path(place.file))
        if name is None:
            return str(place)
        return name if place.line is None else f"{name}[{place.line - 1}]"

    try:
        yield
    except UserError as error:
        if not isinstance(error, SettingError):
            if (setting := error.about or about) is None:
                raise
            error = SettingError(f"{{{setting}}} {{reason}}", reason=error)
        raise error.renamed(lambda setting: names.get(setting, setting), row) from error


class TriBridMLXReranker(Reranker):
    """A reranker in use: `rerank(query, documents, top_n)`.

    Args:
        reranker_type: "qwen3", "cross-encoder" (or "cross_encoder"), "listwise" (or "jina"), "late"; None = what the
            model's files say.
        model_name: a folder or hub name; None = the adapter's base, or without one Qwen3-Reranker-0.6B.
        adapter_path: a saved adapter's folder. max_length: tokens of query and document; None = as the model was saved.
        dtype: to compute in: see `Reranker`.
    """

    def __init__(
        self,
        reranker_type: str | None = "qwen3",
        model_name: str | None = None,
        adapter_path: str | None = None,
        max_length: int | None = None,
        dtype: str | None = None,
    ):
        with _parameters(LOADING, about="model" if model_name else "adapter"):
            kind = TYPES.get(reranker_type.lower()) if reranker_type else None
            if reranker_type and kind is None:
                known = ", ".join(TYPES)
                raise SettingError("{reranker_type} {name}: known are {known}", name=reranker_type, known=known)
            if adapter_path and not kinds.is_adapter(Path(adapter_path).expanduser()):
                raise SettingError("{adapter} {path}: no saved adapter's folder", path=adapter_path)
            if not (model_name or adapter_path):
                if kind not in (None, "qwen3"):
                    raise SettingError(
                        "{model} is missing: {reranker_type} {name} has no default model", name=reranker_type
                    )
                model_name = QWEN3
            model = (model_name, adapter_path or None) if model_name else (adapter_path, None)
            super().__init__(*model, kind, max_length, dtype=dtype)

    def score(self, query: str, documents: str | Sequence[str]) -> Any:
        """Score documents as `Reranker.score` does; return a float for a single document."""
        if isinstance(documents, str):
            return float(super().score(query, [documents])[0])
        return super().score(query, documents)


def from_env(environ: Mapping[str, str] = os.environ) -> TriBridMLXReranker | None:
    """Return the reranker that RERANKER_MODE=mlx and the MLX_RERANKER_* variables name; None in every other mode.

    A variable that is unset or empty stands for a parameter that is None. A UserError names the variable at fault.
    """
    if environ.get("RERANKER_MODE", "").strip().lower() != "mlx":
        return None
    values: dict[str, Any] = {name: environ.get(VARIABLES[name], "").strip() or None for name in VARIABLES}
    if (length := values["max_length"]) is not None:
        if not (length.isdecimal() and int(length)):
            raise UserError(f"{VARIABLES['max_length']} {length}: not a whole number above 0")
        values["max_length"] = int(length)

    def variable(setting: str) -> str:
        parameter = LOADING.get(setting, setting)
        return VARIABLES.get(parameter, parameter)

    try:
        return TriBridMLXReranker(**values)
    except SettingError as error:
        raise error.renamed(variable) from error


class MLXCrossEncoder(Reranker):
    """A cross-encoder, made by `from_pretrained`. MLXCrossEncoderTrainer changes it in place."""

    @classmethod
    def from_pretrained(cls, name: str, max_length: int | None = None, dtype: str | None = None) -> "MLXCrossEncoder":
        """Load a model by folder or hub name, or by a saved adapter's folder; `dtype`: see `Reranker`."""
        with _parameters(dict.fromkeys(LOADING, "pretrained_path"), about="model"):
            model = cls(name, max_length=max_length, dtype=dtype)
        if model.kind != "cross-encoder":
            raise UserError(f"pretrained_path {name}: of the type {model.kind}; use TriBridMLXReranker for it")
        return model

    def predict(self, pairs: Sequence[Sequence[str]]) -> Any:
        """Return the scores of (query, document) pairs, (N,) float32; a number for a single pair.

        They are logits or from 0 to 1, as the model defines it.
        """
        single = len(pairs) == 2 and isinstance(pairs[0], str)
        groups = [(query, [document]) for query, document in ([pairs] if single else pairs)]
        scores = np.concatenate([np.zeros(0, np.float32), *self.score_groups(groups)])
        return scores[0] if single else scores


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Config(Settings):
    """Every setting of train.py under its own name, and the fields below. Differences from train.py:

    The loss sees `batch_size` x `gradient_accumulation_steps` rows (all rows if there are fewer), computed in at least
    `gradient_accumulation_steps` micro-batches, which changes no result. `num_epochs` gives the number of steps; if the
    rows do not divide evenly, the last step takes rows of the next epoch. `overwrite` replaces an earlier run.
    """

    num_epochs: float = 3
    learning_rate: float | None = 2e-5
    eval_steps: int = 0  # 0 = after every epoch
    eval_tasks: list[str] = field(default_factory=list)
    lora_target_modules: list[str] | None = None  # lora_keys
    warmup_ratio: float | None = None  # warmup
    output_dir: str | None = None  # in place of adapter_path or save_path
    model_parameter: ClassVar[str]
    output_parameter: ClassVar[str]

    @property
    def parameters(self) -> dict[str, str]:
        """The parameters of settings that have another name here."""
        output = "output_dir" if self.output_dir else self.output_parameter
        return PARAMETERS | {"model": self.model_parameter, "output": output}

    def __post_init__(self) -> None:
        with _parameters(self.parameters):
            super().__post_init__()
        for name in ("gradient_accumulation_steps", "num_epochs"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} {getattr(self, name)}: must be above 0")
        if wrong := [name for name in RESERVED if getattr(self, name) != getattr(Settings(), name)]:
            raise UserError(f"{', '.join(wrong)}: settings of train.py alone")

    def folders(self) -> tuple[Path, Path, Path]:
        """Return the folders of the last weights, of the best weights, and of the run."""
        base = Path(self.output_dir or getattr(self, self.output_parameter)).expanduser()
        return base, base.with_name(base.name + "_best"), base.with_name(base.name + "_run")

    def settings(self, model: str, kind: str, rows: int) -> Settings:
        """Return train.py's settings; `rows` is the number of training rows, which are in the run's folder."""
        run, batch = self.folders()[2], min(self.batch_size * self.gradient_accumulation_steps, rows)
        values = {f.name: getattr(self, f.name) for f in fields(Settings)}
        renamed = {setting: getattr(self, parameter, None) for setting, parameter in PARAMETERS.items()}
        values |= {name: value for name, value in renamed.items() if value is not None}
        values |= {"batch_size": batch, "steps": math.ceil(self.num_epochs * rows / batch)}
        values |= {"eval_steps": self.eval_steps or math.ceil(rows / batch), "data": [str(run / "data")]}
        settings = Settings(**values | {"model": model, "task": "rerank", "reranker_type": kind, "output": str(run)})
        resolve_weights(settings)
        return settings


@dataclass(kw_only=True)
class Qwen3RerankerConfig(_Config):
    """Settings for training a Qwen3-Reranker, by default with LoRA."""

    model_parameter: ClassVar[str] = "model_name"
    output_parameter: ClassVar[str] = "adapter_path"

    model_name: str = QWEN3
    adapter_path: str = "./adapters/qwen3-reranker-lora"
    task_instruction: str | None = None  # instruction
    batch_size: int = 4
    gradient_accumulation_steps: int = 8
    max_length: int | None = 512


@dataclass(kw_only=True)
class MLXCrossEncoderConfig(_Config):
    """Settings for training a cross-encoder: all weights, or an adapter with train_type="lora"."""

    model_parameter: ClassVar[str] = "pretrained_path"
    output_parameter: ClassVar[str] = "save_path"

    pretrained_path: str | None = None  # None = the model that the trainer gets
    save_path: str = "./adapters/mlx-cross-encoder"
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    train_type: str = "full"


class _Trainer:
    """Trains a model and scores with it: with the base weights before training, with the last weights after it."""

    def __init__(self, name: str, kind: str, config: _Config, model: Reranker | None = None):
        self.name, self.kind, self.config = name, kind, config
        self.model = self._own = model
        self._save: Callable[[Path], None] | None = None  # writes the trained model; None before training
        self._trained = False

    def prepare_model(self) -> None:
        """Load the model now. Without this call, the first score before training loads it."""
        if self.model is None:
            instruction = getattr(self.config, "task_instruction", None) or self.config.instruction
            settings = (self.config.max_length, instruction, False, self.config.dtype)
            with _parameters(self.config.parameters, about="model"):
                self.model = Reranker(self.name, None, self.kind, *settings)

    def score_pair(self, query: str, document: str) -> float:
        """Return the score of one document."""
        self.prepare_model()
        return float(self.model.score(query, [document])[0])

    def rerank(self, query: str, documents: Sequence[str], top_n: int | None = None) -> list[dict[str, Any]]:
        """Return the best `top_n` documents (None = all), best first: {"index", "score", "document"}."""
        self.prepare_model()
        return self.model.rerank(query, documents, top_n)

    def train(self, train_data: Iterable[Mapping], eval_data: Iterable[Mapping] | None = None) -> dict[str, Any]:
        """Train, starting from the base model. A second call starts there again and replaces this trainer's first run.

        Ctrl-C saves the run and ends the process, as in train.py, which can then resume it.

        Returns {"steps", "best_step" (0 without eval_data, or if no step beat the untrained model), "folder"}.
        """
        data = {"train_data": train_data} | ({} if eval_data is None else {"eval_data": eval_data})
        _, best, folder = self._folders()
        with _parameters(self.config.parameters, rows={folder / "data" / FILES[name]: name for name in data}):
            utils_files.write_folder(folder / "data", partial(_write, data))
            rows = Rows([folder / "data" / FILES["train_data"]], self.config.skip_bad_rows)
            settings = self.config.settings(self.name, self.kind, len(rows))
            self.model, self._save = self._own, None  # frees a model that was loaded for scores before training
            settings.overwrite = checkpoint.holds_run(folder)  # `_folders` has checked that it may be replaced
            run = training_run.prepare(settings)
            if run.trainer.validation:
                rerank_batches.check(run.trainer.validation.rows, settings.loss, settings.random_negatives)
            if best.is_dir():
                shutil.rmtree(best)  # of the run that is replaced
            training_run.run(run)
        trainer, self._save, self._trained = run.trainer, run.trainer.save_model, True
        parts = (trainer.model, run.retrieval, trainer.batches.tokenizer, self.name)
        if self._own:
            self._own.set_model(*parts)
        self.model = self._own or Reranker.of(*parts)
        lines = [("saved", str(self.save_adapter()))]
        if (folder / "best").is_dir():
            left_out = shutil.ignore_patterns(checkpoint.STATE, checkpoint.OPTIMIZER)
            copy = partial(shutil.copytree, folder / "best", ignore=left_out, dirs_exist_ok=True)
            utils_files.write_folder(best, copy)
            lines.append(("best", str(best)))
        print_lines(lines)
        return {"steps": trainer.state.step, "best_step": trainer.state.best_step, "folder": str(folder)}

    def save_adapter(self, path: str | Path | None = None) -> Path:
        """Save the last weights as an adapter folder; None = the config's, where `train` has saved them already."""
        if self._save is None:
            raise UserError("nothing to save: train first")
        path = self.config.folders()[0] if path is None else Path(path).expanduser()
        _check_replaceable(path)
        utils_files.write_folder(path, self._save)
        return path

    save = save_adapter

    def _folders(self) -> tuple[Path, Path, Path]:
        """Return the config's folders. UserError if something is there that must not be replaced."""
        last, best, folder = self.config.folders()
        taken = [path for path in (last, best) if kinds.is_adapter(path)] + [folder] * checkpoint.holds_run(folder)
        if taken and not (self.config.overwrite or self._trained):
            raise UserError(f"{taken[0]} exists already: name another folder, or replace it with overwrite=True")
        for path in (last, best):
            _check_replaceable(path)
        return last, best, folder


class Qwen3RerankerTrainer(_Trainer):
    """Trains the model that the config names, and scores with it."""

    def __init__(self, config: Qwen3RerankerConfig):
        super().__init__(config.model_name, "qwen3", config)


class MLXCrossEncoderTrainer(_Trainer):
    """Trains a cross-encoder in place, starting from its base model."""

    def __init__(self, model: MLXCrossEncoder, config: MLXCrossEncoderConfig):
        if config.pretrained_path not in (None, model.name):
            raise UserError(f"pretrained_path {config.pretrained_path}, but the model is {model.name}")
        if kinds.is_adapter(Path(model.name).expanduser()):
            raise UserError(f"{model.name} is an adapter: training starts from a base model")
        own = {name: getattr(model.config, name) for name in ("max_length", "dtype")}
        config = replace(config, **{name: value for name, value in own.items() if getattr(config, name) is None})
        super().__init__(model.name, "cross-encoder", config, model)


def _write(data: Mapping[str, Iterable[Mapping]], folder: Path) -> None:
    """Write rows as JSON lines. They are checked when the files are read."""
    for name, rows in data.items():
        if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
            raise UserError(f'{name}: not a list of rows such as {{"query": ..., "document": ..., "label": 1}}')
        with open(folder / FILES[name], "w", encoding="utf-8") as file:
            for i, row in enumerate(rows):
                try:
                    file.write(json.dumps(row, default=lambda value: value.tolist()) + "\n")  # converts NumPy's numbers
                except (AttributeError, TypeError, ValueError) as error:
                    raise UserError(f"{name}[{i}]: {error}") from error


def _check_replaceable(path: Path) -> None:
    empty = not path.exists() or (path.is_dir() and not entries(path))
    if not empty and not kinds.is_adapter(path):
        raise UserError(f"{path}: not an adapter's folder, so it is not replaced")
