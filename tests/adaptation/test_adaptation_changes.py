"""What a change does to an adaptation: which stages are done again, with which chunks, and what cannot be reached.

python -m pytest tests/adaptation/test_adaptation_changes.py
"""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from beir_folders import WordCounts, write_folder

from mlx_retrieval.adaptation import asking, chunk_file, costs, keys, report, run, stages
from mlx_retrieval.adaptation.costs import Costs
from mlx_retrieval.adaptation.job import Adaptation
from mlx_retrieval.adaptation.record import UNFINISHED, Record
from mlx_retrieval.adaptation.workshop import Workshop
from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.evaluation import retrieval
from mlx_retrieval.evaluation.results import Evaluation
from mlx_retrieval.utils import toolkit
from mlx_retrieval.utils.errors import Place, UserError

PAIRS = "".join(json.dumps({"query": f"q{i}", "document": f"d{i}", "score": i / 4}) + "\n" for i in range(5))


@pytest.fixture
def job(tmp_path) -> Adaptation:
    for name in ("docs", "model", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "docs" / "a.md").write_text("# A\n\ntext")
    Record(tmp_path / "out").note("read", "", 0.0)
    return Adaptation(tmp_path / "docs", str(tmp_path / "model"), tmp_path / "out")


def changed_by(job: Adaptation, change) -> set[str]:
    """Return the stages that something changes."""
    before = keys.keys_of(job)
    change()
    return {name for name, key in keys.keys_of(job).items() if key != before[name]}


def from_stage(name: str) -> set[str]:
    """Return a stage and those that build on it."""
    return {each for each in stages.STAGES if name in (each, *keys.stages_before(each))}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".git/index", ".DS_Store", ".a.md.swp", ".index/index.json", "b.log", "notes/c.md"])
def test_files_of_the_folder_that_are_not_read_change_nothing(job, name):
    """Regression: git, an editor or an index of search.py below the documents made training begin again."""
    (job.documents / ".gitignore").write_text("*.log\n")
    job = replace(job, exclude=["notes"])
    write(job.documents / name, "one")
    assert not changed_by(job, lambda: write(job.documents / name, "another"))
    assert changed_by(job, lambda: write(job.documents / "a.md", "# A\n\nother text")) == {*stages.STAGES}


def test_a_corpus_is_changed_by_its_documents_alone(job):
    rows = [{"_id": "d", "text": "thing"}]
    write_folder(job.documents, rows, [{"_id": "q", "text": "thing"}], "q\td\t1\n")
    assert not changed_by(job, lambda: write(job.documents / "queries.jsonl", '{"_id": "q", "text": "other"}\n'))
    assert changed_by(job, lambda: write(job.documents / "corpus.jsonl", '{"_id": "d", "text": "other"}\n'))


@pytest.mark.parametrize(("setting", "first"), [
    ("model", "filter"), ("reranker", "filter"), ("generator", "questions"), ("guide", "train")
])  # fmt: skip
def test_models_that_are_trained_again_in_place_are_other_models(job, tmp_path, setting, first):
    """Regression: of a reranker, and of a model that writes questions, only the name counted."""
    folder = tmp_path / "trained"
    write(folder / "model.safetensors", "weights")
    write(tmp_path / "train.yaml", f"guide: {folder}\n")
    named = {"generator": {"generator": f"mlx:{folder}"}, "guide": {"config": tmp_path / "train.yaml"}}
    job = replace(job, **named.get(setting, {setting: str(folder)}))
    assert changed_by(job, lambda: write(folder / "model.safetensors", "other weights")) == from_stage(first)
    assert not changed_by(job, lambda: write(folder / ".cache" / "x.lock", ""))


def test_the_questions_of_a_model_that_was_trained_again_are_in_another_file(job, tmp_path):
    write(tmp_path / "chat" / "model.safetensors", "weights")
    job = replace(job, generator=f"mlx:{tmp_path / 'chat'}")
    before = Workshop(job).questions
    assert Workshop(job).questions == before
    write(tmp_path / "chat" / "model.safetensors", "other weights")
    assert Workshop(job).questions != before


