"""Tell what kind of model a folder holds, and say so in one line where a command takes another kind.

detect_kind("adapters/final")                 "embed", "late" or "rerank"; UserError for a folder of something else
require(EMBEDDING, "adapters/final")          UserError that names the commands that take the model
"""

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from mlx_retrieval.backbones import resolve
from mlx_retrieval.backbones.finding import near_folder
from mlx_retrieval.backbones.hub import read_config, read_json, tensor_table, weight_files
from mlx_retrieval.models import pylate_files, retrieval_config, sentence_transformers_files
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.utils.errors import UserError, concerning
from mlx_retrieval.utils.text import shell

ADAPTERS, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What a model gives: a vector a text, a vector a token, or a score a query and document.
Kind = Literal["embed", "late", "rerank"]
EMBEDDING: tuple[Kind, ...] = ("embed", "late")
RERANKING: tuple[Kind, ...] = ("rerank", "late")
DESCRIPTIONS: dict[Kind, str] = {
    "embed": "is an embedding model, which gives one vector a text",
    "late": "is a late-interaction model, which gives one vector a token",
    "rerank": "is a reranker, which scores a query and a document together",
}
TAKEN_BY: dict[Kind, str] = {
    "embed": "embed.py --model, search.py index --model-path, mine.py negatives --model and serve.py --model "
    "take it; train.py --task rerank makes a reranker of it",
    "late": "embed.py --model, search.py index --model-path, rerank.py --model, serve.py --model, eval.py and mine.py "
    "--reranker take it",
    "rerank": "rerank.py --model and --check, serve.py --model, eval.py --task rerank, train.py --task rerank, "
    "search.py search --rerank and mine.py --reranker or --teacher take it",
}


def is_adapter(folder: Path) -> bool:
    """Return whether this is the folder of a saved adapter, perhaps a damaged one; exported models are not adapters."""
    return any((folder / name).is_file() for name in (ADAPTERS, ADAPTER_CONFIG))


def explain(name: str, kind: Kind) -> str:
    """Return a line that says what a model is and which commands take it."""
    return f"{name} {DESCRIPTIONS[kind]}: {TAKEN_BY[kind]}"


def require(wanted: Collection[Kind], model: str | None, adapter: str | None = None, task: str | None = None) -> Kind:
    """Return the kind of a model; `model` and `adapter`: see `detect_kind`.

    Args:
        task: the kind that the user names, which wins over the model's name, but not over its files.

    Raises UserError if it is none of `wanted`, or not a model for retrieval at all. A language model whose files name
    no kind counts as an embedding model and as a reranker.
    """
    kind, certain = _detect(model, adapter)
    if kind not in wanted and (certain or (kind == "rerank" and task is None)):
        raise UserError(explain(adapter or model, kind))
    return kind


def detect_kind(model: str | None, adapter: str | None = None) -> Kind:
    """Return whether a model embeds, embeds token by token (late interaction) or reranks, by its files or its name.

    Yes/no rerankers are language models whose files say nothing of it; they are recognised by "rerank" in their name.

    Args:
        model: adapter folder, base model's folder or GGUF, or hub name.
        adapter: the adapter on top of it, which decides; None = there is none.

    Raises UserError for a folder that holds something else: see `refuse_others`.
    """
    return _detect(model, adapter)[0]


def _detect(model: str | None, adapter: str | None) -> tuple[Kind, bool]:
    """Return a model's kind, and whether its files say so."""
    name = adapter or model
    path = Path(name).expanduser()
    with concerning("adapter" if adapter else "model"):
        if adapter:
            check_adapter_folder(adapter)
        refuse_others(path, name)
        folder = path if is_adapter(path) else resolve(name)
        return _by_files(folder, name)


def check_adapter_folder(adapter: str) -> None:
    """Raise UserError if there is no such folder."""
    if not Path(adapter).expanduser().is_dir():
        raise UserError(f"{adapter}: no such adapter folder{near_folder(adapter)}")


def _by_files(folder: Path, name: str) -> tuple[Kind, bool]:
    if (folder / retrieval_config.FILE).is_file():
        return RetrievalConfig.read(folder).task, True
    if is_adapter(folder):
        RetrievalConfig.read(folder)  # raises: its file is missing
    if pylate_files.is_late(folder):
        return "late", True
    settings = sentence_transformers_files.optional_json(folder / sentence_transformers_files.SETTINGS)
    if settings.get("model_type") == "CrossEncoder":
        return "rerank", True
    if (folder / sentence_transformers_files.MODULES).is_file():
        return "embed", True
    if any("SequenceClassification" in each for each in read_config(folder).get("architectures") or ()):
        return "rerank", True
    tensors = {tensor for file in weight_files(folder) for tensor in tensor_table(file)}
    if "score.weight" in tensors or any(tensor.startswith("projector.") for tensor in tensors):
        return "rerank", True
    names = (folder.resolve().name, Path(name).name)
    return ("rerank" if any("rerank" in each.lower() for each in names) else "embed"), False


# --- folders that hold something else -------------------------------------------------------------------------------


def refuse_others(folder: Path, name: str) -> None:
    """Raise UserError if a folder holds a chat or PEFT adapter or a run, and say what to do with it."""
    if not folder.is_dir():
        return
    if is_peft(folder):
        raise UserError(
            f"{name} is an adapter of PEFT: merge it into its base model there (merge_and_unload, save_pretrained) and "
            "give that folder"
        )
    if is_chat_adapter(folder):
        raise UserError(
            f"{name} is a chat adapter, not a retrieval model: mlx_lm.generate --adapter-path takes it, with its base "
            "model as --model, export.py --adapter merges it, and train.py --task chat goes on training it"
        )
    if is_adapter(folder) or (folder / "config.json").is_file():
        return
    if saved := [str(Path(name) / part) for part in ("best", "final") if is_adapter(folder / part)]:
        raise UserError(f"{name} is the folder of a run: give the adapter in it, {' or '.join(saved)}")


def is_peft(folder: Path) -> bool:
    """Return whether PEFT has saved an adapter in this folder."""
    if any((folder / name).is_file() for name in PEFT_WEIGHTS):
        return True
    file = folder / ADAPTER_CONFIG
    return file.is_file() and isinstance(config := read_json(file), dict) and "peft_type" in config


def is_chat_adapter(folder: Path) -> bool:
    """Return whether this is the folder of a chat model's adapter, which this toolkit or mlx-lm has trained."""
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / retrieval_config.FILE).is_file():
        return False
    config = read_json(folder / ADAPTER_CONFIG)
    settings = folder / "config.yaml"
    trained_here = settings.is_file() and "\ntask: chat\n" in "\n" + settings.read_text("utf-8", "replace")
    return trained_here or (isinstance(config, dict) and "model" in config)


def require_base(name: str) -> Path:
    """Return the folder of a base model. UserError for an adapter, a run and other folders."""
    path = Path(name).expanduser()
    refuse_others(path, name)
    if is_adapter(path):
        raise UserError(
            f"{name} is an adapter, and a base model is needed here: merge it first ({export_command(name)}) and give "
            "that folder"
        )
    return resolve(name)


def export_command(adapter: str) -> str:
    """Return the command that merges an adapter into its base model."""
    return shell("python", "export.py", "--adapter", adapter, "--output", "DIR")
