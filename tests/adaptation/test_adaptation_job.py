"""The settings, the record and the split of an adaptation.

python -m pytest tests/adaptation/test_adaptation_job.py
"""

import json
import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import adapt
from mlx_retrieval.adaptation import chunk_file, costs, run, split, stages
from mlx_retrieval.adaptation.costs import Costs
from mlx_retrieval.adaptation.held import Held
from mlx_retrieval.adaptation.held import rows_of as held_rows_of
from mlx_retrieval.adaptation.job import Adaptation, seconds_of
from mlx_retrieval.adaptation.keys import keys_of
from mlx_retrieval.adaptation.record import Record
from mlx_retrieval.adaptation.training_settings import EVALUATIONS, evaluations_in, rows_to_hold, settings_of
from mlx_retrieval.adaptation.workshop import Workshop
from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.exporters import job as export_job
from mlx_retrieval.mining.questions.prompted import Completion, Prompted
from mlx_retrieval.mining.questions.prompts import TEMPLATE
from mlx_retrieval.training import source_settings
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.length import resolve_length
from mlx_retrieval.utils.errors import Place, UserError


@pytest.fixture
def job(tmp_path) -> Adaptation:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# A\n\ntext")
    (tmp_path / "model").mkdir()
    return Adaptation(tmp_path / "docs", str(tmp_path / "model"), tmp_path / "out")


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("20m", 1200), ("1h30m", 5400), ("90s", 90), ("45", 45), ("1.5h", 5400), ("2 min", 120)]
)
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "20 minutes", "-5m", "0m", "1d", "20m5"])
def test_times_that_are_none(text):
    with pytest.raises(UserError, match="--budget"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": Path("nowhere")}, "nowhere: no such folder"),
        ({"overlap": 5000}, "--overlap 5000"),
        ({"negatives": -1}, "--negatives -1"),
        ({"holdout": 0.0}, "--holdout 0"),
        ({"guard_tolerance": -0.1}, "--guard-tolerance -0.1"),
        ({"guard_tolerance": float("nan")}, "--guard-tolerance nan"),
        ({"trained_share": 0.0}, "--trained-share 0: above 0"),
        ({"trained_share": float("nan")}, "--trained-share nan"),
        ({"found_among": 0}, "--found-among 0: 1 or more"),
        ({"seed": -1}, "--seed -1: 0 or more"),
        ({"max_file_size": -5}, "--max-file-size -5"),
        ({"styles": ("foo",)}, "--styles foo"),
        ({"styles": ("title",), "generator": "http://localhost:8080"}, "--styles title"),
        ({"generator": "foo"}, "--generator foo: not a generator"),
        ({"generator": "mlx:"}, "--generator mlx:: not a generator"),
        ({"generator": "mlx:no/such-model-here"}, "--generator no/such-model-here"),
    ],
)
def test_wrong_settings(job, changes, message):
    with pytest.raises(UserError, match=message):
        replace(job, **changes)


