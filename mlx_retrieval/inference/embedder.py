"""Embed texts with a base model or a trained adapter."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.backbones import dtype_name, resolve
from mlx_retrieval.inference import fingerprint, finite
from mlx_retrieval.inference.quantization import check, quantise, truncate
from mlx_retrieval.models import kinds, loading
from mlx_retrieval.models.batching import Texts
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.runners import make_runner
from mlx_retrieval.models.shared_weights import SharedWeights
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import progress_bar

CHUNK = 16_384  # texts tokenised and sorted by length together


class Model:
    """An embedding model for inference. `load` makes one, and training makes one of the model that it trains.

    Args:
        name: adapter folder, base model's folder or GGUF, or hub name; shown in messages.
        base: the folder of the base model that an adapter was loaded on; None = there is no adapter.
        compile: whether passes are compiled; see `make_runner`.
    """

    def __init__(
        self,
        model: RetrievalModel,
        config: RetrievalConfig,
        tokenizer: TextTokenizer,
        name: str,
        base: Path | None = None,
        compile: str = "auto",
    ):
        self.model, self.config, self.tokenizer, self.name, self.base = model, config, tokenizer, name, base
        self.runner = make_runner(model, compile)

    @property
    def late(self) -> bool:
        """Whether a text becomes one vector a token (late interaction)."""
        return self.config.task == "late"

    @property
    def dimensions(self) -> int:
        """Length of a vector that `encode` returns by default; see `RetrievalConfig.truncate_dim`."""
        return self.config.truncate_dim or self.config.dimensions

    @property
    def dtype(self) -> str:
        """The dtype that the backbone computes in, such as `bfloat16`; vectors are float32 whatever it is."""
        return dtype_name(self.model.backbone)

    def fingerprint(self) -> str:
        """Return a hash of everything that decides this model's vectors; see `fingerprint.fingerprint`."""
        return self._fingerprint(by_tensor=True)

    def is_of(self, known: str) -> bool:
        """Return whether a fingerprint is this model's, of this version or of one that read less of large files."""
        return known == self.fingerprint() or known == self._fingerprint(by_tensor=False)

    def _fingerprint(self, by_tensor: bool) -> str:
        adapter = None if self.base is None else Path(self.name).expanduser()
        return fingerprint.fingerprint(self.config, self.base or resolve(self.name), adapter, by_tensor)

    def add_prompts(self, prompts: Mapping[str, str]) -> None:
        """Add prompts by name for `encode`, or replace those of the same names; the saved model stays as it is."""
        if prompts:
            others = {name: prompt for name, prompt in prompts.items() if name not in ("query", "document")}
            roles = {f"{name}_prompt": prompts.get(name) for name in ("query", "document")}
            self.config = self.config.override(**roles, task_prompts=self.config.task_prompts | others)
            self.tokenizer = self.config.tokenizer(self.base or resolve(self.name))

    def limit_shapes(self, models: int = 1) -> None:
        """Keep fewer graphs from now on, in a process that answers requests: see `ModelRunner.limit_shapes`."""
        self.runner.limit_shapes(models)

    def count_tokens(self, texts: Sequence[str], prompt: str | None = None) -> int:
        """Return how many tokens of texts `encode` computes, prompts and special tokens included."""
        return int(self.tokenizer(texts, prompt).lengths.sum())

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
        """Embed texts. Return (N, D) float32 vectors of unit length in the order of a list, or (D,) for one text.

        Models that compare by plain dot products, as their files say, return vectors of any length. A late-interaction
        model returns the vectors of each text's tokens instead: for a list, a list of (L_i, D). Another precision
        returns int8 or uint8: (N, D), or (N, ceil(D / 8)) for "binary" and "ubinary".

        Args:
            texts: one text or a list; the list may be empty.
            prompt: put this prompt of the model before each text: "query", "document" or the name of a further one;
                None = no prompt.
            show_progress: show a progress bar; None = for more than 2,000 texts, if standard error is a terminal.
            dimensions: keep only the first N dimensions (Matryoshka), scaled to unit length again; None = as many as
                the model's files say, mostly all.
            batch_tokens: most tokens in the backbone at once, padding included; None = suited to the device.
            precision: "float32", "int8", "uint8", "binary" or "ubinary", applied after `dimensions`; see
                quantization.py.
            ranges: for int8 and uint8, (2, D) smallest and largest value of each dimension, which queries and documents
                must share: `quantization.ranges(model.encode(sample))`. None = taken from `texts`, at least 100.

        Raises UserError for a wrong argument, and NonFiniteError, which names a text, if a vector is not finite.
        """
        if isinstance(texts, str):
            return self.encode([texts], prompt, False, dimensions, batch_tokens, precision, ranges)[0]
        if prompt is not None and prompt not in self.config.prompts:
            raise UserError(f"prompt {prompt!r} is unknown; known: {', '.join(self.config.prompts)}")
        full = self.config.dimensions
        if dimensions is not None and not 0 < dimensions <= full:
            raise UserError(f"dimensions {dimensions}: the model has {full}")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"texts[{i}] is a {type(text).__name__}, not a text")
        if self.late and (dimensions is not None or precision != "float32"):
            raise UserError(
                "late-interaction models take neither dimensions nor precision: their token vectors are float32"
            )
        check(precision, len(texts), dimensions or self.dimensions, ranges)
        if show_progress is None:
            show_progress = len(texts) > 2_000 and sys.stderr.isatty()
        results = [None] * len(texts) if self.late else np.empty((len(texts), full), np.float32)
        if self.model.training:  # eval() walks through all modules
            self.model.eval()
        done = 0
        with progress_bar("embedding", "texts", len(texts), show_progress) as progress:
            for first in range(0, len(texts), CHUNK):
                tokens = self.tokenizer(texts[first : first + CHUNK], prompt)
                budget = batch_tokens or backend.MICRO_BATCH_TOKENS
                batches = list(self.runner.micro_batches(tokens, budget, self.tokenizer.pad_id))
                representations = self.runner.representations([micro_batch for _, micro_batch in batches])
                for (index, _), representation in zip(batches, representations, strict=True):
                    vectors = np.array(representation)
                    if self.late:
                        for i, token_vectors in zip(index, self._counted(vectors, tokens, index, prompt), strict=True):
                            results[first + i] = token_vectors
                    else:
                        results[first + index] = vectors
                    done += len(index)
                    progress(done)
                finite.check_vectors(self.name, texts, results[first:done], first)
        if self.late:
            return results
        vectors = truncate(results, dimensions or self.dimensions, self.config.normalize)
        return vectors if precision == "float32" else quantise(vectors, precision, ranges)

    def _counted(self, vectors: np.ndarray, texts: Texts, index: np.ndarray, prompt: str | None) -> list[np.ndarray]:
        """Return the vectors of the tokens that count, (L_i, D), of each of the texts at `index`.

        Args:
            vectors: (R, L, D), zero for tokens that do not count.
        """
        counts = vectors.any(axis=-1)
        if prompt == "document" and self.config.skiplist:
            counts &= texts.without(self.tokenizer.ids_of(self.config.skiplist), vectors.shape[1])[index]
        return [row[mask] for row, mask in zip(vectors, counts, strict=True)]


