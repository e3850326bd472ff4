"""Whether an exported reranker gives the scores of the model that it was made of, in everything that loads it.

    groups = check_groups(limit)
    expected = scores(reranker, groups)
    print(accept(found, expected, "CrossEncoder", tolerance=EXACT))          # UserError where they are not near enough

All sides compute in float32, so that what is compared is the weights and files. Used by rerankers/exporting.py; tested
by `python -m pytest tests/test_export_reranker.py`.
"""

import importlib.util
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np

from mlx_retrieval import backbones, backend
from mlx_retrieval.exporters import parity
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.models.pair_tokenizers import Group
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.hf_logging import quiet_transformers

# Between two that compute with the same weights; GPUs may round the factors of float32 products (TF32).
EXACT = 1e-2 if backend.IS_GPU else 1e-4
# To the model that was exported, of one whose merged weights were rounded once more.
ROUNDED = {mx.float32: EXACT, mx.float16: 0.02, mx.bfloat16: 0.1}
FIRST_WITH_JUDGES = 6  # version of sentence-transformers whose CrossEncoder takes language models
QUERY = "where does the last bus leave?"
FEW = 4  # prompts whose whole vocabulary is computed


def check_groups(limit: int) -> list[Group]:
    """Sixteen pairs: an empty document, one word to a few hundred, other scripts, and some over the limit."""
    texts = parity.check_texts(limit)
    longest = texts[-1]
    return [(QUERY, ["", *texts[:-1:2], longest]), (texts[5], texts[1:4]), (longest, [longest, texts[2]])]


def scores(reranker: Reranker, groups: list[Group]) -> np.ndarray:
    """(N,) float32 of all groups' documents, one group after another."""
    return np.concatenate(reranker.score_groups(groups))


def difference(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """(worst, mean) difference of scores; UserError where some are not finite or of another number."""
    if found.shape != expected.shape:
        raise UserError(f"scores are {found.shape} and should be {expected.shape}: nothing was written")
    if not np.isfinite(found).all():
        raise UserError("some scores of the exported model are not finite: nothing was written")
    apart = np.abs(found - expected)
    return float(apart.max()), float(apart.mean())


def accept(found: np.ndarray, expected: np.ndarray, reader: str, tolerance: float = EXACT) -> str:
    """The line that says how near `reader` came; UserError where a score is off by more than `tolerance`.

    Scores that are no probabilities may be off by that part of their range.
    """
    worst, _ = difference(found, expected)
    most = tolerance * max(1.0, float(np.ptp(expected)))
    if worst > most:
        raise UserError(
            f"the check failed: {reader} gives a score that is {worst:.2g} from that of the model that was exported "
            f"(at most {most:.2g}); nothing was written"
        )
    return f"{reader}: worst difference {worst:.1e} of at most {most:.0e}"


def own_scores(folder: Path, groups: list[Group]) -> np.ndarray:
    """What `rerank.Reranker` makes of the folder."""
    reranker = Reranker(str(folder))
    backbones.set_dtype(reranker.model.backbone, mx.float32)
    try:
        return scores(reranker, groups)
    except FloatingPointError as error:
        raise UserError(f"{error}: nothing was written") from error
    finally:
        parity.release(reranker.model)


def check_cross_encoder(folder: Path, groups: list[Group], expected: np.ndarray, judge: bool) -> str:
    """`accept` of what sentence-transformers makes of the folder; `judge`: a language model."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return "sentence-transformers is not installed: what it makes of the folder is not checked"
    import sentence_transformers
    import torch

    version = sentence_transformers.__version__
    if judge and int(version.partition(".")[0]) < FIRST_WITH_JUDGES:
        return f"sentence-transformers {version} takes no language models, {FIRST_WITH_JUDGES} does: not checked"
    pairs = [(query, document) for query, documents in groups for document in documents]
    try:
        with quiet_transformers():
            options = {"device": "cpu", "local_files_only": True, "model_kwargs": {"dtype": torch.float32}}
            model = sentence_transformers.CrossEncoder(str(folder), **options)
            found = np.array(model.predict(pairs, batch_size=8, show_progress_bar=False).tolist(), np.float32)
    except parity.LIBRARY_ERRORS as error:
        raise UserError(f"sentence-transformers cannot use the folder ({type(error).__name__}: {error})") from error
    return accept(found, expected, f"CrossEncoder {version}")


def check_mlx_lm(folder: Path, groups: list[Group], expected: np.ndarray) -> str:
    """`accept` of the answers of mlx-lm's model to the shortest prompts; it computes the whole vocabulary's logits."""
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
    found = []
    for i in short:
        ids = texts.ids[texts.offsets[i] : texts.offsets[i + 1]]
        no, yes = (model(mx.array(ids)[None])[0, -1, token].item() for token in tokenizer.answers)
        found.append(1 / (1 + np.exp(no - yes)) if config.activation else yes - no)
    parity.release(model)
    return accept(np.array(found, np.float32), expected[short], "mlx_lm.load, its yes against its no")
