"""Whether an exported folder gives the vectors of the model that it was made of, in everything that loads it.

    expected = vectors(unmerged.encode, config.prompts, limit)
    print(check_own(folder, expected, limit))                       # UserError where they are not near enough

Both sides compute in float32, so that what is compared is the weights and files. Used by export.py; tested by
`python -m pytest tests/test_export.py`.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

from mlx_retrieval.backend import mx, nn

import numpy as np

from mlx_retrieval import backbones
from mlx_retrieval.backbones.decoder import Decoder
from mlx_retrieval.inference import embedder
from mlx_retrieval.models import pylate_files
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.hf_logging import quiet_transformers

LEAST_COSINE = 0.999  # below which what was written is not what was trained
# What libraries raise for a folder that they cannot use.
LIBRARY_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, IndexError)
WORDS = """a model of kidney stones in drinking water where the last bus leaves Zürich at 23:45 and pays 12.50 for two
tickets, because snow (wet, heavy) lay on every roof; nobody asked what heating oil costs per litre nowadays"""
COUNTS = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 28, 37, 50, 66, 88, 117, 156, 208)  # words
LONGEST = 1024  # tokens; a model's limit is checked only where it is no longer
OTHER_SCRIPTS = ("def area(r):\n    return 3.14 * r ** 2", "Которая из книг? 何時に開きますか。 🚲")

Vectors = dict[str | None, np.ndarray]  # (N, D) by the prompt's name; of late models N tokens


def check_texts(limit: int) -> list[str]:
    """Twenty-one texts: one word to a few hundred, other scripts, and one over the limit, if that is within reach."""
    words = WORDS.split()

    def of(count: int) -> str:
        return " ".join(words[(7 * count + 3 * i) % len(words)] for i in range(count))

    return [*map(of, COUNTS), *OTHER_SCRIPTS, of(min(limit, LONGEST) + 20)]


def vectors(encode: Callable, prompts: Iterable[str], limit: int) -> Vectors:
    """Of the check's texts under every prompt and without; fewer texts under a task's own prompt."""
    texts = check_texts(limit)
    whole, found = (None, "query", "document"), {}
    for name in (None, *prompts):
        result = encode(texts if name in whole else texts[1::4], name)
        if not isinstance(result, list):
            found[name] = result
        elif name is not None:  # a late model's; what counts of a text that is neither query nor document is open
            found[name] = np.concatenate(result)
    return found


def compare(found: Vectors, expected: Vectors) -> tuple[float, float]:
    """(worst, mean) cosine; UserError where some are not finite or of another size."""
    cosines = []
    for name, wanted in expected.items():
        if found[name].shape != wanted.shape:
            raise UserError(f"vectors are {found[name].shape} and should be {wanted.shape}: nothing was written")
        # The square of the longer one: of unit vectors this is the cosine, and others must not differ in length either.
        squares = np.maximum((found[name] ** 2).sum(axis=1), (wanted**2).sum(axis=1))
        cosines.append((found[name] * wanted).sum(axis=1) / np.maximum(squares, 1e-12))
    cosines = np.concatenate(cosines)
    if not np.isfinite(cosines).all():
        raise UserError("some vectors of the exported model are not finite: nothing was written")
    return float(cosines.min()), float(cosines.mean())


def accept(found: Vectors, expected: Vectors, reader: str) -> str:
    """The line that says how near `reader` came to what is expected; UserError where it is not near enough."""
    worst, _ = compare(found, expected)
    if worst < LEAST_COSINE:
        raise UserError(
            f"the check failed: {reader} gives a vector of cosine {worst:.6f} to that of the model that was exported "
            f"(at least {LEAST_COSINE}); nothing was written"
        )
    return f"{reader}: worst cosine {worst:.6f}"


def release(model: nn.Module) -> None:
    """Take a model's weights from it: the next one needs their memory, and compiled functions hold on to the model."""
    model.clear()
    mx.clear_cache()


def check_own(folder: Path, expected: Vectors, limit: int, reader: str = "embed.load") -> str:
    """`accept` of what embed.py makes of the folder."""
    model = embedder.load(folder)
    backbones.set_dtype(model.model.backbone, mx.float32)
    found = vectors(model.encode, model.config.prompts, limit)
    release(model.model)
    return accept(found, expected, reader)


def check_sentence_transformers(folder: Path, expected: Vectors, limit: int) -> str:
    """`accept` of what sentence-transformers makes of the folder."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return "sentence-transformers is not installed: what it makes of the folder is not checked"
    import sentence_transformers
    import torch

    try:
        with quiet_transformers():
            options = {"device": "cpu", "local_files_only": True, "model_kwargs": {"dtype": torch.float32}}
            late = pylate_files.is_late(folder)
            kind = sentence_transformers.MultiVectorEncoder if late else sentence_transformers.SentenceTransformer
            model = kind(str(folder), **options)

        def encode(texts: list[str], prompt: str | None) -> np.ndarray | list[np.ndarray]:
            method = {"query": model.encode_query, "document": model.encode_document}.get(prompt if late else None)
            if method is None:
                method = functools.partial(model.encode, prompt_name=prompt)
            result = method(texts, batch_size=8, show_progress_bar=False)
            return [np.array(v.tolist(), np.float32) for v in result] if late else result

        found = vectors(encode, [name for name in expected if name is not None], limit)
    except LIBRARY_ERRORS as error:
        raise UserError(f"sentence-transformers cannot use the folder ({type(error).__name__}: {error})") from error
    return accept(found, expected, f"{kind.__name__} {sentence_transformers.__version__}")


def check_mlx_lm(folder: Path) -> str:
    """Whether mlx-lm loads the folder, and, where it is causal, gives the states that the toolkit gives."""
    import mlx_lm

    ids, lengths = mx.array([[3 + 5 * i % 97 for i in range(40)]]), mx.array([40])

    def states(decoder: Decoder) -> Vectors:
        backbones.set_dtype(decoder, mx.float32)
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
        return "mlx_lm.load: loads it, but as a causal model; its vectors come from embed.load"
    return accept(states(Decoder(model, config)), expected, "mlx_lm.load, states")
