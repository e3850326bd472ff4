"""Keep only some blocks of a model: the student that a distillation starts from (`export.py --keep-layers`).

    keep_layers(model.backbone, [0, 2, 4])                 # before anything is merged or compared
    tensors = renumbered(read_weights(folder), [0, 2, 4])  # the same of a checkpoint, under its own names

Every other block of a tuned model is a better beginning than random weights (Sanh et al. 2019, DistilBERT, arXiv
1910.01108).
"""

import re
from collections.abc import Sequence

from mlx_retrieval.backend import mx

from mlx_retrieval.backbones import Backbone
from mlx_retrieval.backbones.base import NAMES
from mlx_retrieval.utils.errors import UserError

COUNT = "num_hidden_layers"
BLOCK = re.compile(r"(?:^|\.)layers?\.(\d+)\.")  # in names of tensors: encoder.layer.3.output.dense.weight
# Settings by which a block's number decides how it computes.
BY_NUMBER = (
    "global_attn_every_n_layers",
    "sliding_window_pattern",
    "no_rope_layer_interval",
    "full_attention_interval",
)


def keep_layers(backbone: Backbone, layers: Sequence[int]) -> None:
    """Leave only these blocks, counted from 0, in the backbone, in place. UserError if it needs the others."""
    total, given = len(backbone.layers), " ".join(map(str, layers))
    if not layers or list(layers) != sorted({*layers}):
        raise UserError(f"--keep-layers {given}: name each layer once, in ascending order")
    if layers[0] < 0 or layers[-1] >= total:
        raise UserError(f"--keep-layers {given}: the model has the layers 0 to {total - 1}")
    config = backbone.config
    if COUNT not in config:
        raise UserError(f"--keep-layers: of models of type {config['model_type']}, layers cannot be left out")
    kinds = [value for value in config.values() if isinstance(value, list) and len(value) == total > 1]
    if any(config.get(key) for key in BY_NUMBER) or any(value != [value[0]] * total for value in kinds):
        raise UserError(
            f"--keep-layers: the layers of this model ({config['model_type']}) differ by their numbers, which they "
            "would not keep"
        )
    backbone.layers[:] = [backbone.layers[i] for i in layers]


def renumbered(tensors: dict[str, mx.array], layers: Sequence[int]) -> dict[str, mx.array]:
    """Return a checkpoint's tensors without those of other blocks, the kept ones numbered from 0 on."""
    places = {old: new for new, old in enumerate(layers)}
    kept = {}
    for name, value in tensors.items():
        match = BLOCK.search(name)
        if match is None:
            kept[name] = value
        elif (place := places.get(int(match[1]))) is not None:
            kept[f"{name[: match.start(1)]}{place}{name[match.end(1) :]}"] = value
    return kept


def adapt_config(config: dict, layers: Sequence[int]) -> None:
    """Make a config.json that of the kept blocks alone, in place."""
    names = [name for name in (COUNT, *NAMES[COUNT]) if name in config]
    total = config[names[0]]
    for key, value in config.items():
        if isinstance(value, list) and len(value) == total and key != "architectures":
            config[key] = value[: len(layers)]  # all are alike
    config |= dict.fromkeys(names, len(layers))
