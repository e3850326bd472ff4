"""Models that write questions: a chat server, here a stub, and mlx-lm in this process.

python -m pytest tests/mining/test_question_models.py
"""

import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_stub import Stub, completion, mlx_lm_server
from chat_templates import TEMPLATES

from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.mining.questions import chat_server, local_model, store
from mlx_retrieval.mining.questions.base import Job
from mlx_retrieval.mining.questions.chat_server import ChatServer, Rules
from mlx_retrieval.mining.questions.generators import open_generator
from mlx_retrieval.mining.questions.local_model import LocalModel
from mlx_retrieval.mining.questions.prompted import Prompted
from mlx_retrieval.mining.questions.prompts import STYLES, Prompt
from mlx_retrieval.utils.errors import Place, UserError

CHUNKS = [Chunk(f"c{i}", f"number {i} is a number that some people like", Place("a.md", i + 1)) for i in range(8)]
JOBS = [Job(chunk, "question") for chunk in CHUNKS]
FAST = Rules(timeout=5, patience=5, first_patience=5, pause=0.001, longest_pause=0.002)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.delenv(chat_server.KEY, raising=False)
    made = Stub()
    yield made
    made.close()


def complete(model, jobs=JOBS) -> list:
    return [completion for lot in model.complete(jobs, Prompt()) for completion in lot]


def texts(completions) -> list[str]:
    return [completion.text for completion in completions]


EXPECTED = [f"What is number {i}?" for i in range(8)]


def test_several_requests_at_once_are_answered_in_order(stub):
    def answer(number, body):
        time.sleep(0.02 if number % 3 == 0 else 0.002)
        return completion(f"What is number {number}?")

    stub.answer = answer
    model = ChatServer(stub.address, at_once=3, max_tokens=32, temperature=0.5, seed=4, rules=FAST)
    assert texts(complete(model)) == EXPECTED
    assert stub.most == 3 and model.name == f"{stub.address}/v1#toy"
    body = next(body for body in stub.asked if "number 2 " in body["messages"][0]["content"])
    expected = {"model": "toy", "max_tokens": 32, "temperature": 0.5, "top_p": 0.95, "seed": 4, "stream": False}
    assert body == expected | {"messages": [{"role": "user", "content": Prompt().fill(JOBS[2])}]}
    assert not any("Authorization" in headers for headers in stub.headers)


def test_the_key_is_the_environment_s(stub, monkeypatch):
    monkeypatch.setenv(chat_server.KEY, "secret")
    complete(ChatServer(stub.address, rules=FAST), JOBS[:1])
    assert stub.headers[0]["Authorization"] == "Bearer secret"
    stub.answer = lambda *_: (401, {"error": {"message": "bad key"}})
    with pytest.raises(UserError, match=r"GENERATOR_API_KEY was refused \(401 bad key\)"):
        complete(ChatServer(stub.address, rules=FAST))
    monkeypatch.delenv(chat_server.KEY)
    with pytest.raises(UserError, match="GENERATOR_API_KEY is needed"):
        complete(ChatServer(stub.address, rules=FAST))


@pytest.mark.parametrize("status", [429, 502, 503])
def test_an_overloaded_server_is_asked_again(stub, status):
    stub.answer = lambda number, _: (status, b"busy") if stub.count(number) <= 2 else completion(EXPECTED[number])
    assert texts(complete(ChatServer(stub.address, rules=FAST))) == EXPECTED
    assert len(stub.asked) == 3 * len(JOBS)


@pytest.mark.parametrize("after", ["7", "date"])
def test_retry_after_is_waited_for(stub, after, monkeypatch):
    class Waits(threading.Event):
        seconds = ()

        def wait(self, timeout=None):
            Waits.seconds += (timeout,)

    from email.utils import formatdate

    monkeypatch.setattr(chat_server.time, "time", lambda: 1_000_000_000.0)
    header = formatdate(1_000_000_007, usegmt=True) if after == "date" else after
    stub.answer = lambda n, _: (429, {}, {"Retry-After": header}) if stub.count(n) == 1 else completion(EXPECTED[n])
    model = ChatServer(f"{stub.address}#toy", rules=Rules(pause=0.001))
    model._closed = Waits()
    assert texts(complete(model, JOBS[:1])) == EXPECTED[:1]
    assert Waits.seconds == (7,)
    stub.answer = lambda *_: (429, {"error": "quota"}, {"Retry-After": "3600"})
    with pytest.raises(UserError, match=r"asks to wait for 3600 s \(429 quota\)"):
        complete(ChatServer(stub.address))


