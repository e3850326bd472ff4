"""What transformers computes with a saved encoder: states, and the gradients of `backbone_checks.pooled_loss`."""

import functools
import json
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import random_models
from backbone_checks import direction
from random_encoders import auto_class


@functools.lru_cache(8)
def torch_model(folder: Path):
    """Return transformers' encoder of a folder, which does not change, in float32."""
    import torch

    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return auto_class(model_type).from_pretrained(folder, dtype=torch.float32).eval()


def torch_states(model, ids: mx.array, lengths: mx.array):
    """Return the states (R, L, D) and a mask (R, L) of real tokens."""
    import torch

    real = torch.tensor(np.arange(ids.shape[1]) < np.array(lengths)[:, None])
    return model(input_ids=torch.tensor(np.array(ids)), attention_mask=real.long()).last_hidden_state, real


def reference(folder: Path, ids: mx.array, lengths: mx.array) -> list[np.ndarray]:
    """Return transformers' states of each row's real tokens."""
    states, _ = torch_states(torch_model(folder), ids, lengths)
    return [states[row, :length].detach().numpy() for row, length in enumerate(lengths.tolist())]


def rewritten(folder: Path, target: Path, rename, **config) -> Path:
    """Return a copy of a folder with each tensor named `rename(name)`; None leaves it out."""
    random_models.changed(folder, target, **config)
    weights = mx.load(str(target / "model.safetensors"))
    weights = {rename(name): value for name, value in weights.items() if rename(name)}
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "pt"})
    return target


def torch_gradients(
    folder: Path, tensors: dict[str, mx.array], scale: float, ids, lengths, parts_of=lambda name: [name]
) -> dict[str, np.ndarray]:
    """Return the gradients of `pooled_loss` with respect to `tensors`: matrices of adapters, or weights.

    `parts_of`: from a tensor's name here to those in transformers' model, several if it is their concatenation.
    """
    import torch

    model = torch_model(folder)
    leaves = {name: torch.tensor(np.array(value), requires_grad=True) for name, value in tensors.items()}
    whole = {name: leaf for name, leaf in leaves.items() if "lora_" not in name}
    for name in {name.rsplit(".", 1)[0] for name in leaves.keys() - whole.keys()}:
        update = scale * (leaves[f"{name}.lora_a"] @ leaves[f"{name}.lora_b"]).T
        base = [model.get_parameter(part).detach() for part in parts_of(f"{name}.weight")]
        whole[f"{name}.weight"] = torch.cat(base) + update
    weights = {}
    for name, value in whole.items():
        weights |= dict(zip(parts_of(name), value.chunk(len(parts_of(name))), strict=True))

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            states, real = torch_states(self.model, ids, lengths)
            means = (states * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
            return (means * torch.tensor(np.array(direction(means.shape)))).sum()

    torch.func.functional_call(Loss(), {f"model.{name}": value for name, value in weights.items()}, ()).backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}
