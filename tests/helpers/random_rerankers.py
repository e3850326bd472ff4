"""Small random rerankers of every kind, saved by transformers, and pairs and graded rows for them."""

import json
from pathlib import Path

import torch
import transformers
from random_models import word_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mlx_retrieval.models import pair_tokenizers

QUERY = "what is a kidney stone"
DOCUMENTS = [
    "a kidney stone is a hard piece of material that forms in the kidney",
    "the cat sat on the mat",
    "",
    "which animal did sit there? " * 30,
    "the cat sat on the mat; a stone",
]
ANSWERS = ("a kidney stone is hard material", "the cat sat on the mat", "which animal did sit there")
ASKED = ("what is a kidney stone", "the cat", "animal?")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", pair_tokenizers.PASSAGE_END, pair_tokenizers.QUERY_END)
FAMILIES = ("mpnet", "distilbert", "deberta-v2", "nomic_bert", "gte", "eurobert", "eurobert-mean")
ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert", "modernbert-mean", *FAMILIES)
TYPED = ("bert", "nomic_bert")  # whose token types tell a pair's second text
ROBERTA = ("roberta", "xlm-roberta", "mpnet")  # whose tokenizer frames a pair as RoBERTa's does


def graded_rows() -> list[dict]:
    return [
        {"query": ASKED[i % 3], "positive": ANSWERS[i % 3], "negatives": [ANSWERS[(i + 1) % 3], ANSWERS[(i + 2) % 3]]}
        for i in range(12)
    ]


def make_qwen_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer with Qwen's special tokens, and with "yes" and "no"."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["yes no yes no", pair_tokenizers.PREFIX, *DOCUMENTS, QUERY] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in ("<think>", "</think>")])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


def save(model, folder: Path, tokenizer: Path) -> Path:
    """A transformers model with a tokenizer, as a folder."""
    model.eval().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((tokenizer / file).read_text())
    return folder


def causal(kind: str, folder: Path, tokenizer: Path, **changes):
    """A small causal language model with random weights, and its folder."""
    settings = {
        "vocab_size": 640, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    } | changes  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(float("norm" in name and kind in ("qwen3", "llama", "granite")), 0.15)
    return model.eval(), save(model, folder, tokenizer)


def quantised(folder: Path, target: Path) -> Path:
    """A 4-bit copy of a folder, as mlx-lm writes one."""
    import mlx_lm.utils

    model, config = mlx_lm.utils.load_model(folder)
    model, config = mlx_lm.utils.quantize_model(model, config, 32, 4)
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    mlx_lm.utils.save_model(target, model)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (target / file).write_text((folder / file).read_text())
    return target


def encoder_config(kind: str, labels: int = 1):
    settings = {
        "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 130, "num_labels": labels,
    }  # fmt: skip
    if kind.startswith("modernbert"):
        pooling = kind.partition("-")[2] or "cls"
        extra = {"classifier_pooling": pooling, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        extra |= {"cls_token_id": 2, "sep_token_id": 3, "global_attn_every_n_layers": 2, "local_attention": 16}
        return transformers.ModernBertConfig(**settings, **extra)
    if kind in ROBERTA:
        settings |= {"type_vocab_size": 1, "pad_token_id": 1}
    elif kind == "distilbert":
        settings["hidden_dim"] = settings.pop("intermediate_size")
    elif kind == "deberta-v2":
        settings |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
        settings |= {"share_att_key": True, "position_biased_input": False, "norm_rel_ebd": "layer_norm"}
    elif kind.startswith("eurobert"):
        kind, _, pooling = kind.partition("-")
        settings |= {"pad_token_id": 0, "num_key_value_heads": 2, "classifier_pooling": pooling or "late"}
    return transformers.AutoConfig.for_model(kind, **settings)


def cross_encoder(kind: str, folder: Path, labels: int = 1):
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_config(
        encoder_config(kind, labels), attn_implementation="eager"
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(float("norm" in name.lower() and "weight" in name), 0.3)
    model.eval().save_pretrained(folder)
    word_tokenizer(folder, kind in ROBERTA, types=kind in TYPED)
    return model


def listwise(tmp_path: Path, tokenizer: Path, as_file: bool = False):
    """A Qwen3 with jina-reranker-v3's projector, and the projector's weights."""
    from safetensors.torch import load_file, save_file

    theirs, folder = causal("qwen3", tmp_path / "list", tokenizer)
    torch.manual_seed(3)
    weights = {"projector.0.weight": torch.randn(24, 64) * 0.2, "projector.2.weight": torch.randn(20, 24) * 0.2}
    if as_file:
        renamed = {"linear1.weight": weights["projector.0.weight"], "linear2.weight": weights["projector.2.weight"]}
        save_file(renamed, folder / "projector.safetensors")
    else:
        file = folder / "model.safetensors"
        save_file(load_file(file) | weights, file, metadata={"format": "pt"})
    return theirs, folder, weights
