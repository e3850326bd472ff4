"""Training rerankers: rows to groups, losses over groups, exact micro-batches, adapters that score as trained ones do.

python -m pytest tests/training/test_rerank_training.py
"""

import itertools
import json
import math
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from random_rerankers import ANSWERS, ASKED, DOCUMENTS, QUERY, causal, cross_encoder, graded_rows, listwise, quantised

import loss
import train
from data_loader import pack, unpack
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.evaluation.reranking import evaluate_reranker
from mlx_retrieval.evaluation.results import METRICS, Evaluation
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.models import pair_tokenizers
from mlx_retrieval.models.pair_tokenizers import CrossEncoderTokenizer
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.evaluations import Evaluations, Step
from mlx_retrieval.training.objectives import RerankObjective
from mlx_retrieval.training.rerank_batches import GroupBatch, GroupMaker
from mlx_retrieval.training.retrieval_run import RetrievalRun
from mlx_retrieval.utils.errors import UserError

KINDS = ("qwen3", "cross-encoder", "listwise")

# --- losses ---


@pytest.fixture
def scored():
    """Scores, labels and which of them count: groups of 4, 2, 1 and 3 documents."""
    rng = np.random.default_rng(0)
    real = np.arange(4)[None] < np.array([4, 2, 1, 3])[:, None]
    scores = np.where(real, rng.normal(size=(4, 4)) * 2, 77.0).astype(np.float32)
    labels = np.array([[1, 0, 0.5, 0], [0, 1, 9, 9], [1, 9, 9, 9], [0, 0, 0, 9]], np.float32)
    return scores, labels, real


def reference(name: str, scores, labels, real) -> torch.Tensor:
    """Each loss as its paper has it, group by group."""
    if name == "list_bce":
        return sum(reference(part, scores, labels, real) for part in ("binary_cross_entropy", "list_softmax"))
    total, count = 0.0, 0
    for row, judged, here in zip(scores, torch.tensor(labels), torch.tensor(real), strict=True):
        s, y = row[here], judged[here]
        if name == "binary_cross_entropy":
            total = total + torch.nn.functional.binary_cross_entropy_with_logits(s, y, reduction="sum")
            count += len(s)
        elif name == "list_softmax" and y.sum() > 0:
            total, count = total + torch.nn.functional.cross_entropy(s[None], (y / y.sum())[None]), count + 1
        elif name == "ranknet":
            pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if y[i] > y[j]]
            costs = [
                torch.nn.functional.binary_cross_entropy_with_logits(s[i] - s[j], torch.ones(())) for i, j in pairs
            ]
            total, count = (total + sum(costs) / len(costs), count + 1) if pairs else (total, count)
        elif name == "list_mle" and len(s) > 1:
            drawn = s[torch.argsort(-y, stable=True)]
            total = total - sum(torch.log_softmax(drawn[i:], 0)[0] for i in range(len(s)))
            count += 1
        elif name == "lambda_loss":
            ideal = sum((2**g - 1) / math.log2(2 + i) for i, g in enumerate(sorted(y.tolist(), reverse=True)))
            rank = {int(i): r for r, i in enumerate(torch.argsort(-s), start=1)}
            for i, j in itertools.permutations(range(len(s)), 2):
                if y[i] > y[j]:
                    swap = abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
                    apart = abs(rank[i] - rank[j])
                    bound = 1 / math.log2(1 + apart) - 1 / math.log2(2 + apart)
                    gain = float(2 ** y[i] - 2 ** y[j]) / ideal
                    total = total + (swap + 10 * bound) * gain * torch.log2(1 + torch.exp(s[j] - s[i]))
                    count += 1
        elif name == "margin_mse" and len(s) > 1:
            best = int(y.argmax())
            rest = [i for i in range(len(s)) if i != best]
            margins, wanted = s[best] - s[rest], y[best] - y[rest]
            total, count = total + torch.nn.functional.mse_loss(margins, wanted), count + 1
    return total / count


@pytest.mark.parametrize("name", sorted({function.__name__ for function in loss.GROUPS.values()}))
def test_losses_over_groups(name, scored):
    """Value and gradient against torch; what is no document changes nothing."""
    scores, labels, real = scored
    theirs = torch.tensor(scores, requires_grad=True)
    expected = reference(name, theirs, labels, real)
    expected.backward()
    function = getattr(loss, name)
    found, gradient = mx.value_and_grad(lambda s: function(s, mx.array(labels), mx.array(real)))(mx.array(scores))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), theirs.grad.numpy(), atol=1e-6)


