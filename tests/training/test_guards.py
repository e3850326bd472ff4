"""Guards: tasks on which a model must not get worse; a step at which one has fallen is never the best.

python -m pytest tests/training/test_guards.py
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from beir_folders import write_folder

import train
from mlx_retrieval.evaluation import mteb_tasks
from mlx_retrieval.evaluation.results import METRICS, Evaluation
from mlx_retrieval.training import checkpoint, improvement
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.guards import Guards
from mlx_retrieval.training.reporting import Reporter
from mlx_retrieval.training.run_data import open_data
from mlx_retrieval.training.state import State
from mlx_retrieval.utils.errors import UserError


def evaluation(**tasks: float) -> Evaluation:
    """Three queries of each task, all with the task's score."""
    per_query = {task: {m: dict.fromkeys(("a", "b", "c"), score) for m in METRICS} for task, score in tasks.items()}
    return Evaluation("toy", {task: dict.fromkeys(METRICS, score) for task, score in tasks.items()}, per_query, {})


@pytest.fixture
def guards(tmp_path):
    """Guards of two tasks with the given results, one after the other."""

    def make(*results: Evaluation, tolerance: float = 0.002) -> Guards:
        following = iter(results)
        return Guards(lambda: (None, next(following)), tmp_path, tolerance)

    return make


def test_a_guard_falls_if_it_loses_more_than_the_tolerance(guards):
    guard = guards(evaluation(code=0.5, prose=0.4), evaluation(code=0.4985, prose=0.39), tolerance=0.002)
    guard(0)
    assert guard.changes() == {} and guard.fallen() == []
    guard(10)
    assert guard.changes() == pytest.approx({"code": -0.0015, "prose": -0.01})
    assert guard.fallen() == ["prose"]


@pytest.mark.parametrize("before, after", [(0.5, 0.498), (0.9, 0.898), (0.01563, 0.01363)])
def test_a_guard_that_has_lost_just_the_tolerance_holds(guards, before, after):
    """Regression: 0.5 - 0.498 is 0.0020000000000000018."""
    guard = guards(evaluation(code=before), evaluation(code=after), evaluation(code=after - 1e-5))
    guard(0)
    guard(10)
    assert guard.fallen() == []
    guard(20)
    assert guard.fallen() == ["code"]


def test_their_table_is_of_the_best_step(guards, capsys):
    guard = guards(evaluation(code=0.5), evaluation(code=0.51), evaluation(code=0.2))
    guard(0)
    guard(10)
    guard.keep_best()
    guard(20)
    assert guard.results() == {"code": {"before": 0.5, "after": 0.51}}
    guard.print()
    out = capsys.readouterr().out
    assert "after step 10" in out and "+0.0100" in out and max(map(len, out.splitlines())) <= 80


def test_they_are_restored(guards):
    first = guards(evaluation(code=0.5), evaluation(code=0.51))
    first(0)
    first(10)
    first.keep_best()
    again = guards(evaluation(code=0.3))
    again.restore(10, 10)
    assert again.results() == first.results()
    again(20)
    assert again.fallen() == ["code"]


def test_the_figures_of_a_best_step_are_restored_after_a_kill_before_they_were_noted(guards):
    """Regression: figures of a later step were given as those of the model in `best`."""
    first = guards(evaluation(code=0.5), evaluation(code=0.51))
    first(0)
    first(10)
    again = guards(evaluation(code=0.3))
    again.restore(10, 10)
    again(20)
    assert again.results() == {"code": {"before": 0.5, "after": 0.51}}


def test_a_guard_that_cannot_be_evaluated_any_more_has_fallen(guards):
    guard = guards(evaluation(code=0.5, prose=0.4), evaluation(prose=0.4))
    guard(0)
    guard(10)
    assert guard.fallen() == ["code"]


def test_a_step_with_a_fallen_guard_is_not_the_best():
    state = State()
    improvement.note(state, {"ndcg_at_10": 0.5})
    state.step, state.fallen = 10, ["code"]
    assert not improvement.note(state, {"ndcg_at_10": 0.9}) and state.best == 0.5
    assert improvement.improved(state) is False and state.evaluations_since_best == 1
    (line,) = improvement.conclusion(state, Path("nowhere"))
    assert line == ("no best", "nDCG@10 0.9000 after training, 0.5000 before, but code fell: no step was better and "
                    "kept its guards")  # fmt: skip
    state.step, state.fallen = 20, []
    assert improvement.note(state, {"ndcg_at_10": 0.8}) and state.best_step == 20


