"""Write sentence-transformers' files beside an exported model."""

import json
from pathlib import Path
from typing import Any

from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.sentence_transformers_files import MODULES, POOLING_FLAGS, SENTENCE, SETTINGS
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError

# What the tokenizer's own tokens weigh where pooling leaves them out: nothing, unless a text has no others.
NOTHING = 1e-8
NEVER_SET = ("pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
TORCH_ACTIVATIONS = {"Identity": "linear"}  # the module of torch.nn.modules that has it; "activation" for the others


def write(folder: Path, config: RetrievalConfig, tokenizer: TextTokenizer, width: int, vocabulary: int) -> None:
    """Write `modules.json` and what it names, but for the dense layers (see `write_dense`).

    Args:
        config: what the model is; tokenizer: its tokenizer.
        width: of a token's state; vocabulary: rows of the model's table of tokens.

    Raises UserError where sentence-transformers has no module that pools so.
    """
    parts = [("Transformer", "")]
    if frame := _left_out(config, tokenizer):
        parts.append(("WordWeights", "1_WordWeights"))
        words = [str(token) for token in range(vocabulary)]  # by number: some vocabularies hold a word twice
        weights = {str(token): NOTHING for token in frame}
        write_json(folder / "1_WordWeights", {"vocab": words, "word_weights": weights, "unknown_word_weight": 1.0})
    parts += [("Pooling", "1_Pooling"), *(("Dense", layer["path"]) for layer in config.dense)]
    parts += [("Normalize", f"{len(config.dense) + 2}_Normalize")] if config.normalize else []
    kind = "sentence_transformers.models."
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind + name} for i, (name, path) in enumerate(parts)]
    write_json(folder, modules, MODULES)
    flags = {f"pooling_mode_{key}": mode == config.pooling for key, mode in POOLING_FLAGS.items()}
    flags |= dict.fromkeys(NEVER_SET, False)
    flags["include_prompt"] = config.pool_prompt or config.pooling in ("cls", "last")
    write_json(folder / "1_Pooling", {"word_embedding_dimension": width} | flags)
    limit = max(config.max_length, config.query_max_length)
    write_json(folder, {"max_seq_length": limit, "do_lower_case": config.lowercase}, SENTENCE)
    settings = {"__version__": {"sentence_transformers": "5.0.0"}, "model_type": "SentenceTransformer"}
    settings |= {"prompts": config.prompts, "default_prompt_name": None}
    settings["similarity_fn_name"] = "cosine" if config.normalize else "dot"
    write_json(folder, settings, SETTINGS)


def _left_out(config: RetrievalConfig, tokenizer: TextTokenizer) -> list[int]:
    """The tokens that pooling does not count; UserError where sentence-transformers would leave out others too."""
    frame = sorted({*tokenizer.opening, *tokenizer.closing})
    if config.pool_special or config.pooling in ("cls", "last") or not frame:
        return []
    if config.pooling == "max":
        raise UserError(
            "sentence-transformers cannot leave the tokenizer's own tokens out of a maximum: use --format mlx or hf"
        )
    for name, prompt in config.prompts.items() if config.pool_prompt else ():
        if not set(frame).isdisjoint(tokenizer.tokenizer.encode(prompt, add_special_tokens=False).ids):
            raise UserError(
                f"the prompt {name!r} has tokens that the tokenizer puts around texts, and sentence-transformers could "
                "count only all or none of them: use --format mlx or hf"
            )
    return frame


def write_dense(folder: Path, layer: dict[str, Any]) -> Path:
    """Write what describes a dense layer, as `RetrievalConfig.dense` has it; returns where its weights belong."""
    name = layer["activation"]
    values = {key: layer[key] for key in ("in_features", "out_features", "bias")}
    values["activation_function"] = f"torch.nn.modules.{TORCH_ACTIVATIONS.get(name, 'activation')}.{name}"
    write_json(folder / layer["path"], values)
    return folder / layer["path"]


def write_json(folder: Path, content: Any, file: str = "config.json") -> None:
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