def test_what_is_not_there_is_refused_before_any_work(job):
    """Regression: a missing task was found after training, and a reranker was called --model."""
    for changes, message in (
        ({"eval_tasks": ["nowhere"]}, "--eval-tasks: nowhere"),
        ({"guard": ["nowhere"]}, "--guard: nowhere"),
        ({"reranker": "nowhere", "guard": ()}, "--reranker nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            run.run(replace(job, **changes))
        assert not job.output.exists()
    with pytest.raises(UserError, match="--redo train: it is not among --stages read"):
        run.run(job, ["read"], ["train"])


def test_the_output_is_a_folder_of_its_own(job, tmp_path):
    with pytest.raises(UserError, match="would be read as some of them"):
        replace(job, output=job.documents / "model")
    with pytest.raises(UserError, match="the documents are in there"):
        replace(job, output=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".DS_Store").write_text("of a file manager")
    assert replace(job, output=tmp_path / "other").output == tmp_path / "other"
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="no adaptation was begun there"):
        replace(job, output=tmp_path / "other")
    with pytest.raises(UserError, match="this is a file"):
        replace(job, output=tmp_path / "other" / "mine.txt")


def test_settings_that_the_adaptation_decides_are_refused(job, tmp_path):
    (tmp_path / "train.yaml").write_text("learning_rate: 0.001\ndata: [rows.jsonl]\n")
    with pytest.raises(UserError, match="data is decided by adapt.py"):
        replace(job, config=tmp_path / "train.yaml")
    (tmp_path / "train.yaml").write_text("teacher_vectors: t.safetensors\n")
    with pytest.raises(UserError, match="teacher_vectors is what texts are held in place by; see --hold"):
        replace(job, config=tmp_path / "train.yaml")
    assert replace(job, config=tmp_path / "train.yaml", hold=()).training == {"teacher_vectors": "t.safetensors"}
    (tmp_path / "train.yaml").write_text("learning_rate: 0.001\n")
    assert replace(job, config=tmp_path / "train.yaml").training == {"learning_rate": 0.001}


def test_a_misspelt_stage_or_flag_is_one_line(capsys):
    for flags, message in ((["--stages", "reed"], "did you mean read"), (["--bugdet", "1m"], "did you mean --budget")):
        with pytest.raises(SystemExit):
            adapt.parser().parse_args(["docs", "--model", "m", "--output", "o", *flags])
        assert message in capsys.readouterr().err
    assert adapt.STAGES == run.ALL


# --- what is done -----------------------------------------------------------------------------------------------------


def test_a_change_concerns_the_stages_from_there_on(job, tmp_path):
    keys = keys_of(job)

    def changed(**changes) -> set[str]:
        others = keys_of(replace(job, **changes))
        return {name for name in keys if others[name] != keys[name]}

    after_train = {"train", "export", "evaluate", "index"}
    assert changed(hold=()) == after_train
    assert changed(guard=()) == after_train - {"train"}
    assert changed(eval_tasks=("x",)) == {"evaluate"}
    assert changed(budget=60.0) == set(keys) - {"read"}
    assert changed(negatives=2) == {"negatives", *after_train}
    assert changed(generator="http://localhost:8080") == set(keys) - {"read"}
    assert changed(chunk_size=900) == set(keys)
    assert not changed(output=tmp_path / "elsewhere")
    (job.documents / "b.md").write_text("# B")
    assert {name for name, key in keys_of(job).items() if key != keys[name]} == set(keys)


def test_a_prompt_of_one_s_own_reaches_the_generator_and_is_another_adaptation(job, tmp_path, monkeypatch):
    file, jobs = tmp_path / "prompt.txt", []
    monkeypatch.setattr(run, "run", lambda given, *_: jobs.append(given))
    flags = [str(job.documents), "--model", job.model, "--output", str(job.output), "--generator", "http://localhost:1"]
    for text in (None, "Ask about {text}", "Ask about {title}: {text}"):
        if text:
            file.write_text(text)
        assert adapt.main([*flags, *["--prompt", str(file)] * bool(text)]) == 0
        shop = Workshop(jobs[-1])
        assert shop.generator.prompt.template == (text or TEMPLATE)
        jobs[-1] = (shop.questions, keys_of(jobs[-1]))
    paths, keys = zip(*jobs, strict=True)
    assert len({*paths}) == 3 and len({key["questions"] for key in keys}) == len({key["filter"] for key in keys}) == 3
    assert len({key["read"] for key in keys}) == 1
    assert adapt.main([*flags, "--prompt", str(tmp_path / "none.txt")]) == 2


def test_other_settings_of_a_generator_take_over_what_it_has_answered(job):
    """Regression: --questions 4 after --questions 1 asked for the same questions again."""
    asked = []

    class Echo:
        name, shortened = "echo", ()

        def settings(self):
            return ("echo",)

        def complete(self, jobs, prompt):
            for each in jobs:
                asked.append((each.chunk.id, each.style))
                yield [Completion(each, f"which {each.style} is about {each.chunk.id}?")]

    job.output.mkdir()
    Record(job.output).note("read", "k", 1.0)
    chunks = [Chunk(f"a.md#{i}", f"text of number {i}", Place("a.md", i + 1)) for i in range(6)]
    chunk_file.write(job.output / "chunks.jsonl", chunks)
    made = {}
    for count, styles in ((1, ("keywords",)), (4, ()), (2, ("keywords", "claim"))):
        shop = Workshop(replace(job, generator="http://localhost:1", questions=count, styles=styles))
        shop._generator = Prompted(Echo(), styles, count)
        assert stages.questions(shop)["questions"] == 6 * count
        rows = [json.loads(line) for line in shop.questions.read_text().splitlines()]
        made[count] = {(row["chunk_id"], row["question_type"]) for row in rows}
    assert len(asked) == len({*asked}) == 24  # six of the first, the other eighteen of the second, none of the third
    assert made[1] < made[4] and made[1] < made[2] < made[4] and len(made[2]) == 12


def test_a_stage_is_done_with_its_key_alone(tmp_path):
    record = Record(tmp_path)
    record.note("read", "k", 2.0)
    assert not record.is_done("read", "k") and record.seconds("read", "k") == 2.0
    record.note("read", "k", 3.0, {"chunks": 8})
    again = Record(tmp_path)
    assert again.is_done("read", "k") and again.figures("read") == {"chunks": 8}
    assert not again.is_done("read", "other") and again.seconds("read", "other") == 0
    again.forget("read")
    assert not again.is_done("read", "k")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stages": 1}', '{"stages": {"read": 1}}'])
def test_a_broken_record_is_one_line(tmp_path, text):
    (tmp_path / "adapt.json").write_text(text)
    with pytest.raises(UserError, match="not the record of an adaptation"):
        Record(tmp_path)


def test_chunks_are_read_as_they_were_written(tmp_path):
    chunks = [
        Chunk("a.md#1", "text\nmore", Place("a.md", 3), "A", ("A", "B"), "a.md", "A > B"),
        Chunk("b.pdf#1", "ü \u2028 x", Place("b.pdf")),
    ]
    path = tmp_path / "chunks.jsonl"
    assert chunk_file.write(path, chunks) == 2
    assert [*chunk_file.Chunks(path)] == chunks and [*chunk_file.Chunks(path, {"b.pdf#1"})] == chunks[1:]
    assert chunk_file.read_ids(path) == ["a.md#1", "b.pdf#1"]
    path.write_text(path.read_text() + '{"id": 1}\n')
    with pytest.raises(UserError, match=r"chunks.jsonl:3: not a chunk"):
        [*chunk_file.Chunks(path)]


# --- which questions are held out -------------------------------------------------------------------------------------


def rows_of(documents: dict[str, int]) -> list[dict]:
    names = [f"{name}#{i}" for name, count in documents.items() for i in range(1, count + 1)]
    return [{"query": f"q {name}", "positive": f"about {name}", "chunk_id": name} for name in names]


def test_whole_documents_are_held_out():
    rows = rows_of({f"{i}.md": 3 for i in range(200)})
    ids = [row["chunk_id"] for row in rows]
    result = split.split_rows(rows, ids, 0.1, seed=1)
    assert sorted([*result.trained, *result.held]) == [*range(600)] and len(result.held) == 60
    by_document = Counter(split.document_of(rows[i]["chunk_id"]) for i in result.held)
    assert set(by_document.values()) == {3}
    assert result.chunks == {rows[i]["chunk_id"] for i in result.held}
    other = split.split_rows(rows, ids, 0.1, seed=2)
    assert result == split.split_rows(rows, ids, 0.1, seed=1) != other


def test_of_one_thick_book_parts_are_held_out():
    rows = rows_of({"book.pdf": 900})
    result = split.split_rows(rows, [row["chunk_id"] for row in rows], 0.1, seed=0)
    numbers = [i + 1 for i in result.held]
    assert len(numbers) == 90 and Counter((n - 1) // split.RUN for n in numbers).most_common()[-1][1] == split.RUN


def test_chunks_without_a_question_are_held_out_with_their_document():
    rows = rows_of({f"{i}.md": 1 for i in range(100)})
    ids = [f"{i}.md#{k}" for i in range(100) for k in (1, 2)]
    result = split.split_rows(rows, ids, 0.1, seed=0)
    assert {split.document_of(name) for name in result.chunks} == {
        split.document_of(rows[i]["chunk_id"]) for i in result.held
    }
    assert len(result.chunks) == 2 * len(result.held)


def test_too_few_questions_hold_nothing_out():
    result = split.split_rows(rows_of({"a.md": 20}), [], 0.05, seed=0)
    assert not result.held and len(result.trained) == 20 and "too few" in result.reason


def test_held_out_questions_are_searched_among_chunks():
    rows = rows_of({f"{i}.md": 2 for i in range(100)})
    rows[0]["positive"] = rows[0]["positive"] + " without its query"
    chunks = [Chunk(row["chunk_id"], f"about {row['chunk_id']}", Place("x")) for row in rows]
    divided = split.Split([*range(20, 200)], [*range(20)], frozenset())
    questions = split.questions_of(rows, divided, chunks, seed=0)
    assert len(questions.queries) == 20 and len(questions.documents) == 200
    for query, (answer,) in questions.answers.items():
        row = next(row for row in rows if row["query"] == questions.queries[query])
        assert questions.documents[answer] == row["positive"]
    doubled = [*rows, {**rows[0], "query": "another"}]
    again = split.questions_of(doubled, replace(divided, held=[0, 200]), chunks, seed=0)
    assert [*again.queries.values()] == [rows[0]["query"]]  # one a chunk: its document lacks this query alone


# --- time -------------------------------------------------------------------------------------------------------------


def test_the_plan_fits_the_time(job):
    measured = Costs(chunk=0.02, row=0.1, questions=0.0)
    whole = costs.fit(job, measured, 20_000, None)
    assert whole.chunks == 20_000 and whole.all > 3_000
    some = costs.fit(job, measured, 20_000, 1_200.0)
    assert 1_000 < some.chunks < 20_000 and 1_050 < some.all <= 1_200
    assert costs.fit(job, measured, 20_000, 1e6) == whole
    with pytest.raises(UserError, match="too short.*are left"):
        costs.fit(job, measured, 20_000, 60.0)
    slow = costs.fit(job, replace(measured, questions=1.0), 20_000, 1_200.0)
    assert slow.chunks < some.chunks / 2
    assert costs.fit(job, measured, 20_000, 1_200.0, indexed=False).chunks > 1.5 * some.chunks
    without = costs.fit(replace(job, negatives=0), measured, 20_000, 1_200.0)
    assert without.seconds["negatives"] == 0 and without.chunks > some.chunks


def test_the_plan_counts_what_judges_and_what_is_held(job):
    """Regression: a reranker, the guards, the user's tasks and the vectors of held texts took no time in the plan."""
    alone = Costs(chunk=0.01, row=0.1, questions=0.0)
    before = costs.plan(job, alone, 1_000, 2_000).seconds

    def more(job=job, **changes) -> dict[str, float]:
        seconds = costs.plan(job, replace(alone, **changes), 1_000, 2_000).seconds
        return {name: round(seconds[name] - before[name], 6) for name in seconds if seconds[name] != before[name]}

    assert more(pair=0.001) == {"filter": 100.0}  # each question with a hundred chunks
    assert more(guards=3.0) == {"export": 18.0, "evaluate": 6.0}  # the base model, and shares of 0.5 to 0.1
    assert more(replace(job, trained_share=1.0), guards=3.0) == {"export": 33.0, "evaluate": 6.0}
    assert more(tasks=20.0) == {"evaluate": 40.0}
    assert more(held_row=0.5) == {"train": 480.0}  # 30 steps of 64 questions, and half as many of what is held


def test_a_machine_is_measured_by_what_the_adaptation_will_do(job, tmp_path, monkeypatch):
    chunks = [Chunk(f"{i}.md#1", f"thing {i} of some kind", Place(f"{i}.md", 1)) for i in range(20)]
    held = [{"query": f"what is {i}", "positive": f"thing {i}", "negatives": ["another"]} for i in range(100)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    asked, judged, embedded = [], [], []

    class Judge:
        def __init__(self, name, dtype):
            assert name == "judge"

        def score_groups(self, groups):
            judged.extend(groups)

    monkeypatch.setattr(costs, "Reranker", Judge)
    monkeypatch.setattr(costs.embedder, "load", lambda name, dtype: "the model")
    monkeypatch.setattr(costs.embedder, "embed", lambda model, texts, prompt: embedded.append({*texts}))
    monkeypatch.setattr(costs, "_seconds", lambda function: function() or 3.0)
    monkeypatch.setattr(costs, "evaluate", lambda model, tasks: asked.append((model, tasks)))
    monkeypatch.setattr(costs, "_row_seconds", lambda job, chunks: 2.0)
    job = replace(job, guard=["g"], eval_tasks=["t"], reranker="judge", hold=[str(tmp_path / "held.jsonl")])
    measured = costs.measure(job, chunks, 5.0)
    assert asked == [("the model", ["g"]), ("the model", ["t"])]
    assert [len(documents) for _, documents in judged] == [costs.PAIRS] * (1 + costs.CALLS)  # once to compile
    of_held = embedded[-1]
    assert of_held <= {text for row in held for text in (row["query"], row["positive"], "another")}
    assert len(of_held) == 2 * costs.SAMPLE + 1
    assert measured.held_row == 3.0 / costs.SAMPLE and measured.chunk == 3.0 / 20 and measured.questions == 5.0
    none = costs.measure(replace(job, reranker=None, hold=(), guard=(), eval_tasks=()), chunks, 5.0)
    assert none == Costs(chunk=3.0 / 20, row=2.0, questions=5.0) and len(judged) == 1 + costs.CALLS


def test_a_call_that_other_work_disturbs_does_not_count(monkeypatch):
    """Regression: a plan gave the index half as much time again as it took, and cut the training for it."""
    times = iter([9.0, 2.0, 5.0])

    def call():
        now[0] += next(times)

    now = [0.0]
    monkeypatch.setattr(costs.time, "perf_counter", lambda: now[0])
    assert costs._warm_seconds(call) == 2.0


@pytest.mark.parametrize(("training", "rows"), [
    ({}, 30 * 64),
    ({"batch_size": 16}, 30 * 16),
    ({"steps": 2_000}, 2_000 * 64),
    ({"steps": 8, "batch_size": 16}, 8 * 16),
    ({"epochs": 2.0}, 2 * 215),
], ids=str)  # fmt: skip
def test_the_plan_counts_the_steps_of_few_questions(job, training, rows):
    """Regression: 265 questions were planned, and the time sufficed for 14 of their 45 steps."""
    job.hold, job.training, measured = (), training, Costs(chunk=0.0, row=0.1, questions=0.0)
    assert costs.plan(job, measured, 265, 10_000).seconds["train"] == pytest.approx(costs.OPENING + 0.1 * rows)
    planned = costs.plan(job, measured, 265, 10_000, most_epochs=2).seconds["train"] - costs.OPENING
    assert planned == pytest.approx(0.1 * (min(rows, 2 * 215) if not training.get("steps") else rows))


def test_more_time_means_more_questions(job):
    """Regression: with two seconds more, the plan went from 837 chunks to 200, each trained on ten times."""
    job.hold, measured = (), Costs(chunk=0.02, row=0.1, questions=0.0)
    plans = [costs.fit(job, measured, 20_000, seconds, indexed=False) for seconds in range(150, 1_200, 10)]
    chunks = [plan.chunks for plan in plans]
    assert chunks == sorted(chunks) and chunks[0] >= costs.FEWEST and len({*chunks}) > 90
    assert all(plan.all <= seconds for plan, seconds in zip(plans, range(150, 1_200, 10), strict=True))


@pytest.mark.parametrize(
    ("seconds", "one", "count"), [(600, 0, 4), (600, 10, 4), (600, 50, 2), (600, 100, 1), (-5, 1, 1)]
)
def test_evaluations_take_a_part_of_the_time(seconds, one, count):
    """One more comes before the first step."""
    assert evaluations_in(seconds, one) == count


@pytest.mark.parametrize(("training", "rows", "most", "count"), [
    ({}, 5_000, math.inf, 39 * 64),  # 78 steps over the questions
    ({}, 5_000, 30, 10 * 64),
    ({}, 100, math.inf, 8 * 64),  # ten epochs of them
    ({"steps": 30}, 5_000, math.inf, 10 * 64),
    ({"steps": 1}, 5_000, math.inf, 2 * 64),  # each of two sources fills a batch
    ({"epochs": 2.0}, 5_000, math.inf, 2_500),
    ({"epochs": 2.0}, 30, 0, 2 * 64),
], ids=str)  # fmt: skip
def test_as_many_rows_are_held_as_a_run_comes_to(job, tmp_path, training, rows, most, count):
    """Regression: all 9,299 texts were embedded for a run of 14 steps."""
    job.training = training
    settings = settings_of(job, tmp_path / "mined.jsonl", [], tmp_path / "run")
    assert rows_to_hold(settings, rows, names=2, most_steps=most) == count


def test_rows_to_hold_are_drawn_at_random(job, tmp_path):
    rows = [{"query": f"what is {i}", "positive": f"thing {i}", "source": i} for i in range(200)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "code").mkdir()
    function = 'def f{0}(x):\n    """Return x times the number {0}."""\n    y = x\n    return {0} * y\n'
    (tmp_path / "code" / "a.py").write_text("".join(map(function.format, range(20))))
    job = replace(job, hold=(str(tmp_path / "others.jsonl"), str(tmp_path / "code")))

    def drawn(count, name="a", **changes) -> list[list[dict]]:
        (folder := tmp_path / name).mkdir(exist_ok=True)
        files = held_rows_of(replace(job, **changes), folder, count)
        return [[json.loads(line) for line in Path(file).read_text().splitlines()] for file in files]

    those, pairs = drawn(60)
    assert len(those) == 30 and len(pairs) == 20  # all that there are
    assert those == [row for row in rows if row in those] and those != rows[:30]
    assert drawn(10)[0] == those  # what is there stays: vectors of it may be, too
    assert drawn(60, "b")[0] == those and drawn(60, "c", seed=1)[0] != those
    (tmp_path / "others.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"--hold .*others.jsonl: no rows"):
        drawn(60, "d")


def test_the_plan_counts_the_batches_of_held_texts(job):
    measured = Costs(chunk=0.0, row=1.0, questions=0.0)
    alone, held = (costs.plan(replace(job, hold=hold), measured, 1_000, 1_000).seconds for hold in ((), ["x.jsonl"]))
    assert held["train"] - costs.OPENING == pytest.approx(1.5 * (alone["train"] - costs.OPENING))


@pytest.mark.parametrize(("training", "budget", "steps"), [
    ({"batch_size": 16}, None, 28),  # ten epochs of the questions, and half as many steps for what is held
    ({"batch_size": 64}, 1e8, 8),
    ({"batch_size": 64}, 200.0, EVALUATIONS),
    ({"batch_size": 16, "epochs": 2.0}, 1e8, 10),
    ({"batch_size": 16, "epochs": 3.0}, 200.0, 12),
    ({"batch_size": 16, "epochs": 2.0, "steps": 99}, None, 10),
    ({"batch_size": 16, "steps": 2}, 1e8, 2),  # regression: four were taken
], ids=str)  # fmt: skip
def test_steps_count_what_a_batch_takes(job, monkeypatch, tmp_path, training, budget, steps):
    """Regression: with a budget, epochs were counted by the questions alone; and batches were those of questions alone.

    Of 80 rows, 30 are questions. A row takes a second.
    """
    for name, count in (("mined.jsonl", 30), ("held.jsonl", 50)):
        lines = (json.dumps({"query": f"{name} {i}", "document": f"text {i}"}) + "\n" for i in range(count))
        (tmp_path / name).write_text("".join(lines))
    job.training = training
    shop = Workshop(job, figures={"filter": {"rows": 30}})
    if budget is not None:
        shop.plan = costs.Plan(30, 30, 30, 1.0, {"export": 0.0, "evaluate": 0.0, "index": 0.0})
        shop.deadline = time.monotonic() + budget
    taken = []
    held = Held(tmp_path / "held.safetensors", [str(tmp_path / "held.jsonl")])
    monkeypatch.setattr(stages, "_hold", lambda shop, count: held)
    monkeypatch.setattr(Workshop, "path", lambda shop, name: tmp_path / name)
    monkeypatch.setattr(stages.training_run, "train", taken.append)
    monkeypatch.setattr(stages, "_trained", lambda run: {})
    stages.train(shop)
    (settings,) = taken
    resolve_length(settings, 80 / training["batch_size"])  # as training does
    assert settings.steps == steps


@pytest.mark.parametrize(("left", "search", "steps", "every"), [
    (700.0, 0.0, 30, 8),  # all that were wanted, and four evaluations
    (505.0, 20.0, 24, 12),  # 305 s for training: 240 for steps, and three evaluations with the first
    (300.0, 60.0, 1, 1),
], ids=str)  # fmt: skip
def test_steps_and_evaluations_fit_into_the_time(job, left, search, steps, every):
    """A row takes a tenth of a second, a step ten; the stages after training take 200."""
    seconds = {"export": 100.0, "evaluate": 60.0, "index": 40.0}
    shop = Workshop(job, plan=costs.Plan(1_000, 1_000, 1_000, 0.1, seconds, search), deadline=time.monotonic() + left)
    settings = Settings(steps=30)
    stages._limit_steps(shop, settings, size=100)
    assert (settings.steps, settings.eval_steps) == (steps, every)
    if search:
        taken = 10.0 * steps + (1 + math.ceil(steps / every)) * search
        assert taken <= max(left - 200.0, 10.0 + 2 * search)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"guard": ["g"]}, ("guards", 0.5)),
        ({"guard": ["g"], "trained_share": 0.8}, ("guards", 0.8)),
        ({"guard": ()}, (0.5, 1.0)),
        ({"guard": (), "trained_share": 1.0}, (None, 1.0)),
    ],
)
def test_the_export_keeps_a_share_of_the_trained_weights(job, tmp_path, monkeypatch, changes, expected):
    exports = []
    monkeypatch.setattr(stages, "export_with_warnings", lambda wanted, _: exports.append(wanted))
    monkeypatch.setattr(stages, "model_to_use", lambda run: tmp_path / "final")
    monkeypatch.setattr(export_job, "check_adapter", lambda adapter: None)
    shop = SimpleNamespace(job=replace(job, **changes), path=tmp_path.joinpath, figures={"train": {"improved": True}})
    assert stages.export(shop)["exported"]
    assert [(wanted.merge_with_base, wanted.largest_share) for wanted in exports] == [expected]


