"""Check that every library that loads an exported folder gives the original model's vectors.

    expected = vectors(unmerged.encode, config.prompts, limit)
    print(check_own(folder, expected, limit))                       # UserError if they are not close enough

Both sides compute in float32, so that the comparison is about weights and files, not about rounding.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_retrieval.backend import mx, nn

import numpy as np

from mlx_retrieval import backbones
from mlx_retrieval.backbones.decoder import Decoder
from mlx_retrieval.exporters import limits
from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.finite import NonFiniteError
from mlx_retrieval.models import pylate_files
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.hf_logging import quiet_transformers

# Errors that libraries raise for a folder they cannot use.
LIBRARY_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, IndexError)
WORDS = """a model of kidney stones in drinking water where the last bus leaves Zürich at 23:45 and pays 12.50 for two
tickets, because snow (wet, heavy) lay on every roof; nobody asked what heating oil costs per litre nowadays"""
COUNTS = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 28, 37, 50, 66, 88, 117, 156, 208)  # words
LONGEST = 1024  # tokens; a longer limit of a model is not checked
OTHER_SCRIPTS = ("def area(r):\n    return 3.14 * r ** 2", "Которая из книг? 何時に開きますか。 🚲")

Vectors = dict[str | None, np.ndarray]  # by prompt name: (N, D), N texts, or N tokens of all texts for late models


def check_texts(limit: int) -> list[str]:
    """Return 21 texts: one word to a few hundred, other scripts, and one over the limit (see LONGEST)."""
    words = WORDS.split()

    def of(count: int) -> str:
        return " ".join(words[(7 * count + 3 * i) % len(words)] for i in range(count))

    return [*map(of, COUNTS), *OTHER_SCRIPTS, of(min(limit, LONGEST) + 20)]


def vectors(encode: Callable, prompts: Iterable[str], limit: int) -> Vectors:
    """Encode the check's texts under every prompt and without one; fewer texts under the prompts of single tasks."""
    texts = check_texts(limit)
    results = {}
    for name in (None, *prompts):
        result = encode(texts if name in (None, "query", "document") else texts[1::4], name)
        if not isinstance(result, list):
            results[name] = result
        elif name is not None:  # late models: which tokens count is defined for queries and documents only
            results[name] = np.concatenate(result)
    return results


def compare(actual: Vectors, expected: Vectors) -> tuple[float, float]:
    """Return the (worst, mean) cosine. UserError if some are not finite or the shapes differ."""
    cosines = []
    for name, target in expected.items():
        if actual[name].shape != target.shape:
            raise UserError(f"vectors are {actual[name].shape} and should be {target.shape}: nothing was written")
        # Divided by the longer one's square: the cosine of unit vectors, and a difference in length counts as well.
        squares = np.maximum((actual[name] ** 2).sum(axis=1), (target**2).sum(axis=1))
        cosines.append((actual[name] * target).sum(axis=1) / np.maximum(squares, 1e-12))
    cosines = np.concatenate(cosines)
    if not np.isfinite(cosines).all():
        raise UserError("some vectors of the exported model are not finite: nothing was written")
    return float(cosines.min()), float(cosines.mean())


@contextmanager
def of_exported_model(kind: str) -> Iterator[None]:
    """Turn a NonFiniteError of this block into one about the exported model; `kind`: vectors or scores."""
    try:
        yield
    except NonFiniteError as error:
        raise UserError(
            f"some {kind} of the exported model are not finite, {error.first}: nothing was written. The original "
            "model's are: another --dtype has room for larger numbers (float16 ends at 65,504)"
        ) from error


def accept(actual: Vectors, expected: Vectors, reader: str, form: str = "float32") -> str:
    """Return a line with the worst cosine of the vectors that `reader` gave. UserError if it misses its limit.

    `form`: how the weights are stored, a key of `limits.LIMITS`.
    """
    worst, mean = compare(actual, expected)
    if worst < (least := limits.LIMITS[form].cosine):
        raise UserError(
            f"the check failed: {reader} gives a vector of cosine {worst:.6f} to that of the original model "
            f"(at least {least} is required for {form}{limits.advice(form)}); nothing was written"
        )
    return f"{reader}: worst cosine {worst:.6f} of at least {least}, mean {mean:.6f}"


