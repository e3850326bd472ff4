"""A chat model's adapter: `adapters.safetensors` and `adapter_config.json` as mlx-lm reads them, and its base model.

    adapter_config = adapt(backbone, settings)           # makes the weights trainable
    save(folder, backbone, adapter_config)
    attach(backbone, folder)                             # later, on the same base model: see base_of and check_base

Adapters that mlx-lm itself has trained have the same form.
"""

import json
from pathlib import Path

from mlx.utils import tree_flatten

from mlx_retrieval.backbones import hub, lora
from mlx_retrieval.backbones.decoder import Decoder
from mlx_retrieval.backbones.gradient_checkpointing import seed
from mlx_retrieval.models import loading
from mlx_retrieval.training import checkpoint
from mlx_retrieval.training.config import Settings
from mlx_retrieval.utils.errors import UserError

FINGERPRINT = "base_fingerprint"  # key of adapter_config.json, which mlx-lm ignores


def adapt(backbone: Decoder, settings: Settings) -> dict:
    """Make the weights to train trainable. Return the content of `adapter_config.json`."""
    origin = {"model": hub.toolkit_relative(settings.model), FINGERPRINT: lora.fingerprint(backbone)}
    seed(settings.seed)  # fresh LoRA weights
    config = lora.adapt(backbone, **settings.adapter)
    if settings.train_type == "full" and settings.num_layers == -1:
        backbone.adapted.unfreeze()  # the vocabulary's head too
    return origin | config


def save(folder: Path, backbone: Decoder, config: dict) -> None:
    """Write the trained weights and `adapter_config.json`."""
    hub.save_tensors(folder / loading.ADAPTERS, dict(tree_flatten(backbone.adapted.trainable_parameters())))
    (folder / loading.ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def base_of(folder: Path) -> str | None:
    """Return the name of the base model that an adapter was trained on; None if its files do not say."""
    config = hub.read_json(folder / loading.ADAPTER_CONFIG)
    return config.get("model") or checkpoint.run_settings(folder).get("model")


def check_base(backbone: Decoder, folder: Path, base: str) -> None:
    """Raise UserError if the adapter in `folder` was trained on another model than `backbone`, whose name is `base`."""
    config = hub.read_json(folder / loading.ADAPTER_CONFIG)
    if differing := lora.differing(config.get(FINGERPRINT, {}), lora.fingerprint(backbone)):
        others = f"(its {', '.join(differing)} differ)"
        raise UserError(f"{folder} was trained on {config['model']}, and {base} is another model {others}")


def attach(backbone: Decoder, folder: Path) -> None:
    """Put the adapter in `folder` on its base model. UserError if it does not fit."""
    config = hub.read_json(folder / loading.ADAPTER_CONFIG)
    weights = hub.read_safetensors(folder / loading.ADAPTERS)
    model = backbone.adapted
    try:
        if config.get("fine_tune_type", "lora") == "full":
            model.freeze()
            modules = dict(model.named_modules())
            for path, _, name in (tensor.rpartition(".") for tensor in weights):
                if path in modules:
                    modules[path].unfreeze(recurse=False, keys=[name])
        else:
            lora.attach(backbone, {"fine_tune_type": "lora"} | config)
        loading.load_trainable(model, weights, folder)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / loading.ADAPTER_CONFIG}: not an adapter's settings ({error!r})") from error
    model.eval()
