"""What a run is judged on: questions of its own data, kept from training, the same in every command and after a resume.

python -m pytest tests/training/test_run_data.py
"""

import json
import shlex
from pathlib import Path

import pytest

import eval as evaluation
import train
from mlx_retrieval.dataset import held_out_pairs
from mlx_retrieval.evaluation.results import METRICS, Evaluation
from mlx_retrieval.training import checkpoint, contents, output_folder
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.evaluations import Evaluations, Step
from mlx_retrieval.training.run_data import open_data
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = ["oak", "elm", "fir", "ash", "yew", "fig", "bay", "hop", "ivy", "nut", "pea", "rye"]


def rows(count, **more):
    """Rows whose answers can be learnt: the answer is the question's word with a number, beside another word."""
    texts = [(f"{WORDS[i % 12]} {i}", WORDS[i * 7 % 12]) for i in range(count)]
    return [{"query": query, "document": f"{query} {word}"} | more for query, word in texts]


@pytest.fixture
def data(tmp_path, write_rows):
    """`data(rows, valid)`: settings of a run on these rows, and on these validation rows."""

    def make(rows, valid=None, **changes) -> Settings:
        source = write_rows(rows)
        if valid is not None:
            write_rows(valid, "valid.jsonl")
            source = tmp_path
        return Settings(**{"data": [str(source)], "output": str(tmp_path / "run")} | changes)

    return make


def judged_on(settings: Settings) -> str:
    return dict(open_data(settings).lines).get("judged on", "")


def test_what_a_run_is_judged_on(data, tmp_path):
    held_out = [str(tmp_path / "run" / "held-out")]
    own = open_data(data(rows(400)))
    assert own.eval_tasks == held_out and len(own.rows) == 350
    assert (
        dict(own.lines)["judged on"]
        == "50 questions held out (--holdout 0.05, at least 50), searched among 400 documents"
    )
    assert dict(own.lines)["not trained"] == "50 of 400 rows, which hold one of these questions or answers"
    for changes, tasks in (({"eval_tasks": []}, []), ({"eval_tasks": ["mine"]}, ["mine"]), ({"holdout": 0.0}, [])):
        given = open_data(data(rows(400), **changes))
        assert (given.eval_tasks, given.questions, len(given.rows)) == (tasks, None, 400)
        assert "not trained" not in dict(given.lines)
        assert dict(given.lines).get("judged on", "").startswith("" if tasks else "nothing (--")
    toy = Settings(data=[str(ROOT / "train-data.jsonl")])
    assert [Path(task).name for task in open_data(toy).eval_tasks] == ["eval-data"] and not judged_on(toy)
    assert "500 questions" not in judged_on(Settings(data=toy.data, holdout=0.1)) != ""
    assert judged_on(Settings(data=toy.data, eval_tasks=[])).startswith(
        "nothing (--eval-tasks without a name), so there"
    )


def test_where_nothing_is_held_out_the_run_says_so(data):
    settings = data(rows(29))
    assert len(open_data(settings).rows) == 29 and open_data(settings).eval_tasks == []
    reason = "nothing, as no questions could be held out: 29 queries are too few: 30 are needed. --eval-tasks names"
    assert judged_on(settings).startswith(reason)
    alike = [{"query": "one", "document": f"d{i}"} for i in range(100)]
    assert "1 query is too few" in judged_on(data(alike))


def test_validation_rows_are_the_questions(data, tmp_path):
    settings = data(rows(100), rows(130)[98:])
    opened = open_data(settings)
    name = tmp_path / "valid.jsonl"
    assert dict(opened.lines)["judged on"] == f"32 questions of {name}, searched among 130 documents"
    assert len(opened.rows) == 98 and len(opened.validation) == 32
    most = open_data(data(rows(100), rows(60)))
    lines = dict(most.lines)
    assert len(most.rows) == 67 and lines["judged on"].startswith("33 questions held out")
    reason = "most rows share a question or an answer with it"
    assert lines["validation"] == f"{name} gives a loss, but no questions: {reason}"
    few = judged_on(data(rows(100), rows(104)[98:]))
    assert few == f"6 questions of {name}, too few to tell models apart, searched among 104 documents"


