"""Small random models for tests: `save` has transformers write one as it writes real ones, the rest vary its copy."""

import json
import shutil
from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx.utils import tree_flatten, tree_unflatten

DECODERS = ("gemma3_text", "qwen3", "llama", "llama3", "mistral")
ENCODERS = ("bert", "roberta", "xlm-roberta")
KINDS = (*DECODERS, *ENCODERS)
WINDOW, LAYERS, VOCABULARY = 8, 4, 512

_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_DECODER = _SHAPE | {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": LAYERS}
_ENCODER = _SHAPE | {"num_hidden_layers": LAYERS, "max_position_embeddings": 64}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SETTINGS = {
    "gemma3_text": _DECODER
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW}
    | {"query_pre_attn_scalar": 16},
    "qwen3": _DECODER | {"rope_theta": 1e6},
    "llama": _DECODER | {"rope_theta": 5e5},
    "llama3": _DECODER | {"rope_theta": 5e5, "rope_scaling": _LLAMA3 | {"original_max_position_embeddings": 16}},
    "mistral": _DECODER | {"rope_theta": 1e4, "sliding_window": 128},
    "bert": _ENCODER,
    "roberta": _ENCODER | {"max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
    "xlm-roberta": _ENCODER | {"max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
}


def config_of(kind: str, **changes):
    """transformers' config of a small model of this kind."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind.replace("llama3", "llama")](**_SETTINGS[kind] | changes)


def save(
    kind: str,
    folder: Path,
    seed: int = 0,
    bare: bool = False,
    equal_norms: bool = False,
    tokenizer: Path | None = None,
    **changes,
) -> Path:
    """Write a random model of `kind` into `folder`: config.json, model.safetensors, perhaps a tokenizer.

    Args:
        bare: decoders as AutoModel saves them, without the language model around.
        equal_norms: norms as a fresh model has them; else they are random too.
        tokenizer: a folder whose files are copied in.
        changes: settings of the config.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    whole = kind in DECODERS and not bare
    auto = transformers.AutoModelForCausalLM if whole else transformers.AutoModel
    model = auto.from_config(config_of(kind, **changes))
    for name, parameter in model.named_parameters():
        fresh = 0.0 if equal_norms else torch.randn_like(parameter) * 0.2
        if "norm" in name.lower():  # large enough that attention, positions and norms all show in the states
            parameter.data += fresh
        else:
            parameter.data = torch.randn_like(parameter) * 0.2
    model.save_pretrained(folder)
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            shutil.copy(file, folder / file.name)
    return folder


def changed(folder: Path, target: Path, **config) -> Path:
    """A copy of a model's folder with other settings in its config.json; None removes one."""
    shutil.copytree(folder, target)
    settings = json.loads((target / "config.json").read_text()) | config
    settings = {name: value for name, value in settings.items() if value is not None}
    (target / "config.json").write_text(json.dumps(settings))
    return target


def recast(folder: Path, target: Path, dtype: mx.Dtype) -> Path:
    """A copy of a model's folder with its weights in another dtype."""
    shutil.copytree(folder, target)
    weights = mx.load(str(folder / "model.safetensors"))
    cast = {name: value.astype(dtype) for name, value in weights.items()}
    mx.save_safetensors(str(target / "model.safetensors"), cast, metadata={"format": "pt"})
    return target


def quantised(folder: Path, target: Path, dtype: mx.Dtype = mx.bfloat16, bits: int = 4) -> Path:
    """A decoder's folder in few bits, as mlx-lm writes it, the rest in `dtype`."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model, config = load_model(folder, model_config=rope_as_mlx_lm_reads_it(folder))
    model.set_dtype(dtype)
    model, config = quantize_model(model, config, group_size=32, bits=bits)
    save_model(target, model)
    save_config(config, target / "config.json")
    return target


def rope_as_mlx_lm_reads_it(folder: Path) -> dict:
    """What `mlx_lm.load(model_config=...)` has to be told of these models, whose configs transformers 5 wrote."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    theta = {"qwen3": {"rope_theta": 1e6}, "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4}}
    theta |= {"qwen2": {"rope_theta": 1e4}}
    return theta[kind] | {"sliding_window_pattern": 2}


def shake(module: nn.Module, seed: int = 0) -> None:
    """Give every trainable parameter a random value near its own, so that no part of an adapter is without effect."""
    keys = mx.random.split(mx.random.key(seed), 1 << 10)
    values = [
        (name, value + 0.2 * mx.random.normal(value.shape, value.dtype, key=key))
        for (name, value), key in zip(tree_flatten(module.trainable_parameters()), keys, strict=False)
    ]
    module.update(tree_unflatten(values))


def texts(lengths: tuple[int, ...] = (29, 5, 17, 1), seed: int = 0) -> tuple[mx.array, mx.array]:
    """Random ids (R, L), right-padded with 1, and lengths (R,); padding's id is in no text."""
    key = mx.random.key(seed)
    ids = mx.random.randint(5, VOCABULARY, (len(lengths), max(lengths)), key=key)
    real = mx.arange(max(lengths)) < mx.array(lengths)[:, None]
    return mx.where(real, ids, 1), mx.array(lengths)


WORDS = "a the what is kidney stone hard piece of material that forms in cat sat on mat which animal did sit there ? ;"


def word_tokenizer(folder: Path, roberta: bool = False, types: bool = False) -> Path:
    """Write a tokenizer of whole words that frames a pair as BERT does, or as RoBERTa; `types`: with token types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ("<s>", "<pad>", "</s>", "<unk>") if roberta else ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>" if roberta else "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    first, last = ("<s>", "</s>") if roberta else ("[CLS]", "[SEP]")
    pair = f"{first} $A {last} {last} $B {last}" if roberta else f"{first} $A {last} $B:1 {last}:1"
    marks = [(word, vocabulary[word]) for word in (first, last)]
    single = f"{first} $A {last}"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=marks)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("bos_token", "pad_token", "eos_token", "unk_token") if roberta else ("pad_token", "unk_token")
    roles = dict(zip(names, special, strict=False)) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    roles |= {"cls_token": first, "sep_token": last}
    roles |= {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]} if types else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles), encoding="utf-8")
    return folder