def test_what_is_said_of_the_loss_is_for_the_questions(job, tmp_path):
    """Regression: texts to hold are learnt by their vectors alone, and such settings of --config were refused."""
    job.training = {"positive_aware": "perc", "matryoshka_dims": [8], "query_prompt": "ask: ", "loss": "info_nce"}
    held = Held(tmp_path / "held.safetensors", ["held.jsonl"])
    settings = settings_of(job, tmp_path / "mined.jsonl", [], tmp_path / "run", held)
    questions, others = (source_settings.settings_of(settings, source) for source in settings.sources)
    assert (questions.positive_aware, questions.loss, questions.matryoshka_dims) == ("perc", "info_nce", [8])
    assert (others.positive_aware, others.loss, others.matryoshka_dims) == ("off", "distill_vectors", [])
    assert settings.query_prompt == "ask: " and settings.matryoshka_dims == [8]


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (150, "2 min"), (7_300, "2 h 2 min")])
def test_times_in_words(seconds, text):
    assert costs.minutes(seconds) == text


def test_the_record_is_json_that_people_can_read(tmp_path):
    Record(tmp_path).note("read", "k", 1.234, {"lines": [("a", "ü")]})
    assert json.loads((tmp_path / "adapt.json").read_text())["stages"]["read"]["seconds"] == 1.2
    assert "ü" in (tmp_path / "adapt.json").read_text()
