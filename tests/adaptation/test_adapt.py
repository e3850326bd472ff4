"""adapt.py on a folder of small documents, from the first stage to the last.

python -m pytest -m slow tests/adaptation/test_adapt.py
"""

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from beir_folders import write_folder
from chat_stub import mlx_lm_server
from document_files import pdf

import adapt
from mlx_retrieval.adaptation import asking, costs, run, stages
from mlx_retrieval.adaptation.job import Adaptation
from mlx_retrieval.adaptation.workshop import Workshop
from mlx_retrieval.dataset.text_keys import text_key
from mlx_retrieval.evaluation.retrieval import evaluate
from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.mining.questions import filtering
from mlx_retrieval.mining.questions.without_model import WithoutModel
from mlx_retrieval.retrieval.searcher import Searcher

pytestmark = pytest.mark.slow

WORDS = [
    f"{a}{b}" for a in ("kel", "mor", "tan", "sil", "fer", "gan") for b in ("dor", "vin", "lex", "pol", "ram", "tis")
]
FILES = 90
PROSE = {
    "Kettle": "A kettle boils water. Descale it once a month with vinegar, or the water tastes of chalk.",
    "Bicycle": "Oil the chain of a bicycle every two weeks, after rain at once. A dry chain squeaks and wears out.",
    "Boiler": "If the boiler drips at night, its pressure is too high. Let water out until it shows 1.5 bar.",
    "Tomato": "Tomatoes need six hours of sun a day. Water them in the morning at the root, never over the leaves.",
}


def sentences(rng: np.random.Generator, topic: str) -> str:
    return " ".join(f"{topic} " + " ".join(rng.choice(WORDS, 7)) + "." for _ in range(6))


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("documents")
    for i in range(FILES):
        topic = f"{WORDS[i % 36]} {WORDS[(7 * i + 1) % 36]} topic{i}"
        (folder / f"{i:02}.md").write_text(f"# About {topic}\n\n{sentences(rng, topic)}\n")
    (folder / "paper.pdf").write_bytes(pdf([["Report", "", *sentences(rng, "paper").split(". ")]], title="A report"))
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    return folder


@pytest.fixture(scope="module")
def flags(small, tmp_path_factory) -> list[str]:
    config = tmp_path_factory.mktemp("config") / "train.yaml"
    config.write_text("steps: 8\nbatch_size: 16\nlora_rank: 4\neval_steps: 4\nsave_steps: 4\nlearning_rate: 0.01\n")
    return [
        "--model",
        small,
        "--config",
        str(config),
        "--questions",
        "2",
        "--found-among",
        "90",
        "--compile",
        "off",
        "--hold",
        "--guard",
    ]


@pytest.fixture(scope="module")
def finished(documents, flags, tmp_path_factory) -> tuple[Path, str, Path]:
    """The folder of a whole adaptation, its screen, and the documents."""
    import contextlib
    import io

    output, screen = tmp_path_factory.mktemp("adapted") / "out", io.StringIO()
    with contextlib.redirect_stdout(screen):
        assert adapt.main([str(documents), "--output", str(output), *flags]) == 0
    return output, screen.getvalue(), documents


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def embedded(chunk: dict) -> str:
    return f"{chunk['context']}\n{chunk['text']}" if chunk["context"] else chunk["text"]