def embed(
    model: Model, texts: Sequence[str], prompt: str, place: Callable[[int], str] | None = None
) -> np.ndarray | list[np.ndarray]:
    """Return `model.encode(texts, prompt)` without a progress bar; `place` names a text in NonFiniteError by number."""
    try:
        return model.encode(texts, prompt=prompt, show_progress=False)
    except finite.NonFiniteError as error:
        raise (error.placed(place) if place else error) from error


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    shared: SharedWeights | None = None,
    dequantize: str | None = None,
    **overrides,
) -> Model:
    """Load a model for inference.

    Args:
        path: adapter folder, which names its base model; base model's folder or GGUF; or hub name.
        adapter: adapter folder to load on top of the base model `path`.
        dtype: to compute in: "float32", "bfloat16", "float16", or "auto": the checkpoint's on GPUs, float32 on CPUs;
            None = as an adapter was trained, or else "auto".
        shared: weights of base models that are in memory already; None = this model has its own.
        dequantize: what quantised weights are computed with on CPUs: see `load_backbone`.
        overrides: fields of RetrievalConfig that override the saved ones, for instance max_length or query_prompt.

    Raises UserError if anything is missing or does not fit.
    """
    base: str | None = str(path)
    if adapter is None and kinds.is_adapter(Path(path).expanduser()):
        base, adapter = None, path
    name = str(adapter or base).rstrip("/")
    kinds.require(kinds.EMBEDDING, base, str(adapter) if adapter else None, overrides.get("task"))
    names = (base, str(adapter) if adapter else None)
    options = {"shared": shared, "dequantize": dequantize, "dtype": dtype}
    model, config, folder = loading.open_model(*names, **options, **overrides)
    return Model(model, config, config.tokenizer(folder), name, folder if adapter else None)
