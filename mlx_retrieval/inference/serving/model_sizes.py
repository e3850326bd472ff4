"""Return what a server's models take in memory, before they are loaded.

sizes = BaseSizes(max_memory=8 << 30)
sizes.of(folder, "auto")                # BaseSize(size=1_234_567, dequantize="on")
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.backend import device_memory, mx

from mlx.utils import tree_flatten

from mlx_retrieval import backend
from mlx_retrieval.backbones import dequantized, load_backbone
from mlx_retrieval.backbones.hub import tensor_table, weight_files

FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}  # the dtypes of files that are computed with


class BaseSize(NamedTuple):
    """The bytes of a base model's weights, and what quantised ones are computed with: None = nothing is quantised."""

    size: int
    dequantize: str | None


class BaseSizes:
    """The sizes of base models, by folder and dtype.

    What quantised weights are computed with on CPUs is decided here, once for a server. If it were when a model is
    loaded, nobody would know before what copies take, and an adapter that finds less memory free than an earlier one
    could not share its base.

    Args:
        max_memory: most bytes of all models that are loaded at a time; None = no limit.
    """

    def __init__(self, max_memory: int | None = None):
        self.most = math.inf if max_memory is None else max_memory
        self._known: dict[tuple[Path, str], BaseSize] = {}

    def of(self, folder: Path, dtype: str | None) -> BaseSize:
        """Return the size of a base model that computes in `dtype`; UserError if it cannot be loaded."""
        key = folder, dtype or "auto"
        if key not in self._known:
            self._known[key] = self._planned(*key)
        return self._known[key]

    def _planned(self, folder: Path, dtype: str) -> BaseSize:
        files = weight_files(folder)
        stored = {entry["dtype"] for file in files for entry in tensor_table(file).values()}
        if not backend.FUSED or stored <= FLOATS.keys():
            return BaseSize(weights_size(files, dtype), None)
        backbone = load_backbone(folder, dtype=dtype, dequantize="off")  # which reads no weight
        others = sum(base.size for base in self._known.values())
        free = device_memory.free() - min(others, self.most)
        way = dequantized.chosen(backbone, room=min(dequantized.COPIES_SHARE * free, self.most))
        dequantized.dequantize(backbone, way)
        return BaseSize(sum(value.nbytes for _, value in tree_flatten(backbone.parameters())), way)


def weights_size(files: Sequence[Path], dtype: str | None) -> int:
    """Return the bytes that the weights in files take in memory, by their headers."""
    size = 0
    for file in files:
        for entry in tensor_table(file).values():
            first, last = entry["data_offsets"]
            stored = FLOATS.get(entry["dtype"])
            wanted = stored and backend.compute_dtype(stored, dtype or "auto")
            size += (last - first) * (wanted.size if stored else 1) // (stored.size if stored else 1)
    return size
