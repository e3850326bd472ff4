"""A hash that tells whether a model is still the one that made an index or a cached result."""

import dataclasses
import hashlib
import json
from pathlib import Path

from mlx_retrieval.backbones.gguf.folder import source_of
from mlx_retrieval.models import loading
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.utils.files import sampled_blocks


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model's folder that decide its results: weights, config and tokenizer.

    Of a folder that a GGUF was converted to, it is the GGUF: GPUs and CPUs have a conversion each, which give the same
    results up to rounding.
    """
    if gguf := source_of(folder):
        return [gguf]
    patterns = ("*.safetensors", "*/*.safetensors", "config.json", "tokenizer.json")
    return [file for pattern in patterns for file in sorted(folder.glob(pattern))]


def fingerprint(config: RetrievalConfig, base: Path, adapter: Path | None = None) -> str:
    """Return a hash (64 hexadecimal digits) of everything that decides a model's results.

    That is weights, adapter, tokenizer, prompts, pooling and lengths. Large files are sampled (`files.sampled_blocks`):
    reading gigabytes would take longer than a search, and training changes all of a file.

    Args:
        base: the base model's folder.
        adapter: the adapter's folder; None = there is none.
    """
    settings = dataclasses.asdict(config) | {"base_model": ""}  # folders may move
    del settings["dtype"]  # the same vectors up to rounding: an index of one dtype is searched in another
    if not config.truncate_dim:  # a later field: indices of before stay valid
        del settings["truncate_dim"]
    if gguf := source_of(base):
        settings["base_fingerprint"] = {}  # of weights as they were converted
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    files = model_files(base)
    if adapter is not None:
        names = (loading.ADAPTERS, loading.ADAPTER_CONFIG, loading.HEADS)
        files += [path for name in names if (path := adapter / name).is_file()]
    for path in files:
        name = "GGUF" if path == gguf else path.name  # it may be renamed
        digest.update(f"{name} {path.stat().st_size}\n".encode())
        for block in sampled_blocks(path):
            digest.update(block)
    return digest.hexdigest()