def test_a_run_from_an_adapter_is_asked_what_that_one_was_not_trained_on(data, tmp_path):
    """Regression: with another seed or more rows, most questions were those that the adapter had learnt."""
    first = open_data(data(rows(400), output=str(tmp_path / "one")))
    first.keep(tmp_path / "one")
    best = str(tmp_path / "one" / "best")
    second = open_data(data(rows(450), model=best, seed=7))
    assert second.questions.queries == first.questions.queries and len(second.rows) == 400
    assert dict(second.lines)["judged on"].startswith(f"50 questions of {tmp_path}/one/held-out, which {best} was not")
    second.keep(tmp_path / "run")
    again = open_data(data(rows(450), model=best, seed=7, resume=True))
    assert again.rows.kept.tolist() == second.rows.kept.tolist()
    new = [{"query": f"new {i}", "document": f"text {i}"} for i in range(200)]
    others = open_data(data(new, model=best))
    assert len(others.questions.queries) == 50 and "warning" not in dict(others.lines)
    few = [{"query": query, "document": "a text"} for query in [*first.questions.queries.values()][:3]]
    mixed = open_data(data(new + few, model=best))
    assert "3 of its 50 held-out questions are in these data" in dict(mixed.lines)["warning"]
    named = open_data(data(rows(450), eval_tasks=[str(tmp_path / "one" / "held-out")]))
    assert "50 of the 50 questions" in dict(named.lines)["warning"] and len(named.rows) == 450
    contents.write(tmp_path / "two", {"data": first.rows.contents()})  # of a run with --holdout 0
    knows = open_data(data(rows(400), model=str(tmp_path / "two" / "final")))
    assert "was trained on these data without holding out" in dict(knows.lines)["warning"]


def test_negatives_that_are_held_out_are_counted(data):
    opened = open_data(
        data([row | {"negatives": ["x", rows(400)[i - 1]["document"]]} for i, row in enumerate(rows(400))])
    )
    assert dict(opened.lines)["not trained"].endswith(" negatives that are one of these answers")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": -0.1}, "--holdout -0.1: must be a share from 0 to 0.5"),
        ({"holdout": 0.6}, "--holdout 0.6: must be a share from 0 to 0.5"),
        ({"holdout": 5.0}, "--holdout 5.0: must be a share from 0 to 0.5"),
        ({"holdout": 0.1, "eval_tasks": ["eval-data"]}, "--holdout 0.1: has no effect beside --eval-tasks"),
        ({"holdout": 0.1, "eval_tasks": []}, "--holdout 0.1: has no effect beside --eval-tasks"),
        ({"holdout": float("nan")}, "--holdout nan: must be finite"),
    ],
)
def test_shares_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        Settings(**changes)
    Settings(holdout=0.0, eval_tasks=["eval-data"])


def test_the_questions_are_a_run_s_own_folder(data, tmp_path):
    """--overwrite removes it; without a run it is somebody else's, and so it is where it is an input."""
    run = tmp_path / "run"
    settings = data(rows(400))
    opened = open_data(settings)
    assert not run.exists()  # nothing is written before the run begins
    opened.keep(run)
    assert sorted(path.name for path in (run / "held-out").iterdir()) == ["corpus.jsonl", "qrels", "queries.jsonl"]
    with pytest.raises(UserError, match="held-out is there without a run"):
        output_folder.check(run, settings)
    with pytest.raises(UserError, match="the run would replace held-out"):
        inside = data(rows(400), overwrite=True, eval_tasks=[str(run / "held-out")])
        output_folder.check(run, inside)
    checkpoint.remove_run(run)
    assert not (run / "held-out").exists()


def test_a_resumed_run_keeps_its_questions(data, tmp_path):
    """Also where the data have changed: no question that was trained on becomes one, and none is trained on."""
    settings = data(rows(400), resume=True)
    before = open_data(settings)  # it has not begun
    before.keep(tmp_path / "run")
    again = open_data(settings)
    assert again.questions is None and again.eval_tasks == before.eval_tasks
    assert [again.rows.where(i) for i in again.rows.kept] == [before.rows.where(i) for i in before.rows.kept]
    assert dict(again.lines)["judged on"] == (
        f"50 questions of {tmp_path / 'run' / 'held-out'}, as when the run was begun, searched among 400 documents"
    )
    longer = open_data(data(rows(450), resume=True))
    assert len(longer.rows) == 400
    checkpoint.remove_run(tmp_path / "run")
    contents.write(tmp_path / "run", {"evaluation": []})  # of a run whose data were too few
    few = open_data(settings)
    assert len(few.rows) == 450 and not few.eval_tasks
    assert dict(few.lines)["judged on"] == "no held-out questions, as when the run was begun"