class Scores:
    """A stand-in for a CrossEncoder: its score of a pair is the number that the document spells."""

    num_labels, device = 1, "cpu"

    def __init__(self):
        self.leaves = {}

    def preprocess(self, pairs, **_) -> dict[str, list[str]]:
        return {"documents": [document for _, document in pairs]}

    def __call__(self, inputs: dict[str, list[str]]) -> dict[str, torch.Tensor]:
        numbers = inputs["documents"]
        leaves = [self.leaves.setdefault(n, torch.tensor(float(n), requires_grad=True)) for n in numbers]
        return {"scores": torch.stack(leaves)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs", "arguments"),
    [("lambda_loss", "LambdaLoss", {}), ("list_mle", "ListMLELoss", {"respect_input_order": False})],
)
def test_losses_are_those_of_sentence_transformers(name, theirs, arguments):
    """Value and gradient, in groups of 6, 2 and 4 documents, grades from 0 to 3 without ties."""
    from sentence_transformers.cross_encoder import losses

    rng = np.random.default_rng(1)
    real = np.arange(6)[None] < np.array([6, 2, 4])[:, None]
    scores = np.where(real, rng.normal(size=(3, 6)) * 3, 9.0).astype(np.float32)
    labels = np.where(real, rng.permuted(np.tile(np.linspace(0, 3, 6), (3, 1)), axis=1), 5.0).astype(np.float32)
    spelt = [[repr(float(s)) for s in row[here]] for row, here in zip(scores, real, strict=True)]
    judged = [torch.tensor(row[here]) for row, here in zip(labels, real, strict=True)]
    model = Scores()
    expected = getattr(losses, theirs)(model, **arguments)([["q"] * 3, spelt], judged)
    expected.backward()
    function = getattr(loss, name)
    value, gradient = mx.value_and_grad(lambda s: function(s, mx.array(labels), mx.array(real)))(mx.array(scores))
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = [model.leaves[spelling].grad.item() for row in spelt for spelling in row]
    np.testing.assert_allclose(np.array(gradient)[real], wanted, atol=1e-5)
    assert not np.array(gradient)[~real].any()


def from_pairs(logits: dict[tuple[str, str], float], columns: list[list[str]]) -> tuple[float, dict]:
    """Return the loss of sentence-transformers over all in-batch documents, and its gradient by pair.

    `columns`: queries, positives and negatives, as its trainer gives them.
    """
    from sentence_transformers.cross_encoder.losses import MultipleNegativesRankingLoss

    leaves = {pair: torch.tensor(value, requires_grad=True) for pair, value in logits.items()}
    theirs = MultipleNegativesRankingLoss.__new__(MultipleNegativesRankingLoss)  # its own takes real models only
    torch.nn.Module.__init__(theirs)
    theirs.num_negatives, theirs.scale, theirs.activation_fn = None, 10.0, torch.nn.Sigmoid()
    theirs.cross_entropy_loss = torch.nn.CrossEntropyLoss()
    theirs.call_model_with_pairs = lambda pairs, **_: torch.stack([leaves[pair] for pair in pairs])
    value = theirs(columns, None)
    value.backward()
    return value.item(), {pair: leaf.grad for pair, leaf in leaves.items()}


class Spelt:
    """A tokenizer of one text a pair, numbered in order."""

    def __call__(self, groups):
        count = sum(len(documents) for _, documents in groups)
        return pair_tokenizers.Sequences(None, np.arange(count), np.zeros(count, int), 0)


@pytest.mark.slow
def test_info_nce_is_that_of_sentence_transformers(write_rows):
    """With all documents of the batch: value and gradient of five queries with two negatives each."""
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negatives": [f"m{i}", f"n{i}"]} for i in range(5)]
    columns = [[row["query"] for row in rows], [row["positive"] for row in rows]]
    columns += [[row["negatives"][j] for row in rows] for j in range(2)]
    documents = [text for column in columns[1:] for text in column]
    rng = np.random.default_rng(0)
    logits = {(query, text): float(rng.normal() * 3) for query in columns[0] for text in documents}
    expected, gradient = from_pairs(logits, columns)

    read = Rows([write_rows(rows)])
    maker = GroupMaker(read, random_negatives=99, from_all=True)
    examples = [read[i] for i in range(5)]
    batch = maker(examples, range(5), Spelt())
    pairs = [(e.query, text) for i, e in enumerate(examples) for text in maker.group(examples, i)[0]]
    objective = RerankObjective(Settings(task="rerank", loss="info_nce", temperature=0.1))
    representations = mx.array([logits[pair] for pair in pairs])[:, None]
    value, grads = mx.value_and_grad(lambda r: objective(r, batch))(representations)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    wanted = [0.0 if gradient[pair] is None else gradient[pair].item() for pair in pairs]
    np.testing.assert_allclose(np.array(grads)[:, 0], wanted, atol=1e-5)
    assert len(pairs) == len({*pairs}) == 5 * 15