@pytest.mark.parametrize(("rules", "expected"), [
    (Rules(pause=0.5, longest_pause=3), [0.5, 1, 2, 3, 3]),
    (Rules(pause=0.5, longest_pause=3, patience=6), [0.5, 1, 2]),  # then 3 s more would be too long
    (Rules(pause=8, longest_pause=3, patience=60), [8, 3, 3, 3, 3]),
])  # fmt: skip
def test_waits_double_up_to_the_longest_pause_and_to_the_end_of_patience(stub, monkeypatch, rules, expected):
    now, waits = 0.0, []

    class Waits(threading.Event):
        def wait(self, timeout=None):
            nonlocal now
            waits.append(timeout)
            now += timeout

    stub.answer = lambda number, _: (503, b"busy") if stub.count(number) <= 5 else completion(EXPECTED[number])
    model = ChatServer(f"{stub.address}#toy", rules=rules)
    model._closed, model._answered = Waits(), True
    monkeypatch.setattr(chat_server, "random", SimpleNamespace(random=lambda: 0.0))
    monkeypatch.setattr(chat_server, "time", SimpleNamespace(monotonic=lambda: now))
    if len(expected) < 5:
        with pytest.raises(UserError, match=r"no answer in 4 s \(503 busy\)"):
            complete(model, JOBS[:1])
    else:
        assert texts(complete(model, JOBS[:1])) == EXPECTED[:1]
    assert waits == expected


def test_waits_are_spread_so_that_clients_do_not_come_back_together(stub, monkeypatch):
    waits = []

    class Waits(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)

    stub.answer = lambda number, _: (503, b"busy") if stub.count(number) <= 3 else completion(EXPECTED[number])
    model = ChatServer(f"{stub.address}#toy", rules=Rules(pause=0.5, longest_pause=1))
    model._closed = Waits()
    drawn = iter([0.0, 0.25, 1.0])
    monkeypatch.setattr(chat_server, "random", SimpleNamespace(random=lambda: next(drawn)))
    assert texts(complete(model, JOBS[:1])) == EXPECTED[:1] and waits == [0.5, 1.25, 2.0]


def test_a_prompt_of_one_s_own_is_what_the_model_gets(stub, tmp_path):
    file, job = tmp_path / "prompt.txt", Job(CHUNKS[0], "claim")
    file.write_text("Ask me {count} of this kind: {style}\n\n{text}")
    digests = []
    for given in (file, None):
        generator = open_generator(stub.address, ("claim",), 1, prompt_file=given)
        path = tmp_path / f"{len(digests)}.jsonl"
        with store.open_store(path) as opened:
            assert len([*store.generate(CHUNKS[:1], generator, opened)]) == 1
        digests.append(generator.prompt_digest(job))
        assert json.loads(path.read_text())["prompt_hash"] == digests[-1]
    own, usual = (body["messages"][0]["content"] for body in stub.asked)
    assert own == f"Ask me 1 of this kind: one {STYLES['claim'][0]}\n\n{CHUNKS[0].text}"
    assert usual == Prompt().fill(job) and digests[0] != digests[1]


@pytest.mark.parametrize(
    "broken",
    [
        (500, {"error": {"message": "bug"}}),
        (200, b"<html>"),
        (200, {"choices": []}),
        (200, {"choices": [{}]}),
        (200, [1]),
    ],
)
def test_a_message_that_the_server_cannot_answer_is_left_out_and_the_others_go_on(stub, broken):
    stub.answer = lambda number, _: broken if number == 3 else completion(EXPECTED[number])
    results = complete(ChatServer(stub.address, rules=FAST))
    assert results[3].failure == chat_server.FAILED and stub.count(3) == chat_server.ATTEMPTS
    assert texts(results[:3] + results[4:]) == EXPECTED[:3] + EXPECTED[4:]


def test_a_server_that_answers_nothing_at_all_is_broken(stub):
    stub.answer = lambda *_: (500, {"message": "out of order"})
    model = ChatServer(stub.address, rules=FAST)
    with pytest.raises(UserError, match="10 messages in a row without an answer; the last: 500 out of order"):
        complete(model, [*JOBS, *JOBS])


def test_an_answer_that_takes_too_long_is_not_waited_for(stub, monkeypatch):
    def slow(number, body):
        time.sleep(0.7 * (number == 1))
        return completion(EXPECTED[number])

    stub.answer = slow
    monkeypatch.setattr(chat_server, "ATTEMPTS", 1)
    results = complete(ChatServer(stub.address, rules=Rules(timeout=0.3, pause=0.001)), JOBS[:3])
    assert [bool(result.failure) for result in results] == [False, True, False]


def test_an_empty_answer_is_one(stub):
    stub.answer = lambda number, _: completion(None, "length" if number else "stop")
    results = complete(ChatServer(stub.address, rules=FAST), JOBS[:2])
    assert texts(results) == ["", ""] and [result.is_cut for result in results] == [False, True]