def test_the_last_step_may_have_lost_a_guard(tmp_path):
    (tmp_path / "best").mkdir()
    state = State(step=20, metric="ndcg_at_10", untrained=0.5, best=0.6, best_step=10, last=0.7, fallen=["code"])
    assert ("last", "nDCG@10 0.7000 at step 20, but code fell there") in improvement.conclusion(state, tmp_path)


def test_the_reporter_does_not_call_it_the_best(tmp_path, capsys):
    with Reporter(tmp_path, 3) as reporter:
        reporter.evaluation(0, {"ndcg_at_10": 0.5})
        reporter.evaluation(1, {"ndcg_at_10": 0.9}, {}, {"code": -0.01, "prose": 0.001}, ["code"])
        reporter.evaluation(2, {"ndcg_at_10": 0.6}, {}, {"code": 0.0, "prose": 0.001}, [])
    lines = capsys.readouterr().out.splitlines()
    assert "eval 1: nDCG@10 0.9000" in lines and "eval 2: nDCG@10 0.6000, best" in lines
    assert "guards 1: code -0.0100 fell  prose +0.0010, not kept as best" in lines
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[1]["fallen"] == ["code"] and "guards" not in records[0]


def test_a_guard_that_cannot_be_evaluated_ends_the_run_before_it_begins(guards):
    """Regression: it guarded nothing, and `best` was kept."""
    unreachable = Evaluation("toy", {}, {}, {"NanoNQRetrieval": "no network"})
    with pytest.raises(UserError, match="--guard NanoNQRetrieval: it cannot be evaluated, .* no network"):
        guards(unreachable)(0)


def test_another_run_leaves_no_guards_behind(guards, tmp_path):
    """Regression: --overwrite left their results, which a later run read."""
    guard = guards(evaluation(code=0.5))
    guard(0)
    (tmp_path / "config.yaml").write_text("")
    assert tmp_path / "guards" in checkpoint.contents(tmp_path)
    checkpoint.remove_run(tmp_path)
    assert not (tmp_path / "guards").exists()


def test_guards_compare_a_later_round_with_the_model_that_the_first_began_with(tmp_path):
    results = iter([evaluation(code=0.5), evaluation(code=0.4985), evaluation(code=0.497)])
    guards = [Guards(lambda: (None, next(results)), checkpoint.round_folder(tmp_path, n), 0.002) for n in (1, 2)]
    for guard in guards:
        guard.folder.parent.mkdir(parents=True)
        guard(0)
    guards[1](10)
    assert guards[1].fallen() == ["code"] and guards[1].changes() == pytest.approx({"code": -0.003})
    assert json.loads((guards[1].folder / "before.json").read_text())["tasks"]["code"]["ndcg_at_10"] == 0.5


@pytest.fixture
def settings(tmp_path, small):
    """A run of two steps, judged on one small task, of which there is a copy, and guarded by another."""
    texts = ["dogs bark", "cats meow", "cows moo"]
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    for name, asked in (("task", "which animal barks"), ("other", "which one barks")):
        queries = [{"_id": "q0", "text": asked}, {"_id": "q1", "text": "meow"}]
        write_folder(tmp_path / name, corpus, queries, "q0\td0\t1\nq1\td1\t1\n")
    shutil.copytree(tmp_path / "task", tmp_path / "copy")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"query": f"q {i}", "document": f"d {i}"}) + "\n" for i in range(20)))

    def make(**changes) -> Settings:
        defaults = {"model": small, "data": [str(rows)], "batch_size": 4, "steps": 2, "lora_rank": 2, "save_steps": 0}
        defaults |= {"eval_tasks": [str(tmp_path / "task")], "guard": [str(tmp_path / "other")]}
        return Settings(**defaults | {"output": str(tmp_path / "run")} | changes)

    return make


def test_guard_and_guard_tolerance_of_a_run(settings, capsys):
    """A tolerance that nothing can break, in a run from its first line to its last."""
    chosen = settings(guard_tolerance=1.0)
    results = training_run.train(chosen)
    assert set(results["guards"]) == {"other"} and set(results["guards"]["other"]) == {"before", "after"}
    out = capsys.readouterr().out
    lines = ("may lose 1 of nDCG@10 or Spearman", "guards 2: other ", "guards, nDCG@10, before training")
    assert all(line in out for line in lines)
    assert (Path(chosen.output) / "guards" / "before.json").is_file()


