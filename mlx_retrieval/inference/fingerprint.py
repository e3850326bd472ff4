"""Where models and the search index meet: vectors of texts, and what tells whether a model is still the same.

from search_model import embed, fingerprint
vectors = embed(model, ["where are gradients cached"], "query")
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mlx_retrieval.inference.embedder import Model

READ_WHOLE = 64 << 20  # bytes; of larger files the fingerprint takes BLOCKS blocks of BLOCK bytes, spread over them
BLOCKS, BLOCK = 64, 256 << 10


def fingerprint(model: "Model") -> str:
    """A hash of all that decides a model's vectors: weights, adapter, tokenizer, prompts, pooling, lengths.

    Large files are sampled, as reading gigabytes would take longer than a search: training changes all of a file.
    """
    from mlx_retrieval.backbones import resolve
    from mlx_retrieval.models import loading

    settings = dataclasses.asdict(model.config) | {"base_model": ""}  # folders may move
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    base = model.base or resolve(model.name)
    patterns = ("*.safetensors", "*/*.safetensors", "config.json", "tokenizer.json")
    files = [file for pattern in patterns for file in sorted(base.glob(pattern))]
    if model.base is not None:
        names = (loading.ADAPTERS, loading.ADAPTER_CONFIG, loading.HEADS)
        files += [path for name in names if (path := Path(model.name).expanduser() / name).is_file()]
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for at in range(0, size, BLOCK) if size <= READ_WHOLE else np.linspace(0, size - BLOCK, BLOCKS, dtype=int):
                file.seek(at)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
