"""A run that learns nothing says so: from its rows and settings, from its first steps, and at its end.

python -m pytest tests/training/test_nothing_learnt.py
"""

import json
import re
from dataclasses import asdict
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

import train
from mlx_retrieval.dataset.elastic.rows import ElasticRows
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.dataset.sources import InterleavedRows
from mlx_retrieval.training import nothing_learnt
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings, for_task
from mlx_retrieval.training.state import State
from mlx_retrieval.utils.errors import UserError

# --- settings and rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_type", ["lora", "dora"])
def test_an_update_that_is_multiplied_by_0_is_refused(train_type):
    with pytest.raises(UserError, match=r"--lora-alpha 0(\.0)?: must be above 0: the update is multiplied by it"):
        Settings(train_type=train_type, lora_alpha=0.0)
    assert Settings(train_type="full", lora_alpha=0.0).lora_alpha == 0  # not used


@pytest.mark.parametrize(("warmup", "steps", "ends"), [
    (20.0, 10, "50.0%"), (1000.0, 150, "15.0%"), (10.0, 10, None), (0.1, 10, None), (0.99, 3, None), (0.0, 1, None),
])  # fmt: skip
def test_a_warm_up_longer_than_the_run(warmup, steps, ends):
    lines = nothing_learnt.warnings(Settings(warmup=warmup, steps=steps))
    assert [name for name, _ in lines] == ["warning"] * bool(ends)
    if ends:
        text = (
            f"--warmup of {int(warmup):,} steps is longer than the run of {steps}: the learning rate ends at {ends} of"
        )
        assert text in lines[0][1]


PAIRS = [{"query": f"query {i}", "positive": f"answer {i}"} for i in range(5)]


@pytest.mark.parametrize(("rows", "constant"), [
    (PAIRS, {}),
    (PAIRS[:1], {}),
    ([row | {"query": "same"} for row in PAIRS], {"query": "same"}),
    ([row | {"positive": "same"} for row in PAIRS], {"positive": "same"}),
    ([PAIRS[0]] * 3, PAIRS[0]),
    ([*[row | {"query": "same"} for row in PAIRS], PAIRS[0]], {}),
    ([{"query": f"q{i}", "document": f"d{i}", "label": 1} for i in range(3)], {"label": "1"}),
    ([{"query": f"q{i}", "document": f"d{i}", "label": i % 2} for i in range(3)], {}),
], ids=str)  # fmt: skip
def test_what_all_rows_share_is_told(write_rows, rows, constant):
    source = Rows([write_rows(rows)])
    assert source.constant == constant
    lines = [text for _, text in nothing_learnt.warnings(Settings(steps=100), source)]
    assert len(lines) == len(constant)
    for side, text in constant.items():
        assert any(f'all rows that were read have the same {side} ("{text}")' in line for line in lines)


def test_a_mixture_shares_what_all_of_its_sources_share(write_rows):
    same = [row | {"query": "same"} for row in PAIRS]
    sources = [Rows([write_rows(rows, f"{i}.jsonl")]) for i, rows in enumerate((same, same, PAIRS))]
    assert InterleavedRows(sources[:2], [Fraction(1)] * 2).constant == {"query": "same"}
    assert InterleavedRows(sources, [Fraction(1)] * 3).constant == {}


def test_of_an_index_the_first_documents_count():
    """One that makes no row is not a reason to be silent about the others."""
    rows = object.__new__(ElasticRows)
    rows.address, rows.fields, rows.format = "es://notes", {"query": ("q",), "positive": ("p",)}, "pair"
    rows.documents = SimpleNamespace(
        sample=[(str(i), {"q": "same", "p": f"answer {i}"}) for i in range(3)] + [("3", {"q": "", "p": ""})]
    )
    assert rows._common_parts() == {"query": "same"}
    rows.documents.sample = [("0", {"q": "same", "p": "answer"})]
    assert rows._common_parts() == {}


# --- the first steps --------------------------------------------------------------------------------------------------


def watched(losses, norms, steps: int, learning_rate: float = 2e-4) -> dict[int, str]:
    """The warnings of a run by their steps; its state is saved and read back after each one."""
    state, settings = State(), Settings(steps=steps, learning_rate=learning_rate)
    warnings = {}
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        state = State(**json.loads(json.dumps(asdict(state))))
        state.step = step
        if warning := nothing_learnt.watch(state, settings, loss, norm):
            warnings[step] = warning
    return warnings


def test_a_gradient_that_is_always_0_is_told_once_after_a_tenth_of_the_steps():
    warnings = watched([0.0] * 100, [0.0] * 100, 100)
    assert list(warnings) == [10] and "gradient has been 0 in all 10 steps so far, and the loss is 0:" in warnings[10]
    moving = watched([3.0, 2.5, 2.75, 2.0], [0.0] * 4, 4)  # the batches differ, the weights do not
    assert list(moving) == [3] and "the loss is 2.75" in moving[3]
    assert list(watched([0.0], [0.0], 1)) == [1]


