"""A Gemma 3 of 60 thousand parameters with random weights, for tests of the loop: one step takes milliseconds."""

import json
import shutil
from pathlib import Path

from mlx_retrieval.backend import mx

from mlx.utils import tree_flatten

TINY = Path(__file__).resolve().parent.parent.parent / "gemma-3-tiny-mlx"


def make_small_gemma(folder: Path) -> str:
    """Write the model into `folder`: the tiny model's tokenizer and layer pattern, few and narrow layers."""
    from mlx_lm.models.gemma3_text import Model, ModelArgs

    folder.mkdir(parents=True)
    for file in TINY.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    config = json.loads((TINY / "config.json").read_text())
    config |= {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "head_dim": 16}
    config |= {"query_pre_attn_scalar": 16, "layer_types": config["layer_types"][:3], "sliding_window": 8}
    config |= {"torch_dtype": "float32", "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    model.sanitize({})  # ties the vocabulary's matrix, as the checkpoint's loader does
    weights = {name: 0.1 * mx.random.normal(v.shape) for name, v in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return str(folder)
