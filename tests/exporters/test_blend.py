"""Weights between a trained model's and its base model's: `export.py --merge-with-base`.

python -m pytest tests/exporters/test_blend.py
"""

import json
import math
import shutil
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from beir_folders import write_folder
from exported import read_json, refusal, run_export
from mlx.utils import tree_flatten
from random_models import save
from random_rerankers import cross_encoder
from trained_models import trained

import export
from mlx_retrieval.evaluation import mteb_tasks
from mlx_retrieval.exporters import blend
from mlx_retrieval.exporters.blend import Point
from mlx_retrieval.exporters.job import share_of
from mlx_retrieval.inference.embedder import load
from mlx_retrieval.models import loading
from mlx_retrieval.utils.errors import UserError

TEXTS = ["the cat sat on the mat", "a kidney stone", "what is it"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, toy_tokenizer_folder) -> Path:
    return save("bert", tmp_path_factory.mktemp("blend") / "bert", tokenizer=toy_tokenizer_folder)


@pytest.fixture(scope="module", params=["lora", "dora", "full"])
def adapter(request, base, tmp_path_factory) -> Path:
    """An adapter of each kind, in a folder of its own."""
    return trained(base, tmp_path_factory.mktemp(request.param) / "best", request.param)[1]


@pytest.fixture(scope="module")
def run_folder(base, tmp_path_factory) -> Path:
    """The folder of a run that has a `best`."""
    run = tmp_path_factory.mktemp("run")
    mx.random.seed(1)  # so that training has helped
    trained(base, run / "best")
    return run


def opened(adapter: Path):
    model, config, _ = loading.open_model(None, str(adapter))
    return model, loading.open_model(None, str(adapter), bare=True)[0], config


def states(model) -> np.ndarray:
    ids, lengths = mx.array([[5, 6, 7, 8]]), mx.array([4])
    return np.array(model.backbone.hidden_states(ids, lengths).astype(mx.float32))


def test_the_ends_are_the_base_model_and_the_trained_one(adapter):
    model, original, config = opened(adapter)
    base_states, trained_states = states(original), states(model)
    assert np.abs(base_states - trained_states).max() > 1e-2
    mixture = blend.Blend(model, original, config)
    for share, expected in ((1.0, trained_states), (0.0, base_states), (1.0, trained_states)):
        mixture.set(share)
        np.testing.assert_allclose(states(model), expected, atol=2e-5)


def test_half_way_is_the_mean_of_the_weights(adapter):
    model, original, config = opened(adapter)
    mixture = blend.Blend(model, original, config)
    mixture.set(1.0)
    ends = [dict(blend.tree_flatten(each.backbone.adapted.parameters())) for each in (original, model)]
    ends = [{name: np.array(value.astype(mx.float32)) for name, value in end.items()} for end in ends]
    mixture.set(0.5)
    changed = 0
    for name, value in blend.tree_flatten(model.backbone.adapted.parameters()):
        np.testing.assert_allclose(np.array(value), (ends[0][name] + ends[1][name]) / 2, atol=1e-6, err_msg=name)
        changed += not np.array_equal(ends[0][name], ends[1][name])
    assert changed


def head_of(model) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.head.parameters())}


@pytest.fixture
def dense_base(base, tmp_path) -> Path:
    """The base model with a dense layer behind its pooling, as sentence-transformers stores it."""
    folder = shutil.copytree(base, tmp_path / "dense")
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    settings = {"in_features": 64, "out_features": 16, "bias": True}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
    weights = {"linear.weight": mx.random.normal((16, 64)), "linear.bias": mx.random.normal((16,))}
    mx.save_safetensors(str(folder / "2_Dense" / "model.safetensors"), weights)
    return folder


@pytest.mark.parametrize("kind", ["dense", "reranker"])
def test_layers_of_a_head_in_the_base_model_s_files_are_blended(kind, request, tmp_path):
    """Regression: they stayed as they were trained, so that a share of 0 was not the base model."""
    if kind == "dense":
        _, adapter = trained(request.getfixturevalue("dense_base"), tmp_path / "best", "full")
    else:
        cross_encoder("bert", tmp_path / "reranker")
        _, adapter = trained(tmp_path / "reranker", tmp_path / "best", task="rerank")
    model, original, config = opened(adapter)
    ends = [head_of(each) for each in (original, model)]
    assert ends[0] and all(np.abs(ends[0][name] - value).max() > 1e-2 for name, value in ends[1].items())
    mixture = blend.Blend(model, original, config)
    for share in (0.0, 0.25, 1.0):
        mixture.set(share)
        for name, value in head_of(model).items():
            expected = (1 - share) * ends[0][name] + share * ends[1][name]
            np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=name)


