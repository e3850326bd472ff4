"""A chat model's adapter: `adapters.safetensors` and `adapter_config.json` as mlx-lm reads them, and its base model.

    adapter_config = adapt(backbone, settings, start)    # makes the weights trainable
    save(folder, backbone, adapter_config)
    attach(backbone, folder)                             # later, on the same base model: see check_base

Adapters that mlx-lm itself has trained have the same form.
"""

import json
from pathlib import Path

from mlx.utils import tree_flatten

from mlx_retrieval.backbones import finding, hub, lora
from mlx_retrieval.backbones.decoder import Decoder
from mlx_retrieval.backbones.gradient_checkpointing import seed
from mlx_retrieval.models import loading
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.starting_model import StartingModel
from mlx_retrieval.utils.errors import UserError, concerning

FINGERPRINT, DTYPE = "base_fingerprint", "dtype"  # keys of adapter_config.json, which mlx-lm ignores


def adapt(backbone: Decoder, settings: Settings, start: StartingModel) -> dict:
    """Make the weights to train trainable. Return the content of `adapter_config.json`.

    UserError if the run starts from an adapter that does not fit.
    """
    origin = {"model": finding.toolkit_relative(start.base), FINGERPRINT: lora.fingerprint(backbone)}
    origin[DTYPE] = settings.dtype
    if start.adapter:
        with concerning("model"):
            check_base(backbone, start.adapter, start.base)
            attach(backbone, start.adapter, start.config)
    seed(settings.seed)  # fresh LoRA weights
    config = start.adapt(backbone, settings)
    if settings.train_type == "full" and settings.num_layers == -1:
        backbone.adapted.unfreeze()  # the vocabulary's head too
    return origin | config


def dtype_of(folder: Path) -> str:
    """Return the dtype that the adapter in `folder` asks for, as --dtype names it; "auto" if it asks for none."""
    return hub.read_json(folder / loading.ADAPTER_CONFIG).get(DTYPE) or "auto"


def save(folder: Path, backbone: Decoder, config: dict) -> None:
    """Write the trained weights and `adapter_config.json`."""
    hub.save_tensors(folder / loading.ADAPTERS, dict(tree_flatten(backbone.adapted.trainable_parameters())))
    (folder / loading.ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_base(backbone: Decoder, folder: Path, base: str) -> None:
    """Raise UserError if the adapter in `folder` was trained on another model than `backbone`, whose name is `base`."""
    config = hub.read_json(folder / loading.ADAPTER_CONFIG)
    if differing := lora.differing(config.get(FINGERPRINT, {}), lora.fingerprint(backbone)):
        others = f"(its {', '.join(differing)} differ)"
        raise UserError(f"{folder} was trained on {config['model']}, and {base} is another model {others}")


def attach(backbone: Decoder, folder: Path, config: dict | None = None) -> None:
    """Put the adapter in `folder` on its base model. UserError if it does not fit.

    `config`: in place of its adapter_config.json.
    """
    config = config or hub.read_json(folder / loading.ADAPTER_CONFIG)
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