def test_guards_that_have_changed_are_judged_anew_before_the_run_goes_on(settings, tmp_path):
    """Regression: any changed evaluation file deleted their reference, and no guard could fall any more."""
    job = training_run.prepare(settings())
    training_run.begin(job)
    job.guards(0)
    job.trainer.state.step = 1
    job.trainer.save()
    reference = tmp_path / "run" / "guards" / "before.json"
    figures = reference.read_bytes()

    def go_on(changed: str) -> Guards:
        corpus = tmp_path / changed / "corpus.jsonl"
        corpus.write_text(corpus.read_text().replace("cows moo", "cows moo, too"))
        given = {"resume": True, "accept_changed_data": True, "output": str(tmp_path / "run")}
        job = training_run.prepare(train.resumed_settings(given))
        training_run.begin(job)
        return job.guards

    assert go_on("task").before and reference.read_bytes() == figures
    now = go_on("other")
    assert now.before.digests != Evaluation(**json.loads(figures)).digests
    assert json.loads(reference.read_text())["digests"] == now.before.digests
    assert now.before.tasks == job.guards.evaluate()[1].tasks  # of the untrained model


def test_guards_that_have_changed_since_the_first_round_are_refused(tmp_path):
    results = iter([replace(evaluation(code=0.5), digests={"code": digest}) for digest in ("one", "other")])
    guards = [Guards(lambda: (None, next(results)), checkpoint.round_folder(tmp_path, n), 0.002) for n in (1, 2)]
    for guard in guards:
        guard.folder.parent.mkdir(parents=True)
    guards[0](0)
    with pytest.raises(UserError, match="--guard code: it has changed since the first round"):
        guards[1](0)
    assert not guards[1].has_reference


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guard": ["task"]}, "the run is judged on this task"),
        ({"guard": ["other", "copy"]}, "--guard copy: the run is judged on this task, or on a copy of it"),
        ({"guard": ["other", "./other"]}, "--guard ./other: names a task twice, or a copy of it"),
        ({"skip_eval_init": True}, "--guard .*other: needs the evaluation before training, and --skip-eval-init"),
        ({"eval_tasks": []}, "--guard: nothing is evaluated"),
        ({"guard": [""]}, "--guard: must not be empty"),
        ({"guard": ["other", "other"]}, "--guard other other: names a task twice"),
        ({"guard_tolerance": -0.1}, "--guard-tolerance -0.1: must not be negative"),
        ({"guard": ["no-such-folder/here"]}, "no-such-folder"),
    ],
)
def test_guards_that_cannot_guard_are_refused(settings, changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        training_run.prepare(settings(**changes))


def test_held_out_questions_that_are_not_written_yet_are_no_guard(settings, write_rows, tmp_path):
    """Regression: a run from another's `best` asks that one's questions again, in a folder of its own."""
    rows = write_rows({"query": f"question {i}", "document": f"answer {i}"} for i in range(90))
    given = {"data": [str(rows)], "eval_tasks": None}
    open_data(settings(**given)).keep(tmp_path / "earlier")
    with pytest.raises(UserError, match="--guard .*held-out: the run is judged on this task, or on a copy of it"):
        training_run.prepare(settings(**given, guard=[str(tmp_path / "earlier" / "held-out")]))


@pytest.fixture
def refusal(settings, tmp_path, capsys, monkeypatch):
    """Return a function that runs train.py with flags that it refuses, and returns what it prints on standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> str:
        chosen = settings()
        command = ["--model", chosen.model, "--data", *chosen.data, "--batch-size", "4", "--steps", "2"]
        assert train.main([*command, "--eval-tasks", "task", "--output", chosen.output, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("train.py: ") and error.count("\n") == 1, error
        return error

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guard", "task"], "--guard task: the run is judged on this task"),
        (["--guard", "copy"], "--guard copy: the run is judged on this task, or on a copy of it"),
        (["--guard", "other", "./other"], "--guard ./other: names a task twice"),
        (["--guard", "other", "--guard-tolerance", "-0.1"], "--guard-tolerance -0.1: must not be negative"),
        (["--guard", "other", "--eval-tasks"], "--guard: nothing is evaluated"),
    ],
)
def test_the_command_refuses_guards_in_one_line(refusal, flags, message, tmp_path):
    assert message in refusal(*flags) and not (tmp_path / "run").exists()


def test_the_command_names_a_guard_that_cannot_be_reached_in_one_line(refusal, monkeypatch):
    monkeypatch.setattr(mteb_tasks, "load", lambda *_: (None, "no network"))
    assert "--guard SciFact: it cannot be evaluated, so nothing would guard it: no network" in refusal(
        "--guard", "SciFact"
    )
