"""The step is exact whatever the micro-batches, and a run that is stopped and continued is the same run.

python -m pytest tests/training/test_trainer.py
"""

import json
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import train
from mlx_retrieval import backend
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.checkpoint import last_step
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.gradient_cache import join
from mlx_retrieval.training.reporting import Reporter
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


def flat(gradient: dict) -> np.ndarray:
    return np.concatenate([np.array(v).reshape(-1) for _, v in sorted(tree_flatten(gradient))])


def prepared(settings: Settings):
    """A prepared run whose LoRA matrices are both non-zero, so that every gradient is."""
    run = training_run.prepare(settings)
    mx.random.seed(1)
    parameters = run.trainer.model.trainable_parameters()
    run.trainer.model.update(tree_map(lambda v: v + 0.02 * mx.random.normal(v.shape), parameters))
    return run.trainer


SLOW = (  # the same for more losses, poolings and training types
    {"loss": "symmetric_info_nce"}, {"loss": "hard_negative_info_nce"}, {"positive_aware": "perc"}, {"pooling": "last"},
    {"bidirectional": True}, {"margin_weight": 0.5}, {"loss": "margin_mse"}, {"task": "late", "maxsim": "sum"},
    {"task": "late", "loss": "kl_distill", "skip_punctuation": True}, {"train_type": "full", "num_layers": 2},
)  # fmt: skip


@pytest.mark.parametrize("changes", [
    {}, {"loss": "nt_xent"}, {"matryoshka_dims": [8, 16]}, {"loss": "kl_distill"}, {"task": "late"},
    {"task": "late", "loss": "xtr", "xtr_k": 50, "projection_dim": 8, "margin_weight": 0.5},
    {"train_type": "dora"}, {"grad_checkpoint": True}, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW),
], ids=str)  # fmt: skip
def test_loss_and_gradient_are_the_same_for_1_4_and_16_micro_batches(settings, changes):
    trainer = prepared(settings(**changes))
    batch = trainer.batches.batch(0)
    step, results = trainer.grad_cache, {}
    for parts in (1, 4, 16):
        step.accumulation = parts
        result = step(batch, seed=0)
        assert (result.micro_batches == 1) == (parts == 1) and result.micro_batches >= parts
        results[parts] = result.loss.item(), flat(result.grads)
    for parts in (4, 16):
        assert results[parts][0] == pytest.approx(results[1][0], rel=1e-5)
        difference = np.linalg.norm(results[parts][1] - results[1][1]) / np.linalg.norm(results[1][1])
        assert difference < 1e-5, difference
    assert np.linalg.norm(results[1][1]) > 0


@pytest.mark.parametrize(
    "name", ["cosent", *(pytest.param(name, marks=pytest.mark.slow) for name in ("angle", "cosine_mse"))]
)
def test_scored_pairs_are_the_same_for_1_4_and_16_micro_batches(settings, write_rows, rows, name):
    texts = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    pairs = [{"text1": r["query"], "text2": r["positive"], "similarity": i % 7 / 6} for i, r in enumerate(texts)]
    file = write_rows(pairs, "pairs.jsonl")
    test_loss_and_gradient_are_the_same_for_1_4_and_16_micro_batches(settings, {"data": [str(file)], "loss": name})


