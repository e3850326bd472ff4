"""Read sentence-transformers' description of a model: modules, pooling, dense layers, prompts and lengths.

Folders of versions 2 to 6 are read.
"""

from pathlib import Path
from typing import Any

from mlx_retrieval.backbones.hub import inside, read_json
from mlx_retrieval.models.heads import ACTIVATIONS, POOLING
from mlx_retrieval.utils.errors import UserError

MODULES, SENTENCE, SETTINGS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
MODULE_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
LENGTHENED = "mean_sqrt_len_tokens"
SIMILARITIES = ("cosine", "dot", "dot_score")
POOLING_FLAGS = {  # without the prefix "pooling_mode_"
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean",  # differs only in the vector's length, so it is the same at unit length
    "cls_token": "cls",
    "max_tokens": "max",
    "lasttoken": "last",
}


def modules_of(folder: Path) -> list[tuple[str, str]]:
    """Return (kind, path) of every module in `modules.json`; UserError for a path that leads out of the folder."""
    try:
        entries = [(entry["type"].rsplit(".", 1)[-1], entry["path"]) for entry in read_json(folder / MODULES)]
        return [(kind, inside(folder, path, MODULES).relative_to(folder).as_posix()) for kind, path in entries]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / MODULES}: not a list of modules with type and path ({error!r})") from error


def read(folder: Path) -> dict[str, Any]:
    """Return fields of RetrievalConfig from `modules.json` and the files it names; UserError for an unknown module."""
    modules = modules_of(folder)
    kinds = [kind for kind, _ in modules if kind != "Dropout"]  # which does nothing in inference
    if unknown := set(kinds) - set(MODULE_ORDER):
        raise UserError(f"{folder}: {MODULES} names {', '.join(sorted(unknown))}; known: {', '.join(MODULE_ORDER)}")
    in_order = sorted(kinds, key=MODULE_ORDER.index)
    if kinds != in_order or kinds.count("Transformer") != 1 or kinds.count("Pooling") > 1:
        raise UserError(
            f"{folder}: {MODULES} has the modules {', '.join(kinds)}; known, in this order: {', '.join(MODULE_ORDER)}"
        )
    paths = {kind: Path(path).name for kind, path in modules}
    similarity = optional_json(folder / SETTINGS).get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        names = ", ".join(SIMILARITIES)
        raise UserError(f"{folder / SETTINGS}: similarity {similarity} is not supported; known: {names}")
    # A cosine ignores lengths, so unit vectors and dot products give it.
    normalize = "Normalize" in kinds or similarity == "cosine"
    pooling, pool_prompt = _pooling(
        optional_json(folder / paths.get("Pooling", "1_Pooling") / "config.json"), normalize
    )
    sentence = optional_json(folder / SENTENCE)
    fields = {
        "pooling": pooling,
        "pool_prompt": pool_prompt,
        "normalize": normalize,
        "lowercase": bool(sentence.get("do_lower_case", False)),
        "dense": [dense(folder, Path(path).name) for kind, path in modules if kind == "Dense"],
    }
    if limit := longest(folder, sentence):
        fields["max_length"] = fields["query_max_length"] = limit
    settings = optional_json(folder / SETTINGS)
    if limit := truncate_dim(folder / SETTINGS, settings):
        if normalize and similarity != "cosine":
            raise UserError(
                f"{folder / SETTINGS}: truncate_dim with dot products of vectors that were of unit length before is "
                "not supported; remove truncate_dim from the file, or give similarity_fn_name cosine"
            )
        fields["truncate_dim"] = limit
    return fields | prompts(settings)


def truncate_dim(path: Path, settings: dict) -> int:
    """Return the number of leading dimensions that are used, or 0 if the file `path` sets no limit."""
    limit = settings.get("truncate_dim")
    if limit is None:
        return 0
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise UserError(f"{path}: truncate_dim {limit!r} is not a number of dimensions")
    return limit


def longest(folder: Path, sentence: dict) -> int | None:
    """Return the most tokens of a text; None if the folder does not say.

    From version 6 on the limit is the tokenizer's, where an absurdly large number stands for no limit.
    """
    limit = sentence.get("max_seq_length") or optional_json(folder / "tokenizer_config.json").get("model_max_length")
    return int(limit) if limit and limit < 1_000_000 else None


def optional_json(path: Path) -> dict:
    """Return the file's content, or {} if it is missing: a model need not have any of these files."""
    return read_json(path) if path.is_file() else {}


def _pooling(settings: dict, normalize: bool) -> tuple[str, bool]:
    """Return the pooling mode and whether the prompt counts, from a Pooling module's config."""
    flag = "pooling_mode_"
    flagged = [key.removeprefix(flag) for key, value in settings.items() if key.startswith(flag) and value]
    names = settings.get("pooling_mode") or flagged
    names = [names] if isinstance(names, str) else names
    modes = [POOLING_FLAGS.get(name, name) for name in names] or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLING or (names == [LENGTHENED] and not normalize):
        raise UserError(f"pooling by {' and '.join(modes)} is not supported; known: {', '.join(POOLING)}")
    return modes[0], bool(settings.get("include_prompt", True))


def dense(folder: Path, path: str, of_tokens: bool = False) -> dict[str, Any]:
    """Return a Dense module in the form of `RetrievalConfig.dense`; `of_tokens`: a layer on token vectors."""
    file = folder / path / "config.json"
    settings = read_json(file)
    activation = settings.get("activation_function", "torch.nn.modules.activation.Tanh").rsplit(".", 1)[-1]
    if activation not in ACTIVATIONS:
        raise UserError(f"{file}: activation {activation} is not supported; known: {', '.join(ACTIVATIONS)}")
    usual = "token_embeddings" if of_tokens else "sentence_embedding"
    places = {settings.get(f"module_{end}_name") or usual for end in ("input", "output")}
    if places != {usual} or settings.get("use_residual"):
        vector = "every token's" if of_tokens else "the pooled"
        raise UserError(f"{file}: only a layer on {vector} vector, without residual, can be loaded")
    try:
        size = {name: int(settings[name]) for name in ("in_features", "out_features")}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: no in_features or out_features") from error
    return {"path": path, **size, "bias": bool(settings.get("bias", True)), "activation": activation}


def prompts(settings: dict) -> dict[str, Any]:
    """Return the prompts of queries and documents, by the names that sentence-transformers uses, and all others."""
    prompts = dict(settings.get("prompts") or {})
    default = prompts.get(settings.get("default_prompt_name"), "")
    document = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), default)
    others = {name: text for name, text in prompts.items() if name not in ("query", "document")}
    return {"query_prompt": prompts.get("query", default), "document_prompt": document, "task_prompts": others}
