"""adapt.py with questions by a chat server, here a stub: from the first stage to the last, and where it goes wrong.

python -m pytest tests/adaptation/test_adapt_by_server.py
"""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from chat_stub import Stub, completion

import adapt
from mlx_retrieval.adaptation import costs, run
from mlx_retrieval.adaptation.costs import Costs
from mlx_retrieval.adaptation.job import Adaptation
from mlx_retrieval.adaptation.keys import keys_of
from mlx_retrieval.mining.questions import chat_server, filtering
from mlx_retrieval.mining.questions.chat_server import Rules
from mlx_retrieval.retrieval.searcher import Searcher

FILES, ROOT = 60, Path(__file__).parents[2]
ONLY = ["--stages", "read", "questions", "filter"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("documents")
    for i in range(FILES):
        words = " ".join(rng.choice(["boiler", "drips", "night", "bike", "squeaks", "rain", "cold", "town"], 12))
        (folder / f"{i:02}.md").write_text(f"# About topic{i}\n\nThing topic{i} has {words} and more of topic{i}.\n")
    return folder


@pytest.fixture
def stub(monkeypatch):
    """A server that knows each document by its number, and a filter that drops nothing."""
    monkeypatch.delenv(chat_server.KEY, raising=False)
    monkeypatch.setattr(chat_server, "Rules", lambda: Rules(5, 0.2, 0.2, 0.001, 0.002))
    monkeypatch.setattr(filtering, "SHARE_OF_CHUNKS", 1.0)
    made = Stub(lambda message: int(re.search(r"topic(\d+)", message)[1]))
    made.answer = lambda number, _: completion(f"What has topic{number}?")
    yield made
    made.close()


@pytest.fixture
def flags(small, documents, stub, tmp_path) -> list[str]:
    (tmp_path / "train.yaml").write_text("steps: 2\nbatch_size: 16\nlora_rank: 4\nlearning_rate: 0.01\n")
    training = ["--model", small, "--config", str(tmp_path / "train.yaml"), "--compile", "off", "--hold", "--guard"]
    asking = ["--generator", stub.address, "--questions", "1", "--found-among", str(FILES)]
    return [str(documents), "--output", str(tmp_path / "out"), *training, *asking]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stages_of(output: Path) -> dict[str, dict]:
    return json.loads((output / "adapt.json").read_text())["stages"]


def test_a_server_s_questions_go_through_all_stages_one_by_one(stub, flags, tmp_path, capsys):
    """Regression: without an evaluation, a report ended in a missing file; without an index, there was none."""

    def answer(number, body):
        if number == 7 and len(body["messages"][0]["content"]) > 600:
            return 400, {"error": {"message": "maximum context length"}}
        return completion(f"1. What has topic{number}?\n2. The passage says what?")

    stub.answer, output = answer, tmp_path / "out"
    (Path(flags[0]) / "07.md").write_text("# About topic7\n\n" + "Thing topic7 has cold rain, and more of it. " * 8)
    for name in run.ALL[: run.ALL.index("evaluate")]:
        assert adapt.main([*flags, "--stages", name]) == 0, name
    screen = capsys.readouterr().out
    assert "shortened" in screen and "1 chunk: the model's window holds only the beginning" in screen
    assert adapt.main([*flags, "--stages", "report"]) == 2
    assert "it builds on evaluate, which is not done" in capsys.readouterr().err
    for name in ("evaluate", "report"):
        assert adapt.main([*flags, "--stages", name]) == 0, name
    assert "no index" in capsys.readouterr().out and "topic" in (output / "report.html").read_text()
    for name in ("index", "report"):
        assert adapt.main([*flags, "--stages", name]) == 0, name
    assert "search.py search" in capsys.readouterr().out
    assert adapt.main(flags) == 0
    assert capsys.readouterr().out.count("done before") == len(run.STAGES)

    made = [*rows(output / "mined.jsonl"), *({"query": q["text"]} for q in rows(output / "held-out" / "queries.jsonl"))]
    assert {row["query"] for row in made} == {f"What has topic{i}?" for i in range(FILES)}
    assert {row["generator_name"] for row in made if "generator_name" in row} == {f"{stub.address}/v1#toy"}
    dropped = dict(stages_of(output)["questions"]["figures"]["lines"])
    assert dropped["mentions the text"].startswith(f"{FILES} questions; 'The passage says what?'")
    assert len(stub.asked) <= FILES + 4  # chunk 7 in shorter and shorter parts
    assert Searcher(str(output / "index")).search("topic9", "bm25", 1)[0].path == "09.md"


@pytest.mark.parametrize(("answer", "reason"), [
    pytest.param(
        "§ § § § § §", "no question was made; no question in the answer: 60 questions",
        id="nonsense", marks=pytest.mark.slow,
    ),
    pytest.param(
        "[]", "no question was made; no question in the answer: 60 questions", id="empty", marks=pytest.mark.slow
    ),
    pytest.param(
        "О чём говорится в этом тексте?", "no question was made; another script: 60 questions", id="another language"
    ),
    pytest.param(
        "What is it about?", "1 question left of 1: too few questions: 30 are needed, to train and to judge",
        id="the same", marks=pytest.mark.slow,
    ),
])  # fmt: skip
def test_without_usable_questions_the_documents_are_indexed_all_the_same(stub, flags, tmp_path, capsys, answer, reason):
    """Regression: such a generator was an error, and nothing could be searched."""
    stub.answer = lambda *_: completion(answer)
    output, model = tmp_path / "out", flags[flags.index("--model") + 1]
    assert adapt.main([*flags, "--stages", "read", "questions", "filter"]) == 2
    assert "index" not in capsys.readouterr().err  # was not asked for
    for attempt in range(2):
        assert adapt.main(flags) == 2
        screen = capsys.readouterr()
        assert reason in screen.err and f"the index is made with {model}" in screen.err
        assert f"search.py search 'your question' --index {output}/index" in screen.out
        assert ("index   done before" in screen.out) == bool(attempt)
    assert Searcher(str(output / "index")).search("topic9", "semantic", 3)
    assert len(stub.asked) == FILES and not (output / "model").exists()
    settings = vars(adapt.parser().parse_args(flags))
    job = Adaptation(**{name: value for name, value in settings.items() if name not in ("stages", "redo", "dry_run")})
    assert stages_of(output)["index"]["key"] != keys_of(job)["index"]  # that of the index after training


@pytest.mark.slow
def test_a_server_that_goes_away_leaves_work_to_go_on_with_and_is_asked_for_the_rest(stub, flags, tmp_path, capsys):
    """Regression: it ended the run, with all questions that were there."""
    stub.answer = lambda number, _: completion(f"What has topic{number}?") if number < 40 else (503, b"gone")
    output = tmp_path / "out"
    for _ in range(2):  # the second time, no question more
        assert adapt.main([*flags, *ONLY]) == 0
        screen = capsys.readouterr().out
        assert "40 questions kept in" in screen and "the work goes on with these" in screen
        first = stages_of(output)
        assert [first[name]["done"] for name in ONLY[1:]] == [True, False, True]
        few = len(rows(output / "rows.jsonl"))
    assert screen.count("done before") == 2
    stub.answer = lambda number, _: completion(f"What has topic{number}?")
    asked = len(stub.asked)
    assert adapt.main([*flags, *ONLY]) == 0
    # A request of the run before may still arrive: each of the rest is asked, and nothing else.
    assert len({str(request["messages"]) for request in stub.asked[asked:]}) == FILES - 40
    assert all(stages_of(output)[name]["done"] for name in ONLY[1:])
    assert len(rows(output / "rows.jsonl")) > few
    capsys.readouterr()
    assert adapt.main([*flags, *ONLY]) == 0
    assert capsys.readouterr().out.count("done before") == 3


@pytest.mark.slow
def test_a_killed_run_asks_no_answered_question_again(stub, flags, tmp_path):
    """SIGKILL in the middle of the questions: those that were asked at that moment alone are asked twice."""
    stub.answer = lambda number, _: time.sleep(0.1) or completion(f"What has topic{number}?")
    command = [sys.executable, "adapt.py", *flags, "--stages", "read", "questions"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(stub.asked) < FILES // 2 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.5)  # requests that are under way
    before, at_once = len(stub.asked), stub.most
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    (made,) = (tmp_path / "out" / "questions").glob("*.jsonl")
    assert sorted(row["query"] for row in rows(made)) == sorted(f"What has topic{i}?" for i in range(FILES))
    assert FILES // 2 <= before < FILES <= len(stub.asked) <= FILES + at_once


def test_a_server_that_is_away_from_the_beginning_is_an_error_at_once(stub, flags, tmp_path, capsys):
    stub.answer = lambda *_: (503, b"gone")
    assert adapt.main(flags) == 2
    assert "503" in capsys.readouterr().err and not (tmp_path / "out" / "index").exists()


def test_what_a_machine_takes_is_measured_once(flags, tmp_path, monkeypatch, capsys):
    """Regression: the same command with more time found the measured questions done, and took them to cost nothing."""
    measured = []
    monkeypatch.setattr(costs, "measure", lambda *given: measured.append(given) or Costs(9.0, 9.0, 9.0))
    for budget in ("50s", "60s"):
        assert adapt.main([*flags, *ONLY, "--budget", budget]) == 2
        assert "--budget: too short" in capsys.readouterr().err
    assert len(measured) == 1 and stages_of(tmp_path / "out")["measured"]["figures"]["questions"] == 9.0