def compare_quantised(actual: Vectors, expected: Vectors, form: str) -> tuple[str, str]:
    """Return a line with the worst cosine after quantising, and a warning if it misses its limit, or ""."""
    worst, mean = compare(actual, expected)
    least = limits.LIMITS[form].cosine
    line = f"quantised, against the original model: worst cosine {worst:.4f} of at least {least}, mean {mean:.4f}"
    if worst >= least:
        return line, ""
    return line, f"{form} miss their limit: a worst cosine of {worst:.4f}, at least {least}{limits.advice(form)}"


def release(model: nn.Module) -> None:
    """Free a model's weights, though compiled functions still refer to it: the next model needs the memory."""
    model.clear()
    mx.clear_cache()


def check_own(folder: Path, expected: Vectors, limit: int, reader: str = "embed.load", form: str = "float32") -> str:
    """Check the folder with this toolkit's own embedder; `form`: see `accept`."""
    model = embedder.load(folder)
    backbones.set_dtype(model.model.backbone, mx.float32)
    with of_exported_model("vectors"):
        actual = vectors(model.encode, model.config.prompts, limit)
    release(model.model)
    return accept(actual, expected, reader, form)


def check_sentence_transformers(folder: Path, expected: Vectors, limit: int, form: str) -> str:
    """Check the folder with sentence-transformers, if it is installed; `form`: see `accept`."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return "sentence-transformers is not installed: its vectors are not checked"
    import sentence_transformers
    import torch

    try:
        with quiet_transformers():
            options = {"device": "cpu", "local_files_only": True, "model_kwargs": {"dtype": torch.float32}}
            late = pylate_files.is_late(folder)
            kind = sentence_transformers.MultiVectorEncoder if late else sentence_transformers.SentenceTransformer
            model = kind(str(folder), **options)

        config = RetrievalConfig.read(folder)
        # It does not scale truncated vectors to unit length again; its cosines are the same.
        lengths = {"normalize_embeddings": True} if config.truncate_dim and config.normalize else {}

        def encode(texts: list[str], prompt: str | None) -> np.ndarray | list[np.ndarray]:
            method = {"query": model.encode_query, "document": model.encode_document}.get(prompt if late else None)
            if method is None:
                method = functools.partial(model.encode, prompt_name=prompt, **lengths)
            result = method(texts, batch_size=8, show_progress_bar=False)
            return [np.array(v.tolist(), np.float32) for v in result] if late else result

        actual = vectors(encode, [name for name in expected if name is not None], limit)
    except LIBRARY_ERRORS as error:
        raise UserError(f"sentence-transformers cannot use the folder ({type(error).__name__}: {error})") from error
    return accept(actual, expected, f"{kind.__name__} {sentence_transformers.__version__}", form)


def check_mlx_lm(folder: Path) -> str:
    """Check that mlx-lm loads the folder and, for a causal model, gives the same states as this toolkit."""
    import mlx_lm

    ids, lengths = mx.array([[3 + 5 * i % 97 for i in range(40)]]), mx.array([40])

    def states(decoder: Decoder) -> Vectors:
        backbones.set_dtype(decoder, mx.float32)
        backbones.dequantized.dequantize(decoder)
        return {None: np.array(decoder.hidden_states(ids, lengths)).reshape(1, -1)}

    own = backbones.load_backbone(folder)
    expected, bidirectional, config = states(own), own.bidirectional, own.config
    release(own)
    try:
        with quiet_transformers():
            model, _ = mlx_lm.load(str(folder))
    except LIBRARY_ERRORS as error:
        raise UserError(f"mlx_lm.load cannot load the folder ({type(error).__name__}: {error})") from error
    if bidirectional:
        return "mlx_lm.load: loads it, but as a causal model; use embed.load for vectors"
    return accept(states(Decoder(model, config)), expected, "mlx_lm.load, states")
