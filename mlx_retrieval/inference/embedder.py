"""Embed texts with a base model or a trained adapter."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.backbones import resolve
from mlx_retrieval.inference import fingerprint
from mlx_retrieval.inference.quantization import check, quantise, truncate
from mlx_retrieval.models import loading
from mlx_retrieval.models.batching import Texts, micro_batches
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.runners import make_runner
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError

CHUNK = 16_384  # texts that are tokenised and sorted by length together


class Model:
    """A retrieval model in use. Made by `load`; training makes one of the model it trains.

    `base` is the folder of the model that an adapter was loaded on; None where there is no adapter.
    """

    def __init__(
        self,
        model: RetrievalModel,
        config: RetrievalConfig,
        tokenizer: TextTokenizer,
        name: str,
        base: Path | None = None,
    ):
        self.model, self.config, self.tokenizer, self.name, self.base = model, config, tokenizer, name, base
        self.runner = make_runner(model)

    @property
    def late(self) -> bool:
        """Whether a text becomes a vector a token."""
        return self.config.task == "late"

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return self.config.dimensions

    def fingerprint(self) -> str:
        """Return a hash of everything that decides this model's vectors; see `fingerprint.fingerprint`."""
        adapter = None if self.base is None else Path(self.name).expanduser()
        return fingerprint.fingerprint(self.config, self.base or resolve(self.name), adapter)

    def limit_shapes(self) -> None:
        """Meet fewer shapes from now on, for a process that answers requests: see `ModelRunner.limit_shapes`."""
        self.runner.limit_shapes()

    def encode(
        self,
        texts: str | Sequence[str],
        prompt: str | None = None,
        show_progress: bool | None = None,
        dimensions: int | None = None,
        batch_tokens: int | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """Vectors of unit length, float32: (N, D) for a list, in its order; (D,) for one text.

        Models that compare by plain dot products, as their files say, give vectors of any length.
        A late-interaction model gives the vectors of a text's tokens instead: for a list, a list of (L_i, D).
        Stored in another precision they are int8 or uint8, (N, D), or (N, ceil(D / 8)) for "binary" and "ubinary".

        Args:
            texts: anything from an empty list up.
            prompt: "query", "document" or the name of a task's prompt puts that prompt of the model before each text;
                None puts none.
            show_progress: None = a bar for more than 2,000 texts, where standard error is a terminal.
            dimensions: keep only the first so many (Matryoshka), scaled to unit length again.
            batch_tokens: most tokens, padding included, in the backbone at once; None = what suits the device.
            precision: "float32", "int8", "uint8", "binary" or "ubinary", after truncation; see precision.py.
            ranges: (2, D) of each dimension, for int8 and uint8; queries and documents must share them. None takes
                them from these very texts, of which there must be 100: `precision.ranges(model.encode(sample))`.
        """
        if isinstance(texts, str):
            return self.encode([texts], prompt, False, dimensions, batch_tokens, precision, ranges)[0]
        if prompt is not None and prompt not in self.config.prompts:
            raise UserError(f"prompt {prompt!r} is unknown; known: {', '.join(self.config.prompts)}")
        if dimensions is not None and not 0 < dimensions <= self.dimensions:
            raise UserError(f"dimensions {dimensions}: the model has {self.dimensions}")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"texts[{i}] is a {type(text).__name__}, not a text")
        if self.late and (dimensions is not None or precision != "float32"):
            raise UserError("token vectors of a late-interaction model are whole and float32")
        check(precision, len(texts), dimensions or self.dimensions, ranges)
        if show_progress is None:
            show_progress = len(texts) > 2_000 and sys.stderr.isatty()
        whole = [None] * len(texts) if self.late else np.empty((len(texts), self.dimensions), np.float32)
        self.model.eval()
        with _bar(len(texts), show_progress) as advance:
            for first in range(0, len(texts), CHUNK):
                tokens = self.tokenizer(texts[first : first + CHUNK], prompt)
                budget = batch_tokens or backend.MICRO_BATCH_TOKENS
                cut = list(micro_batches(tokens, budget, self.tokenizer.pad_id, self.runner.length_grid))
                parts = self.runner.representations([rows for _, rows in cut])
                for (index, _), part in zip(cut, parts, strict=True):
                    if self.late:
                        for i, vectors in zip(
                            index, self._counting(np.array(part), tokens, index, prompt), strict=True
                        ):
                            whole[first + i] = vectors
                    else:
                        whole[first + index] = np.array(part)
                    advance(len(index))
        if self.late:
            return whole
        vectors = truncate(whole, dimensions, self.config.normalize)
        return vectors if precision == "float32" else quantise(vectors, precision, ranges)

    def _counting(self, part: np.ndarray, texts: Texts, index: np.ndarray, prompt: str | None) -> list[np.ndarray]:
        """The vectors of the tokens that count: of every one of these texts, (L_i, D)."""
        counts = part.any(axis=-1)
        if prompt == "document" and self.config.skiplist:
            counts &= texts.without(self.tokenizer.ids_of(self.config.skiplist), part.shape[1])[index]
        return [row[kept] for row, kept in zip(part, counts, strict=True)]


def embed(model: Model, texts: Sequence[str], prompt: str) -> np.ndarray | list[np.ndarray]:
    """(N, D) float32; of a late-interaction model (L, D) for each text. UserError where some are not finite."""
    vectors = model.encode(texts, prompt=prompt, show_progress=False)
    if broken := sum(not np.isfinite(vector).all() for vector in vectors):
        raise UserError(
            f"{model.name}: the vectors of {broken} of {len(texts)} texts are not finite (embed.py --check)"
        )
    return vectors


class _bar:  # noqa: N801  (used as a function)
    """A progress bar on standard error, or nothing."""

    def __init__(self, total: int, show: bool):
        self.total, self.show = total, show

    def __enter__(self):
        if not self.show:
            return lambda count: None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("embedding", BarColumn(), MofNCompleteColumn(), "texts", TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.progress.start()
        task = self.progress.add_task("", total=self.total)
        return lambda count: self.progress.advance(task, count)

    def __exit__(self, *_):
        if self.show:
            self.progress.stop()


def load(path: str | Path, adapter: str | Path | None = None, **overrides) -> Model:
    """Load a model for use.

    Args:
        path: an adapter folder (its base is found by itself), a base model's folder, or a hub name.
        adapter: an adapter folder to put on the base model `path`.
        overrides: settings that win over what is saved, for instance max_length, pooling, query_prompt.

    Raises UserError where anything is missing or does not fit.
    """
    base: str | None = str(path)
    if adapter is None and loading.is_adapter(Path(path).expanduser()):
        base, adapter = None, path
    name = str(adapter or base).rstrip("/")
    model, config, folder = loading.open_model(base, str(adapter) if adapter else None, **overrides)
    return Model(model, config, config.tokenizer(folder), name, folder if adapter else None)
