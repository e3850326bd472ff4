"""The vectors of all texts of rows, by a teacher or a guide, in a file to train by.

python mine.py score --vectors --teacher MODEL --data rows.jsonl --output teacher.safetensors
python train.py --data rows.jsonl --loss distill_vectors --teacher-vectors teacher.safetensors
"""

from array import array
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.text_keys import vector_key
from mlx_retrieval.inference import embedder, text_vectors
from mlx_retrieval.mining.cache import ResumableCache
from mlx_retrieval.mining.collection import TextFile
from mlx_retrieval.utils.progress import Progress

QUERY, DOCUMENT = "query", "document"  # names of prompts
Text = tuple[str, str]  # the name of its prompt, and the text


class Texts:
    """The distinct queries and documents of examples, queries first. They lie in files that have no name.

    Args:
        folder: where.

    Attributes:
        keys: (N,) int64, the `vector_key` of each text.
        digest: a hash of all texts.
    """

    def __init__(self, examples: Iterable[Example], folder: Path):
        self.sides = {prompt: TextFile(folder, partial(vector_key, prompt=prompt)) for prompt in (QUERY, DOCUMENT)}
        self._keys = {prompt: array("q") for prompt in self.sides}
        for example in examples:
            self._add(QUERY, example.query)
            for text in (example.positive, *example.negatives):
                self._add(DOCUMENT, text)
        self.digest = " ".join(side.close() for side in self.sides.values())
        self.keys = np.concatenate([np.frombuffer(keys, np.int64) for keys in self._keys.values()])

    def _add(self, prompt: str, text: str) -> None:
        side = self.sides[prompt]
        if side.add(text) == len(self._keys[prompt]):
            self._keys[prompt].append(vector_key(text, prompt))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def queries(self) -> int:
        """The number of distinct queries."""
        return len(self.sides[QUERY])

    @property
    def documents(self) -> int:
        """The number of distinct documents."""
        return len(self.sides[DOCUMENT])

    def read(self, numbers: Iterable[int]) -> list[Text]:
        """Return texts by their numbers."""
        queries, documents = self.sides.values()
        count = len(queries)
        return [(QUERY, *queries.read([i])) if i < count else (DOCUMENT, *documents.read([i - count])) for i in numbers]


def write_vectors(
    path: Path,
    texts: Texts,
    model: embedder.Model,
    cache: ResumableCache,
    notify: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> None:
    """Embed texts, queries with the model's query prompt and documents with its document prompt, into a file.

    What is finished is kept in the cache, and not computed again.

    Args:
        notify: takes a message about finished work in the cache.
    """
    fingerprint = f"{model.fingerprint()} {model.dtype}"
    resumed, changed = cache.open({"texts": texts.digest, "model": fingerprint}, ("texts", "model"))
    if resumed:
        notify(f"{cache.folder}: {'started over, as other texts or another model' if changed else 'continued'}")

    def encode(lot: list[Text]) -> np.ndarray:
        parts = [[text for prompt, text in lot if prompt == each] for each in (QUERY, DOCUMENT)]
        sides = zip(parts, (QUERY, DOCUMENT), strict=True)
        return np.concatenate([embedder.embed(model, part, prompt) for part, prompt in sides if part])

    vectors = cache.vectors(texts, model.dimensions, encode, progress)
    about = {"model": model.name, "fingerprint": fingerprint}
    text_vectors.write(path, texts.keys, vectors, about, f"--output {path}")