PAIR = {"query": "one text", "document": "another", "score": 0.5}


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (PAIR, {}, "similarity are for --task rerank, or for --task embed with --loss cosent, angle or cosine_mse"),
        ({"query": "one", "document": "two"}, {"loss": "cosent"}, "--loss cosent: every row of .* needs a score"),
        (PAIR, {"loss": "angle", "task": "late"}, "--loss angle compares one vector a text; it needs --task embed"),
        (PAIR, {"loss": "cosent", "batch_size": 1}, "--loss cosent compares the pairs of a batch"),
        (PAIR | {"score": 4.5}, {"loss": "cosent"}, "score 4.5 is not a number from 0 to 1; divide by the top"),
    ],
)
def test_what_scored_pairs_need_is_said(settings, write_rows, row, changes, message):
    file = write_rows([row | {"query": f"{row['query']} {i}"} for i in range(8)])
    with pytest.raises(UserError, match=message):
        training_run.prepare(settings(data=[str(file)], **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin_weight": 0.1}, "--margin-weight 0.1: does not go with cosent"),
        ({"positive_aware": "perc"}, "works with info_nce and hard_negative_info_nce, not with cosent"),
        ({"hardness": 5.0}, "works with info_nce, not with cosent"),
        ({"loss": "cosine_mse", "temperature": 0.1}, "--temperature 0.1: has no effect with cosine_mse"),
    ],
)
def test_flags_without_effect_on_scored_pairs_are_refused(settings, changes, message):
    with pytest.raises(UserError, match=message):
        settings(**{"loss": "cosent"} | changes)


