"""Folders in BEIR layout, and an encoder without weights to evaluate on them."""

import json
import zlib
from pathlib import Path

import numpy as np


class WordCounts:
    """Unit vectors of hashed word counts; with `break_at`, the vector of that text's number is not finite."""

    def __init__(self, seed: int = 0, dimensions: int = 256, name: str = "toy", break_at: int | None = None):
        self.seed, self.dimensions, self.name, self.break_at = seed, dimensions, name, break_at
        self.calls: list[tuple[str | None, list[str]]] = []

    def encode(self, texts, prompt=None, show_progress=False):
        self.calls.append((prompt, texts))
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                vectors[row, zlib.crc32(f"{self.seed} {word}".encode()) % self.dimensions] += 1
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        if self.break_at is not None and prompt == "document":
            vectors[self.break_at] = np.nan
        return vectors


def write_folder(folder: Path, corpus, queries, qrels: str | None, qrels_name: str = "test.tsv") -> Path:
    """`corpus` and `queries`: rows, or the file's text."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for stem, rows in (("corpus", corpus), ("queries", queries)):
        if rows is not None:
            text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{stem}.jsonl").write_text(text, encoding="utf-8")
    if qrels is not None:
        (folder / "qrels" / qrels_name).write_text(qrels, encoding="utf-8")
    return folder
