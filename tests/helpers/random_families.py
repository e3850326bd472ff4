"""Small random models of the families in models/families.py that have no helper of their own, saved by transformers."""

import json
from pathlib import Path

from random_models import VOCABULARY

LAYERS = 3
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
_SIZES |= {"vocab_size": VOCABULARY, "max_position_embeddings": 256}
_DISTIL = {"dim": 64, "hidden_dim": 96, "n_heads": 4, "n_layers": LAYERS, "vocab_size": VOCABULARY}
_DEBERTA = _SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
SETTINGS = {
    "mpnet": _SIZES | {"pad_token_id": 1},
    "distilbert": _DISTIL | {"max_position_embeddings": 256},
    "deberta-v3": _DEBERTA
    | {"position_biased_input": False, "position_buckets": 16, "max_position_embeddings": 64}
    | {"norm_rel_ebd": "layer_norm", "share_att_key": True},
    "deberta-v2": _DEBERTA
    | {"max_relative_positions": 40, "type_vocab_size": 2, "conv_kernel_size": 3, "conv_act": "gelu"}
    | {"embedding_size": 32},
    "nomic_bert": _SIZES,
    "gte": _SIZES | {"type_vocab_size": 0},
    "eurobert": _SIZES | {"num_key_value_heads": 2, "head_dim": 24, "pad_token_id": 0},
    "qwen2": _SIZES | {"num_key_value_heads": 2, "is_causal": False, "use_sliding_window": False},
}
MODEL_TYPES = {"deberta-v3": "deberta-v2"}


def save(kind: str, folder: Path, whole: str = "", **changes) -> Path:
    """Have transformers write a random model, or the class `whole` around it, under its published names."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[MODEL_TYPES.get(kind, kind)](**SETTINGS[kind] | changes)
    model = getattr(transformers, whole)(config) if whole else transformers.AutoModel.from_config(config)
    for name, parameter in model.named_parameters():
        fresh = torch.randn_like(parameter)
        if "norm" in name.lower():
            parameter.data += fresh * 0.2
        else:
            parameter.data = fresh * (0.5 if "relative" in name else 0.15)
    model.save_pretrained(folder)
    return folder


# The settings of a published nomic-bert, named as GPT-2's are.
_GPT2_NAMES = {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_attention_heads": "n_head"}
_GPT2_NAMES |= {"num_hidden_layers": "n_layer", "max_position_embeddings": "n_positions"}
_GPT2_NAMES |= {"layer_norm_eps": "layer_norm_epsilon"}


def publish_nomic(folder: Path) -> Path:
    """Rewrite the config.json of a nomic-bert as that of a published one, which names code of its own."""
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config = {_GPT2_NAMES.get(name, name): value for name, value in config.items() if name != "hidden_act"}
    config |= {"rotary_emb_base": theta, "activation_function": "swiglu", "prenorm": False, "qkv_proj_bias": False}
    config |= {"rotary_emb_fraction": 1.0, "rotary_scaling_factor": None, "mlp_fc1_bias": False}
    config |= {"auto_map": {"AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"}}
    config.pop("head_dim", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def publish_new(folder: Path, **changes) -> Path:
    """Rewrite the config.json of a GTE as that of a published `new`, with scaled positions."""
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "new", "architectures": ["NewModel"]}
    config.pop("rope_parameters")
    config |= {"rope_theta": 500.0, "rope_scaling": {"type": "ntk", "factor": 2.0}, "layer_norm_type": "layer_norm"}
    config |= {"position_embedding_type": "rope", "pack_qkv": True, "logn_attention_scale": False}
    config |= {"auto_map": {"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"}} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder
