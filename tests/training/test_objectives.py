"""From a batch to its loss: late interaction's own gradient, margin, distillation; what does not fit is refused.

python -m pytest tests/training/test_objectives.py
"""

from types import SimpleNamespace

from mlx_retrieval.backend import mx

import numpy as np
import pytest
import torch

import loss
from data_loader import Batch
from mlx_retrieval.models import maxsim
from mlx_retrieval.models.batching import Texts
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training import objectives
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.defaults import resolve_defaults
from mlx_retrieval.utils.errors import UserError

QUERIES, DOCUMENTS, LONGEST = (3, 5, 2), (6, 2, 9, 4), 12
SKIPPED = 7


def settled(**changes) -> Settings:
    """Settings with the loss and temperature of a model of 1,000 parameters where none is given."""
    settings = Settings(**changes)
    resolve_defaults(settings, 1_000)
    return settings


@pytest.fixture
def batch() -> Batch:
    """Three queries, four documents, one of them a hard negative; all judged by a teacher but the last query's."""
    lengths = np.array([*QUERIES, *DOCUMENTS], np.int32)
    ids = np.arange(lengths.sum(), dtype=np.int32) % 10
    texts = Texts(ids, lengths, np.zeros_like(lengths), lengths)
    return Batch(
        texts,
        len(QUERIES),
        query=np.array([0, 1, 2], np.int32),
        document=np.array([0, 1, 2], np.int32),
        rank=np.array([1, 2, 1], np.int32),
        rows=np.arange(3),
        scored=np.array([[0, 3], [1, 3], [-1, -1]], np.int32),
        scores=np.array([[3.0, 1.0], [0.5, 0.6], [0.0, 0.0]], np.float32),
        known=np.array([[0, 0], [1, 1], [2, 2]], np.int32),
        mined=np.array([[0, 3]], np.int32),
        keys=np.arange(7),
    )


@pytest.fixture
def representations(batch) -> mx.array:
    """Token vectors, padded to more than the longest text as micro-batches are."""
    rng = np.random.default_rng(0)
    made = rng.normal(size=(len(batch.texts), LONGEST, 16)).astype(np.float32)
    made /= np.linalg.norm(made, axis=-1, keepdims=True)
    made[np.arange(LONGEST) >= batch.texts.lengths[:, None]] = 0
    return mx.array(made)


@pytest.mark.parametrize("changes", [
    {}, {"loss": "symmetric_info_nce"}, {"loss": "hard_negative_info_nce"}, {"positive_aware": "perc"},
    {"directions": ["query-document", "document-query"], "mask_above": 0.1, "hardness": 5.0},
    {"margin_weight": 0.5}, {"loss": "kl_distill"}, {"loss": "margin_mse"}, {"loss": "xtr", "xtr_k": 4},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("skipped", [[], [SKIPPED]])
def test_the_lean_gradient_is_the_usual_one(batch, representations, changes, skipped):
    """Every late objective: value and gradient as `mx.value_and_grad` gives them."""
    objective = objectives.LateObjective(settled(task="late", **changes), skipped, "mean")
    expected = mx.value_and_grad(objective)(representations, batch)
    found = objective.loss_and_grad(representations, batch)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(mine), np.array(theirs), rtol=1e-5, atol=1e-7)
    gradient = np.array(found[1])
    counts = np.arange(LONGEST) < batch.texts.lengths[:, None]
    if skipped:  # in documents, not in queries
        hit = np.zeros_like(counts)
        hit[counts] = batch.texts.ids == SKIPPED
        assert hit[: batch.queries].any() and hit[batch.queries :].any()
        counts[batch.queries :] &= ~hit[batch.queries :]
    assert not gradient[~counts].any() and gradient[counts].any()


def test_skipped_tokens_do_not_count(batch, representations):
    objective = objectives.LateObjective(settled(task="late"), [SKIPPED], "mean")
    queries, documents = objective._sides(representations, batch)
    assert queries.shape == (3, 5, 16) and documents.shape == (4, 9, 16)
    counted = np.array(maxsim.counted(documents))
    kept = [
        [token != SKIPPED for token in part]
        for part in np.split(batch.texts.ids, batch.texts.offsets[1:-1])[batch.queries :]
    ]
    assert [row[:length].tolist() for row, length in zip(counted, DOCUMENTS, strict=True)] == kept


def test_margin_by_hand():
    scores = mx.array([[0.9, 0.5, 0.8], [0.1, 0.9, 0.95], [0.3, 0.2, 0.1]])
    allowed = mx.array([[False, True, True], [True, False, True], [False, False, False]])
    targets = mx.array([0, 1, 0])
    found = loss.margin(scores, targets, allowed, margin=0.2)
    assert found.item() == pytest.approx((0.1 + 0.25 + 0.0) / 3, rel=1e-5)
    gradient = np.array(mx.grad(lambda s: loss.margin(s, targets, allowed, margin=0.2))(scores))
    np.testing.assert_allclose(gradient * 3, [[-1, 0, 1], [0, -1, 1], [0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize(
    "kept",
    [{"positive_aware": "perc"}, {"positive_aware": "abs", "positive_aware_margin": 0.05}, {"mask_above": 0.0}],
    ids=str,
)
def test_the_margin_is_on_the_hardest_negative_that_counts(batch, kept):
    """Regression: it was on the one that the filter takes for an answer."""
    scores = mx.array([[0.5, 0.4, 0.3, 0.9], [0.1, 0.8, 0.1, 0.1], [0.1, 0.1, 0.6, 0.1]])
    alone, both = (
        objectives.EmbedObjective(settled(margin_weight=weight, **kept)).loss_of(batch, None, None, lambda *_: scores)
        for weight in (0.0, 1.0)
    )
    weights = 1 / np.log2(1 + batch.rank)
    assert (both - alone).item() == pytest.approx((0.2 - (0.5 - 0.4)) / weights.sum(), rel=1e-4)


def test_distillation_is_torchs_divergence():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 6)).astype(np.float32)
    judged = np.array([[0, 2, 5], [1, 3, -1], [4, -1, -1], [-1, -1, -1]])
    teacher = rng.normal(size=(4, 3)).astype(np.float32) * 3
    student = torch.tensor(scores, requires_grad=True)
    total = 0.0
    for row in range(2):
        columns = judged[row][judged[row] >= 0]
        log_student = torch.log_softmax(student[row, columns] / 0.5, dim=0)
        log_teacher = torch.log_softmax(torch.tensor(teacher[row, : len(columns)]) / 2.0, dim=0)
        total = total + torch.nn.functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    (total / 4).backward()

    def distil(scores: mx.array) -> mx.array:
        return loss.kl_distill(scores, mx.array(judged), mx.array(teacher), None, 0.5, 2.0)

    found, gradient = mx.value_and_grad(distil)(mx.array(scores))
    assert found.item() == pytest.approx(total.item() / 4, rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), student.grad.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"loss": "kl_distill"}, {}, "every row needs scores"),
        ({"loss": "margin_mse"}, {}, "every row needs scores"),
        ({"loss": "xtr"}, {}, "it needs --task late"),
        ({"spread_weight": 1.0}, {"normalize": False}, "--spread-weight needs vectors of unit length"),
        ({"loss": "nt_xent"}, {"task": "late"}, "takes neither"),
        ({"matryoshka_dims": [8]}, {"task": "late"}, "takes neither"),
    ],
)
def test_what_does_not_fit_is_refused(changes, config, message):
    rows = SimpleNamespace(has_scores=False)
    with pytest.raises(UserError, match=message):
        objectives.make_objective(settled(**changes), RetrievalConfig(**config), None, rows)