@pytest.mark.parametrize("bounded", [True, False])
def test_info_nce_against_torch(scored, bounded):
    """Value and gradient in groups of several sizes; cosines are compared as they are."""
    scores, _, real = scored
    labels = np.zeros_like(scores)
    labels[:, 0] = 1
    theirs = torch.tensor(scores, requires_grad=True)
    compared = (theirs.sigmoid() if bounded else theirs) / 0.1
    rows = [compared[i][torch.tensor(here)] for i, here in enumerate(real)]
    target = torch.tensor([0])
    expected = sum(torch.nn.functional.cross_entropy(row[None], target) for row in rows) / len(rows)
    expected.backward()
    judged = (mx.array(labels), mx.array(real))
    value, grads = mx.value_and_grad(lambda s: loss.reranker_info_nce(s, *judged, 0.1, bounded))(mx.array(scores))
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(np.array(grads), theirs.grad.numpy(), atol=1e-5)


def test_documents_of_other_rows_are_drawn_for_info_nce(write_rows):
    """From positives and negatives alike, a chosen number, none of them an answer; the same batch draws the same."""
    rows = [{"query": f"q{i % 4}", "positive": f"p{i}", "negatives": [f"n{i}"]} for i in range(8)]
    read = Rows([write_rows(rows)])
    examples = [read[i] for i in range(8)]
    maker = GroupMaker(read, random_negatives=3, from_all=True)
    drawn = [
        [maker.group(examples, i, np.random.default_rng([seed, i]))[0][2:] for i in range(8)] for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    for i, texts in enumerate(drawn[0]):
        answers = {f"p{i}", f"p{(i + 4) % 8}", f"n{i}"}
        assert len({*texts}) == 3 and not answers & {*texts}
    assert {text[0] for texts in drawn[0] for text in texts} == {"p", "n"}
    assert all(text.startswith("p") for text in GroupMaker(read, random_negatives=3).group(examples, 0)[0][2:])


def test_equal_labels_are_ordered_as_the_row_is():
    scores, real = mx.array([[0.5, -1.0, 2.0]]), mx.array([[True, True, True]])
    ties, order = mx.array([[1.0, 0.0, 0.0]]), mx.array([[2.0, 1.0, 0.0]])
    assert loss.list_mle(scores, ties, real).item() == loss.list_mle(scores, order, real).item()


def test_pairs_at_the_top_weigh_more_in_lambda_loss():
    """Of two mistakes of the same size, that between the first places costs more."""
    real, labels = mx.ones((1, 4), dtype=mx.bool_), mx.array([[3.0, 2.0, 1.0, 0.0]])
    top = loss.lambda_loss(mx.array([[3.0, 4.0, 2.0, 1.0]]), labels, real).item()
    bottom = loss.lambda_loss(mx.array([[4.0, 3.0, 1.0, 2.0]]), labels, real).item()
    right = loss.lambda_loss(mx.array([[4.0, 3.0, 2.0, 1.0]]), labels, real).item()
    assert top > bottom > right


def test_documents_by_themselves_have_no_list():
    """So that labelled pairs are learnt by the cross-encoders' default loss as they are by `bce`."""
    pairs = mx.array([[2.0], [-1.0], [0.5]]), mx.array([[1.0], [0.0], [0.5]]), mx.array([[True]] * 3)
    (value, grads), (expected, wanted) = (mx.value_and_grad(loss.GROUPS[name])(*pairs) for name in ("list_bce", "bce"))
    assert value.item() == expected.item()
    np.testing.assert_array_equal(grads, wanted)


def test_groups_with_nothing_to_compare_cost_nothing():
    scores, labels = mx.array([[2.0, 1.0]]), mx.array([[0.0, 0.0]])
    real = mx.array([[True, True]])
    for function in (loss.list_softmax, loss.ranknet, loss.lambda_loss):
        value, gradient = mx.value_and_grad(lambda s, f=function: f(s, labels, real))(scores)
        assert value.item() == 0 and not np.array(gradient).any()


# --- rows ---


def test_every_format_becomes_a_group(write_rows, tmp_path):
    cross_encoder("bert", tmp_path / "model")
    tokenizer = CrossEncoderTokenizer(tmp_path / "model", 100)

    def batch_of(rows, **how) -> GroupBatch:
        read = Rows([write_rows(rows)])
        return GroupMaker(read, **how)([read[i] for i in range(len(read))], range(len(read)), tokenizer)

    labelled = batch_of([{"query": "a", "document": "b", "label": 0.5}, {"query": "a", "document": "c", "label": True}])
    assert labelled.labels.tolist() == [[0.5], [1.0]] and labelled.text.tolist() == [[0], [1]]
    triplets = batch_of([{"anchor": "a", "positive": "b", "negative": "c"}])
    assert triplets.labels.tolist() == [[1, 0]]
    mixed = batch_of([graded_rows()[0], {"query": "the cat", "positive": "mat", "negatives": ["a"]}])
    assert mixed.labels.tolist() == [[1, 0, 0], [1, 0, 0]] and mixed.text.tolist() == [[0, 1, 2], [3, 4, -1]]
    scored = batch_of([{"query": "a", "documents": ["b", "c", "d"], "scores": [0.1, 3, -2]}])
    np.testing.assert_allclose(scored.labels, [[3, 0.1, -2]])
    logits = [{"query": f"q{i}", "documents": [f"good {i}", f"hard {i}"], "scores": [6, -4]} for i in range(2)]
    assert batch_of(logits, random_negatives=1).labels.tolist() == [[6, -4, -4]] * 2  # regression: 0, above hard ones
    plain = [{"query": f"q{i % 3}", "positive": ANSWERS[i]} for i in range(3)] + [{"query": "q0", "positive": "mat"}]
    drawn = batch_of(plain, random_negatives=2)
    assert drawn.labels.tolist() == [[1, 0, 0]] * 4  # q0's other positive is no negative of it
    again = unpack({k: np.array(v) for k, v in pack(drawn).items()}, GroupBatch)
    np.testing.assert_array_equal(again.texts.second, drawn.texts.second)
    assert again.tokens == drawn.tokens and drawn.rows_with(4).tolist() == [1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_compiled_passes_is_the_plain_one_on_gpus(settings, as_metal, kind):
    results = []
    for compile in ("on", "off"):
        run = training_run.prepare(settings(kind, compile=compile))
        trainer = run.trainer
        result = trainer.grad_cache(trainer.batches.batch(0), seed=3)
        grads = np.concatenate([np.array(v).ravel() for _, v in sorted(tree_flatten(result.grads))])
        reranker = Reranker.of(trainer.model, run.retrieval, trainer.batches.tokenizer, "trained", compile)
        results.append((result.loss.item(), grads, reranker.score(QUERY, DOCUMENTS)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-5 * np.abs(results[1][1]).max())
    np.testing.assert_allclose(results[0][2], results[1][2], atol=1e-5)


def test_listwise_order_is_shuffled_and_repeats(write_rows, tmp_path, qwen_tokenizer):
    _, folder, _ = listwise(tmp_path, qwen_tokenizer)
    tokenizer = Reranker(str(folder)).tokenizer
    rows = Rows([write_rows(graded_rows())])
    examples = [rows[i] for i in range(12)]
    first, second = (GroupMaker(rows, shuffled=True)(examples, range(12), tokenizer) for _ in range(2))
    np.testing.assert_array_equal(first.labels, second.labels)
    assert len(np.unique(first.labels.argmax(axis=1))) == 3 and (first.labels.sum(axis=1) == 1).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a", "document": "b", "label": 1.5}, "label 1.5 is not a number from 0 to 1"),
        ({"query": "a", "document": "b", "label": "yes"}, "label 'yes' is not a number from 0 to 1"),
        ({"query": "a", "document": "", "label": 1}, "document is empty"),
        ({"query": "a", "documents": ["b"], "scores": [1]}, "at least two"),
        ({"query": "a", "documents": ["b", "c"], "scores": [1]}, "2 finite numbers"),
    ],
)
def test_bad_rows(write_rows, row, message):
    with pytest.raises(UserError, match=message):
        Rows([write_rows([row])])


# --- training ---


@pytest.fixture(scope="module")
def bases(tmp_path_factory, qwen_tokenizer) -> dict[str, str]:
    """A small random model of each kind."""
    folder = tmp_path_factory.mktemp("rerankers")
    causal("qwen3", folder / "qwen3", qwen_tokenizer)
    cross_encoder("bert", folder / "cross-encoder")
    listwise(folder, qwen_tokenizer)
    return {
        "qwen3": str(folder / "qwen3"),
        "cross-encoder": str(folder / "cross-encoder"),
        "listwise": str(folder / "list"),
    }


@pytest.fixture
def settings(bases, tmp_path, write_rows):
    """Settings of a small run of a kind of reranker, changed by keyword."""

    def make(kind: str, rows=None, **changes) -> Settings:
        data = write_rows(rows or graded_rows())
        defaults = {"model": bases[kind], "task": "rerank", "data": [str(data)], "batch_size": 6, "steps": 4}
        defaults |= {"eval_tasks": [], "lora_rank": 4, "save_steps": 0, "output": str(tmp_path / "run")}
        return Settings(**defaults | {"max_length": 120 if kind == "cross-encoder" else 300} | changes)

    return make


def everything(run) -> dict:
    return dict(tree_flatten(run.trainer.model.trainable_parameters()))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen3", "yes_no"),
        pytest.param("listwise", "list_softmax", marks=pytest.mark.slow),
        *(("cross-encoder", name) for name in (*loss.GROUPS, "kl_distill") if name != "yes_no"),
    ],
)
def test_micro_batches_change_nothing(kind, name, settings):
    """Loss and gradient of 1, 3 and 12 micro-batches: no group's loss is split."""
    rows = [row | {"scores": [0.9, 0.1, 0.3]} for row in graded_rows()]
    found = []
    for parts in (1, 3, 12):
        run = training_run.prepare(settings(kind, rows, loss=name, gradient_accumulation_steps=parts))
        batch = run.trainer.batches.batch(0)
        run.trainer.update(run.trainer.batches.batch(1), 1)  # fresh LoRA has half of its gradients at zero
        result, _ = run.trainer.compute_grads(batch, 2)
        found.append((result.micro_batches, result.loss.item(), dict(tree_flatten(result.grads))))
    assert found[0][0] == 1 and found[1][0] >= 3
    for _, value, gradient in found[1:]:
        assert value == pytest.approx(found[0][1], abs=1e-5)
        for key, expected in found[0][2].items():
            np.testing.assert_allclose(np.array(gradient[key]), np.array(expected), atol=2e-5, err_msg=key)