def test_there_are_never_fewer_micro_batches_than_asked_for(settings):
    trainer = prepared(settings(batch_size=4))
    batch = trainer.batches.batch(0)  # about a dozen texts, of very different lengths
    for wanted in (2, 3, 5, 8, len(batch.texts), 99):
        trainer.grad_cache.accumulation = wanted
        rows, order = trainer.grad_cache.plan(batch)
        assert len(rows) >= min(wanted, len(batch.texts)) and sorted(order) == list(range(len(batch.texts)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_the_same_in_both_passes(settings, checkpointing):
    """The cached gradient is the derivative of the loss that was reported: a central difference agrees."""
    trainer = prepared(settings(lora_dropout=0.3, gradient_accumulation_steps=4, grad_checkpoint=checkpointing))
    batch, model = trainer.batches.batch(0), trainer.model
    model.train()
    start = dict(tree_flatten(model.trainable_parameters()))
    result = trainer.grad_cache(batch, seed=3)
    assert trainer.grad_cache(batch, seed=3).loss.item() == result.loss.item()
    assert trainer.grad_cache(batch, seed=4).loss.item() != result.loss.item()
    gradient = dict(tree_flatten(result.grads))
    norm = np.sqrt(sum(v.square().sum().item() for v in gradient.values()))
    losses = []
    for sign in (1, -1):
        size = sign * 5e-4 / norm
        model.load_weights([(name, start[name] + size * gradient[name]) for name in start], strict=False)
        losses.append(trainer.grad_cache(batch, seed=3).loss.item())
    assert (losses[0] - losses[1]) / 1e-3 == pytest.approx(norm, rel=0.01)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_has_room_at_once_goes_through_once(settings, monkeypatch, dropout):
    """Where passes are not compiled: several micro-batches under one gradient, equal to gradient caching."""
    monkeypatch.setattr(backend, "COMPILED", False)
    trainer = prepared(settings(lora_dropout=dropout))
    trainer.model.train()
    step, batch = trainer.grad_cache, trainer.batches.batch(0)
    monkeypatch.setattr(backend, "MICRO_BATCH_TOKENS", 1 << 20)
    monkeypatch.setattr(type(step.runner), "overhead", 32)  # so that so small a model's batch is cut all the same
    once = step(batch, seed=3)
    assert once.micro_batches > 1 and step.clock.seconds.keys() == {"forward, loss, backward"}
    monkeypatch.setattr(step.objective, "loss_and_grad", mx.value_and_grad(step.objective), raising=False)
    twice = step(batch, seed=3)  # an objective with a gradient of its own
    assert twice.micro_batches == once.micro_batches and "backward" in step.clock.seconds
    assert once.loss.item() == pytest.approx(twice.loss.item(), rel=1e-5)
    assert once.representations.shape == twice.representations.shape
    largest = np.abs(flat(twice.grads)).max()
    np.testing.assert_allclose(flat(once.grads), flat(twice.grads), atol=1e-5 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {}, {"train_type": "dora"}, {"train_type": "full"}, {"task": "late"}, {"loss": "nt_xent", "pooling": "last"},
    {"gradient_accumulation_steps": 4}, {"dtype": "bfloat16"}, {"dtype": "float16", "task": "late"},
], ids=str)  # fmt: skip
def test_a_step_with_compiled_passes_is_the_plain_one_on_gpus(settings, as_metal, changes):
    results = {}
    for compile in ("on", "off"):
        trainer = prepared(settings(compile=compile, **changes))
        result = trainer.grad_cache(trainer.batches.batch(0), seed=3)
        results[compile] = result.loss.item(), flat(tree_map(lambda v: v.astype(mx.float32), result.grads))
        assert trainer.grad_cache.runner.compiled == (compile == "on")
    tolerance = 1e-5 if "dtype" not in changes else 1e-2
    assert results["on"][0] == pytest.approx(results["off"][0], rel=tolerance)
    difference = np.linalg.norm(results["on"][1] - results["off"][1]) / np.linalg.norm(results["off"][1])
    assert difference < tolerance * (1 if "dtype" not in changes else 5), difference


def test_join_puts_rows_back_in_order_and_pads_token_vectors():
    parts = [mx.array([[3.0], [1.0]]), mx.array([[2.0], [0.0]])]
    assert join(parts, np.array([3, 1, 2, 0])).tolist() == [[0.0], [1.0], [2.0], [3.0]]
    tokens = [mx.ones((1, 3, 2)), 2 * mx.ones((2, 1, 2))]
    joined = join(tokens, np.array([1, 2, 0]))
    assert joined.shape == (3, 3, 2) and joined[0, :, 0].tolist() == [2, 0, 0] and joined[1, :, 0].tolist() == [1, 1, 1]


def test_the_learning_rate_is_the_one_that_is_applied(settings, tmp_path):
    """The first update applies the first rate, not 0, and what is reported is what was used."""
    trainer = training_run.prepare(settings(warmup=2.0, learning_rate=0.5)).trainer
    before = flat(trainer.model.trainable_parameters())
    record = trainer.update(trainer.batches.batch(0), 1)
    moved = np.abs(flat(trainer.model.trainable_parameters()) - before).max()
    assert record["learning_rate"] == 0.25
    assert moved == pytest.approx(0.25, rel=1e-2)  # AdamW's first step is the learning rate, with bias correction


def test_learning_makes_the_loss_fall_and_vectors_stay_finite(settings):
    trainer = training_run.prepare(settings(learning_rate=5e-3)).trainer
    losses = [trainer.update(trainer.batches.batch(0), step)["loss"] for step in range(1, 9)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_sick_numbers_stop_the_run_after_saving_and_name_the_examples(settings, tmp_path, where, monkeypatch):
    s = settings(save_steps=0)
    run = training_run.prepare(s)
    trainer, bad = run.trainer, run.trainer.batches.row_numbers(2)[5]
    original = trainer.grad_cache.objective

    def sick(representations, batch):
        if bad not in batch.rows:
            return original(representations, batch)
        return original(representations, batch) * (mx.array(float("nan")) if where == "loss" else 1.0) + (
            mx.sqrt((representations * 0).sum()) if where == "gradient" else 0.0
        )

    trainer.grad_cache.objective = sick
    training_run.begin(run)
    with pytest.raises(UserError, match="not finite") as error, Reporter(run.folder, s.steps) as report:
        trainer.reporter = report
        training_run.take_steps(trainer)
    assert f"rows.jsonl:{bad + 1}" in str(error.value) or "more" in str(error.value)
    steps = json.loads((last_step(run.folder) / "trainer_state.json").read_text())["step"]
    assert f"step {steps + 1}: " in str(error.value) and steps <= 2 and "--skip-bad-batches" in str(error.value)


def test_a_sick_text_is_named_by_its_row(settings):
    trainer = training_run.prepare(settings()).trainer
    batch = trainer.batches.batch(0)
    text = int(batch.query[4])
    original = trainer.model.head

    class Sick(type(original)):
        def __call__(self, states, rows):
            out = super().__call__(states, rows)
            target = mx.array(batch.texts.ids[batch.texts.offsets[text] : batch.texts.offsets[text + 1]])
            width = min(rows.ids.shape[1], target.size)
            hit = (rows.lengths == target.size) & (rows.ids[:, :width] == target[:width]).all(axis=1)
            return mx.where(hit[:, None], float("nan"), out)

    trainer.model.head = Sick(original.pooling)
    with pytest.raises(UserError) as error:
        trainer.update(batch, 1)
    named = [line for line in str(error.value).splitlines() if "rows.jsonl" in line]
    expected = {trainer.batches.rows.where(int(row)) for row in batch.rows_with(text)}
    assert {line.strip() for line in named} == expected


def test_validation_loss_of_a_folder_decides_what_is_best(settings, tmp_path, rows):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = Path(rows).read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:40]))
    (folder / "valid.jsonl").write_text("".join(lines[40:]))
    train.train(settings(data=[str(folder)], eval_steps=2, steps=4))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["metrics"]["validation_loss"] for r in records if r["type"] == "eval"}
    assert list(losses) == [0, 2, 4]
    state = json.loads((tmp_path / "run" / "final" / "trainer_state.json").read_text())
    assert state["best_step"] == min((loss, step) for step, loss in losses.items() if step)[1]


