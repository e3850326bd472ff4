"""Small GGUFs as llama.cpp's converter writes them, with its own package: names of tensors, order of heads, vocabulary.

path = gguf_files.write(tmp_path / "m.gguf", "qwen3", "Q4_0")
path = gguf_files.write(tmp_path / "m.gguf", "llama", "F16", drop=("llama.block_count",), values={"x.y": 3})
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
BYTES = ("qwen2", "qwen3", "llama")  # whose vocabulary here is one of bytes; Gemma's is one of pieces
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = (
    "the kidney stone is a hard piece of material",
    "ünï 2026  12,5 %\n\tx = y[0]",
    "<|im_start|>user\nhi<|im_end|>",
)
# Shapes for which transformers' reading of a GGUF is right: it takes Qwen 3's and Gemma 3's heads to be these.
_SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = {
    "llama": _SHAPE | {"head_dim": 16, "num_hidden_layers": 2, "rope_theta": 5e5},
    "qwen2": _SHAPE | {"num_hidden_layers": 2, "rope_theta": 1e6},
    "qwen3": _SHAPE | {"head_dim": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "rope_theta": 1e6},
    "gemma3": _SHAPE
    | {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 6}
    | {"query_pre_attn_scalar": 256, "sliding_window": 8, "rope_theta": 1e6},
}
CONTEXT = 128


@cache
def vocabulary(pieces: bool) -> dict[str, list]:
    """Return tokens, types and either merges, or scores of pieces, as a GGUF holds them."""
    if pieces:
        words = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", *(f"<0x{byte:02X}>" for byte in range(256))]
        types = [3, 3, 3, 2, 3, *[6] * 256]
        letters = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789=[],.%\n\t"]
        longer = ["th", "the", "▁the", "▁a", "in", "st", "on", "ston", "stone", "▁stone", "er", "al"]
        tokens = [*words, *longer, *letters]
        scores = [0.0] * len(words) + [-float(i) for i in range(len(longer) + len(letters))]
        return {"tokens": tokens, "types": types + [1] * (len(tokens) - len(types)), "scores": scores}
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXTS[0]] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), *SPECIAL]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"tokens": tokens, "types": [1] * (len(tokens) - 3) + [3] * 3, "merges": merges}


@cache
def model(architecture: str, tied: bool = True, **changes):
    """Return a random model of transformers, whose norms, biases and positions all show in its states."""
    import torch
    import transformers

    kind = "gemma3_text" if architecture == "gemma3" else architecture
    size = len(vocabulary(architecture == "gemma3")["tokens"])
    settings = SHAPES[architecture] | {"vocab_size": size, "tie_word_embeddings": tied} | changes
    settings |= {"max_position_embeddings": CONTEXT, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0}
    torch.manual_seed(0)
    built = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind](**settings))
    for name, parameter in built.named_parameters():
        noise = torch.randn_like(parameter) * 0.2
        # As training in bfloat16 leaves it.
        parameter.data = (parameter.data + noise if "norm" in name else noise).bfloat16().float()
    return built.eval()


def write(
    path: Path,
    architecture: str,
    kind: str = "F16",
    kinds: Callable[[str], str | None] = lambda name: None,
    tokenizer: bool = True,
    drop: tuple[str, ...] = (),
    values: dict | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    own=None,
    name: str | None = None,
    raw: str | None = None,
    weights: bool = True,
) -> Path:
    """Write a random model as a GGUF.

    Args:
        kind: the type of its matrices.
        kinds: GGUF's name of a tensor -> another type for it.
        tokenizer: whether the file has one.
        drop: keys to leave out.
        values: further keys, which replace those that there would be.
        tensors: further tensors; None leaves one out.
        own: a model of transformers, in place of the one that `model` returns.
        name: of the architecture that the file says it has.
        raw: a type in which a further tensor is written, as zeros.
        weights: whether the file has any.
    """
    own = own or model(architecture)
    writer = gguf.GGUFWriter(path, name or architecture)
    for key, value in (_values(architecture, own.config) | _tokens(architecture, tokenizer) | (values or {})).items():
        if key not in drop:
            _add(writer, key.replace("{arch}", architecture), value)
    for tensor, value in (_tensors(architecture, own) | (tensors or {})).items():
        if value is None or not weights:
            continue
        wanted = Kind[kinds(tensor) or (kind if value.ndim > 1 else "F32")]
        writer.add_tensor(tensor, _quantised(np.ascontiguousarray(value, np.float32), wanted), raw_dtype=wanted)
    if raw:
        _, size = gguf.GGML_QUANT_SIZES[Kind[raw]]
        writer.add_tensor("raw.weight", np.zeros((1, size), np.uint8), raw_dtype=Kind[raw])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _quantised(value: np.ndarray, kind: Kind) -> np.ndarray:
    """Return the bytes of a matrix; in Q6_K, which the package does not write, any numbers of about its size."""
    if kind != Kind.Q6_K:
        return gguf.quantize(value, kind)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (len(value), value.shape[1] // 256, 210), np.uint8)
    scales = np.full((*blocks.shape[:2], 1), value.std() / 1_400, np.float16)  # of codes to 32 by scales to 128
    blocks[..., 208:] = scales.view(np.uint8)
    return blocks.reshape(len(value), -1)


def _values(architecture: str, config) -> dict:
    rope = config.rope_parameters
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "context_length": CONTEXT,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float((rope.get("full_attention") or rope)["rope_theta"]),
    }
    if architecture == "llama":
        values |= {"rope.dimension_count": head}
    if architecture in ("qwen3", "gemma3"):
        values |= {"attention.key_length": head, "attention.value_length": head}
    if architecture == "gemma3":
        values |= {"attention.sliding_window": config.sliding_window}
    return {f"{architecture}.{key}": value for key, value in values.items()}


def _tokens(architecture: str, there: bool) -> dict:
    if not there:
        return {}
    pieces = architecture not in BYTES
    words = vocabulary(pieces)
    eos, pad = (1, 0) if pieces else (len(words["tokens"]) - 1, len(words["tokens"]) - 3)
    values = {
        "model": "llama" if pieces else "gpt2",
        "tokens": words["tokens"],
        "token_type": words["types"],
        "eos_token_id": eos,
        "padding_token_id": pad,
        "add_bos_token": pieces,
    }
    if pieces:
        values |= {"scores": words["scores"], "bos_token_id": 2, "unknown_token_id": 3, "add_space_prefix": False}
    else:
        values |= {"pre": "qwen2" if architecture.startswith("qwen") else "smollm", "merges": words["merges"]}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | {"tokenizer.chat_template": TEMPLATE}


def _add(writer: gguf.GGUFWriter, key: str, value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _tensors(architecture: str, own) -> dict[str, np.ndarray]:
    """Return the model's tensors as llama.cpp's converter changes them."""
    config = own.config
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    result = {}
    for name, value in own.state_dict().items():
        value = value.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and ".q_proj." in name:
            value = _neighbours(value, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            value = _neighbours(value, config.num_key_value_heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            value = value + 1
        result[names.get_name(name, try_suffixes=(".weight", ".bias"))] = value
    return result


def _neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return rows of queries or keys with the two halves of a head interleaved, as llama.cpp turns them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