def test_a_loss_that_does_not_move_is_told():
    warnings = watched([2.772588, 2.7725883, 2.7725878, 2.8], [0.5] * 4, 20, learning_rate=1e-12)
    assert list(warnings) == [3] and "the loss has been 2.773 in all 3 steps so far" in warnings[3]
    assert "--learning-rate 1e-12 may be too low" in warnings[3]


@pytest.mark.parametrize(("losses", "norms", "steps"), [
    ([2.5, 2.5001, 2.4999, 2.5], [1.0] * 4, 4),  # slow
    ([0.0, 0.0, 0.3, 0.0], [0.0, 0.0, 0.1, 0.0], 4),  # a filter that leaves most batches nothing
    ([2.5, 2.5], [1.0] * 2, 2),  # too few to tell
    ([1e-3, 2e-3, 1.5e-3], [1e-4] * 3, 3),  # nearly perfect already
    ([2.0, 1.9, *[1.0] * 98], [1.0] * 100, 100),
], ids=str)  # fmt: skip
def test_a_run_that_moves_gives_no_alarm(losses, norms, steps):
    assert watched(losses, norms, steps) == {}


# --- the trained model ------------------------------------------------------------------------------------------------


def test_samples_are_equal_to_rounding():
    vectors = np.random.default_rng(0).normal(size=(3, 100)).astype(np.float32)
    before = nothing_learnt.sample(vectors)
    assert len(before) == nothing_learnt.PROBE_SIZE and json.loads(json.dumps(before)) == before
    for scale, unchanged in ((1e-7, True), (1e-4, False)):
        assert nothing_learnt.unchanged(before, nothing_learnt.sample(vectors * (1 + scale))) == unchanged
    assert nothing_learnt.sample(None) == nothing_learnt.sample(vectors * np.nan) == []
    assert not nothing_learnt.unchanged([], []) and not nothing_learnt.unchanged(before, [])
    assert len(nothing_learnt.sample(np.ones(3, np.float32))) == 3


@pytest.fixture
def prepared(tmp_path, small, write_rows):
    """`prepared(task)` returns the settings of a small run."""

    def make(task: str, **changes) -> Settings:
        rows = [{"query": f"number {i} ?", "positive": f"answer {i}", "negatives": [f"other {i}"]} for i in range(8)]
        if task == "chat":
            rows = [{"prompt": row["query"], "completion": row["positive"]} for row in rows]
        given = {"model": small, "data": [str(write_rows(rows))], "batch_size": 4, "steps": 4, "lora_rank": 2}
        given |= {"output": str(tmp_path / "run"), "save_steps": 0, "warmup": 0.0, "max_length": 300, "eval_tasks": []}
        return for_task(task, given | changes)

    return make


@pytest.mark.parametrize("task", ["embed", "late", "rerank", "chat"])
def test_the_probe_sees_an_update_and_nothing_else(prepared, task):
    trainer = training_run.prepare(prepared(task, learning_rate=1e-3)).trainer
    before = nothing_learnt.sample(trainer.probe())
    assert before and nothing_learnt.sample(trainer.probe()) == before
    training_run.prepare(prepared(task))
    assert nothing_learnt.unchanged(before, nothing_learnt.sample(trainer.probe()))
    trainer.train(1, lambda record: False)
    assert not nothing_learnt.unchanged(before, nothing_learnt.sample(trainer.probe()))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["embed", "late", "rerank", "chat"])
@pytest.mark.parametrize("stop", [0, 4])
def test_a_run_that_learns_nothing_says_so_at_its_end_resumed_or_not(prepared, task, stop, capsys):
    """And one that learns does not."""
    rate, ending = "1e-12", "warning: the trained model computes the same as the untrained one: nothing was learnt at"
    same = {"batch_size": 8, "steps": 6, "learning_rate": float(rate)}
    train.train(prepared(task, **same, stop_after=stop))
    out = capsys.readouterr().out
    if stop:
        assert ending not in out
        train.main(["--resume", "--output", prepared(task).output])
        out += capsys.readouterr().out
    assert f"{ending} --learning-rate {rate}" in out
    assert out.count(" in all 3 steps so far: nothing is learnt") == 1  # every batch holds the same rows
    train.train(prepared(task, **same | {"learning_rate": 1e-3, "overwrite": True}))
    out = capsys.readouterr().out
    assert "nothing is learnt" not in out and "nothing was learnt" not in out


@pytest.mark.slow
def test_one_query_for_all_rows_is_told_before_and_during_the_run(prepared, write_rows, capsys):
    """Regression: the loss was 0 for ever, without a word."""
    settings = prepared("embed")
    write_rows([{"query": "same", "positive": f"answer {i}"} for i in range(8)])
    train.train(settings)
    out = capsys.readouterr().out
    assert re.search(r'^warning: all rows that were read have the same query \("same"\)', out, re.MULTILINE)
    assert "warning: the gradient has been 0 in all 3 steps so far, and the loss is 0" in out
