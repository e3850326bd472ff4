"""The class names of rerankers that users of other MLX code import, over rerank.py and train.py.

from mlx_cross_encoder import Qwen3RerankerConfig, Qwen3RerankerTrainer, TriBridMLXReranker
trainer = Qwen3RerankerTrainer(Qwen3RerankerConfig(model_name="Qwen/Qwen3-Reranker-0.6B", adapter_path="adapters/mine"))
trainer.train(train_data, eval_data)     # [{"query", "document", "label": 0 or 1}], or other rows of rows.py
reranker = TriBridMLXReranker("qwen3", adapter_path="adapters/mine_best")     # or from_env()
reranker.rerank("where is Kyoto", documents, top_n=2)       # [{"index", "score", "document"}], best first

Training is train.py's, step for step, in a run's folder of its own: `adapter_path` + "_run" has the rows, the curves
and what `python train.py --resume --output` needs. `adapter_path` gets the last weights, `adapter_path` + "_best" those
of the lowest loss on `eval_data`. Mistakes raise `backend.UserError`, which names the parameter, row or variable.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.models import loading
from mlx_retrieval.training import checkpoint, rerank_batches
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings, flag
from mlx_retrieval.utils import files as utils_files
from mlx_retrieval.utils.console import print_lines
from mlx_retrieval.utils.errors import UserError

QWEN3 = "Qwen/Qwen3-Reranker-0.6B"
TYPES = {"qwen3": "qwen3", "cross-encoder": "cross-encoder", "cross_encoder": "cross-encoder"}
TYPES |= {"listwise": "listwise", "jina": "listwise", "late": "late"}
# What parameters here are called elsewhere.
VARIABLES = {"reranker_type": "MLX_RERANKER_TYPE", "model_name": "MLX_RERANKER_MODEL"}
VARIABLES |= {"adapter_path": "MLX_RERANKER_ADAPTER", "max_length": "MLX_RERANKER_MAX_LENGTH"}
SETTINGS = {"lora_target_modules": "lora_keys", "warmup_ratio": "warmup", "task_instruction": "instruction"}
SETTINGS |= {"model_name": "model", "adapter_path": "output"}
FILES = {"train_data": "train.jsonl", "eval_data": "valid.jsonl"}
KEPT = ("data", "dry_run", "model", "output", "profile", "reranker_type", "resume", "steps", "task")  # trainers' own


@contextmanager
def _named_here(files: Mapping[Path, str] | None = None, **given: str | None) -> Iterator[None]:
    """Let UserErrors name parameters, for flags and before values `given` for them, and rows for lines of `files`."""
    try:
        yield
    except UserError as error:
        text = str(error).replace("max length", "max_length")
        for path, name in (files or {}).items():
            text = re.sub(re.escape(str(path)) + r":(\d+)", lambda m, n=name: f"{n}[{int(m[1]) - 1}]", text)
            text = text.replace(str(path), name)
        names = {flag(ours): theirs for theirs, ours in SETTINGS.items()}
        text = re.sub(r"--[a-z][a-z-]*", lambda m: names.get(m[0], m[0][2:].replace("-", "_")), text)
        for name, value in given.items():
            if value and text.startswith((value, str(Path(value).expanduser()))):
                text = f"{name} {text}"
                break
        raise UserError(text) from error


class TriBridMLXReranker(Reranker):
    """A reranker in use: `rerank(query, documents, top_n)`.

    Args:
        reranker_type: "qwen3", "cross-encoder" (or "cross_encoder"), "listwise" (or "jina"), "late"; None = what the
            model's files say.
        model_name: a folder or hub name; None = the adapter's base, or without one Qwen3-Reranker-0.6B.
        adapter_path: a saved adapter's folder. max_length: tokens of query and document; None = as the model was saved.
    """

    def __init__(
        self,
        reranker_type: str | None = "qwen3",
        model_name: str | None = None,
        adapter_path: str | None = None,
        max_length: int | None = None,
    ):
        kind = TYPES.get(reranker_type.lower()) if reranker_type else None
        if reranker_type and kind is None:
            raise UserError(f"reranker_type {reranker_type}: known are {', '.join(TYPES)}")
        if adapter_path and not loading.is_adapter(Path(adapter_path).expanduser()):
            raise UserError(f"adapter_path {adapter_path}: no saved adapter's folder")
        if not (model_name or adapter_path):
            if kind not in (None, "qwen3"):
                raise UserError(f"model_name is missing: there is none that reranker_type {reranker_type} stands for")
            model_name = QWEN3
        with _named_here(adapter_path=adapter_path, model_name=model_name):
            model = (model_name, adapter_path or None) if model_name else (adapter_path, None)
            super().__init__(*model, kind, max_length)

    def score(self, query: str, documents: str | Sequence[str]) -> Any:
        """As `Reranker.score`; of a single document, a float."""
        if isinstance(documents, str):
            return float(super().score(query, [documents])[0])
        return super().score(query, documents)


def from_env(environ: Mapping[str, str] = os.environ) -> TriBridMLXReranker | None:
    """The reranker that RERANKER_MODE=mlx and the MLX_RERANKER_* variables name; None in every other mode.

    A variable that is unset or empty is as a parameter that is None. UserError names the variable that is wrong.
    """
    if environ.get("RERANKER_MODE", "").strip().lower() != "mlx":
        return None
    given: dict[str, Any] = {name: environ.get(VARIABLES[name], "").strip() or None for name in VARIABLES}
    if (length := given["max_length"]) is not None:
        if not (length.isdecimal() and int(length)):
            raise UserError(f"{VARIABLES['max_length']} {length}: not a whole number above 0")
        given["max_length"] = int(length)
    try:
        return TriBridMLXReranker(**given)
    except UserError as error:
        text = re.sub(rf"\b({'|'.join(VARIABLES)})\b", lambda m: VARIABLES[m[0]], str(error))
        named = any(name in text for name in VARIABLES.values())
        raise UserError(text if named else f"{VARIABLES['model_name']} {given['model_name']}: {text}") from error


class MLXCrossEncoder(Reranker):
    """A cross-encoder, `from_pretrained`; the trainer that is given it changes it in place."""

    @classmethod
    def from_pretrained(cls, name: str, max_length: int | None = None) -> "MLXCrossEncoder":
        """The model of a folder or hub name, or of a saved adapter's folder."""
        with _named_here(pretrained_path=name):
            model = cls(name, max_length=max_length)
        if model.kind != "cross-encoder":
            raise UserError(f"pretrained_path {name}: of the type {model.kind}, which TriBridMLXReranker is for")
        return model

    def predict(self, pairs: Sequence[Sequence[str]]) -> Any:
        """(N,) float32: scores of (query, document) pairs, raw or 0 to 1 as the model has it; of one pair, a number."""
        single = len(pairs) == 2 and isinstance(pairs[0], str)
        alone = [(query, [document]) for query, document in ([pairs] if single else pairs)]
        scores = np.concatenate([np.zeros(0, np.float32), *self.score_groups(alone)])
        return scores[0] if single else scores


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Config(Settings):
    """Every setting of train.py by its name, and those below. Where they differ:

    The loss sees `batch_size` x `gradient_accumulation_steps` rows (all, where there are fewer), computed in at least
    `gradient_accumulation_steps` parts, which changes no result. There are as many steps as `num_epochs` need; where
    they do not come out even, the last one takes rows of the next epoch. `overwrite` replaces an earlier run.
    """

    num_epochs: float = 3
    learning_rate: float | None = 2e-5
    eval_steps: int = 0  # 0 = after every epoch
    eval_tasks: list[str] = field(default_factory=list)
    lora_target_modules: list[str] | None = None  # lora_keys
    warmup_ratio: float | None = None  # warmup
    output_dir: str | None = None  # in place of adapter_path or save_path

    def __post_init__(self) -> None:
        with _named_here():
            super().__post_init__()
        for name in ("gradient_accumulation_steps", "num_epochs"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} {getattr(self, name)}: must be above 0")
        if wrong := [name for name in KEPT if getattr(self, name) != getattr(Settings(), name)]:
            raise UserError(f"{', '.join(wrong)}: settings of train.py alone")

    def folders(self) -> tuple[Path, Path, Path]:
        """Of the last weights, of the best ones, and of the run."""
        base = Path(self.output_dir or getattr(self, "adapter_path", None) or self.save_path).expanduser()
        return base, base.with_name(base.name + "_best"), base.with_name(base.name + "_run")

    def settings(self, model: str, kind: str, rows: int) -> Settings:
        """train.py's settings for so many rows, which are in the run's folder."""
        run, batch = self.folders()[2], min(self.batch_size * self.gradient_accumulation_steps, rows)
        chosen = {f.name: getattr(self, f.name) for f in fields(Settings)}
        named = {ours: getattr(self, theirs, None) for theirs, ours in SETTINGS.items()}
        chosen |= {name: value for name, value in named.items() if value is not None}
        chosen |= {"batch_size": batch, "steps": math.ceil(self.num_epochs * rows / batch)}
        chosen |= {"eval_steps": self.eval_steps or math.ceil(rows / batch), "data": [str(run / "data")]}
        return Settings(**chosen | {"model": model, "task": "rerank", "reranker_type": kind, "output": str(run)})


