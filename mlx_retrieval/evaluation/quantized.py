"""Encoders with which a model is evaluated at several precisions and dimensions after a single embedding pass."""

import hashlib
import json
from typing import Any

import numpy as np

from mlx_retrieval.inference.quantization import CALIBRATED, quantise, restore, truncate


class CachedEncoder:
    """An encoder (see `retrieval.Encoder`) that keeps its vectors, so that each text is embedded once."""

    def __init__(self, model: Any):
        self.model, self.name = model, model.name
        self.normalize = getattr(getattr(model, "config", None), "normalize", True)
        self.vectors: dict[tuple[str | None, bytes], np.ndarray] = {}  # one entry a call

    def encode(self, texts: list[str], prompt: str | None, show_progress: bool) -> np.ndarray:
        """Return the vectors of these texts, (N, D) float32: from memory if they were embedded together before."""
        key = prompt, hashlib.sha256(json.dumps(texts).encode()).digest()
        if key not in self.vectors:
            self.vectors[key] = self.model.encode(texts, prompt=prompt, show_progress=show_progress)
        return self.vectors[key]

    def ranges(self, dimensions: int) -> np.ndarray:
        """Return the lowest and highest value of each dimension over all cached documents, after truncation.

        (2, dimensions) float32.
        """
        blocks = [
            truncate(vectors, dimensions, self.normalize)
            for (prompt, _), vectors in self.vectors.items()
            if prompt == "document"
        ]
        lows, highs = ([reduce(block, axis=0) for block in blocks] for reduce in (np.min, np.max))
        return np.stack([np.min(lows, axis=0), np.max(highs, axis=0)])


class QuantizedEncoder:
    """An encoder whose vectors went through quantisation: their dot products are the scores of the stored format.

    int8 and uint8 take their ranges from the cached documents. Queries are never stored, so they stay float32; bits are
    also compared with bits, which is faster.
    """

    def __init__(self, cached: CachedEncoder, precision: str, dimensions: int, float_queries: bool = False):
        self.cached, self.precision, self.dimensions, self.name = cached, precision, dimensions, cached.name
        self.float_queries = float_queries or precision in CALIBRATED
        self.bounds = cached.ranges(dimensions) if precision in CALIBRATED else None

    def encode(self, texts: list[str], prompt: str | None, show_progress: bool) -> np.ndarray:
        """Return (N, dimensions) float32."""
        vectors = truncate(self.cached.encode(texts, prompt, show_progress), self.dimensions, self.cached.normalize)
        if self.float_queries and prompt == "query":
            return vectors
        return restore(quantise(vectors, self.precision, self.bounds), self.precision, self.bounds, self.dimensions)
