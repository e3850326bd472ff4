"""Choose the weights to train: LoRA or DoRA layers, which are mlx-lm's, or the layers themselves.

`adapt` prepares a frozen backbone and returns the contents of mlx-lm's `adapter_config.json`. From these, `attach`
prepares a backbone in the same way before saved weights are loaded.
"""

import base64
import math
import re
from collections.abc import Sequence

from mlx_retrieval.backend import mx, nn

import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_retrieval.backbones import dequantized
from mlx_retrieval.backbones.base import Backbone
from mlx_retrieval.utils.errors import SettingError

LINEAR = (nn.Linear, nn.QuantizedLinear)
INNER = ("linear.weight", "embedding.weight")  # of mlx-lm's adapted layers: the weight that the update changes
NORM = re.compile(r"norm|_ln\.", re.IGNORECASE)  # in names of parameters; GTE's are attn_ln and mlp_ln
ROUTERS = ("gate", "router")  # in mlx-lm's mixtures of experts: the layer that chooses the experts


def linear_names(backbone: Backbone, num_layers: int = -1) -> list[str]:
    """Return the names within a block, such as `self_attn.q_proj`, of the linear layers of the last N blocks."""
    names: dict[str, None] = {}
    for layer in backbone.layers[-max(num_layers, 0) :]:
        names |= {name: None for name, module in layer.named_modules() if _is_linear(module)}
    return list(names)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, LINEAR) or type(module).__name__ in ("SwitchLinear", "QuantizedSwitchLinear")