def test_micro_batches_change_nothing_with_in_batch_documents(settings):
    """`info_nce` in 1, 4 and 16 micro-batches, with four documents of other rows for each query."""
    words = ["cat", "mat", "stone", "animal", "hard", "piece"]
    texts = [f"{one} {other}" for one in words for other in words]
    rows = [{"query": f"the {texts[i]}", "positive": texts[i], "negatives": [texts[i + 12]]} for i in range(12)]
    results = []
    for parts in (1, 4, 16):
        changes = {"loss": "info_nce", "random_negatives": 4, "gradient_accumulation_steps": parts}
        chosen = settings("cross-encoder", rows, **changes)
        trainer = training_run.prepare(chosen).trainer
        assert chosen.temperature == 0.1
        trainer.update(trainer.batches.batch(1), 1)
        batch = trainer.batches.batch(0)
        assert (batch.text >= 0).sum(axis=1).tolist() == [6] * 6
        result, _ = trainer.compute_grads(batch, 2)
        grads = np.concatenate([np.array(value).ravel() for _, value in sorted(tree_flatten(result.grads))])
        results.append((result.micro_batches, result.loss.item(), grads))
    assert results[0][0] == 1 and results[1][0] >= 4 and results[2][0] >= 16
    for _, value, grads in results[1:]:
        assert value == pytest.approx(results[0][1], abs=1e-5)
        np.testing.assert_allclose(grads, results[0][2], atol=1e-5)