def test_a_server_that_goes_away_leaves_what_is_done_and_the_next_run_goes_on(stub, tmp_path):
    def answer(number, body):
        if number >= 5:
            stub.server.shutdown()
            stub.server.socket.close()
            return 503, b""
        return completion(EXPECTED[number])

    stub.answer = answer
    path = tmp_path / "questions.jsonl"
    rules = Rules(patience=0.3, pause=0.01)
    generator = Prompted(ChatServer(stub.address, at_once=1, rules=rules), styles=("question",), count=1)
    with (
        store.open_store(path) as opened,
        pytest.raises(UserError, match=r"no answer in 0 s .*; 5 questions kept in .*questions.jsonl; the same command"),
    ):
        list(store.generate(CHUNKS, generator, opened))
    again = Stub()
    generator = Prompted(ChatServer(again.address, rules=FAST), styles=("question",), count=1)
    with store.open_store(path) as opened:
        more = [question.chunk for question in store.generate(CHUNKS, generator, opened, notify=lambda _: None)]
    again.close()
    assert more == ["c5", "c6", "c7"] and len(again.asked) == 3
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["query"] for row in rows] == EXPECTED


def test_no_server_is_one_line_soon(stub):
    stub.close()
    with pytest.raises(UserError, match=r"http://127.0.0.1:\d+/v1: no answer in 0 s \(.*refused.*\)"):
        complete(ChatServer(stub.address, rules=Rules(first_patience=0.05, pause=0.01)))


def test_a_chunk_that_is_too_long_for_the_server_is_cut_and_counted(stub):
    long = Chunk("long", "number 1 " + "and so on " * 300, Place("a.md", 1))

    def answer(number, body):
        if len(body["messages"][0]["content"]) > 1500:
            return 400, {"error": {"message": "This model's maximum context length is 400 tokens."}}
        return completion(EXPECTED[number])

    stub.answer = answer
    model = ChatServer(stub.address, rules=FAST)
    assert texts(complete(model, [Job(long, "question"), JOBS[2]])) == [EXPECTED[1], EXPECTED[2]]
    assert model.shortened == {"long"} and stub.count(1) == 3
    complete(model, [Job(long, "keywords")])
    assert len(model.shortened) == 1  # chunks, not messages


def test_a_message_that_is_refused_is_counted_and_settings_that_are_unknown_are_left_out(stub):
    def answer(number, body):
        if number == 2:
            return 400, {"error": {"message": "content filter"}}
        if "max_tokens" in body:
            return 400, {"error": {"message": "Unsupported: 'max_tokens'. Use 'max_completion_tokens' instead."}}
        if "seed" in body:
            return 400, {"error": {"message": "Unknown parameter: 'seed'."}}
        return completion(EXPECTED[number])

    stub.answer = answer
    model = ChatServer(stub.address, at_once=1, rules=FAST)
    digest = model.settings()
    results = complete(model)
    assert results[2].refusal == "refused by the server (400)"
    assert texts(results[3:]) == EXPECTED[3:] and texts(results[:2]) == EXPECTED[:2]
    assert len(stub.asked) == len(JOBS) + 2 and "seed" not in stub.asked[-1]
    assert model.settings()[2:] == digest[2:]  # so that no job is done twice


def test_a_server_may_refuse_many_messages_once_it_has_answered_one(stub):
    """Regression: ten chunks in a row that a content filter refuses ended the run."""
    many = [Job(Chunk(f"c{i}", f"number {i} ", Place("a.md", 1)), "question") for i in range(20)]
    stub.answer = lambda number, _: completion(f"What is number {number}?") if number in (0, 19) else (400, b"filtered")
    results = complete(ChatServer(stub.address, at_once=1, rules=FAST), many)
    assert [bool(result.refusal) for result in results] == [False, *[True] * 18, False]
    with pytest.raises(UserError, match="10 messages in a row without an answer; the last: filtered"):
        complete(ChatServer(stub.address, at_once=1, rules=FAST), many[1:])


@pytest.mark.parametrize(
    ("models", "name"),
    [((200, {"data": []}), ""), ((404, {}), ""), ((200, b"?"), ""), ((200, {"data": [{"id": "a"}]}), "a")],
)
def test_a_server_s_only_model_is_asked(stub, models, name):
    stub.models = models
    complete(ChatServer(stub.address, rules=FAST), JOBS[:1])
    assert stub.asked[0].get("model", "") == name


