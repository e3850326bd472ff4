"""Every loss, and all that is added to one, is the same in 1, 4 and 16 micro-batches and over 2 and 3 ranks.

python -m pytest tests/training/test_ranks.py

The model is a table of vectors, one a letter, so that a step takes milliseconds. Its gradient of a whole batch is
compared. test_distributed.py has real processes.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

from mlx_retrieval.backend import mx, nn

import numpy as np
import pytest
from gist import guided_loss
from mlx.utils import tree_flatten
from simulated_ranks import on_ranks

import loss
from data_loader import make_batch
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.text_keys import vector_key
from mlx_retrieval.models.batching import Texts
from mlx_retrieval.models.heads import EmbeddingHead, LateHead, RetrievalModel, ScoreHead
from mlx_retrieval.models.pair_tokenizers import Sequences
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.defaults import resolve_defaults
from mlx_retrieval.training.gradient_cache import GradientCache, StepResult
from mlx_retrieval.training.objectives import BySource, make_objective
from mlx_retrieval.training.other_vectors import OtherVectors
from mlx_retrieval.training.rerank_batches import GroupMaker

SIZE = 12  # examples of a batch
WIDTH = 8  # of vectors
RNG = np.random.default_rng(0)


def letters() -> str:
    return "".join(chr(97 + i) for i in RNG.integers(0, 26, RNG.integers(2, 12)))


EXAMPLES = [
    Example(letters(), letters(), (letters(), letters()), 1 + i % 3, tuple(RNG.normal(size=3).tolist()))
    for i in range(SIZE)
]
SCORED = [example._replace(negatives=(), scores=(i % 7 / 6,)) for i, example in enumerate(EXAMPLES)]
JUDGED = [example._replace(scores=(3.0, 1.0, i % 2)) for i, example in enumerate(EXAMPLES)]  # by grades from 0 on


class Letters:
    """A tokenizer of texts, and of pairs of a reranker, whose tokens are letters."""

    def __call__(self, texts: list, name: str | None = None) -> Texts | Sequences:
        if name is None:
            pairs = [f"{query} {document}" for query, documents in texts for document in documents]
            return Sequences(self(pairs, "pair"), np.arange(len(pairs)), np.zeros(len(pairs), np.int32), 0)
        lengths = np.array([len(text) for text in texts], np.int32)
        ids = np.frombuffer("".join(texts).encode(), np.uint8).astype(np.int32)
        return Texts(ids, lengths, np.zeros_like(lengths), lengths)

    def ids_of(self, words: list) -> list[int]:
        return []


class Table(nn.Module):
    """A backbone whose state of a letter is a vector of its own."""

    layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH)),)  # they have a size, and compute nothing

    def __init__(self):
        super().__init__()
        self.table = mx.array(np.random.default_rng(1).normal(size=(128, WIDTH)).astype(np.float32))

    @property
    def trunk(self) -> nn.Module:
        return self

    def hidden_states(self, ids: mx.array, lengths: mx.array) -> mx.array:
        return self.table[ids]


@pytest.fixture(scope="module")
def models() -> dict[str, RetrievalModel]:
    mx.random.seed(0)
    heads = {"embed": EmbeddingHead(), "late": LateHead(), "rerank": ScoreHead(WIDTH, "mean")}
    return {task: RetrievalModel(Table(), head) for task, head in heads.items()}


def step(
    model: RetrievalModel, task: str, examples: list[Example], parts: int, source: int = -1, **changes
) -> StepResult:
    """Return loss and gradient of one batch in at least `parts` micro-batches; `source`: of a mixture, or -1."""
    settings = Settings(task=task, **changes)
    config = RetrievalConfig(task=task, reranker="cross-encoder" if task == "rerank" else "")
    resolve_defaults(settings, 1_000, config.reranker)
    vectors = OtherVectors(TEACHER, getattr(model, "projection", None), TEACHER)
    objective = make_objective(settings, config, Letters(), SimpleNamespace(has_scores=True), vectors)
    numbers = range(len(examples))
    if task == "rerank":
        rows, from_all = SimpleNamespace(format="pair"), settings.loss == "info_nce"
        batch = GroupMaker(rows, settings.random_negatives, from_all=from_all)(examples, numbers, Letters())
    else:
        batch = make_batch(examples, numbers, Letters())
    if source >= 0:
        batch = replace(batch, source=source)
        objective = BySource([objective if number == source else None for number in range(source + 1)])
    return GradientCache(model, objective, accumulation=parts, compile="off")(batch, seed=0)


class Teacher:
    """Vectors of a teacher that is wider than the model, or of a guide."""

    def of(self, keys: np.ndarray) -> np.ndarray:
        return np.stack([np.random.default_rng(abs(int(key))).normal(size=WIDTH + 3) for key in keys]).astype(
            np.float32
        )


TEACHER = Teacher()


def flat(grads: dict) -> np.ndarray:
    return np.concatenate([np.array(value).ravel() for _, value in sorted(tree_flatten(grads))])


def check_all_alike(compute) -> None:
    """`compute(parts)` gives the same loss and gradient for 1, 4 and 16 micro-batches, and on each of 2 and 3 ranks."""
    whole = compute(1)
    assert whole.micro_batches == 1 and np.linalg.norm(flat(whole.grads)) > 0
    results = [(compute(parts), parts) for parts in (4, 16)]
    for ranks, parts in ((2, 4), (3, 16)):
        by_rank = on_ranks(ranks, lambda parts=parts: compute(parts))
        assert all(np.array_equal(flat(other.grads), flat(by_rank[0].grads)) for other in by_rank)
        results.append((by_rank[0], parts))
    for result, least in results:
        assert result.micro_batches >= least
        assert result.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5, abs=1e-6)
        difference = np.linalg.norm(flat(result.grads) - flat(whole.grads)) / np.linalg.norm(flat(whole.grads))
        assert difference < 1e-5, difference


FOUR = {"directions": list(loss.DIRECTIONS)}
VECTORS = [
    {}, FOUR | {"mask_above": 0.05}, FOUR | {"guide": "a file"}, FOUR | {"denominator": "each"},
    {"hardness": 5.0, "hardness_of": "all"}, {"spread_weight": 0.5}, {"binary_weight": 1.0},
]  # fmt: skip
MORE = [
    *({"loss": name} for name in loss.CONTRASTIVE), {"positive_aware": "perc"}, {"margin_weight": 0.5}, FOUR,
    {"hardness": 5.0}, {"hardness": 5.0, "hardness_of": "in-batch"}, {"matryoshka_dims": [2, 4], "spread_weight": 0.5},
    {"loss": "kl_distill"}, {"loss": "margin_mse"},
]  # fmt: skip


def slow(cases) -> list:
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("changes", [*VECTORS, *slow(MORE)], ids=str)
def test_losses_of_vectors(models, changes):
    check_all_alike(lambda parts: step(models["embed"], "embed", EXAMPLES, parts, **changes))


@pytest.mark.parametrize("name", loss.SCORED_PAIRS)
def test_losses_of_scored_pairs(models, name):
    check_all_alike(lambda parts: step(models["embed"], "embed", SCORED, parts, loss=name))


LATE = [{"hardness": 5.0, "mask_above": 0.05}, *slow([{}, {"loss": "xtr", "xtr_k": 20}, {"loss": "kl_distill"}])]


@pytest.mark.parametrize("changes", LATE, ids=str)
def test_losses_of_late_interaction(models, changes):
    check_all_alike(lambda parts: step(models["late"], "late", EXAMPLES, parts, **changes))


NEW = ("info_nce", "lambda_loss", "list_mle")


@pytest.mark.parametrize("name", [*NEW, *slow(sorted({*loss.RERANKER_LOSSES} - {*NEW}))])
def test_losses_of_rerankers(models, name):
    of_labels = name in ("info_nce", "yes_no", "bce")  # 1 of the positive, 0 of each negative
    rows = [example._replace(scores=()) for example in EXAMPLES] if of_labels else JUDGED
    more = {"random_negatives": 3} if name == "info_nce" else {}
    check_all_alike(lambda parts: step(models["rerank"], "rerank", rows, parts, loss=name, **more))


@pytest.mark.parametrize("loss", ["info_nce", "distill_vectors"])
def test_vectors_of_a_teacher(loss):
    """Through a projection, whose gradient every rank has whole; alone and beside another loss."""
    model = RetrievalModel(Table(), EmbeddingHead())
    model.projection = nn.Linear(WIDTH, WIDTH + 3)
    more = {"loss": loss, "teacher_vectors": "a file", "teacher_projection": True}
    more |= {"distill_weight": 0.5} if loss == "info_nce" else {}
    check_all_alike(lambda parts: step(model, "embed", EXAMPLES, parts, **more))


def test_losses_by_source(models):
    """A batch of scored pairs and one of others, each learnt by the loss of its source."""
    names = ("info_nce", "cosent")
    for source, examples in enumerate((EXAMPLES, SCORED)):
        one, by_source = (
            partial(step, models["embed"], "embed", examples, loss=names[source], source=number)
            for number in (-1, source)
        )
        assert by_source(1).loss.item() == one(1).loss.item()
        check_all_alike(by_source)


def peers(torch, losses) -> list[tuple[dict, list[Example], object]]:
    """Return settings, examples, and a function that gives sentence-transformers' loss of unit vectors by columns."""
    plain = [example._replace(rank=1) for example in EXAMPLES]
    ranking = losses.MultipleNegativesRankingLoss
    all_four = tuple(name.replace("document", "doc").replace("-", "_to_") for name in loss.DIRECTIONS)
    modes = {"hard": "hard_negatives", "in-batch": "in_batch_negatives", "all": "all_negatives"}

    def harder(mode):
        return ranking(None, hardness_mode=mode, hardness_strength=5.0)

    def guided(columns, labels):
        texts = zip(*([e.query, e.positive, *e.negatives] for e in plain), strict=True)
        keys = [[vector_key(text, "document" if n else "query") for text in column] for n, column in enumerate(texts)]
        guide = [torch.tensor(TEACHER.of(column)) for column in keys]
        return guided_loss(("query-document", "query-query"), 0.05, 0.1)(columns, guide)

    def of(reference):
        return lambda columns, labels: reference.compute_loss_from_embeddings(columns, labels)

    def spread(columns, labels):
        apart = losses.GlobalOrthogonalRegularizationLoss(None)
        # Theirs is of columns; ours of all documents of the batch.
        terms = apart.compute_loss_from_embeddings([columns[0], torch.cat(columns[1:])])
        return ranking(None).compute_loss_from_embeddings(columns, labels) + 0.5 * sum(terms.values())

    return [
        ({}, plain, of(ranking(None))),
        ({"loss": "symmetric_info_nce"}, plain, of(losses.MultipleNegativesSymmetricRankingLoss(None))),
        (FOUR, plain, of(ranking(None, directions=all_four, partition_mode="joint"))),
        *(({"hardness": 5.0, "hardness_of": kind}, plain, of(harder(modes[kind]))) for kind in loss.HARDNESS_OF),
        ({"guide": "a file", "guide_margin": 0.1, "directions": list(loss.DIRECTIONS[:2])}, plain, guided),
        ({"spread_weight": 0.5}, plain, spread),
        ({"loss": "kl_distill", "temperature": 1.0}, plain, of(losses.DistillKLDivLoss(None))),
        ({"loss": "margin_mse", "temperature": 1.0}, JUDGED, of(losses.MarginMSELoss(None))),
        ({"loss": "cosent"}, SCORED, of(losses.CoSENTLoss(None))),
        ({"loss": "angle"}, SCORED, of(losses.AnglELoss(None))),
        ({"loss": "cosine_mse"}, SCORED, of(losses.CosineSimilarityLoss(None))),
    ]