@pytest.mark.parametrize(
    "kind", [k if k == "cross-encoder" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_training_learns_and_the_adapter_scores_as_the_trained_model(kind, settings, tmp_path, monkeypatch):
    """Loss falls, `Reranker` of the saved folder gives the scores of the model in memory, positives come first."""
    changes = {"steps": 25, "learning_rate": 3e-3, "lora_rank": 8}
    if kind == "listwise":  # its random model has to learn to look at the passages at all
        monkeypatch.setattr(pair_tokenizers, "LIST_SYSTEM", "system\n")
        changes = {"steps": 90, "learning_rate": 2e-3, "lora_rank": 16, "batch_size": 12}
    chosen = settings(kind, seed=1, **changes)
    train.train(chosen)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    final = tmp_path / "run" / "final"
    reranker = Reranker(str(final))
    assert reranker.kind == kind and reranker.config.task == "rerank"
    for query, answer in zip(ASKED, ANSWERS, strict=True):
        assert reranker.rerank(query, ANSWERS, 1)[0]["document"] == answer
    again = Reranker(chosen.model, adapter=str(final))
    np.testing.assert_array_equal(again.score(QUERY, DOCUMENTS), reranker.score(QUERY, DOCUMENTS))
    assert (final / "heads.safetensors").is_file() == (kind != "qwen3")
    (final / "heads.safetensors").unlink(missing_ok=True)
    if kind == "cross-encoder":
        before = Reranker(chosen.model)
        assert np.abs(before.score(QUERY, DOCUMENTS) - reranker.score(QUERY, DOCUMENTS)).max() > 1e-3


def test_scores_in_training_are_those_in_use(settings):
    """The score that the loss sees is the one that `Reranker` gives (before its sigmoid)."""
    for kind in KINDS:
        run = training_run.prepare(
            settings(kind, loss="margin_mse", rows=[r | {"scores": [3, 1, 2]} for r in graded_rows()])
        )
        batch, trainer = run.trainer.batches.batch(0), run.trainer
        trainer.model.eval()
        result = trainer.grad_cache(batch, 0).representations
        rows = np.array(result).reshape(len(batch.texts), -1)
        reranker = Reranker.of(trainer.model, run.retrieval, trainer.batches.tokenizer, "trained")
        example = trainer.batches.rows[int(batch.rows[0])]
        documents = [example.positive, *example.negatives]
        scores = reranker.score(example.query, documents)
        if run.retrieval.activation:
            scores = np.log(scores / (1 - scores))
        mine = rows[batch.text[0], batch.place[0]]
        order = np.argsort(-batch.labels[0]) if kind == "listwise" else np.arange(3)  # labels 3, 2, 1
        if kind == "listwise":  # where a passage stands matters there
            assert mine.shape == (3,) and np.abs(mine).max() <= 1 + 1e-5
            continue
        np.testing.assert_allclose(mine[order], scores, atol=1e-4)


def test_resume_is_exact(settings, tmp_path):
    whole = training_run.prepare(settings("cross-encoder", lora_dropout=0.1, output=str(tmp_path / "whole")))
    for step in range(4):
        whole.trainer.update(whole.trainer.batches.batch(step), step + 1)
    train.train(settings("cross-encoder", lora_dropout=0.1, stop_after=2))
    train.train(train.resumed_settings({"resume": True, "output": str(tmp_path / "run")}))
    from mlx_retrieval.backbones.hub import read_safetensors

    saved = read_safetensors(tmp_path / "run" / "final" / "heads.safetensors")
    head = dict(tree_flatten(whole.trainer.model.head.trainable_parameters()))
    for name, value in saved.items():
        np.testing.assert_array_equal(np.array(value), np.array(head[name]))


def test_evaluation_while_training(settings, tmp_path, capsys):
    """BM25's ranking is reranked before, during and after; results.json has the figures."""
    folder = tmp_path / "task"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate((*ANSWERS, *DOCUMENTS[:2])))
    )
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": text}) + "\n" for i, text in enumerate(ASKED))
    )
    (folder / "qrels" / "test.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(3)))
    results = train.train(settings("cross-encoder", eval_tasks=[str(folder)], steps=10, learning_rate=3e-3))
    assert 0 <= results["before"]["ndcg_at_10"] <= 1 and results["after"]["ndcg_at_10"] > 0.7
    bm25 = evaluate_reranker(Unchanged(), [str(folder)])[0].average()
    assert results["first_stage"] == {"model": "BM25", **bm25}
    row = [line.split()[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith(" nDCG@10")]
    assert row == [[f"{figures['ndcg_at_10']:.4f}" for figures in (bm25, results["before"], results["after"])]]


class Unchanged:
    """A reranker that keeps the first stage's order."""

    name = "unchanged"

    def score_groups(self, groups):
        return [np.zeros(len(documents)) for _, documents in groups]


def evaluation(name: str, *scores: float) -> Evaluation:
    """Figures of two queries, the same for every metric."""
    per_query = {metric: {f"q{i}": score for i, score in enumerate(scores)} for metric in METRICS}
    return Evaluation(name, {"task": dict.fromkeys(METRICS, float(np.mean(scores)))}, {"task": per_query}, {})


@pytest.mark.parametrize("before", [evaluation("r", 0.2, 0.4), None])
def test_bm25_s_figures_stand_beside_those_of_the_reranker(capsys, tmp_path, before):
    """With --skip-eval-init, too; and a reranker below BM25 is told."""
    evaluations = Evaluations(lambda: None, tmp_path)
    evaluations.first_stage, evaluations.before = evaluation("BM25", 0.5, 0.7), before
    evaluations.last = Step(9, evaluation("r", 0.4, 0.6))
    run = RetrievalRun(Settings(output=str(tmp_path)), None, None, evaluations, None, None, None, tmp_path, None, [])
    run.print_results()
    out = capsys.readouterr().out
    head, row = (next(line.split() for line in out.splitlines() if word in line) for word in ("metric", " nDCG@10"))
    assert head[:4] == (["metric", "BM25", "before", "after"] if before else ["metric", "BM25", "after", "difference"])
    assert row[:4] == (
        ["nDCG@10", "0.6000", "0.3000", "0.5000"] if before else ["nDCG@10", "0.6000", "0.5000", "-0.1000"]
    )
    assert "reranking does not help: nDCG@10 0.5000, and 0.6000 in the order of BM25" in out
    assert max(map(len, out.splitlines())) <= 80
    evaluations.last = Step(9, evaluation("r", 0.6, 0.7))
    run.print_results()
    assert "does not help" not in capsys.readouterr().out


SCORED = {"query": "q", "documents": ["a", "b"], "scores": [3, -1]}
SCORED_NEGATIVE = {"query": "q", "positive": "a", "negatives": ["b"], "scores": [3, 1]}


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({}, [{"query": f"q{i}", "positive": f"d{i}"} for i in range(8)], "neither labels nor negatives"),
        ({"loss": "nt_xent"}, None, "compares vectors"),
        ({"loss": "info_nce"}, [{"query": "q", "document": "d", "label": 1}] * 8, "single pairs"),
        (
            {"loss": "info_nce"},
            [{"query": "q", "documents": ["a", "b"], "scores": [1, 0]}] * 8,
            "have scores: list_soft",
        ),
        # Regression: one row without scores let those of all others through as labels.
        (
            {"loss": "info_nce"},
            [{"query": "q", "positive": "a", "negatives": ["b"]}, *[SCORED_NEGATIVE] * 7],
            "have scores: list_soft",
        ),
        ({"loss": "info_nce"}, [{"query": f"q{i}", "positive": f"d{i}"} for i in range(8)], "neither labels nor neg"),
        ({"loss": "ranknet"}, [{"query": "q", "document": "d", "label": 1}] * 8, "single pairs"),
        ({"loss": "margin_mse"}, None, "needs scores"),
        # Regressions: they were taken for documents that the teacher gives 0, and none was added.
        *(
            ({"loss": name, "random_negatives": 4}, [SCORED] * 8, f"--random-negatives: --loss {name} learns a teacher")
            for name in ("kl_distill", "margin_mse")
        ),
        ({"random_negatives": 4}, [{"query": "q", "document": "d", "label": 1}] * 8, "--random-negatives: .*own label"),
        ({"loss": "bce"}, [{"query": "q", "documents": ["a", "b"], "scores": [3, 1]}] * 8, "labels from 0 to 1"),
        ({}, [{"query": "q", "documents": ["a", "b"], "scores": [3, 1]}] * 8, "list_bce takes labels from 0"),
        ({"loss": "list_softmax"}, [{"query": "q", "documents": ["a", "b"], "scores": [0, 0]}] * 8, "no positive"),
        ({"loss": "list_softmax"}, [{"query": "q", "documents": ["a", "b"], "scores": [1, -1]}] * 8, "from 0 on"),
        ({"loss": "lambda_loss"}, [{"query": "q", "documents": ["a", "b"], "scores": [1, -1]}] * 8, "from 0 on"),
        ({"loss": "lambda_loss"}, [{"query": "q", "documents": ["a", "b"], "scores": [31, 0]}] * 8, "grades up to 30"),
        ({"pooling": "mean"}, None, "--pooling is for --task embed"),
        ({"matryoshka_dims": [8]}, None, "--matryoshka-dims is for --task embed"),
        ({"reranker_type": "qwen3"}, None, "needs a language model"),
        ({"max_length": 500}, None, "the model has 130 positions"),
        # Regression: they were taken, and did nothing.
        ({"query_max_length": 9}, None, "--query-max-length is for listwise rerankers, and this one is cross-encoder"),
        ({"instruction": "judge"}, None, "--instruction is for rerankers of the kinds qwen3 and listwise"),
    ],
)
def test_what_does_not_fit_is_refused(settings, changes, rows, message):
    with pytest.raises(UserError, match=message):
        training_run.prepare(settings("cross-encoder", rows, **changes))