def matching(names: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return the `names` that a key equals, ends (`q_proj`), or fully matches as a regular expression."""
    matches = []
    for name in names:
        for key in keys:
            try:
                hit = name == key or name.endswith("." + key) or re.fullmatch(key, name) is not None
            except re.error as error:
                raise SettingError(
                    "{lora_keys} {key}: neither a name nor a regular expression ({reason})", key=key, reason=error
                ) from error
            if hit:
                matches.append(name)
                break
    return matches


def adapt(
    backbone: Backbone,
    train_type: str = "lora",
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    keys: Sequence[str] = (),
    num_layers: int = -1,
) -> dict:
    """Make part of a frozen backbone trainable.

    Args:
        train_type: `lora`, `dora`, or `full` (the blocks' own weights; embeddings and final norm too if all blocks).
        rank, alpha, dropout: of the low-rank update, which is scaled by alpha / rank.
        keys: linear layers within a block, as names or regular expressions; () = all of them, as QLoRA needs (Dettmers
            et al. 2023), but the routers of mixtures of experts, whose balance a small data set spoils.
        num_layers: the last N blocks; -1 = all.

    Returns the dictionary for `adapter_config.json`. Raises UserError if nothing would be trained.
    """
    total = len(backbone.layers)
    if num_layers > total or num_layers < -1 or num_layers == 0:
        raise SettingError(
            "{num_layers} {count}: the model has {total} layers (-1 = all)", count=num_layers, total=total
        )
    names = linear_names(backbone, num_layers)
    chosen = matching(names, keys) if keys else [name for name in names if name.rsplit(".", 1)[-1] not in ROUTERS]
    if not chosen:
        raise SettingError(
            "{lora_keys} {keys} match nothing; a block of this model has {names}",
            keys=" ".join(keys),
            names=", ".join(names),
        )
    config = {
        "fine_tune_type": train_type,
        "num_layers": num_layers,
        "lora_parameters": {"rank": rank, "scale": alpha / rank, "dropout": dropout, "keys": chosen},
    }
    attach(backbone, config)
    return config


def attach(backbone: Backbone, config: dict) -> None:
    """Add to a frozen backbone the trainable weights that `adapter_config.json` describes, newly initialised."""
    backbone.freeze()
    count = config["num_layers"]
    if config["fine_tune_type"] == "full":
        _unfreeze(backbone, count)
        return
    from mlx_lm.tuner.utils import linear_to_lora_layers

    use_dora = config["fine_tune_type"] == "dora"
    try:
        linear_to_lora_layers(backbone.adapted, count, config["lora_parameters"], use_dora=use_dora)
    except ValueError as error:  # mixtures of experts have no DoRA
        raise SettingError("{train_type} {value}: {reason}", value=config["fine_tune_type"], reason=error) from error
    if use_dora:
        for module in backbone.adapted.modules():
            if isinstance(getattr(module, "linear", None), nn.QuantizedLinear):
                _fit_inputs(module)


def _fit_inputs(layer: nn.Module) -> None:
    """Draw the DoRA matrix of a quantised layer's inputs again where mlx-lm took their number for another.

    It divides 32 by the bits and drops the rest, as no weight of 3, 5 or 6 bits fills 32 evenly.
    """
    linear = layer.linear
    inputs = linear.weight.shape[1] * 32 // linear.bits
    if layer.lora_a.shape[0] != inputs:
        bound = 1 / math.sqrt(inputs)  # as mlx-lm draws it
        layer.lora_a = mx.random.uniform(low=-bound, high=bound, shape=(inputs, layer.lora_a.shape[1]))


def attached_keys(backbone: Backbone, keys: Sequence[str], num_layers: int) -> list[str]:
    """Return the keys, as `adapt` takes them, of the update that is attached to a backbone; [] = of all layers.

    Raises UserError if `keys`, where there are any, match other layers than the update has.
    """
    names = linear_names(backbone, num_layers)
    attached = [name.removesuffix(".linear") for name in names if name.endswith(".linear")]
    names = [name.removesuffix(".linear") for name in names]
    if keys and set(matching(names, keys)) != set(attached):
        raise SettingError(
            "{lora_keys} {keys}: the adapter goes on with the layers that it has, {attached}",
            keys=" ".join(keys),
            attached=", ".join(attached),
        )
    every = [name for name in names if name.rsplit(".", 1)[-1] not in ROUTERS]
    return [] if set(every) == set(attached) else list(keys) or attached


def fuse(backbone: Backbone) -> list[str]:
    """Make updates part of the weights, in place, dequantised and in float32; return the layers' names."""
    layers = [(name, module) for name, module in backbone.adapted.named_modules() if hasattr(module, "fuse")]
    for _, layer in layers:
        layer.set_dtype(mx.float32)  # rounded once, when it is cast or written
    fused = [(name, layer.fuse(dequantize=True)) for name, layer in layers]
    backbone.adapted.update_modules(tree_unflatten(fused))
    return [name for name, _ in layers]


def merge(backbone: Backbone) -> None:
    """Make updates part of the weights, in place and in the weights' dtypes. UserError if these are quantised."""
    _refuse_quantised(backbone)
    dtypes = {name: value.dtype for name, value in tree_flatten(backbone.adapted.parameters())}
    fused = fuse(backbone)
    for name, module in backbone.adapted.named_modules():
        if name in fused:
            module.set_dtype(next(dtypes[f"{name}.{key}"] for key in INNER if f"{name}.{key}" in dtypes))


def _refuse_quantised(backbone: Backbone) -> None:
    if is_quantised(backbone):
        raise SettingError("{train_type} full: quantised weights cannot be trained; use lora or dora")


def _unfreeze(backbone: Backbone, count: int) -> None:
    _refuse_quantised(backbone)
    if count == -1:
        backbone.trunk.unfreeze()  # not the language model's head, which would have no gradient
    for layer in backbone.layers[-max(count, 0) :]:
        layer.unfreeze()


def is_quantised(backbone: Backbone) -> bool:
    """Return whether layers of the trunk are quantised, whatever they compute with."""
    return dequantized.is_quantised(backbone.trunk)


# --- fingerprints of base models ------------------------------------------------------------------------------------


def fingerprint(backbone: Backbone) -> dict[str, str]:
    """Return samples of a base model's weights, by which an adapter recognises its base; compare with `differing`.

    `norms` holds numbers that survive quantisation. `matrices` distinguishes two models of one architecture and is left
    out if the base is quantised. Both are float32 in base64, sampled over the whole depth of the blocks.
    """
    samples: dict[str, list[mx.array]] = {"norms": [], "matrices": []}
    quantised = is_quantised(backbone)
    for layer in backbone.layers:
        for name, value in sorted(tree_flatten(layer.parameters())):
            if NORM.search(name):
                samples["norms"].append(value.reshape(-1)[:8])
            elif name.endswith(".weight") and value.ndim == 2 and not quantised:
                samples["matrices"].append(value[0, :8])
    result = {"architecture": f"{backbone.config['model_type']} {backbone.hidden_size} {len(backbone.layers)}"}
    for kind, values in samples.items():
        if values:
            spread = sorted({round(i) for i in np.linspace(0, len(values) - 1, 16)})
            numbers = mx.concatenate([values[i].astype(mx.float32) for i in spread])
            result[kind] = base64.b64encode(np.array(numbers)).decode("ascii")
    return result


def differing(saved: dict[str, str], other: dict[str, str]) -> list[str]:
    """Return the keys that two fingerprints share and by which they belong to different models.

    Numbers may differ by the rounding to bfloat16, to float16, or to one after the other.
    """
    both = sorted(saved.keys() & other.keys())
    return [kind for kind in both if saved[kind] != other[kind] and not _near(saved[kind], other[kind])]


def _near(saved: str, other: str) -> bool:
    """Return whether two entries hold nearly the same numbers; False for an architecture, which has none."""
    try:
        a, b = (np.frombuffer(base64.b64decode(text), np.float32) for text in (saved, other))
    except ValueError:  # not what `fingerprint` writes
        return False
    # Neighbours in bfloat16 are 2**-7 apart, relatively; tiny numbers have fewer digits in float16.
    return a.shape == b.shape and np.allclose(a, b, rtol=2**-7, atol=1e-5 * np.abs(a).mean())
