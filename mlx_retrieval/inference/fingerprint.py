"""A hash that tells whether a model is still the one that made an index or a cached result."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from mlx_retrieval.models import loading
from mlx_retrieval.models.retrieval_config import RetrievalConfig

READ_WHOLE = 64 << 20  # bytes; of a larger file, BLOCKS blocks of BLOCK bytes are read, spread evenly over it
BLOCKS, BLOCK = 64, 256 << 10


def fingerprint(config: RetrievalConfig, base: Path, adapter: Path | None = None) -> str:
    """Return a hash (64 hexadecimal digits) of everything that decides a model's results.

    That is weights, adapter, tokenizer, prompts, pooling and lengths. Large files are sampled: reading gigabytes would
    take longer than a search, and training changes all of a file.

    Args:
        base: the base model's folder.
        adapter: the adapter's folder; None = there is none.
    """
    settings = dataclasses.asdict(config) | {"base_model": ""}  # folders may move
    if not config.truncate_dim:  # a later field: indices of before stay valid
        del settings["truncate_dim"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    patterns = ("*.safetensors", "*/*.safetensors", "config.json", "tokenizer.json")
    files = [file for pattern in patterns for file in sorted(base.glob(pattern))]
    if adapter is not None:
        names = (loading.ADAPTERS, loading.ADAPTER_CONFIG, loading.HEADS)
        files += [path for name in names if (path := adapter / name).is_file()]
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for at in range(0, size, BLOCK) if size <= READ_WHOLE else np.linspace(0, size - BLOCK, BLOCKS, dtype=int):
                file.seek(at)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
