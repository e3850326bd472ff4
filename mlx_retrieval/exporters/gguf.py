"""Prepare a folder for llama.cpp's converter, and refuse models that GGUF cannot express."""

import json
from pathlib import Path

from mlx_retrieval.backbones import ENCODERS, decoder
from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.exporters import tokenizer as exporters_tokenizer
from mlx_retrieval.exporters.config_json import T5
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError

# The class names by which llama.cpp's converter recognises encoders; it recognises decoders by *ForCausalLM.
GGUF = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "camembert": "CamembertModel",
    "distilbert": "DistilBertModel",
    "modernbert": "ModernBertModel",
    "eurobert": "EuroBertModel",
    "t5": "T5EncoderModel",
    "mt5": "T5EncoderModel",
}
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def adapt_config(config: dict, folder: Path, retrieval: RetrievalConfig, tokenizer: TextTokenizer) -> list[str]:
    """Put a class name into `config` that llama.cpp's converter knows; return instructions for the user, a line each.

    `folder` holds the tokenizer files. Raises UserError if a GGUF would compute other vectors.
    """
    kind = config["model_type"]
    bidirectional = retrieval.bidirectional and kind not in ENCODERS
    problems = _problems(config, retrieval, tokenizer)
    if kind in T5 and not (folder / "spiece.model").is_file():
        problems.append("the converter reads spiece.model, and this tokenizer has no such file")
    if problems:
        raise UserError("--gguf-ready: a GGUF would give other vectors: " + "; ".join(problems))
    name = GGUF.get(kind) or (config.get("architectures") or [""])[0]
    if kind == "gemma3_text":
        name = "Gemma3TextModel" if bidirectional else "Gemma3ForCausalLM"
    elif kind not in GGUF and not name.endswith("ForCausalLM"):
        name = name.removesuffix("Model") + "ForCausalLM"
    config["architectures"] = [name]
    if kind == "modernbert":
        config.setdefault("layer_norm_eps", config.get("norm_eps", 1e-5))  # the name that the converter reads
    if kind == "eurobert":
        config["classifier_pooling"] = "mean"  # of a head; the converter does not know EuroBERT's own, and stops
    lines = []
    if retrieval.truncate_dim:
        cut = f"keep the first {retrieval.truncate_dim} of its {retrieval.dimensions} dimensions"
        lines.append(f"a GGUF holds no truncate_dim: {cut}, and scale them to unit length again")
    if retrieval.dense:
        lines.append("convert with --sentence-transformers-dense-modules, which adds the dense layers")
    if kind not in GGUF:
        lines.append(f"run llama.cpp with --pooling {retrieval.pooling}: not every converted decoder stores it")
    if bidirectional and name != "Gemma3TextModel":
        lines.append("run it with --attention non-causal, and with -ub at least as large as the longest text")
    if any(retrieval.prompts.values()):
        lines.append("a GGUF holds no prompts: put them before the texts")
    return lines


def adapt_tokenizer(folder: Path, tokenizer: TextTokenizer) -> list[str]:
    """Let settings ask for a closing token that tokenizer.json adds, if the converter would not know that tokenizer.

    It knows a tokenizer without sentencepiece's file by the ids of a text of its own, and one that also closes the text
    gives others. Returns instructions for the user, a line each; [] = nothing had to be changed. Raises UserError if a
    GGUF cannot have the closing token.
    """
    if any((folder / name).is_file() for name in SENTENCEPIECE) or not exporters_tokenizer.adds_closing(tokenizer):
        return []
    own = json.loads(tokenizer.tokenizer.to_str())
    settings = read_json(folder / exporters_tokenizer.SETTINGS)
    end = settings.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    closing = [tokenizer.tokenizer.id_to_token(i) for i in tokenizer.closing]
    if closing != [end]:
        raise UserError(f"--gguf-ready: a GGUF closes texts with {end}, and this model with {' '.join(closing)}")
    lines = ["only for it: the files of the tokenizer close no text, or it would not know them"]
    if tokenizer.opening:
        lines.append("run it with --override-kv tokenizer.ggml.add_eos_token=bool:true, which the file will not say")
    else:
        own["post_processor"] = None  # of one that adds nothing, the converter concludes that texts are not closed
    (folder / exporters_tokenizer.FILE).write_text(json.dumps(own, ensure_ascii=False), encoding="utf-8")
    return lines


def _problems(config: dict, retrieval: RetrievalConfig, tokenizer: TextTokenizer) -> list[str]:
    """Return the reasons why llama.cpp would compute other vectors."""
    kind, mean = config["model_type"], retrieval.pooling == "mean"
    problems = []
    if (kind in ENCODERS and kind not in GGUF) or "text_config" in config:
        problems.append(f"{kind} is not converted as a text encoder")
    if retrieval.pooling == "max":
        problems.append("it has no max pooling")
    if mean and not retrieval.pool_special and (tokenizer.opening or tokenizer.closing):
        problems.append("its mean counts the tokens that the tokenizer puts around a text (train with --pooling last)")
    if mean and not retrieval.pool_prompt and any(retrieval.prompts.values()):
        problems.append("its mean counts the prompt")
    width = config.get("head_dim", 0) * config.get("num_attention_heads", 0)
    if kind == "eurobert" and width not in (0, config["hidden_size"]):
        problems.append("its EuroBERT has heads that are as wide together as the model")
    if retrieval.lowercase:
        problems.append("it does not lower-case texts")
    plain = all(layer["activation"] == "Identity" and not layer["bias"] for layer in retrieval.dense)
    expected_paths = [layer["path"] for layer in retrieval.dense] in ([], ["2_Dense", "3_Dense"])
    if not (plain and expected_paths) or (retrieval.dense and kind != "gemma3_text"):
        problems.append("of dense layers it supports only EmbeddingGemma's two, without bias or activation")
    return problems + (_gemma_problems(config) if kind == "gemma3_text" else [])


def _gemma_problems(config: dict) -> list[str]:
    """Return the settings that differ from the constants that llama.cpp has for the architecture."""
    problems = []
    settings = config | decoder.normalised(config)
    if settings["sliding_window_pattern"] != 6:
        problems.append("its Gemma 3 has full attention in every sixth layer")
    if settings.get("rope_local_base_freq", 10_000) != 10_000:
        problems.append("its Gemma 3 has a base of 10,000 for positions within the window")
    if config.get("query_pre_attn_scalar", 256) != config.get("head_dim", 256):
        problems.append("its Gemma 3 scales attention by head_dim")
    return problems
