"""A hash that tells whether a model is still the one that made an index or a cached result."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from mlx_retrieval.backbones.gguf.folder import source_of
from mlx_retrieval.models import loading
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.utils import files

PIECE = 4 << 10  # bytes of a tensor that are read in each of three places


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model's folder that decide its results: weights, config and tokenizer.

    Of a folder that a GGUF was converted to, it is the GGUF: GPUs and CPUs have a conversion each, which give the same
    results up to rounding.
    """
    if gguf := source_of(folder):
        return [gguf]
    patterns = ("*.safetensors", "*/*.safetensors", "config.json", "tokenizer.json")
    return [file for pattern in patterns for file in sorted(folder.glob(pattern))]


def fingerprint(config: RetrievalConfig, base: Path, adapter: Path | None = None, by_tensor: bool = True) -> str:
    """Return a hash (64 hexadecimal digits) of everything that decides a model's results.

    That is weights, adapter, tokenizer, prompts, pooling and lengths. Large files are sampled: reading gigabytes would
    take longer than a search. Of their tensors each is read in some places, as training may change a few layers alone.

    Args:
        base: the base model's folder.
        adapter: the adapter's folder; None = there is none.
        by_tensor: False = as earlier versions did, which read large files in fewer places (`files.sampled_blocks`).
    """
    settings = dataclasses.asdict(config) | {"base_model": ""}  # folders may move
    del settings["dtype"]  # the same vectors up to rounding: an index of one dtype is searched in another
    if not config.truncate_dim:  # a later field: indices of before stay valid
        del settings["truncate_dim"]
    if gguf := source_of(base):
        settings["base_fingerprint"] = {}  # of weights as they were converted
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    paths = model_files(base)
    if adapter is not None:
        names = (loading.ADAPTERS, loading.ADAPTER_CONFIG, loading.HEADS)
        paths += [path for name in names if (path := adapter / name).is_file()]
    for path in paths:
        name, size = "GGUF" if path == gguf else path.name, path.stat().st_size  # it may be renamed
        digest.update(f"{name} {size}\n".encode())
        for block in files.sampled_blocks(path):
            digest.update(block)
        if by_tensor and size > files.READ_WHOLE and path.suffix == ".safetensors":
            for piece in _tensor_pieces(path):
                digest.update(piece)
    return digest.hexdigest()


def _tensor_pieces(path: Path) -> Iterator[bytes]:
    """Yield the beginning, the middle and the end of each tensor of a safetensors file, in their order."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        spans = sorted(tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__")
        for first, end in spans:
            last = max(first, end - PIECE)
            for start in sorted({first, (first + last) // 2, last}):
                file.seek(8 + length + start)
                yield file.read(min(PIECE, end - start))