def test_one_candidate_a_query_is_refused(settings, tmp_path):
    file = tmp_path / "plain.jsonl"
    file.write_text('{"query": "a", "document": "b"}\n{"query": "c", "document": "d"}\n')
    with pytest.raises(UserError, match="^--batch-size 1: .* one candidate"):
        training_run.prepare(settings(data=[str(file)], batch_size=1))
    file.write_text('{"query": "a", "document": "b"}\n')  # regression: it was called a --batch-size of 1
    with pytest.raises(UserError, match="plain.jsonl: a single row: .* one candidate"):
        training_run.prepare(settings(data=[str(file)], batch_size=8))
    file.write_text('{"query": "a", "document": "b", "score": 0.5}\n')
    with pytest.raises(
        UserError, match="--loss cosent compares the pairs of a batch, and .*plain.jsonl has a single row"
    ):
        training_run.prepare(settings(data=[str(file)], loss="cosent", batch_size=8))


@pytest.mark.slow
def test_a_run_on_scored_pairs_is_judged_by_spearman(settings, write_rows, rows, tmp_path, capsys):
    """Its best step, its table, results.json, and eval.py, which repeats the figures."""
    import eval as evaluation_command

    texts = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    pairs = [{"text1": r["query"], "text2": r["positive"], "similarity": i % 7 / 6} for i, r in enumerate(texts)]
    chosen = settings(data=[str(write_rows(pairs, "pairs.jsonl"))], loss="cosent", eval_tasks=None, eval_steps=2)
    results = training_run.train(chosen)
    assert {*results["before"]} == {"cosine_spearman", "cosine_pearson"} and "after" in results
    out = capsys.readouterr().out
    assert "by Spearman" in out and "nDCG" not in out
    folder = tmp_path / "run"
    record = tmp_path / "one.json"
    command = ["--model", str(folder / "final"), "--eval-tasks", str(folder / "held-out"), "--output", str(record)]
    assert evaluation_command.main(command) == 0
    figures = json.loads(record.read_text())["tasks"]["held-out"]
    assert figures["cosine_spearman"] == pytest.approx(results["last"]["cosine_spearman"], abs=1e-9)
    assert "by Spearman" in (folder / "report.html").read_text() and (folder / "best").is_dir() == results["improved"]