def test_one_of_several_models_must_be_named(stub):
    stub.models = (200, {"data": [{"id": "a"}, {"id": "b"}]})
    with pytest.raises(UserError, match=r"name one of its models, as in http.*/v1#MODEL: a, b"):
        complete(ChatServer(stub.address, rules=FAST))
    complete(ChatServer(f"{stub.address}/v1#b", rules=FAST), JOBS[:1])
    assert stub.asked[0]["model"] == "b"
    stub.answer = lambda *_: (404, {"error": {"message": "The model `b` does not exist"}})
    with pytest.raises(UserError, match=r"no model b there \(404"):
        complete(ChatServer(f"{stub.address}#b", rules=FAST))


def test_addresses():
    for given in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/chat/completions"):
        assert chat_server.parse(given) == ("http://h:1/v1", "")
    assert chat_server.parse("https://h/openai/v2#a/b") == ("https://h/openai/v2", "a/b")
    assert chat_server.parse("http://[::1]:80#a") == ("http://[::1]:80/v1", "a")
    for wrong in (
        "http://",
        "http://h:x",
        "ftp://h",
        "http://h?a=b",
        "https://user:key@h",
        "http://[::1",
        "http://[#a",
    ):
        with pytest.raises(UserError):
            chat_server.parse(wrong)


# --- mlx-lm in this process -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talking(small, tmp_path_factory) -> Path:
    """The small random Gemma with a chat template."""
    folder = shutil.copytree(small, tmp_path_factory.mktemp("chat") / "talking")
    (folder / "chat_template.jinja").write_text(TEMPLATES["llama3"])
    return folder


def test_a_chunk_is_cut_to_the_window_and_counted_and_cannot_end_its_turn(talking):
    model = LocalModel(f"mlx:{talking}", window=300, max_tokens=20)
    assert model.name == f"mlx:{talking}"
    tokens = model._fitting(JOBS[0], Prompt())
    text = model._tokenizer.decode(tokens)
    assert Prompt().fill(JOBS[0]) in text and text.rstrip().endswith("<|end_header_id|>") and not model.shortened
    long = Chunk("long", "<eos> number 1 " + "and so on " * 600, Place("a.md", 1))
    tokens = model._fitting(Job(long, "question"), Prompt())
    assert 260 <= len(tokens) <= 280 and model.shortened == {"long"}
    assert model._tokenizer.eos_token_id not in tokens
    narrow = LocalModel(str(talking), window=100, max_tokens=90)
    assert [result.refusal for result in complete(narrow, JOBS[:2])] == [local_model.NO_ROOM] * 2


def test_models_that_are_not_there_or_adapters_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--generator \./none: no folder"):
        LocalModel("mlx:./none")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter; python export.py"):
        LocalModel(str(tmp_path))


@pytest.mark.slow
def test_batches_give_the_answers_of_mlx_lm_one_by_one_and_the_same_ones_again(talking):
    from mlx_retrieval.backend import mx

    import mlx_lm
    from mlx_lm.generate import generate_step

    greedy = LocalModel(str(talking), temperature=0, max_tokens=12, at_once=4)
    alone, tokenizer = mlx_lm.load(str(talking))
    expected = []
    for job in JOBS:
        turns = [{"role": "user", "content": Prompt().fill(job)}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=False)
        tokens = [int(token) for token, _ in generate_step(mx.array(prompt), alone, max_tokens=12)]
        ends = [i for i, token in enumerate(tokens) if token in tokenizer.eos_token_ids]
        expected.append(tokenizer.decode(tokens[: ends[0]] if ends else tokens))
    assert texts(complete(greedy)) == expected and len(set(expected)) > 1
    sampling = LocalModel(str(talking), max_tokens=12, at_once=2, seed=1)  # lots of four jobs
    first = complete(sampling)
    assert texts(first) != expected and complete(sampling) == first
    assert complete(sampling, JOBS[4:]) == first[4:]  # as a run that was killed between two lots
    other = LocalModel(str(talking), max_tokens=12, at_once=2, seed=2)
    assert complete(other) != first and other.settings() != sampling.settings()


@pytest.mark.slow
def test_questions_come_from_mlx_lm_server(talking, tmp_path):
    with mlx_lm_server(talking, tmp_path) as address:
        # Its words are random, so that nothing of them can be used: all are read, counted and kept as done.
        rules = Rules(timeout=60, first_patience=60)
        generator = open_generator(address, count=1, max_tokens=12, rules=rules)
        with store.open_store(tmp_path / "questions.jsonl") as opened:
            questions = list(store.generate(CHUNKS, generator, opened))
            assert len(questions) == opened.count
            assert opened.count + opened.dropped.counts.total() >= len(CHUNKS)
            assert chat_server.FAILED not in opened.dropped.counts
            assert all(opened.is_done(job, generator) for chunk in CHUNKS for job in generator.jobs(chunk))
        assert generator.name == f"{address}/v1#{talking.resolve()}"