@dataclass(kw_only=True)
class Qwen3RerankerConfig(_Config):
    """A Qwen3-Reranker's training: LoRA."""

    model_name: str = QWEN3
    adapter_path: str = "./adapters/qwen3-reranker-lora"
    task_instruction: str | None = None  # instruction
    batch_size: int = 4
    gradient_accumulation_steps: int = 8
    max_length: int | None = 512


@dataclass(kw_only=True)
class MLXCrossEncoderConfig(_Config):
    """A cross-encoder's training: of all weights, or with train_type="lora"."""

    pretrained_path: str | None = None  # None = the model that is given to the trainer
    save_path: str = "./adapters/mlx-cross-encoder"
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    train_type: str = "full"


class _Trainer:
    """Trains a model, and scores with it as it stands: as its base before training, with the last weights after it."""

    def __init__(self, name: str, kind: str, config: _Config, model: Reranker | None = None):
        self.name, self.kind, self.config = name, kind, config
        self.model = self._own = model
        self._save: Callable[[Path], None] | None = None  # of the model that was trained
        self._trained = False

    def prepare_model(self) -> None:
        """Load the model, for scores before training; otherwise it is loaded when it is needed."""
        if self.model is None:
            told = getattr(self.config, "task_instruction", None) or self.config.instruction
            with _named_here(model_name=self.name):
                self.model = Reranker(self.name, None, self.kind, self.config.max_length, told)

    def score_pair(self, query: str, document: str) -> float:
        """The score of one document."""
        self.prepare_model()
        return float(self.model.score(query, [document])[0])

    def rerank(self, query: str, documents: Sequence[str], top_n: int | None = None) -> list[dict[str, Any]]:
        """The best `top_n` documents (None = all), best first: {"index", "score", "document"}."""
        self.prepare_model()
        return self.model.rerank(query, documents, top_n)

    def train(self, train_data: Iterable[Mapping], eval_data: Iterable[Mapping] | None = None) -> dict[str, Any]:
        """Train from the base model on; a second time begins there too, and replaces this trainer's first run.

        Ctrl-C saves and ends the process, as in train.py, which can then resume the run. Returns {"steps", "best_step"
        (0 without eval_data), "folder"}.
        """
        data = {"train_data": train_data} | ({} if eval_data is None else {"eval_data": eval_data})
        _, best, folder = self._folders()
        with _named_here({folder / "data" / FILES[name]: name for name in data}, model_name=self.name):
            utils_files.write_folder(folder / "data", partial(_write, data))
            rows = Rows([folder / "data" / FILES["train_data"]], self.config.skip_bad_rows)
            settings = self.config.settings(self.name, self.kind, len(rows))
            self.model, self._save = self._own, None  # makes room, where the model was loaded here
            settings.overwrite = checkpoint.holds_run(folder)  # `_folders` has asked
            run = training_run.prepare(settings)
            if run.trainer.validation:
                try:
                    rerank_batches.check(run.trainer.validation.rows, settings.loss, settings.random_negatives)
                except UserError as error:
                    raise UserError(f"eval_data: {error}") from error
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
        """Save the last weights as an adapter's folder; None = the config's, where `train` has put them already."""
        if self._save is None:
            raise UserError("nothing to save: train first")
        path = self.config.folders()[0] if path is None else Path(path).expanduser()
        _check_replaceable(path)
        utils_files.write_folder(path, self._save)
        return path

    save = save_adapter

    def _folders(self) -> tuple[Path, Path, Path]:
        """The config's, which have room; UserError where something is there that is not to be replaced."""
        last, best, folder = self.config.folders()
        taken = [path for path in (last, best) if loading.is_adapter(path)] + [folder] * checkpoint.holds_run(folder)
        if taken and not (self.config.overwrite or self._trained):
            raise UserError(f"{taken[0]} is there already: name another folder, or replace it with overwrite=True")
        for path in (last, best):
            _check_replaceable(path)
        return last, best, folder