# --- evaluations of a run ---------------------------------------------------------------------------------------------


def figures(score: float) -> Evaluation:
    per_query = {metric: {"q1": score, "q2": score / 2} for metric in METRICS}
    return Evaluation("m", {"task": dict.fromkeys(METRICS, 0.75 * score)}, {"task": per_query}, {})


def test_the_figures_after_training_are_those_of_the_best_step(tmp_path, capsys):
    """Regression: they were those of the last step, and the model to use is `best`."""
    scores = iter([0.2, 0.8, 0.4])
    evaluations = Evaluations(lambda: (None, figures(next(scores))), tmp_path)
    assert evaluations.results() == {"before": None, "after": None}
    evaluations(0)
    evaluations(10)
    evaluations.keep_best()
    evaluations(20)
    results = evaluations.results()
    shown = {name: results[name]["ndcg_at_10"] for name in ("before", "after", "last")}
    assert shown == pytest.approx({"before": 0.15, "after": 0.6, "last": 0.3}) and results["after_step"] == 10
    evaluations.print()
    out = capsys.readouterr().out
    assert "task: 2 queries, before training and after step 10" in out and " 0.1500   0.6000 " in out
    assert evaluations.last_line() == "nDCG@10 0.3000 at step 20, 0.6000 at step 10"

    resumed = Evaluations(lambda: None, tmp_path)
    resumed.restore(10, 20)
    assert (resumed.before, resumed.after) == (figures(0.2), Step(10, figures(0.8)))
    assert resumed.results() == results  # also if the run stops before its next evaluation
    other = Evaluations(lambda: None, tmp_path)
    other.restore(5, 19)  # best.json and last.json are of later steps than the one that the run goes on from
    assert other.before and other.after is None


def test_a_run_without_a_best_step_keeps_its_last_figures_when_it_goes_on(tmp_path):
    """Regression: results.json of a lengthened run that stopped before its next evaluation had no `after`."""
    scores = iter([0.8, 0.4])
    evaluations = Evaluations(lambda: (None, figures(next(scores))), tmp_path)
    evaluations(0)
    evaluations(10)
    resumed = Evaluations(lambda: None, tmp_path)
    resumed.restore(0, 12)
    assert resumed.after == Step(10, figures(0.4)) and resumed.results() == evaluations.results()
    assert (resumed.results()["after_step"], resumed.results()["last_step"]) == (10, 10)
    resumed.forget()  # the evaluation has changed, with --accept-changed-data
    other = Evaluations(lambda: None, tmp_path)
    other.restore(0, 12)
    assert other.results() == {"before": None, "after": None}


