"""Write sentence-transformers' files beside an exported model."""

import json
from pathlib import Path
from typing import Any

from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.sentence_transformers_files import MODULES, POOLING_FLAGS, SENTENCE, SETTINGS
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import writable

# Weight of the tokenizer's own tokens if pooling ignores them: they only count in a text that has no other tokens.
NEGLIGIBLE = 1e-8
ADVICE = ": use --format mlx or hf"  # of errors about what sentence-transformers has no module for
UNUSED_MODES = ("pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
TORCH_ACTIVATIONS = {"Identity": "linear"}  # submodule of torch.nn.modules; "activation" for all others


def write(folder: Path, config: RetrievalConfig, tokenizer: TextTokenizer, width: int, vocabulary: int) -> None:
    """Write `modules.json` and the files it refers to, except the dense layers (see `write_dense`).

    Args:
        width: dimensions of a token's state.
        vocabulary: rows of the model's token embeddings.

    Raises UserError if sentence-transformers has no module for the model's pooling.
    """
    parts = [("Transformer", "")]
    if frame := _ignored_tokens(config, tokenizer):
        parts.append(("WordWeights", "1_WordWeights"))
        words = [str(token) for token in range(vocabulary)]  # by id: some vocabularies hold a word twice
        weights = {str(token): NEGLIGIBLE for token in frame}
        write_json(folder / "1_WordWeights", {"vocab": words, "word_weights": weights, "unknown_word_weight": 1.0})
    parts += [("Pooling", "1_Pooling"), *(("Dense", layer["path"]) for layer in config.dense)]
    parts += [("Normalize", f"{len(config.dense) + 2}_Normalize")] if config.normalize else []
    kind = "sentence_transformers.models."
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind + name} for i, (name, path) in enumerate(parts)]
    write_json(folder, modules, MODULES)
    flags = {f"pooling_mode_{key}": mode == config.pooling for key, mode in POOLING_FLAGS.items()}
    flags |= dict.fromkeys(UNUSED_MODES, False)
    flags["include_prompt"] = config.pool_prompt or config.pooling in ("cls", "last")
    write_json(folder / "1_Pooling", {"word_embedding_dimension": width} | flags)
    limit = max(config.max_length, config.query_max_length)
    write_json(folder, {"max_seq_length": limit, "do_lower_case": config.lowercase}, SENTENCE)
    settings = {"__version__": {"sentence_transformers": "5.0.0"}, "model_type": "SentenceTransformer"}
    settings |= {"prompts": config.prompts, "default_prompt_name": None}
    settings["similarity_fn_name"] = "cosine" if config.normalize else "dot"
    settings |= {"truncate_dim": config.truncate_dim} if config.truncate_dim else {}
    write_json(folder, settings, SETTINGS)


def _ignored_tokens(config: RetrievalConfig, tokenizer: TextTokenizer) -> list[int]:
    """Return the tokens that pooling ignores. UserError if sentence-transformers would ignore others as well."""
    frame = sorted({*tokenizer.opening, *tokenizer.closing})
    if config.pool_special or config.pooling in ("cls", "last") or not frame:
        return []
    if config.pooling == "max":
        raise UserError(f"sentence-transformers cannot ignore the tokenizer's own tokens in max pooling{ADVICE}")
    for name, prompt in config.prompts.items() if config.pool_prompt else ():
        if not set(frame).isdisjoint(tokenizer.tokenizer.encode(prompt, add_special_tokens=False).ids):
            raise UserError(
                f"the prompt {name!r} has tokens that the tokenizer puts around texts, and sentence-transformers could "
                f"count only all or none of them{ADVICE}"
            )
    return frame


def write_dense(folder: Path, layer: dict[str, Any]) -> Path:
    """Write the config of a dense layer, an entry of `RetrievalConfig.dense`; return the folder for its weights."""
    name = layer["activation"]
    values = {key: layer[key] for key in ("in_features", "out_features", "bias")}
    values["activation_function"] = f"torch.nn.modules.{TORCH_ACTIVATIONS.get(name, 'activation')}.{name}"
    write_json(folder / layer["path"], values)
    return folder / layer["path"]


def write_json(folder: Path, content: Any, file: str = "config.json") -> None:
    """Write a JSON file into `folder`, which is made if it is missing."""
    folder.mkdir(exist_ok=True)
    text = writable(json.dumps(content, indent=2, ensure_ascii=False)) + "\n"
    (folder / file).write_text(text, encoding="utf-8")