def test_a_head_that_the_base_model_lacks_stays_as_it_was_trained(base, tmp_path):
    _, adapter = trained(base, tmp_path / "best", task="rerank")
    model, original, config = opened(adapter)
    before, of_base = head_of(model), head_of(original)
    assert before.keys() == {"dense.weight", "dense.bias", "out.weight", "out.bias"}
    blend.Blend(model, original, config).set(0.0)
    for name, value in head_of(model).items():  # BERT's files have its pooler, which is `dense`
        np.testing.assert_array_equal(value, (of_base if name.startswith("dense") else before)[name], err_msg=name)


def test_an_exported_blend(run_folder, tmp_path, capsys):
    """It is read by the libraries, and says what it is."""
    folder = run_export(tmp_path / "half", adapter=run_folder / "best", merge_with_base=0.5)
    whole = run_export(tmp_path / "whole", adapter=run_folder / "best")
    vectors = [load(str(where)).encode(TEXTS) for where in (folder, whole)]
    assert (vectors[0] * vectors[1]).sum(axis=1).min() < 0.9999
    assert "share 0.5, the rest is the base model's" in capsys.readouterr().out
    assert "0.5 of the trained model's and 0.5 of its base model's" in (folder / "README.md").read_text()
    assert read_json(folder)["model_type"] == "bert"


POINTS = [Point(0.0, 0.50, {"g": 0.80}), Point(0.5, 0.60, {"g": 0.799}), Point(0.8, 0.60, {"g": 0.799}),
          Point(1.0, 0.70, {"g": 0.79})]  # fmt: skip


def test_the_best_share_keeps_its_guards(capsys):
    assert blend.best(POINTS, 0.002).share == 0.5  # 0.8 is as good and moves further; 1.0 loses its guard
    assert blend.best(POINTS, 0.02).share == 1.0
    assert blend.best(POINTS, 0.0).share == 0.0
    blend.print_points(POINTS, POINTS[1], 0.002)
    out = capsys.readouterr().out
    assert "0.5 chosen" in out and "1.0 a guard fell" in out and "nDCG@10" in out


def test_a_guard_that_has_lost_just_the_tolerance_holds():
    """As in training: see test_guards.py."""
    for base, score in ((0.5, 0.498), (0.9, 0.898), (0.01563, 0.01363)):
        points = [Point(0.0, 0.0, {"g": base}), Point(0.5, 1.0, {"g": score}), Point(1.0, 2.0, {"g": score - 1e-5})]
        assert blend.best(points, 0.002).share == 0.5


def test_the_table_has_every_share_as_it_is(capsys):
    """Regression: --largest-share 0.25 was a second 0.2."""
    points = [Point(share, share, {}) for share in (0.0, 0.1, 0.2, 0.25)]
    blend.print_points(points, points[-1], 0.002)
    out = capsys.readouterr().out
    assert "0.25 chosen" in out and out.count("0.2 ") == 1


def test_auto_chooses_by_the_run_s_own_tasks_and_guards(run_folder, tmp_path, monkeypatch, capsys):
    """Its held-out questions are asked, and its guards with them."""
    monkeypatch.setattr(blend, "SHARES", (0.0, 0.5, 1.0))
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(TEXTS)]
    write_folder(run_folder / "held-out", corpus, [{"_id": "q", "text": "mat"}], "q\td0\t1\n")
    guard = write_folder(tmp_path / "guard", corpus, [{"_id": "q", "text": "stone"}], "q\td1\t1\n")
    settings = {"data": ["rows.jsonl"], "guard": [str(guard)], "guard_tolerance": 1.0}
    (run_folder / "config.yaml").write_text(json.dumps(settings))
    folder = run_export(tmp_path / "auto", adapter=run_folder / "best", merge_with_base="auto")
    out = capsys.readouterr().out
    assert out.count(" chosen") == 1 and "guard" in out
    assert folder.is_dir()