@pytest.mark.slow
def test_gradients_are_those_of_sentence_transformers(models):
    """From rows to the gradient of the weights, in 1, 4 and 16 micro-batches and on 2 ranks, within 1e-5."""
    torch = pytest.importorskip("torch")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model = models["embed"]
    for changes, examples, reference in peers(torch, losses):
        table = torch.tensor(np.array(model.backbone.table), dtype=torch.float64, requires_grad=True)

        def embed(texts, table=table):
            means = [table[list(text.encode())].mean(0) for text in texts]
            return torch.nn.functional.normalize(torch.stack(means))

        texts = [[e.query, e.positive, *e.negatives] for e in examples]
        teacher = torch.tensor([e.scores for e in examples], dtype=torch.float64)
        labels = teacher[:, 0] if len(texts[0]) == 2 else teacher
        expected = reference([embed(column) for column in zip(*texts, strict=True)], labels)
        expected.backward()
        results = [step(model, "embed", examples, parts, **changes) for parts in (1, 4, 16)]
        results += on_ranks(2, lambda c=changes, e=examples: step(model, "embed", e, 4, **c))
        for result in results:
            assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6), changes
            difference = np.array(result.grads["backbone"]["table"]) - table.grad.numpy()
            assert np.linalg.norm(difference) < 1e-5 * np.linalg.norm(table.grad.numpy()), changes


def test_every_loss_is_here():
    of_vectors = {changes.get("loss", "info_nce") for changes in MORE}
    of_vectors |= {"xtr", "distill_vectors", *loss.SCORED_PAIRS}
    assert {*loss.LOSSES} == of_vectors | {*loss.RERANKER_LOSSES}
