"""Saved models with random trained parts."""

from pathlib import Path

from random_models import shake

from mlx_retrieval.backbones import lora
from mlx_retrieval.models import loading
from mlx_retrieval.utils import files


def trained(base: Path, target: Path, train_type: str = "lora", **flags):
    """A model with random trained parts, and the folder it is saved in."""
    keywords = {name: flags.pop(name) for name in ("keys", "num_layers") if name in flags}
    model, config, _ = loading.build(str(base), **flags)
    adapter_config = lora.adapt(model.backbone, train_type, rank=4, alpha=6.0, **keywords)
    if config.task == "rerank" or (train_type == "full" and not keywords):
        model.head.unfreeze()  # as in training
    shake(model)
    model.eval()
    files.write_folder(target, lambda folder: loading.save_model(folder, model, adapter_config, config))
    return model, target