def test_every_stage_leaves_its_files(finished):
    output, screen, _ = finished
    assert [name for name in run.ALL if f"{run.ALL.index(name) + 1} of {len(run.ALL)}  {name}" in screen] == [*run.ALL]
    chunks, made = rows(output / "chunks.jsonl"), rows(output / "rows.jsonl")
    assert {chunk["file"] for chunk in chunks} >= {"00.md", "paper.pdf"}
    held = {row["_id"]: row["text"] for row in rows(output / "held-out" / "queries.jsonl")}
    assert len(held) >= 10 and not {row["query"] for row in made} & {*held.values()}
    trained = {row["chunk_id"].partition("#")[0] for row in made}
    stages_done = json.loads((output / "adapt.json").read_text())["stages"]
    held_chunks = {*stages_done["filter"]["figures"]["held_chunks"]}
    assert held_chunks and not trained & {name.partition("#")[0] for name in held_chunks}
    corpus = {row["_id"]: row["text"] for row in rows(output / "held-out" / "corpus.jsonl")}
    judged = [line.split("\t") for line in (output / "held-out" / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    assert len(judged) == len(held) and {document for _, document, _ in judged} <= {*corpus}
    mined = rows(output / "mined.jsonl")
    held_texts = {embedded(chunk) for chunk in chunks if chunk["id"] in held_chunks}
    assert len(held_texts) == len(held_chunks) and not held_texts & {text for row in mined for text in row["negatives"]}
    assert len(mined) == len(made) and sum(len(row["negatives"]) for row in mined) > len(mined) / 4
    assert "damaged" in screen and "broken.pdf" in screen
    assert [(row["path"], row["reason"]) for row in rows(output / "unread.jsonl")] == [("broken.pdf", "damaged")]
    assert f"{output}/unread.jsonl" in screen


def test_counts_and_examples_of_questions_are_on_the_screen(finished):
    output, screen, _ = finished
    done = json.loads((output / "adapt.json").read_text())["stages"]
    shown = " ".join(screen.split())
    for name in ("read", "questions", "filter", "negatives"):
        for heading, text in done[name]["figures"]["lines"]:
            assert " ".join(f"{heading} {text}".split()) in shown
    dropped = [text for heading, text in done["filter"]["figures"]["lines"] if heading == "not found"]
    assert len(dropped) == 1 and re.match(r"\d+ questions?; '", dropped[0])
    examples = done["filter"]["figures"]["examples"]
    assert len(examples) == stages.EXAMPLES and "made as" in screen
    for query, style, _ in examples:
        assert query[:40] in shown and style in shown


def test_a_rows_own_chunk_is_no_negative(finished):
    output, *_ = finished
    own = {chunk["id"]: embedded(chunk) for chunk in rows(output / "chunks.jsonl")}
    for row in rows(output / "mined.jsonl"):
        assert own[row["chunk_id"]] not in row["negatives"] and row["positive"] not in row["negatives"]


def test_the_index_answers_also_from_a_pdf(finished):
    output, *_ = finished
    searcher = Searcher(str(output / "index"))
    hits = searcher.search("paper report", "bm25", 3)
    assert hits[0].path == "paper.pdf" and hits[0].line == 0
    assert searcher.search("topic7", "semantic", 3)


def test_the_report_is_about_documents_and_questions(finished):
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    for text in ("<h2>Documents</h2>", "<h2>Questions</h2>", "broken.pdf", "held-out"):
        assert text in page
    assert (finished[0] / "evaluation.json").is_file()


def test_the_same_command_does_nothing_twice(finished, documents, flags, monkeypatch, capsys):
    output, *_ = finished
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*.jsonl")}
    for name in stages.STAGES:
        monkeypatch.setitem(stages.STAGES, name, lambda shop: pytest.fail("done again"))
    assert adapt.main([str(documents), "--output", str(output), *flags]) == 0
    assert capsys.readouterr().out.count("done before") == len(stages.STAGES)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.jsonl")} == times


@pytest.mark.parametrize("stopped", ["questions", "train"])
def test_a_stopped_run_goes_on(stopped, finished, documents, flags, tmp_path, monkeypatch, capsys):
    """Killed at the end of a stage, before it was noted: files that are there are no obstacle."""
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    record = json.loads((output / "adapt.json").read_text())
    names = [*stages.STAGES]
    for name in names[names.index(stopped) :]:
        key = record["stages"].pop(name)["key"]
        if name == stopped:
            record["stages"][name] = {"key": key, "done": False, "seconds": 1.0}
    (output / "adapt.json").write_text(json.dumps(record))
    real, after = dict(stages.STAGES), []
    for name in names:
        monkeypatch.setitem(stages.STAGES, name, lambda shop, name=name: after.append(name) or real[name](shop))
    assert adapt.main([str(documents), "--output", str(output), *flags]) == 0
    assert after == names[names.index(stopped) :]
    assert rows(output / "mined.jsonl") == rows(finished[0] / "mined.jsonl")


def test_a_run_of_training_goes_on_from_its_last_step(finished, documents, flags, tmp_path, capsys):
    """Regression: in a folder that was copied, it went on in the old one."""
    output, weights = shutil.copytree(finished[0], tmp_path / "out"), Path("final", "adapters.safetensors")
    run_folder = output / "run"
    for path in run_folder.glob("step-*8"):
        shutil.rmtree(path)
    for name in ("final", "best"):
        shutil.rmtree(run_folder / name, ignore_errors=True)
    record = json.loads((output / "adapt.json").read_text())
    for name in ("export", "evaluate", "index"):
        del record["stages"][name]
    record["stages"]["train"]["done"] = False
    (output / "adapt.json").write_text(json.dumps(record))
    assert adapt.main([str(documents), "--output", str(output), *flags, "--stages", "train"]) == 0
    assert re.search(r"resumed +from .*step-000004", capsys.readouterr().out)
    assert (run_folder / weights).read_bytes() == (finished[0] / "run" / weights).read_bytes()
    assert [row["step"] for row in rows(run_folder / "metrics.jsonl")][-1] == 8


def test_within_a_budget_a_model_is_made_that_loads_and_has_the_figures_of_its_evaluation(
    documents, flags, tmp_path, capsys
):
    """All of the trained weights; what the machine takes is measured, the guard's evaluation included."""
    guard, output = tmp_path / "guard", tmp_path / "out"
    write_folder(guard, [{"_id": f"d{i}", "text": f"thing {i}"} for i in range(20)], [{"_id": "q", "text": "thing 3"}],
                 "q\td3\t1\n")  # fmt: skip
    flags = [*flags[: flags.index("--guard")], "--guard", str(guard), "--guard-tolerance", "1"]
    flags += ["--trained-share", "1", "--budget", "40m"]
    assert adapt.main([str(documents), "--output", str(output), *flags]) == 0
    done = json.loads((output / "adapt.json").read_text())["stages"]
    measured, plan = done["measured"]["figures"], done["plan"]["figures"]
    assert min(measured["chunk"], measured["row"], measured["guards"]) > 0 == measured["tasks"]
    assert plan["seconds"]["export"] > 2 * costs.OPENING and 0 < sum(plan["seconds"].values()) < 2400
    assert done["export"]["figures"]["share"] == 1.0
    model, tasks = embedder.load(str(output / "model")), [str(output / "held-out"), str(guard)]
    evaluations = [evaluate(embedder.load(flags[flags.index("--model") + 1]), tasks), evaluate(model, tasks)]
    before, after = (evaluation.tasks["held-out"]["ndcg_at_10"] for evaluation in evaluations)
    assert after > before
    (held, *row), other = done["evaluate"]["figures"]["rows"]
    assert held.startswith("held-out, nDCG@10") and row[:2] == [f"{before:.4f}", f"{after:.4f}"]
    assert other[0] == "guard, nDCG@10, 1 query" and f"{before:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("by", ["mlx", "mlx_lm.server"])
def test_a_real_model_writes_questions(smollm2, flags, tmp_path, capsys, by):
    """In this process, or behind mlx_lm's own server."""
    few = tmp_path / "docs"
    few.mkdir()
    for name, text in PROSE.items():
        (few / f"{name}.md").write_text(f"# {name}\n\n{text}\n")
    output = tmp_path / "out"
    with ExitStack() as stack:
        served = by != "mlx" and stack.enter_context(mlx_lm_server(smollm2 / "float32", tmp_path))
        generator = served or f"mlx:{smollm2}"
        code = adapt.main([str(few), "--output", str(output), *flags, "--generator", generator])
    assert code == 2  # too few to train on
    made = [row for file in (output / "questions").glob("*.jsonl") for row in rows(file)]
    assert 1 <= len(made) <= 2 * len(PROSE)
    assert {row["generator_name"].partition("/v1#")[0] for row in made} == {generator}
    assert {row["chunk_id"] for row in made} <= {f"{name}.md#1" for name in PROSE}
    screen = capsys.readouterr()
    assert re.search(rf"^questions +{len(made)} by {generator}", screen.out, re.MULTILINE)
    assert "too few" in screen.err
    assert Searcher(str(output / "index")).search("dry chain", "bm25", 1)[0].path == "Bicycle.md"


def test_other_texts_are_held_where_the_base_model_has_them(finished, documents, flags, tmp_path, capsys):
    output, others = shutil.copytree(finished[0], tmp_path / "out"), tmp_path / "others.jsonl"
    pairs = [{"query": f"what is {i}", "document": f"a thing of kind {i * i} that nobody asks for"} for i in range(40)]
    others.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "code").mkdir()
    function = 'def {0}(x):\n    """Return the number {0}."""\n    y = x\n    return {1} * y\n'
    code = "".join(function.format(name, i) for i, name in enumerate(("doubled", "tripled", "halved")))
    (tmp_path / "code" / "a.py").write_text(code)
    held = ["--hold", str(others), str(tmp_path / "code")]
    flags = [*flags[: flags.index("--hold")], *held, "--guard", "--stages", "train"]
    assert adapt.main([str(documents), "--output", str(output), *flags]) == 0
    assert "54 texts in place" in capsys.readouterr().out and (output / "held.safetensors").is_file()
    base = embedder.load(flags[flags.index("--model") + 1])
    texts = [pair["document"] for pair in pairs]

    def moved(run: Path) -> float:
        """How far the texts' vectors are from the base model's, as 1 - cosine."""
        vectors = [model.encode(texts, "document") for model in (base, embedder.load(run / "run" / "final"))]
        return 1 - float((vectors[0] * vectors[1]).sum(axis=1).mean())

    assert moved(output) < 0.7 * moved(finished[0])  # one batch in three is theirs
    assert adapt.main([str(documents), "--output", str(output), *flags, "--hold", str(tmp_path / "no.jsonl")]) == 2
    assert "--hold" in capsys.readouterr().err


def test_stages_alone_need_those_before(documents, flags, tmp_path, capsys):
    output = tmp_path / "out"
    assert adapt.main([str(documents), "--output", str(output), *flags, "--stages", "filter"]) == 2
    assert "it builds on read, which is not done" in capsys.readouterr().err
    assert adapt.main([str(documents), "--output", str(output), *flags, "--stages", "read"]) == 0
    assert {path.name for path in output.iterdir()} == {"chunks.jsonl", "unread.jsonl", "adapt.json", ".lock"}


def test_a_dry_run_writes_nothing(documents, flags, tmp_path, capsys):
    assert adapt.main([str(documents), "--output", str(tmp_path / "out"), *flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"files read +{FILES + 1}: {FILES} markdown, 1 pdf", out, re.IGNORECASE)
    assert re.search(r"damaged: broken.pdf .* 1 *\n", out) and "unread.jsonl" not in out
    chunks = int(re.search(r"chunks +(\d+) of", out)[1])
    assert f"at most {2 * chunks} for {chunks} of {chunks} chunks, by none" in out
    for name in ("read", "filter", "negatives", "train", "export", "evaluate", "index", "all"):
        assert re.search(rf"^{name} +about \d+ (s|min)$", out, re.MULTILINE), name
    assert "nothing was trained or written" in out
    assert not (tmp_path / "out").exists()


def test_a_budget_asks_about_fewer_chunks(documents, flags, tmp_path, monkeypatch, capsys):
    """A slow machine is measured; the steps fit the time that is left."""
    monkeypatch.setattr(costs, "FEWEST", 40)
    monkeypatch.setattr(costs, "measure", lambda *_: costs.Costs(chunk=0.5, row=1.0, questions=0.0))
    output = tmp_path / "out"
    assert adapt.main([str(documents), "--output", str(output), *flags, "--budget", "10m"]) == 0
    plan = json.loads((output / "adapt.json").read_text())["stages"]["plan"]["figures"]
    assert 40 <= plan["chunks"] < 91
    assert len({row["chunk_id"] for row in rows(next((output / "questions").glob("*.jsonl")))}) <= plan["chunks"]
    assert "left" in capsys.readouterr().out
    record = json.loads((output / "adapt.json").read_text())
    record["stages"]["questions"]["seconds"] = 400.0  # which are not spent again
    (output / "adapt.json").write_text(json.dumps(record))
    changed = ["--budget", "10m", "--negatives", "2", "--stages", "negatives"]
    assert adapt.main([str(documents), "--output", str(output), *flags, *changed]) == 0
    assert json.loads((output / "adapt.json").read_text())["stages"]["plan"]["figures"]["chunks"] == plan["chunks"]
    assert adapt.main([str(documents), "--output", str(tmp_path / "o2"), *flags, "--budget", "1m"]) == 2
    assert "--budget: too short" in capsys.readouterr().err


@pytest.mark.parametrize(("settings", "is_first"), [
    ({}, True),
    ({"styles": ("question", "span")}, True),
    ({"styles": ("span",)}, False),
    ({"generator": "http://localhost:1"}, False),
])  # fmt: skip
def test_chunks_that_ask_come_first_where_questions_are_made_of_them(finished, tmp_path, settings, is_first):
    """Real questions are the best that can be had; a budget must not be spent on parts of other chunks."""
    output = shutil.copytree(finished[0], tmp_path / "out")
    lines = (finished[0] / "chunks.jsonl").read_text().splitlines()
    asking = [json.loads(line) for line in lines[::9]]
    for chunk in asking:
        chunk["text"] = f"How long does it last? {chunk['text']} Nobody knows for how long a thing like this will last."
    changed = {chunk["id"]: json.dumps(chunk) for chunk in asking}
    (output / "chunks.jsonl").write_text("".join(changed.get(json.loads(x)["id"], x) + "\n" for x in lines))
    shop = Workshop(Adaptation(finished[2], "unused", output, **settings))
    shop.plan = costs.Plan(len(asking) + 5, len(lines), 40, 0.1, {})
    chosen = {chunk.id for chunk in shop.chosen()}
    assert len(chosen) == len(asking) + 5 and ({*changed} <= chosen) == is_first


def test_a_reranker_decides_which_questions_stay(finished, documents, flags, tmp_path, monkeypatch):
    from random_rerankers import cross_encoder

    cross_encoder("bert", tmp_path / "reranker")
    tokenizer = json.loads((tmp_path / "reranker" / "tokenizer.json").read_text())
    known = tokenizer["model"]["vocab"]
    ours = dict(zip(filter(str.isalpha, known), WORDS, strict=False))  # it reads the words of these documents
    tokenizer["model"]["vocab"] = {ours.get(word, word): number for word, number in known.items()}
    (tmp_path / "reranker" / "tokenizer.json").write_text(json.dumps(tokenizer))
    judged, score = [], Reranker.score_groups

    def scored(reranker, groups, raw=False):
        scores = score(reranker, groups, raw)
        judged.extend((query, row) for (query, _), row in zip(groups, scores, strict=True))
        return scores

    monkeypatch.setattr(Reranker, "score_groups", scored)
    monkeypatch.setattr(filtering, "CANDIDATES", 12)
    output = shutil.copytree(finished[0], tmp_path / "out")
    changed = ["--found-among", "6", "--reranker", str(tmp_path / "reranker"), "--stages", "filter"]
    assert adapt.main([str(documents), "--output", str(output), *flags, *changed]) == 0
    assert {len(row) for _, row in judged} == {13}  # a question's own chunk, and the base model's first twelve others
    assert min(row.min() for _, row in judged) < 0  # logits: regression: sigmoids are 1 for many
    expected = {query for query, row in judged if (row[1:] > row[0]).sum() < 6}
    made = {row["query"] for row in rows(output / "rows.jsonl")}
    made |= {row["text"] for row in rows(output / "held-out" / "queries.jsonl")}
    (kept, *_) = json.loads((output / "adapt.json").read_text())["stages"]["filter"]["figures"]["lines"]
    assert 30 < len(expected) < len(judged) and made <= expected
    assert int(kept[1].split()[0]) == len({text_key(query) for query in expected})


def test_what_a_generator_is_measured_by_is_kept(finished, tmp_path):
    """Regression: the questions by which a model was measured were thrown away, and asked again."""
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    job = Adaptation(finished[2], "unused", output, generator="http://localhost:1")
    shop, asked = Workshop(job), []

    class Stub(WithoutModel):
        name = "stub"

        def answers(self, jobs):
            for lot in super().answers(jobs):
                asked.extend(answer.job.chunk.id for answer in lot)
                yield lot

    shop._generator = Stub(seed=1)  # whose jobs are not those of the finished adaptation
    assert asking.seconds_to_ask(shop) > 0 and len({*asked}) == asking.ASKED + asking.MORE
    shop.plan = costs.Plan(40, 91, 80, 0.1, {})
    assert {*asked} <= {chunk.id for chunk in shop.chosen()}
    before = len(asked)
    stages.questions(shop)
    assert len(asked) > before and not {*asked[:before]} & {*asked[before:]}


def test_without_a_gain_the_base_model_is_used(finished, documents, flags, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    shutil.rmtree(output / "model", ignore_errors=True)
    shutil.rmtree(output / "run" / "best", ignore_errors=True)
    record = json.loads((output / "adapt.json").read_text())
    for name in ("export", "evaluate", "index"):
        del record["stages"][name]
    record["stages"]["train"]["figures"]["improved"] = False
    (output / "adapt.json").write_text(json.dumps(record))
    assert adapt.main([str(documents), "--output", str(output), *flags]) == 0
    out = capsys.readouterr().out
    assert "stays the model to use" in out and not (output / "model").exists()
    assert "Training gained nothing" in (output / "report.html").read_text()


def test_an_empty_folder_and_one_of_unreadable_files_are_one_line(flags, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    for text in (None, b"%PDF-1.4 nothing"):
        if text:
            (tmp_path / "docs" / "a.pdf").write_bytes(text)
        assert adapt.main([str(tmp_path / "docs"), "--output", str(tmp_path / "out"), *flags]) == 2
        assert "no document that can be read" in capsys.readouterr().err