# --- from the command to the figures ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", ["embed", "late", "rerank"])
def test_own_data_are_judged_by_their_own_questions(task, small, tmp_path, write_rows, capsys):
    """eval.py repeats the figures to the last digit, a resumed run has the same, and no question is trained on."""
    negatives = [row | {"negatives": [rows(90)[i - 5]["document"]]} for i, row in enumerate(rows(90))]
    flags = [
        "--model",
        small,
        "--task",
        task,
        "--data",
        str(write_rows(negatives)),
        "--batch-size",
        "12",
        "--steps",
        "6",
    ]
    flags += ["--eval-steps", "2", "--save-steps", "2", "--lora-rank", "4", "--learning-rate", "0.01"]
    flags += ["--reranker-type", "cross-encoder", "--rerank-depth", "20"] if task == "rerank" else []
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train.main([*flags, "--output", str(tmp_path / "dry"), "--dry-run"]) == 0
    assert train.main([*flags, "--output", str(tmp_path / "dry"), "--profile", "1"]) == 0
    assert not (tmp_path / "dry").exists() and "evaluation" in capsys.readouterr().out
    assert train.main([*flags, "--output", str(straight)]) == 0
    out = capsys.readouterr().out
    assert "judged on 30 questions held out (" in (line := " ".join(out.split())) and "among 90 documents" in line
    assert "held-out: 30 queries, before training and after step" in out
    results = json.loads((straight / "results.json").read_text())
    records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    by_step = {record["step"]: record["metrics"] for record in records if record["type"] == "eval"}
    assert results["after"] == by_step[results["after_step"]] and results["before"] == by_step[0]
    best = max((step for step in by_step if step), key=lambda step: (by_step[step]["ndcg_at_10"], -step))
    if (straight / "best").is_dir():
        assert results["after_step"] == best and by_step[best]["ndcg_at_10"] > by_step[0]["ndcg_at_10"]

    words = ["--model", str(straight / ("best" if (straight / "best").is_dir() else "final"))]
    words += ["--eval-tasks", str(straight / "held-out"), *(["--depth", "20"] if task == "rerank" else [])]
    lines = [line for line in out.splitlines() if line.startswith("evaluate")]
    assert len(lines) == results["improved"]  # else the model that the run began with is the one to use
    assert all(shlex.split(line)[3:] == words for line in lines)
    assert evaluation.main([*words, "--output", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["tasks"] == {"held-out": results["after"]}
    saved = json.loads((straight / "best.json").read_text()) if (straight / "best").is_dir() else None
    assert saved is None or saved["per_query"] == again["per_query"]

    assert train.main([*flags, "--output", str(stopped), "--stop-after", "3"]) == 0
    assert train.main(["--resume", "--output", str(stopped)]) == 0
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        assert (stopped / "held-out" / name).read_bytes() == (straight / "held-out" / name).read_bytes()
    assert json.loads((stopped / "results.json").read_text()) == results
    weights = [(run / "final" / "adapters.safetensors").read_bytes() for run in (straight, stopped)]
    assert weights[0] == weights[1]


# --- scored pairs ---


@pytest.fixture
def scored(tmp_path):
    """Ninety scored pairs; every tenth shares its first text with the one before."""
    file = tmp_path / "scored.jsonl"
    rows = [{"text1": f"first {i - (i % 10 == 9)}", "text2": f"second {i}", "score": i % 6 / 5} for i in range(90)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_scored_pairs_are_held_out_with_all_of_their_texts(scored, tmp_path):
    settings = Settings(data=[str(scored)], loss="cosent", output=str(tmp_path / "run"))
    data = open_data(settings)
    pairs = data.questions.pairs
    assert len(pairs) == 30 and len(data.rows) == 60  # a third, as it is below 50
    trained = {text for i in data.rows.kept.tolist() for text in (data.rows[i].query, data.rows[i].positive)}
    assert trained.isdisjoint(text for pair in pairs for text in pair[:2])
    (line,) = [text for name, text in data.lines if name == "judged on"]
    assert line == "30 pairs held out (--holdout 0.05), by Spearman"
    again = open_data(settings)
    assert again.questions == data.questions
    (tmp_path / "run").mkdir()
    data.keep(tmp_path / "run")
    assert held_out_pairs.read(tmp_path / "run" / "held-out") == data.questions
    resumed = open_data(Settings(data=[str(scored)], loss="cosent", output=str(tmp_path / "run"), resume=True))
    assert resumed.rows.kept.tolist() == data.rows.kept.tolist() and resumed.eval_tasks == data.eval_tasks
    other = Settings(data=[str(scored)], loss="cosent", eval_tasks=data.eval_tasks, output=str(tmp_path / "other"))
    assert any("30 rows with a text of" in text for name, text in open_data(other).lines if name == "warning")


def test_validation_pairs_judge_the_run(scored, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = scored.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "valid.jsonl").write_text("".join(lines[:9]))
    data = open_data(Settings(data=[str(folder)], loss="angle", output=str(tmp_path / "run")))
    assert len(data.questions.pairs) == 9 and len(data.rows) == 80  # the tenth shares a text


def test_pairs_with_line_separators_are_read_back(tmp_path):
    """Regression: str.splitlines cut their JSON at U+2028, U+2029 and U+0085, and --resume ended in a traceback."""
    pairs = held_out_pairs.Pairs([[f"first\u2028{i}", f"second\u2029\x85\x0b{i}", 0.5] for i in range(3)])
    pairs.write(tmp_path)
    assert held_out_pairs.read(tmp_path) == pairs


def test_a_run_on_questions_starts_from_an_adapter_of_scored_pairs(data, scored, tmp_path):
    """Regression: it was refused, as the adapter's run has held out pairs and no corpus."""
    pairs = open_data(Settings(data=[str(scored)], loss="cosent", output=str(tmp_path / "one")))
    pairs.keep(tmp_path / "one")
    opened = open_data(data(rows(400), model=str(tmp_path / "one" / "best")))
    assert len(opened.questions.queries) == 50 and "warning" not in dict(opened.lines)
    asked = open_data(data(rows(400), output=str(tmp_path / "two")))
    asked.keep(tmp_path / "two")
    back = Settings(data=[str(scored)], loss="cosent", model=str(tmp_path / "two" / "best"), output=str(tmp_path / "r"))
    assert open_data(back).questions == pairs.questions


def test_validation_rows_of_scored_pairs_need_scores(scored, tmp_path):
    """Regression: IndexError."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(scored.read_text())
    valid = tmp_path / "data" / "valid.jsonl"
    valid.write_text("".join(json.dumps(row) + "\n" for row in rows(9)))
    settings = Settings(data=[str(tmp_path / "data")], loss="cosent", output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=f"--loss cosent: every row of {valid} needs a score of its two texts"):
        open_data(settings)
    alike = [{"text1": f"one {i}", "text2": f"two {i}", "score": 1} for i in range(9)]
    valid.write_text("".join(json.dumps(row) + "\n" for row in alike))
    assert judged_on(settings).startswith("nothing, as no pairs could be held out: all of them have the same score")


@pytest.mark.parametrize("loss", ["info_nce", "cosent"])
def test_validation_rows_without_anything_to_compare_give_no_loss(data, small, loss):
    """Regression: a single pair in valid.jsonl refused the whole run."""
    score = {"score": 0.5} if loss == "cosent" else {}
    train_rows = [row | ({"score": i % 3 / 2} if score else {}) for i, row in enumerate(rows(20))]
    settings = data(train_rows, [row | score for row in rows(99)[98:]], model=small, loss=loss, steps=1)
    job = training_run.prepare(settings)
    assert job.trainer.validation is None
    (line,) = [line for name, line in job.headline if name == "validation" and "gives no loss" in line]
    assert line.endswith(f"valid.jsonl gives no loss: a single row leaves {loss} nothing to compare")


@pytest.mark.parametrize(("count", "reason"), [(20, "20 pairs are too few"), (90, "nearly all pairs share a text")])
def test_pairs_that_cannot_be_held_out_are_trained_on(tmp_path, count, reason):
    file = tmp_path / "rows.jsonl"
    rows = [{"text1": "the same", "text2": f"second {i}", "score": i % 6 / 5} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = open_data(Settings(data=[str(file)], loss="cosent", output=str(tmp_path / "run")))
    assert data.questions is None and len(data.rows) == count
    assert any(reason in text for name, text in data.lines if name == "judged on")


def test_questions_are_held_out_beside_scored_pairs(data, scored, tmp_path):
    """Scored pairs are no questions, whatever their score, and none with a held-out text is trained on."""
    plain = [{"query": row["query"], "document": row["document"]} for row in rows(400)]
    lines = scored.read_text()
    same = [{"text1": row["query"], "text2": f"other {i}", "score": 0.0} for i, row in enumerate(plain)]
    scored.write_text(lines + "".join(json.dumps(row) + "\n" for row in same))
    asked = data(plain)
    sources = [{"data": asked.data[0]}, {"data": str(scored), "loss": "cosent"}]
    opened = open_data(Settings(sources=sources, output=str(tmp_path / "run")))
    questions = opened.questions
    assert 30 < len(questions.queries) <= 50 and {*questions.queries.values()} <= {row["query"] for row in plain}
    answers = {questions.documents[name] for names in questions.answers.values() for name in names}
    assert answers <= {row["document"] for row in plain}
    left = opened.rows.sources[1]
    assert len(left) == 490 - len(questions.queries)
    assert {left[i].query for i in left.kept.tolist()}.isdisjoint(questions.queries.values())
    assert dict(opened.lines)["judged on"].startswith(f"{len(questions.queries)} questions held out")
