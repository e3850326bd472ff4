"""Make the default base model: a Gemma 3 architecture of a few million weights and its tokenizer, from nothing.

The tokenizer is a byte-fallback BPE trained on generated text; the model is a causal language model trained on the same
kind of text for a few minutes. It knows the words of tools/vocabulary.yaml and how sentences go on, but not
retrieval, which train.py teaches it. `check` compares its hidden states in MLX and in transformers.

    python tools/make_default.py
"""

import json
import math
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_retrieval.backend import mx, nn

import numpy as np
from make_data import SEED, Topic, pretraining_texts
from mlx.optimizers import AdamW, clip_grad_norm, cosine_decay, join_schedules, linear_schedule
from mlx.utils import tree_flatten, tree_map_with_path
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "<unused1>", "<start_of_turn>", "<end_of_turn>")
PAD, EOS, BOS, UNK = range(4)
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
VOCABULARY_SIZE = 3072
TEXT_PAIRS = 24_000  # pairs of query and document that are generated for tokenizer and model

TURN = "<start_of_turn>{role}\n{text}<end_of_turn>\n"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 256,  # its square root, by which embeddings are scaled, is exact in bfloat16
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "sliding_window": 32,
    # mlx-lm and transformers 4 read these three ...
    "sliding_window_pattern": 3,
    "rope_theta": 100_000.0,
    "rope_local_base_freq": 10_000.0,
    # ... and transformers 5 these two; both say the same.
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 100_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": [EOS, SPECIAL.index("<end_of_turn>")],
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-fallback BPE with a visible space, like Gemma's: adds `<bos>` and nothing at the end."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Merges never cross a word, a punctuation mark or a digit.
    pieces = Regex(r"▁?[^\W\d_▁]+|\d|▁?[^\w▁]|▁+|_")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[*SPECIAL, *BYTES],
        min_frequency=2,
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    # The bytes are ordinary entries: spelled out in a text they mean nothing special.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def language_texts(topics: list[Topic], count: int = TEXT_PAIRS, seed: int = SEED) -> list[str]:
    """What the language model reads: questions, documents, forum stories and, for one topic in four, a short chat."""
    texts = []
    for number, (query, document, story) in enumerate(pretraining_texts(topics, count, seed)):
        if number % 4 == 0:
            texts.append(TURN.format(role="user", text=query) + TURN.format(role="model", text=document))
        else:
            texts += [query, document] if number % 4 == 1 else [story]
    return texts


def pack(texts: list[str], tokenizer: Tokenizer, length: int, seed: int) -> np.ndarray:
    """Token ids of `<bos>text<eos>`, shuffled and joined, as rows (N, length + 1) int32."""
    order = np.random.default_rng(seed).permutation(len(texts))
    encoded = tokenizer.encode_batch([texts[i] for i in order])
    flat = np.concatenate([np.array([*e.ids, EOS], np.int32) for e in encoded])
    rows = (len(flat) - 1) // length
    return np.stack([flat[i * length : i * length + length + 1] for i in range(rows)])


def new_model(config: dict, seed: int) -> nn.Module:
    """The architecture with random weights, float32."""
    from mlx_lm.models.gemma3_text import Model, ModelArgs

    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(config))
    model.tie_word_embeddings = True
    model.pop("lm_head", None)

    def initial(name: str, value: mx.array) -> mx.array:
        if "norm" in name:  # Gemma multiplies by 1 + weight
            return mx.zeros_like(value)
        if "embed" in name:
            # Small, so that what is learned soon outweighs chance: words used alike come to lie side by side.
            return mx.random.normal(value.shape) * (0.2 / math.sqrt(config["hidden_size"]))
        return mx.random.normal(value.shape) * (0.5 / math.sqrt(value.shape[-1]))

    model.update(tree_map_with_path(initial, model.parameters()))
    mx.eval(model.parameters())
    return model


def train_language_model(
    model: nn.Module,
    rows: np.ndarray,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 4e-3,
    seed: int = SEED,
) -> list[float]:
    """Next-token training, AdamW, linear warm-up then cosine. Returns the loss (nats a token) of every step."""
    warmup = max(1, steps // 20)
    schedule = join_schedules(
        [linear_schedule(0.0, learning_rate, warmup), cosine_decay(learning_rate, steps - warmup, learning_rate / 50)],
        [warmup],
    )
    optimizer = AdamW(learning_rate=schedule, betas=[0.9, 0.98], weight_decay=0.05)
    rng = np.random.default_rng(seed)

    def loss_of(model: nn.Module, ids: mx.array) -> mx.array:
        logits = model(ids[:, :-1])
        return nn.losses.cross_entropy(logits, ids[:, 1:], reduction="mean")

    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(ids: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, loss_of)(model, ids)
        gradients, _ = clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        return loss

    losses, order, started = [], np.empty(0, np.int64), time.perf_counter()
    for number in range(1, steps + 1):
        if len(order) < batch_size:
            order = rng.permutation(len(rows))
        chosen, order = order[:batch_size], order[batch_size:]
        loss = step(mx.array(rows[chosen]))
        mx.eval(state, loss)
        losses.append(loss.item())
        if number % 50 == 0 or number == steps:
            print(
                f"step {number:4} of {steps}  loss {losses[-1]:.3f}  {time.perf_counter() - started:.0f} s", flush=True
            )
    return losses


def save_model(model: nn.Module, config: dict, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` (bfloat16)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: value.astype(mx.bfloat16) for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), dict(sorted(weights.items())), metadata={"format": "mlx"})


def check(folder: Path) -> float:
    """Largest difference between the hidden states of mlx-lm and of transformers, both in float32."""
    import torch
    from mlx_lm.utils import load_model
    from transformers import AutoModel

    ours, config = load_model(folder)
    ours.set_dtype(mx.float32)
    theirs = AutoModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    # Longer than the sliding window, so that both kinds of layers are compared.
    ids = np.random.default_rng(0).integers(len(SPECIAL), config["vocab_size"], (2, 3 * config["sliding_window"]))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).last_hidden_state.numpy()
    return float(np.abs(np.array(ours.model(mx.array(ids))) - expected).max())


def make_tokenizer(topics: list[Topic], folder: Path, seed: int = SEED) -> tuple[Tokenizer, list[str]]:
    """Train and save the tokenizer; returns it and the texts it was trained on."""
    texts = language_texts(topics, TEXT_PAIRS, seed)
    words = [text.replace("<start_of_turn>", "").replace("<end_of_turn>", "") for text in texts]
    tokenizer = train_tokenizer(words)
    save_tokenizer(tokenizer, folder)
    return tokenizer, texts


def make_model(topics: list[Topic], folder: Path, steps: int, seed: int = SEED) -> list[float]:
    """Make tokenizer and model in `folder`. Returns the training losses."""
    tokenizer, texts = make_tokenizer(topics, folder, seed)
    config = {**CONFIG, "vocab_size": tokenizer.get_vocab_size()}
    model = new_model(config, seed)
    count = sum(value.size for _, value in tree_flatten(model.parameters()))
    print(f"{count / 1e6:.2f} million weights, {config['vocab_size']} tokens, {len(texts)} texts")
    losses = train_language_model(model, pack(texts, tokenizer, 128, seed), steps, seed=seed)
    save_model(model, config, folder)
    return losses