def test_validation_rows_are_checked_as_well(settings, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in graded_rows()))
    valid = [row | {"scores": [2.0, 1.0, 0.5]} for row in graded_rows()]
    (folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in valid))
    with pytest.raises(UserError, match="labels from 0 to 1"):
        training_run.prepare(settings("cross-encoder", data=[str(folder)]))


def test_labels_and_rerank_flags_are_for_rerankers(settings, small):
    labelled = [{"query": "q", "document": f"d{i}", "label": 1} for i in range(8)]
    with pytest.raises(UserError, match="label, score or similarity are for --task rerank"):
        training_run.prepare(settings("cross-encoder", labelled, model=small, task="embed"))
    with pytest.raises(UserError, match="--random-negatives is for --task rerank"):
        training_run.prepare(settings("cross-encoder", model=small, task="embed", random_negatives=2))
    with pytest.raises(UserError, match="--loss bce is for --task rerank"):
        training_run.prepare(settings("cross-encoder", model=small, task="embed", loss="bce"))


def test_random_negatives_and_full_training(settings):
    rows = [{"query": f"query {i} cat", "positive": f"{'stone ' * (i % 5)}{i}"} for i in range(12)]
    run = training_run.prepare(settings("cross-encoder", rows, random_negatives=3, train_type="full"))
    metrics = run.trainer.update(run.trainer.batches.batch(0), 1)
    assert np.isfinite(metrics["loss"]) and "head.dense.weight" in everything(run)
    assert "embeddings.word_embeddings.weight" in " ".join(everything(run))


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ("lora", pytest.param("dora", marks=pytest.mark.slow)))
def test_quantised_judges_are_trained_and_used(settings, bases, tmp_path, train_type):
    """QLoRA: the 4-bit base stays, the adapter learns, and is loaded again."""
    packed = quantised(Path(bases["qwen3"]), tmp_path / "packed")
    train.train(settings("qwen3", model=str(packed), train_type=train_type, steps=3, learning_rate=1e-2))
    before, after = Reranker(str(packed)), Reranker(str(tmp_path / "run" / "final"))
    assert np.abs(after.score(QUERY, DOCUMENTS) - before.score(QUERY, DOCUMENTS)).max() > 1e-3


def test_profile(settings, tmp_path):
    found = train.train(settings("cross-encoder", profile=1, gradient_accumulation_steps=2))
    assert {"data", "forward", "loss", "backward", "optimizer", "step"} <= set(found)
    assert not (tmp_path / "run").exists()


def test_command(settings, tmp_path, capsys):
    """The command of docs/rerankers.md, with a small model."""
    chosen = settings("qwen3")
    command = ["--task", "rerank", "--model", chosen.model, "--data", chosen.data[0], "--batch-size", "4"]
    command += ["--steps", "2", "--max-length", "300", "--output", str(tmp_path / "cli"), "--eval-tasks"]
    assert train.main(command) == 0
    out = capsys.readouterr().out
    assert (
        "qwen3 reranker, 300 tokens" in out
        and "yes_no, temperature 1 (defaults of a qwen3" in out
        and "rerank.py --model" in out
    )
    assert "loss: yes_no" in (tmp_path / "cli" / "config.yaml").read_text()
    assert Path(tmp_path / "cli" / "final" / "adapters.safetensors").is_file()
