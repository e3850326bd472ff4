"""The values of a GGUF as a config.json in transformers' terms, which mlx-lm, transformers and exports read.

Settings of positions stand where transformers 4 and mlx-lm have them (`rope_theta`, `rope_scaling`); transformers 5
reads them there as well. transformers' own reading of a GGUF leaves some of them out (scaled positions, the width of
Qwen 3's heads, Gemma 3 27B's scale): what llama.cpp computes with is what counts here.
"""

from typing import Any

import numpy as np

from mlx_retrieval.backbones.gguf.reading import Gguf

CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
# Of Llama 3.1 and later; a GGUF holds the factors that follow from these and from `factor`.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE_FACTORS = "rope_freqs.weight"
POOLING = {1: "mean_tokens", 2: "cls_token", 3: "lasttoken"}  # llama.cpp's numbers
# As llama.cpp has them for Gemma 3, where the file says nothing.
GEMMA_PERIOD, GEMMA_LOCAL_BASE, GEMMA_27B_LAYERS = 6, 10_000.0, 62


def config_of(file: Gguf) -> dict[str, Any]:
    """Return the config.json of a GGUF, without what depends on its quantisation. UserError if a value is missing."""
    kind, name = CLASSES[file.architecture]
    hidden, heads = int(file.number("embedding_length")), int(file.number("attention.head_count"))
    head_dim = int(file.number("attention.key_length", file.number("rope.dimension_count", hidden // max(heads, 1))))
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.number(key, head_dim) != head_dim:
            raise file.refusal(f"{key} is {file.number(key)} and a head has {head_dim} numbers, which is not read")
    config = {
        "architectures": [name],
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": int(file.number("block_count")),
        "intermediate_size": int(file.number("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(file.number("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": int(file.number("context_length")),
        "rope_theta": file.number("rope.freq_base", 10_000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if scaling := _scaling(file, head_dim, config["rope_theta"]):
        config["rope_scaling"] = scaling
    if file.architecture == "gemma3":
        config |= _gemma(file, config)
    if file.value(f"{file.architecture}.attention.causal") is False:
        config["is_causal"] = False
    return config | _tokens(file)


def pooling_of(file: Gguf) -> str | None:
    """Return how an embedding model pools, in sentence-transformers' words; None if the file does not say."""
    value = file.value(f"{file.architecture}.pooling_type")
    return POOLING.get(value) if isinstance(value, int) else None


def _gemma(file: Gguf, config: dict) -> dict:
    """Return the settings that only Gemma 3 has, and those that it spells otherwise."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    scale = config["hidden_size"] // heads if layers == GEMMA_27B_LAYERS else config["head_dim"]
    period = int(file.number("attention.sliding_window_pattern", GEMMA_PERIOD)) or layers + 1  # 0 = all have the window
    config.pop("hidden_act")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scale,
        "sliding_window": int(file.number("attention.sliding_window")),
        "sliding_window_pattern": period,
        "layer_types": ["full_attention" if i % period == 0 else "sliding_attention" for i in range(1, layers + 1)],
        "rope_local_base_freq": file.number("rope.freq_base_swa", GEMMA_LOCAL_BASE),
    }


def _tokens(file: Gguf) -> dict:
    """Return the ids of special tokens. Answers end at the token that ends a turn, too."""
    ids = {role: file.value(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "eot", "padding")}
    ends = list(dict.fromkeys(ids[role] for role in ("eos", "eot") if ids[role] is not None))
    tokens = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
    }
    return {name: token for name, token in tokens.items() if token is not None}


def _scaling(file: Gguf, head_dim: int, theta: float) -> dict | None:
    """Return how positions are scaled, as `rope_scaling`; None if they are not."""
    kind = file.value(f"{file.architecture}.rope.scaling.type") or "none"
    if ROPE_FACTORS in file.tensors:
        return _llama3(file, head_dim, theta)
    if kind == "none":
        return None
    factor = file.number("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = int(file.number("rope.scaling.original_context_length"))
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise file.refusal(f"positions scaled as {kind!r}; this toolkit reads linear, yarn and Llama 3's from a GGUF")


def _llama3(file: Gguf, head_dim: int, theta: float) -> dict:
    """Return Llama 3's scaling, whose factors a GGUF holds as a tensor (D / 2,). UserError if they follow from no rule.

    Each frequency is divided by its factor: 1 for high ones, the rule's largest for low ones, and between in between.
    """
    factors = np.array(file.tensors[ROPE_FACTORS].data, np.float64)
    rule = {"rope_type": "llama3", "factor": float(np.round(factors.max(), 4)), **LLAMA3}
    turns = rule["original_max_position_embeddings"] * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / rule["factor"] + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise file.refusal(f"{ROPE_FACTORS} holds factors of positions that are not those of Llama 3.1 or later")
    return rule