def test_guards_choose_the_largest_share_at_which_they_hold(run_folder, tmp_path, monkeypatch, capsys):
    """They are evaluated from 1 down, and nothing else is."""
    scores, tried = {0.0: 0.8, 0.5: 0.797, 0.8: 0.79, 1.0: 0.7}, []

    def evaluated(_, share, judge, guard):
        assert judge is None and guard is not None
        tried.append(share)
        return Point(share, share, {"g": scores[share]}, "")

    monkeypatch.setattr(blend, "SHARES", (0.0, 0.5, 0.8, 1.0))
    monkeypatch.setattr(blend, "_evaluated", evaluated)
    config = run_folder / "config.yaml"
    config.write_text('{"data": ["rows.jsonl"], "eval_tasks": ["x"], "guard": ["g"], "guard_tolerance": 0.02}')
    folder = run_export(tmp_path / "out", adapter=run_folder / "best", merge_with_base="guards")
    assert tried == [0.0, 1.0, 0.8] and folder.is_dir()
    out = capsys.readouterr().out
    assert "0.8 chosen" in out and "1.0 a guard fell" in out and "share 0.8" in out
    config.write_text('{"data": ["rows.jsonl"], "eval_tasks": ["x"], "guard": ["g"], "guard_tolerance": 0.0}')
    with pytest.raises(UserError, match="no share of .* is left while its guards hold"):
        run_export(tmp_path / "none", adapter=run_folder / "best", merge_with_base="guards")
    config.write_text('{"data": ["rows.jsonl"], "eval_tasks": ["x"]}')
    with pytest.raises(UserError, match="had no --guard"):
        run_export(tmp_path / "none", adapter=run_folder / "best", merge_with_base="guards")
    own = {"merge_with_base": "guards", "guard": ["g"], "guard_tolerance": 0.005}  # an export's own guards
    run_export(tmp_path / "own", adapter=run_folder / "best", **own)
    assert "0.5 chosen" in capsys.readouterr().out
    tried.clear()
    run_export(tmp_path / "at-most", adapter=run_folder / "best", largest_share=0.8, **own | {"guard_tolerance": 0.02})
    assert tried == [0.0, 0.8] and "0.8 chosen" in capsys.readouterr().out  # which 1.0 would not lose the guard for


@pytest.mark.parametrize("config", [None, '{"data": ["rows.jsonl"]}'])
def test_guards_need_nothing_that_the_run_was_judged_on(base, tmp_path, capsys, config):
    """Regression: the guards of an export were refused for a run that was judged on nothing, or has no config.yaml."""
    _, adapter = trained(base, tmp_path / "run" / "best")
    if config:
        (tmp_path / "run" / "config.yaml").write_text(config)
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(TEXTS)]
    guard = write_folder(tmp_path / "guard", corpus, [{"_id": "q", "text": "stone"}], "q\td1\t1\n")
    own = {"merge_with_base": "guards", "guard": [str(guard)], "guard_tolerance": 1.0}
    assert run_export(tmp_path / "out", adapter=adapter, **own).is_dir()
    assert "1.0 chosen" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [
    {"largest_share": 0.5}, {"largest_share": 0.5, "merge_with_base": 0.5},
    {"largest_share": 0.0, "merge_with_base": "auto"}, {"largest_share": math.nan, "merge_with_base": "guards"},
])  # fmt: skip
def test_a_largest_share_that_bounds_nothing_is_refused(run_folder, tmp_path, changes):
    with pytest.raises(UserError, match="--largest-share"):
        run_export(tmp_path / "out", adapter=run_folder / "best", **changes)


@pytest.mark.parametrize("changes", [
    {"guard": ["g"]}, {"guard_tolerance": 0.1}, {"guard": ["g"], "merge_with_base": 0.5},
    {"guard_tolerance": -1.0, "merge_with_base": "auto"}, {"guard_tolerance": math.nan, "merge_with_base": "auto"},
])  # fmt: skip
def test_guards_that_decide_nothing_are_refused(run_folder, tmp_path, changes):
    with pytest.raises(UserError, match="--guard"):
        run_export(tmp_path / "out", adapter=run_folder / "best", **changes)


def test_auto_that_keeps_nothing_is_refused(run_folder, tmp_path, monkeypatch):
    """Regression: it wrote the base model without a word."""
    points = iter([Point(0.0, 0.7, {}), Point(0.5, 0.6, {}), Point(1.0, 0.5, {})])
    monkeypatch.setattr(blend, "SHARES", (0.0, 0.5, 1.0))
    monkeypatch.setattr(blend, "_evaluated", lambda *_: next(points))
    (run_folder / "config.yaml").write_text('{"data": ["rows.jsonl"], "eval_tasks": ["x"]}')
    with pytest.raises(UserError, match="no share of .*best is better than the base model"):
        run_export(tmp_path / "out", adapter=run_folder / "best", merge_with_base="auto")
    assert not (tmp_path / "out").exists()


