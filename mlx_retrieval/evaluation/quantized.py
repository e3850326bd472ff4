"""Evaluate a model at several precisions and dimensions with one embedding pass."""

import hashlib
import json
from typing import Any

import numpy as np

from mlx_retrieval.inference.quantization import CALIBRATED, quantise, restore, truncate


class Memory:
    """An encoder (see eval.py) whose vectors are kept, so that no text is embedded again for another stored form."""

    def __init__(self, model: Any):
        self.model, self.name = model, model.name
        self.normalize = getattr(getattr(model, "config", None), "normalize", True)
        self.vectors: dict[tuple[str | None, bytes], np.ndarray] = {}  # one entry a call

    def encode(self, texts: list[str], prompt: str | None, show_progress: bool) -> np.ndarray:
        """What the model gave, or gives now, for these texts: (N, D) float32."""
        key = prompt, hashlib.sha256(json.dumps(texts).encode()).digest()
        if key not in self.vectors:
            self.vectors[key] = self.model.encode(texts, prompt=prompt, show_progress=show_progress)
        return self.vectors[key]

    def ranges(self, dimensions: int) -> np.ndarray:
        """(2, dimensions) float32: of all documents that were embedded so far, after truncation."""
        parts = [
            truncate(part, dimensions, self.normalize)
            for (prompt, _), part in self.vectors.items()
            if prompt == "document"
        ]
        lows, highs = ([get(part, axis=0) for part in parts] for get in (np.min, np.max))
        return np.stack([np.min(lows, axis=0), np.max(highs, axis=0)])


class Stored:
    """An encoder as it searches stored vectors: dot products of what it gives are the scores of the stored form.

    int8 and uint8: ranges of the memory's documents; queries stay float32, since they are never stored.
    """

    def __init__(self, memory: Memory, precision: str, dimensions: int):
        self.memory, self.precision, self.dimensions, self.name = memory, precision, dimensions, memory.name
        self.bounds = memory.ranges(dimensions) if precision in CALIBRATED else None

    def encode(self, texts: list[str], prompt: str | None, show_progress: bool) -> np.ndarray:
        """(N, dimensions) float32."""
        whole = self.memory.encode(texts, prompt, show_progress)
        vectors = truncate(whole, self.dimensions, self.memory.normalize)
        if self.precision in CALIBRATED and prompt == "query":
            return vectors
        return restore(quantise(vectors, self.precision, self.bounds), self.precision, self.bounds, self.dimensions)