class Qwen3RerankerTrainer(_Trainer):
    """Trains and uses the model that the config names."""

    def __init__(self, config: Qwen3RerankerConfig):
        super().__init__(config.model_name, "qwen3", config)


class MLXCrossEncoderTrainer(_Trainer):
    """Trains a cross-encoder in place, from its base model on."""

    def __init__(self, model: MLXCrossEncoder, config: MLXCrossEncoderConfig):
        if config.pretrained_path not in (None, model.name):
            raise UserError(f"pretrained_path {config.pretrained_path}, but the model is {model.name}")
        if loading.is_adapter(Path(model.name).expanduser()):
            raise UserError(f"{model.name} is an adapter: training begins at a base model")
        if config.max_length is None:
            config = replace(config, max_length=model.config.max_length)
        super().__init__(model.name, "cross-encoder", config, model)


def _write(data: Mapping[str, Iterable[Mapping]], folder: Path) -> None:
    """Write rows as JSON lines; they are checked as files are."""
    for name, rows in data.items():
        if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
            raise UserError(f'{name}: not a list of rows such as {{"query": ..., "document": ..., "label": 1}}')
        with open(folder / FILES[name], "w", encoding="utf-8") as file:
            for i, row in enumerate(rows):
                try:
                    file.write(json.dumps(row, default=lambda value: value.tolist()) + "\n")  # numpy's numbers
                except (AttributeError, TypeError, ValueError) as error:
                    raise UserError(f"{name}[{i}]: {error}") from error


def _check_replaceable(path: Path) -> None:
    empty = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not empty and not loading.is_adapter(path):
        raise UserError(f"{path}: not an adapter's folder, so it is not replaced")