def test_weights_are_rounded_once(toy_tokenizer_folder, tmp_path):
    """Regression: with --dtype float32, trained weights were first rounded to the base model's bfloat16."""
    base = save("bert", tmp_path / "bert", tokenizer=toy_tokenizer_folder)
    half = {name: value.astype(mx.bfloat16) for name, value in mx.load(str(base / "model.safetensors")).items()}
    mx.save_safetensors(str(base / "model.safetensors"), half)
    trained(base, tmp_path / "best")
    folder = run_export(tmp_path / "out", adapter=tmp_path / "best", dtype="float32", merge_with_base=0.3)
    weights = {n: v for n, v in mx.load(str(folder / "model.safetensors")).items() if "query.weight" in n}
    assert weights and all(v.dtype == mx.float32 for v in weights.values())
    assert not any(mx.array_equal(v, v.astype(mx.bfloat16).astype(mx.float32)) for v in weights.values())


def test_a_reranker_keeps_its_head(toy_tokenizer_folder, tmp_path):
    base = tmp_path / "reranker"
    cross_encoder("bert", base)
    trained(base, tmp_path / "best", task="rerank")
    folder = run_export(tmp_path / "out", adapter=tmp_path / "best", merge_with_base=0.5)
    assert (folder / "model.safetensors").is_file()
    before, blended = (mx.load(str(each / "model.safetensors"))["classifier.weight"] for each in (base, folder))
    after = mx.load(str(tmp_path / "best" / "heads.safetensors"))["out.weight"]
    np.testing.assert_allclose(np.array(blended), np.array(before + after) / 2, atol=1e-6)


def test_auto_needs_what_the_run_was_judged_on(base, tmp_path):
    _, lonely = trained(base, tmp_path / "run" / "best")
    with pytest.raises(UserError, match=r"no config.yaml in .*run"):
        run_export(tmp_path / "out", adapter=lonely, merge_with_base="auto")
    (tmp_path / "run" / "config.yaml").write_text('{"data": ["rows.jsonl"]}')
    with pytest.raises(UserError, match="judged on nothing"):
        run_export(tmp_path / "out", adapter=lonely, merge_with_base="auto")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["-0.1", "1.1", "half", "nan", ""])
def test_shares_that_are_none(text, capsys):
    with pytest.raises(SystemExit):
        export.parser().parse_args(["--adapter", "a", "--output", "o", "--merge-with-base", text])
    assert "neither a number from 0 to 1 nor auto" in capsys.readouterr().err


def test_what_has_no_base_is_refused(base, tmp_path):
    assert share_of("0.7") == 0.7
    with pytest.raises(UserError, match="--merge-with-base 0.5: needs an --adapter"):
        run_export(tmp_path / "out", model=str(base), merge_with_base=0.5)


def test_the_command_refuses_guards_in_one_line(base, tmp_path, capsys):
    """The held-out questions are none, whatever their folder is called: they decide already."""
    _, adapter = trained(base, tmp_path / "run" / "best")
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(TEXTS)]
    held_out = write_folder(tmp_path / "run" / "held-out", corpus, [{"_id": "q", "text": "mat"}], "q\td0\t1\n")
    copy = shutil.copytree(held_out, tmp_path / "copy")
    other = write_folder(tmp_path / "other", corpus, [{"_id": "q", "text": "stone"}], "q\td1\t1\n")
    (tmp_path / "run" / "config.yaml").write_text('{"data": ["rows.jsonl"]}')
    auto, guards = ("--merge-with-base", "auto"), ("--merge-with-base", "guards")
    for flags, message in (
        ((*auto, "--guard", held_out), f"--guard {held_out}: the run is judged on this task, or on a copy of it"),
        ((*auto, "--guard", other, copy), f"--guard {copy}: the run is judged on this task, or on a copy of it"),
        ((*guards, "--guard", copy), f"--guard {copy}: the run is judged on this task, or on a copy of it"),
        ((*guards, "--guard", other, other), f"--guard {other}: names a task twice"),
        ((*guards, "--guard", tmp_path / "none"), f"{tmp_path / 'none'}: no such folder"),
        (guards, "--merge-with-base guards: the run of "),
        (("--guard", other), "--guard and --guard-tolerance choose the share of --merge-with-base auto or guards"),
    ):
        assert message in refusal(capsys, "--adapter", adapter, "--output", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_auto_names_a_task_of_the_run_that_cannot_be_reached(base, tmp_path, capsys, monkeypatch):
    """Regression: a traceback; and of several tasks, it was left out without a word."""
    monkeypatch.setattr(mteb_tasks, "load", lambda *_: (None, "no network"))
    _, adapter = trained(base, tmp_path / "run" / "best")
    (tmp_path / "run" / "config.yaml").write_text('{"data": ["rows.jsonl"], "eval_tasks": ["SciFact"]}')
    flags = ["--adapter", adapter, "--output", tmp_path / "out", "--merge-with-base", "auto"]
    message = "--merge-with-base auto: SciFact, which the run was judged on, cannot be evaluated: no network"
    assert message in refusal(capsys, *flags)
