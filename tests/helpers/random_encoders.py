"""Small random encoders of ModernBERT's and T5's families, saved by transformers."""

from pathlib import Path

from random_models import VOCABULARY

LAYERS = 4
_MODERN = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
_MODERN |= {"local_attention": 16, "max_position_embeddings": 256, "vocab_size": VOCABULARY}
_MODERN |= {f"{role}_token_id": i for i, role in enumerate(("pad", "eos", "bos", "cls", "sep"))}
_T5 = {"d_model": 64, "d_kv": 12, "d_ff": 96, "num_heads": 4, "num_layers": LAYERS, "vocab_size": VOCABULARY}
SETTINGS = {
    "modernbert": _MODERN,
    "modernbert-biased": _MODERN | {"attention_bias": True, "mlp_bias": True, "norm_bias": True},
    "t5": _T5,
    "t5-v1.1": _T5 | {"feed_forward_proj": "gated-gelu"},
    "mt5": _T5,
    "umt5": _T5,
}


def save(kind: str, folder: Path, whole: str = "", **changes) -> Path:
    """Have transformers write a random encoder, or the model class `whole` around it."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind.split("-")[0]](**SETTINGS[kind] | changes)
    model = getattr(transformers, whole)(config) if whole else auto_class(config.model_type).from_config(config)
    for name, parameter in model.named_parameters():
        fresh = torch.randn_like(parameter)
        if "norm" in name.lower():
            parameter.data += fresh * 0.2
        else:  # T5 does not scale scores; with small queries they leave room for the bias to show
            parameter.data = fresh * (0.5 if "relative" in name else 0.05 if name.endswith(".q.weight") else 0.15)
    model.save_pretrained(folder)
    return folder


def auto_class(model_type: str):
    """Return the auto class that loads an encoder alone; AutoModel would load T5 with its decoder."""
    import transformers

    return transformers.AutoModelForTextEncoding if "t5" in model_type else transformers.AutoModel
