"""The config.json of an exported folder, and what llama.cpp's converter can make of it.

    config = make(base_folder, backbone, "sentence-transformers", dtype=None)
    lines = settle_gguf(config, backbone, retrieval, tokenizer)        # UserError where a GGUF would compute otherwise

Used by export.py; tested by `python -m pytest tests/test_export.py`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from backend import UserError

from models import ENCODERS, Backbone, decoder
from models.source import read_config, tensor_table, weight_files

if TYPE_CHECKING:
    from retrieval_config import RetrievalConfig
    from tokens import TextTokenizer

T5 = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
# The class names by which llama.cpp's converter knows encoders; for decoders it goes by *ForCausalLM.
GGUF = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "camembert": "CamembertModel",
    "modernbert": "ModernBertModel",
    "t5": "T5EncoderModel",
    "mt5": "T5EncoderModel",
}


def dropped(kind: str, form: str) -> tuple[str, ...]:
    """Beginnings of the names of tensors that a model of this type has no use for in this form."""
    if form != "sentence-transformers":
        return ()
    return ("lm_head.", "decoder.") if kind in T5 else ("lm_head.",)


def make(base: Path, backbone: Backbone, form: str, dtype: str | None = None) -> dict:
    """config.json for the weights of `backbone`, which came from the folder `base`, in one of export.FORMATS.

    dtype: name of the dtype that all weights were cast to; None: they have kept theirs.
    Raises UserError where transformers has no setting for how the backbone attends.
    """
    config = read_config(base)
    kind, names = config["model_type"], {name for file in weight_files(base) for name in tensor_table(file)}
    for key in ("quantization", "quantization_config", "_name_or_path"):
        config.pop(key, None)
    if form == "mlx" and kind not in ENCODERS:
        config |= decoder.normalised(config)
    inner = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    if kind not in ENCODERS:
        changes = _attention(config, backbone.bidirectional)
        if changes and inner is not config and form != "mlx":
            raise UserError(f"{kind}: transformers has no setting for --bidirectional in it; use --format mlx")
        inner |= changes
        if form == "sentence-transformers" and inner is not config:
            raise UserError(f"{kind}: sentence-transformers would load its image part as well; use --format hf or mlx")
        if form == "sentence-transformers" or not any("lm_head" in name for name in names):
            inner["tie_word_embeddings"] = True  # there is no head, and mlx-lm is not to look for one
    elif kind in T5 and (form == "sentence-transformers" or not any(name.startswith("decoder.") for name in names)):
        config["architectures"] = [T5[kind]]
    for settings in (config, inner) if dtype else ():
        settings |= {key: dtype for key in ("dtype", "torch_dtype") if key in settings}
    return config


def _attention(config: dict, bidirectional: bool) -> dict:
    """What makes transformers, and `models.decoder` again, see right and left as this model was told to, not by nature.

    Both have a number for windows that is not what a window of W tokens to either side is called in mlx-lm.
    """
    natural = decoder.naturally_bidirectional(config)
    inner = config.get("text_config") or config
    if natural == bidirectional:
        return {}
    if not bidirectional:
        return {key: other for key, other in _CAUSAL.items() if key in inner}
    window = inner.get("sliding_window")
    if inner["model_type"].startswith("gemma3"):
        return {"use_bidirectional_attention": True} | ({"sliding_window": 2 * (window - 1)} if window else {})
    return {"is_causal": False} | ({"sliding_window": window - 1} if window else {})


_CAUSAL = {"is_causal": True, "use_bidirectional_attention": False}


def write(folder: Path, config: dict) -> None:
    """Write `config.json` into `folder`."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --- GGUF -----------------------------------------------------------------------------------------------------------


def settle_gguf(config: dict, folder: Path, retrieval: "RetrievalConfig", tokenizer: "TextTokenizer") -> list[str]:
    """Put a class name into `config` that llama.cpp's converter knows; returns what its user has to do besides.

    `folder` holds the tokenizer files. Raises UserError where the GGUF would compute other vectors.
    """
    kind = config["model_type"]
    bidirectional = retrieval.bidirectional and kind not in ENCODERS
    wrong = _inexpressible(config, retrieval, tokenizer)
    if kind in T5 and not (folder / "spiece.model").is_file():
        wrong.append("the converter reads spiece.model, which this tokenizer does not have")
    if wrong:
        raise UserError("--gguf-ready: a GGUF would give other vectors: " + "; ".join(wrong))
    name = GGUF.get(kind) or (config.get("architectures") or [""])[0]
    if kind == "gemma3_text":
        name = "Gemma3TextModel" if bidirectional else "Gemma3ForCausalLM"
    elif kind not in GGUF and not name.endswith("ForCausalLM"):
        name = name.removesuffix("Model") + "ForCausalLM"
    config["architectures"] = [name]
    lines = []
    if retrieval.dense:
        lines.append("convert with --sentence-transformers-dense-modules, which adds the dense layers")
    if kind not in GGUF:
        lines.append(f"run llama.cpp with --pooling {retrieval.pooling}: not every converted decoder says so itself")
    if bidirectional and name != "Gemma3TextModel":
        lines.append("run it with --attention non-causal, and -ub no smaller than the longest text")
    if any(retrieval.prompts.values()):
        lines.append("prompts are not in a GGUF: put them before the texts")
    return lines


def _inexpressible(config: dict, retrieval: "RetrievalConfig", tokenizer: "TextTokenizer") -> list[str]:
    """Why llama.cpp would compute something else."""
    kind, mean = config["model_type"], retrieval.pooling == "mean"
    found = []
    if kind == "umt5" or "text_config" in config:
        found.append(f"{kind} is not converted as a text encoder")
    if retrieval.pooling == "max":
        found.append("it has no pooling by maximum")
    if mean and not retrieval.pool_special and (tokenizer.opening or tokenizer.closing):
        found.append("its mean counts the tokens that the tokenizer puts around a text (train with --pooling last)")
    if mean and not retrieval.pool_prompt and any(retrieval.prompts.values()):
        found.append("its mean counts the prompt")
    if retrieval.lowercase:
        found.append("it does not lower-case texts")
    plain = all(layer["activation"] == "Identity" and not layer["bias"] for layer in retrieval.dense)
    two = [layer["path"] for layer in retrieval.dense] in ([], ["2_Dense", "3_Dense"])
    if not (plain and two) or (retrieval.dense and kind != "gemma3_text"):
        found.append("of dense layers it has only EmbeddingGemma's two, without bias or activation")
    return found + (_gemma_differs(config) if kind == "gemma3_text" else [])


def _gemma_differs(config: dict) -> list[str]:
    """Settings that llama.cpp has as constants of the architecture."""
    found = []
    settings = config | decoder.normalised(config)
    if settings["sliding_window_pattern"] != 6:
        found.append("its Gemma 3 has full attention in every sixth layer")
    if settings.get("rope_local_base_freq", 10_000) != 10_000:
        found.append("its Gemma 3 has a base of 10,000 for positions within the window")
    if config.get("query_pre_attn_scalar", 256) != config.get("head_dim", 256):
        found.append("its Gemma 3 scales attention by head_dim")
    return found