@pytest.mark.parametrize(("setting", "first"), [("guard", "export"), ("eval_tasks", "evaluate")])
def test_tasks_that_have_changed_are_evaluated_again(job, tmp_path, monkeypatch, setting, first):
    """Regression: those that are files, below `~`, or the toolkit's own were looked for in the current folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(toolkit, "CHECKOUT", tmp_path / "toolkit")
    monkeypatch.chdir(job.documents)
    write(tmp_path / "pairs.jsonl", PAIRS)
    for folder in (tmp_path / "folder", tmp_path / "toolkit" / "eval-data"):
        write_folder(folder, [{"_id": "d", "text": "thing"}], [{"_id": "q", "text": "thing"}], "q\td\t1\n")
    for name, file in (
        ("~/pairs.jsonl", "pairs.jsonl"),
        ("~/folder", "folder/queries.jsonl"),
        ("eval-data", "toolkit/eval-data/corpus.jsonl"),
    ):
        path = tmp_path / file
        asked = replace(job, **{"guard": (), setting: [name]})
        assert changed_by(asked, lambda path=path: write(path, path.read_text() + "\n")) == from_stage(first), name
        assert not changed_by(asked, lambda path=path: write(path.parent / "notes.txt", path.name)), name


def test_texts_that_are_held_are_found_below_home_and_their_files_alone_count(job, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "code" / "a.py", "x = 1\n")
    write(tmp_path / "rows" / "train.jsonl", '{"query": "q", "document": "d"}\n')
    for name, file in (("~/code", "code/a.py"), ("~/rows", "rows/train.jsonl")):
        asked = replace(job, hold=[name])
        assert asked.hold == [str(tmp_path / name[2:])]
        other = tmp_path / name[2:] / ".git" / "index"
        assert not changed_by(asked, lambda other=other: write(other, "x"))
        assert changed_by(asked, lambda file=file: write(tmp_path / file, "y = 22\n")) == from_stage("train")


def test_files_of_settings_are_found_below_home(job, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "train.yaml", "learning_rate: 0.001\n")
    write(tmp_path / "prompt.txt", "Ask about {text}")
    asked = replace(job, config=Path("~/train.yaml"), prompt=Path("~/prompt.txt"), generator="http://localhost:1")
    assert asked.training == {"learning_rate": 0.001}
    assert changed_by(asked, lambda: write(tmp_path / "prompt.txt", "Ask for {text}")) == from_stage("questions")


def test_the_folder_in_which_the_command_is_given_changes_nothing(job, tmp_path, monkeypatch):
    """Regression: the toolkit's own guard has another path in its checkout, and the export was made again."""
    monkeypatch.chdir(toolkit.CHECKOUT)
    here = keys.keys_of(replace(job, guard=None))
    monkeypatch.chdir(tmp_path)
    assert keys.keys_of(replace(job, guard=None)) == here


# --- budget -----------------------------------------------------------------------------------------------------------


def test_a_later_setting_goes_on_with_the_chunks_that_were_asked_about(job, monkeypatch):
    """Regression: what earlier stages had spent made a new plan too short, or one of fewer chunks."""
    measured, asked = [], []
    monkeypatch.setattr(
        costs, "measure", lambda job, sample, seconds: measured.append(job) or Costs(0.05, 0.2, seconds)
    )
    monkeypatch.setattr(asking, "seconds_to_ask", lambda shop: asked.append(shop) or 0.2)
    chunk_file.write(job.output / "chunks.jsonl", [Chunk("a.md#1", "text", Place("a.md", 1))])

    def planned(job: Adaptation) -> costs.Plan:
        one = run._Run(job, Record(job.output), run.ALL, ())
        one.shop.figures["read"] = {"chunks": 20_000}
        one.shop.deadline = time.monotonic() + job.budget - one.spent
        one._make_plan()
        for name in ("read", "questions", "filter"):
            one.record.note(name, one.keys[name], one.job.budget / 4, {})
        return one.shop.plan

    job = replace(job, budget=2_400.0)
    first = planned(job)
    assert costs.FEWEST < first.chunks < first.total
    for changes in ({"negatives": 2}, {"trained_share": 0.3}, {"hold": ()}, {}):
        again = planned(replace(job, **changes))
        assert again.chunks == first.chunks
    assert asdict(again) == asdict(first)
    assert len(asked) == 1 and len(measured) == 5  # a generator is asked again for nothing else
    assert planned(replace(job, budget=3_600.0)).chunks > first.chunks
    assert len(asked) == 1


