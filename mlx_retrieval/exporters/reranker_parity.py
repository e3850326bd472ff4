"""Check that every library that loads an exported reranker gives the original model's scores.

    groups = check_groups(limit)
    expected = scores(reranker, groups)
    print(accept(actual, expected, "CrossEncoder"))         # UserError if they are not close enough

All sides compute in float32, so that the comparison is about weights and files, not about rounding.
"""

import importlib.util
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np

from mlx_retrieval import backbones, backend
from mlx_retrieval.exporters import limits, parity
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.models.pair_tokenizers import Group
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.hf_logging import quiet_transformers

# Tolerance between two libraries with the same weights; GPUs may round the factors of float32 products (TF32).
EXACT = 1e-2 if backend.IS_GPU else limits.LIMITS["float32"].score
FIRST_WITH_JUDGES = 6  # first version of sentence-transformers whose CrossEncoder supports language models
QUERY = "where does the last bus leave?"
FEW = 4  # prompts to check with mlx-lm, which computes the logits of the whole vocabulary


def check_groups(limit: int) -> list[Group]:
    """Return 16 pairs: an empty document, one word to a few hundred, other scripts, and some over the limit."""
    texts = parity.check_texts(limit)
    longest = texts[-1]
    return [(QUERY, ["", *texts[:-1:2], longest]), (texts[5], texts[1:4]), (longest, [longest, texts[2]])]


def scores(reranker: Reranker, groups: list[Group]) -> np.ndarray:
    """Return the scores of all groups' documents, one group after another: (N,) float32."""
    return np.concatenate(reranker.score_groups(groups))


def difference(actual: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Return the (worst, mean) difference of scores. UserError if some are not finite or the numbers of them differ."""
    if actual.shape != expected.shape:
        raise UserError(f"scores are {actual.shape} and should be {expected.shape}: nothing was written")
    if not np.isfinite(actual).all():
        raise UserError("some scores of the exported model are not finite: nothing was written")
    differences = np.abs(actual - expected)
    return float(differences.max()), float(differences.mean())


def accept(actual: np.ndarray, expected: np.ndarray, reader: str, form: str = "float32") -> str:
    """Return a line with the worst difference of the scores that `reader` gave. UserError if it misses its limit.

    For scores that are not probabilities, the limit is a share of their range. `form`: how the weights are stored, a
    key of `limits.LIMITS`.
    """
    worst, mean = difference(actual, expected)
    if worst > (limit := allowed(expected, form)):
        raise UserError(
            f"the check failed: {reader} gives a score that differs by {worst:.2g} from that of the original model "
            f"(at most {limit:.2g} is allowed for {form}{limits.advice(form)}); nothing was written"
        )
    return f"{reader}: worst difference {worst:.1e} of at most {limit:.0e}, mean {mean:.1e}"


def compare_quantised(actual: np.ndarray, expected: np.ndarray, form: str) -> tuple[str, str]:
    """Return a line with the worst difference after quantising, and a warning if it misses its limit, or ""."""
    worst, mean = difference(actual, expected)
    most = allowed(expected, form)
    line = f"quantised, against the original model: worst difference {worst:.4f} of at most {most:.2g}, mean {mean:.4f}"
    if worst <= most:
        return line, ""
    return line, f"{form} miss their limit: a worst difference of {worst:.4f}, at most {most:.2g}{limits.advice(form)}"


def allowed(expected: np.ndarray, form: str) -> float:
    """Return the largest difference allowed; of scores that are not probabilities, it is a share of their range."""
    return max(EXACT, limits.LIMITS[form].score) * max(1.0, float(np.ptp(expected)))


def own_scores(folder: Path, groups: list[Group]) -> np.ndarray:
    """Return the scores that this toolkit's own reranker gives with the folder."""
    reranker = Reranker(str(folder))
    backbones.set_dtype(reranker.model.backbone, mx.float32)
    try:
        with parity.of_exported_model("scores"):
            return scores(reranker, groups)
    finally:
        parity.release(reranker.model)


def check_cross_encoder(folder: Path, groups: list[Group], expected: np.ndarray, judge: bool) -> str:
    """Check the folder with sentence-transformers, if it is installed; see `accept`.

    `judge`: the model is a language model that answers yes or no.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        return "sentence-transformers is not installed: its scores are not checked"
    import sentence_transformers
    import torch

    version = sentence_transformers.__version__
    if judge and int(version.partition(".")[0]) < FIRST_WITH_JUDGES:
        return (
            f"sentence-transformers {version} does not support language models, {FIRST_WITH_JUDGES} does: not checked"
        )
    pairs = [(query, document) for query, documents in groups for document in documents]
    try:
        with quiet_transformers():
            options = {"device": "cpu", "local_files_only": True, "model_kwargs": {"dtype": torch.float32}}
            model = sentence_transformers.CrossEncoder(str(folder), **options)
            actual = np.array(model.predict(pairs, batch_size=8, show_progress_bar=False).tolist(), np.float32)
    except parity.LIBRARY_ERRORS as error:
        raise UserError(f"sentence-transformers cannot use the folder ({type(error).__name__}: {error})") from error
    return accept(actual, expected, f"CrossEncoder {version}")


def check_mlx_lm(folder: Path, groups: list[Group], expected: np.ndarray) -> str:
    """Check the answers of mlx-lm's model to the FEW shortest prompts; see `accept`."""
    import mlx_lm

    config = RetrievalConfig.read(folder)
    tokenizer = config.tokenizer(folder)
    texts = tokenizer(groups).texts
    short = np.argsort(texts.lengths, kind="stable")[:FEW]
    try:
        with quiet_transformers():
            model, _ = mlx_lm.load(str(folder))
    except parity.LIBRARY_ERRORS as error:
        raise UserError(f"mlx_lm.load cannot load the folder ({type(error).__name__}: {error})") from error
    backbones.set_dtype(model, mx.float32)
    backbones.dequantized.dequantize(model)
    actual = []
    for i in short:
        ids = texts.ids[texts.offsets[i] : texts.offsets[i + 1]]
        no, yes = (model(mx.array(ids)[None])[0, -1, token].item() for token in tokenizer.answers)
        actual.append(1 / (1 + np.exp(no - yes)) if config.activation else yes - no)
    parity.release(model)
    return accept(np.array(actual, np.float32), expected[short], "mlx_lm.load, its yes against its no")
