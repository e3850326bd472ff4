"""The tensors of a GGUF as weights under transformers' names, in the forms that mlx computes with.

On GPUs, quantised ones stay quantised, in the same number of bits: a 4-bit model fits into the memory for which it was
chosen, and LoRA trains on it. On CPUs they become float32: with quantised weights mlx is about twenty times slower
there. llama.cpp's Q4_0, Q4_1 and Q8_0 give 32 neighbours one scale, and Q4_1 one least value. That is mlx's affine form
in groups of 32, so no number changes:

    Q4_0   scale * (code - 8)       codes 0 to 15           bias = -8 * scale
    Q4_1   scale * code + least     codes 0 to 15           bias = least
    Q8_0   scale * code             codes -128 to 127       code + 128 is kept, bias = -128 * scale

Vocabularies in Q6_K, which mlx has no form for, are dequantised to float16 beside quantised weights.
"""

from collections.abc import Iterator
from typing import Any

from mlx_retrieval.backend import mx

import numpy as np

from mlx_retrieval.backbones.gguf.reading import EMBEDDINGS, HEAD, Gguf
from mlx_retrieval.backbones.gguf.settings import ROPE_FACTORS
from mlx_retrieval.utils.text import listed

GROUP = 32  # neighbours that share a scale
BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}
SAME = 1e-6  # the largest change of a norm's or bias's numbers by which it may become half as long
SLICE = 8_192  # rows that are dequantised at a time
SHOWN = 3  # tensors that a message names

Layout = dict[str, tuple[str, tuple[int, ...]]]  # GGUF's name -> transformers' name, shape


def layout(architecture: str, config: dict) -> Layout:
    """Return the tensors that a model of this architecture has, but for embeddings and head; see `settings.config_of`.

    llama.cpp's names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#standardized-tensor-names
    """
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, values = (config[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))
    block = {
        "attn_norm.weight": ("input_layernorm.weight", (width,)),
        "attn_q.weight": ("self_attn.q_proj.weight", (queries, width)),
        "attn_k.weight": ("self_attn.k_proj.weight", (values, width)),
        "attn_v.weight": ("self_attn.v_proj.weight", (values, width)),
        "attn_output.weight": ("self_attn.o_proj.weight", (width, queries)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (width,)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (inner, width)),
        "ffn_up.weight": ("mlp.up_proj.weight", (inner, width)),
        "ffn_down.weight": ("mlp.down_proj.weight", (width, inner)),
    }
    if architecture == "qwen2":
        block |= {f"attn_{x}.bias": (f"self_attn.{x}_proj.bias", (values,)) for x in "kv"}
        block |= {"attn_q.bias": ("self_attn.q_proj.bias", (queries,))}
    if architecture in ("qwen3", "gemma3"):
        block |= {f"attn_{x}_norm.weight": (f"self_attn.{x}_norm.weight", (head,)) for x in "qk"}
    if architecture == "gemma3":
        block |= {
            "post_attention_norm.weight": ("post_attention_layernorm.weight", (width,)),
            "ffn_norm.weight": ("pre_feedforward_layernorm.weight", (width,)),
            "post_ffw_norm.weight": ("post_feedforward_layernorm.weight", (width,)),
        }
    blocks = {
        f"blk.{i}.{name}": (f"model.layers.{i}.{own}", shape)
        for i in range(config["num_hidden_layers"])
        for name, (own, shape) in block.items()
    }
    return blocks | {"output_norm.weight": ("model.norm.weight", (width,))}