def test_the_last_stages_need_no_plan(job, monkeypatch):
    """Regression: a report was refused, as the time was up."""
    monkeypatch.setattr(run._Run, "_costs", lambda self: pytest.fail("was measured"))
    one = run._Run(replace(job, budget=1.0), Record(job.output), ["report"], ())
    one.shop.figures |= {name: {"chunks": 20_000} for name in stages.STAGES}
    written = []
    monkeypatch.setattr(run.report, "write", lambda shop, following: written.append(shop) or [])
    one._carry_out("report")
    assert written == [one.shop]


def test_a_single_chunk_is_planned_for(job, small, tmp_path, capsys):
    """Regression: a row without another to be told from cannot be trained on, and a flag of train.py was named."""
    job = replace(job, model=small, hold=(), guard=())
    write(job.documents / "a.md", "# Kettle\n\nA kettle boils water, and must be descaled once a month.\n")
    run.dry_run(job)
    assert "at most 1 for 1 of 1 chunk, by none" in capsys.readouterr().out


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_a_guard_that_cannot_be_reached_is_refused_before_any_work(job, monkeypatch):
    """Regression: it was refused by the export, after all training."""
    monkeypatch.setattr(run, "load_tasks", lambda names: ({}, {name: f"{name}: no network" for name in names}))
    job = replace(job, output=job.output / "new", hold=(), guard=["SciFact"])
    for command in (run.run, run.dry_run):
        with pytest.raises(UserError, match="--guard SciFact: it cannot be evaluated, .* SciFact: no network"):
            command(job)
    assert not job.output.exists()
    run._check_tasks(replace(job, guard=(), eval_tasks=["SciFact"]))


def task(folder: Path, things: int) -> Path:
    texts = [{"_id": f"d{i}", "text": f"thing{i} of some kind"} for i in range(things)]
    return write_folder(folder, texts, [{"_id": "q", "text": "thing3"}], "q\td3\t1\n")


@pytest.fixture
def evaluated(job, monkeypatch):
    """Return a function that evaluates toy models on an adaptation's held-out question and other tasks."""
    task(job.output / "held-out", 9)
    (job.output / "model").mkdir()
    models = {job.model: WordCounts(dimensions=1, name="before")}  # which finds nothing
    monkeypatch.setattr(stages.embedder, "load", lambda name, dtype: models.get(name) or WordCounts(name=name))

    def evaluate(**tasks) -> Workshop:
        shop = Workshop(replace(job, **{"guard": (), **tasks}))
        shop.figures["evaluate"] = stages.evaluate(shop)
        return shop

    return evaluate


def test_a_task_that_cannot_be_reached_is_told_and_tried_again(job, evaluated, monkeypatch, capsys):
    """Regression: nothing was said of it, and the stage counted as done."""
    real = retrieval.evaluate

    def offline(model, tasks, *more):
        found = real(model, [name for name in tasks if name != "SciFact"], *more)
        return Evaluation(**vars(found) | {"unreachable": {"SciFact": "SciFact: no network"}})

    monkeypatch.setattr(stages, "evaluate_model", offline)
    shop = evaluated(eval_tasks=["SciFact"])
    assert "not evaluated: SciFact: no network" in capsys.readouterr().out
    record = Record(job.output)
    record.note("evaluate", "k", 1.0, shop.figures["evaluate"])
    assert UNFINISHED in shop.figures["evaluate"] and not record.is_done("evaluate", "k")
    assert ("unfinished", "the same command evaluates the tasks that could not be reached") in run.next_lines(shop)
    assert "Not evaluated: SciFact: no network" in report.content(shop).notes
    monkeypatch.setattr(stages, "evaluate_model", real)
    shop = evaluated()
    assert UNFINISHED not in shop.figures["evaluate"] and "unfinished" not in dict(run.next_lines(shop))


def test_a_guard_may_be_called_as_the_held_out_questions_are(evaluated, tmp_path):
    """Regression: two tasks of one name are told apart by their whole paths, which the report did not know."""
    other = task(tmp_path / "other-model" / "held-out", 5)
    shop = evaluated(guard=[str(other)])
    content = report.content(shop)
    assert [name.partition(",")[0] for name, *_ in shop.figures["evaluate"]["rows"]] == [
        os.path.realpath(folder) for folder in (shop.path("held-out"), other)
    ]
    assert str(other) in content.notes[-2] and content.headline.endswith("1.0000 over 1 held-out question.")
    assert [change.task for change in content.gained] == ["held-out"]
