"""Decide what GGUF can express of a model."""

from pathlib import Path

from mlx_retrieval.backbones import ENCODERS, decoder
from mlx_retrieval.exporters.config_json import T5
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError

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


def settle_gguf(config: dict, folder: Path, retrieval: RetrievalConfig, tokenizer: TextTokenizer) -> list[str]:
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


def _inexpressible(config: dict, retrieval: RetrievalConfig, tokenizer: TextTokenizer) -> list[str]:
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