def weights_of(file: Gguf, config: dict, quantised: bool) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Return the weights of a GGUF, and the settings that follow from them: `dtype`, `vocab_size`, `quantization`.

    Args:
        config: see `settings.config_of`.
        quantised: whether quantised weights stay so.

    Raises UserError that names the tensors that are missing, unknown or of another shape.
    """
    names = _checked(file, layout(file.architecture, config))
    dtype = _dtype(file, quantised)
    weights: dict[str, mx.array] = {}
    bits: dict[str, int] = {}
    for tensor, name in names.items():
        parts = _parts(file.tensors[tensor], quantised)
        if file.architecture == "llama" and tensor.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config[f"num_{'attention' if 'attn_q' in tensor else 'key_value'}_heads"]
            parts = {part: _halves(value, heads) for part, value in parts.items()}
        if file.architecture == "gemma3" and "norm" in name:
            parts["weight"] = parts["weight"] - 1  # llama.cpp multiplies by what is there, Gemma by one more
        stem, part = name.rsplit(".", 1)
        if len(parts) > 1:
            bits[stem] = BITS[file.tensors[tensor].tensor_type.name]
        else:
            parts = {part: parts["weight"]}
        for part, value in parts.items():
            weights[f"{stem}.{part}"] = _stored(value, dtype)
        mx.eval([weights[f"{stem}.{part}"] for part in parts])  # before the next: only one tensor's copies at a time
    settings: dict[str, Any] = {
        "dtype": str(dtype).rpartition(".")[-1],
        "vocab_size": len(weights[names[EMBEDDINGS]]),
    }
    if bits:
        most = max(BITS.values(), key=list(bits.values()).count)
        others = {stem: {"group_size": GROUP, "bits": count} for stem, count in bits.items() if count != most}
        settings["quantization"] = settings["quantization_config"] = {"group_size": GROUP, "bits": most, **others}
    return weights, settings


def _checked(file: Gguf, expected: Layout) -> dict[str, str]:
    """Return transformers' names of the file's tensors. UserError for tensors that do not fit the architecture."""
    shapes = {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in file.tensors.items()}
    shapes.pop(ROPE_FACTORS, None)
    table = (shapes.get(EMBEDDINGS, (0,))[0], expected["output_norm.weight"][1][0])
    expected = expected | {EMBEDDINGS: ("model.embed_tokens.weight", table)}
    if HEAD in shapes:
        expected = expected | {HEAD: ("lm_head.weight", table)}
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} is unknown" for name in shapes if name not in expected]
    problems += [
        f"{name} is {shapes[name]}, not {shape}"
        for name, (_, shape) in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    vectors = [name for name, shape in shapes.items() if len(shape) < 2]
    problems += [f"{name} is quantised" for name in vectors if file.tensors[name].tensor_type.name in BITS]
    if problems:
        raise file.refusal(f"not the tensors of a {file.architecture}: {listed(problems, SHOWN, '; ')}")
    return {name: expected[name][0] for name in shapes}


def _dtype(file: Gguf, quantised: bool) -> mx.Dtype:
    """Return the dtype to compute in on GPUs: that of the file's matrices, float16 where they stay quantised.

    Gemma 3's states are too large for float16, so its numbers of that dtype become float32.
    """
    types = {tensor.tensor_type.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if not quantised and types & {"Q6_K", *BITS}:
        return mx.float32
    if "BF16" in types:
        return mx.bfloat16
    return mx.float32 if types == {"F32"} or file.architecture == "gemma3" else mx.float16


def _stored(value: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return floating-point numbers in `dtype` if that changes none of them noticeably.

    llama.cpp keeps norms and biases in float32, which would make mlx compute everything after them in float32. Those of
    models that were trained in bfloat16, as nearly all are, fit into half of it.
    """
    if value.dtype == dtype or not mx.issubdtype(value.dtype, mx.floating):
        return value
    cast = value.astype(dtype)
    if dtype == mx.float32:
        return cast
    exact = value.ndim == 1 and (mx.abs(cast.astype(mx.float32) - value.astype(mx.float32)) <= SAME).all().item()
    return cast if exact else value


def _halves(value: mx.array, heads: int) -> mx.array:
    """Return rows (heads * d, ...) of queries or keys in transformers' order: one half of each head, then the other.

    llama.cpp turns neighbours by each position, transformers the first of a half with the first of the other.
    """
    pairs = value.reshape(heads, -1, 2, *value.shape[1:])
    return mx.contiguous(mx.swapaxes(pairs, 1, 2).reshape(value.shape))


def _parts(tensor: Any, quantised: bool) -> dict[str, mx.array]:
    """Return a tensor as `weight`, and if it is and stays quantised (R, N) with its `scales` and `biases` (R, N / 32).

    The codes of a quantised one are packed into uint32, the first in the lowest bits.
    """
    kind, data = tensor.tensor_type.name, tensor.data
    if kind == "BF16":
        return {"weight": mx.array(data.view(np.uint16)).view(mx.bfloat16)}
    if kind == "Q6_K" or (kind in BITS and not quantised):
        dtype = np.float16 if quantised else np.float32
        return {"weight": mx.concatenate([_dequantised(rows, tensor.tensor_type, dtype) for rows in _slices(data)])}
    if kind not in BITS:
        return {"weight": mx.array(data)}
    rows, columns = data.shape[0], int(tensor.shape[0])
    blocks = data.reshape(rows, columns // GROUP, -1)
    scales = blocks[..., :2].copy().view(np.float16)[..., 0]
    if kind == "Q8_0":
        codes, biases = blocks[..., 2:] ^ 0x80, scales * np.float16(-128)
    else:
        start = 4 if kind == "Q4_1" else 2
        # A byte holds a code of the first half of the block and, in its high bits, one of the second.
        codes = np.concatenate([blocks[..., start:] & 15, blocks[..., start:] >> 4], axis=-1)
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
        biases = blocks[..., 2:4].copy().view(np.float16)[..., 0] if kind == "Q4_1" else scales * np.float16(-8)
    packed = np.ascontiguousarray(codes).reshape(rows, -1).view(np.uint32)
    return {"weight": mx.array(packed), "scales": mx.array(scales), "biases": mx.array(biases)}


def _slices(data: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a table's rows, SLICE at a time."""
    return (data[i : i + SLICE] for i in range(0, len(data), SLICE))


def _dequantised(rows: np.ndarray, kind: Any, dtype: type) -> mx.array:
    """Return rows of blocks as numbers, by llama.cpp's own package."""
    from gguf import dequantize

    return mx.array(dequantize(rows, kind).astype(dtype))
