"""Questions for chunks: without a model, read from answers, kept through kills, and filtered.

python -m pytest tests/mining/test_questions.py
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.mining.cache import ResumableCache
from mlx_retrieval.mining.questions import answers, base, filtering, prompted, store, without_model
from mlx_retrieval.mining.questions.base import Answer, Job, Question
from mlx_retrieval.mining.questions.generators import open_generator
from mlx_retrieval.mining.questions.prompts import STYLES, Prompt
from mlx_retrieval.mining.questions.without_model import WithoutModel
from mlx_retrieval.utils.errors import Place, UserError

TEXT = """# Kidney stones
## Treatment

Small stones pass by themselves within a few weeks. Drinking a lot of water helps them on their way.
Larger ones are broken by shock waves, which takes about an hour. Surgery is needed only if all else has failed."""
STONES = Chunk("a#1", TEXT, Place("docs/a.md", 12), "Kidney stones", ("Kidney stones", "Treatment"))
BIKES = Chunk(
    "b#1",
    "A chain squeaks when it is dry. Put a drop of oil on every link, wait for a minute, then wipe off the rest.",
    Place("docs/b.txt", 1),
)
GRID = "The loop must keep its fixed pace. Every tooth of the gear counts once in a turn, and no tooth is ever skipped."


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- without a model --------------------------------------------------------------------------------------------------


def made(generator, *chunks: Chunk) -> dict[tuple[str, str], Question]:
    jobs = [job for chunk in chunks for job in generator.jobs(chunk)]
    questions = [q for lot in generator.answers(jobs) for answer in lot for q in answer.questions]
    return {(question.chunk, question.style): question for question in questions}


def test_titles_headings_and_spans_are_queries_and_are_removed_from_their_documents(monkeypatch):
    monkeypatch.setattr(without_model, "REMOVED", 1.0)
    questions = made(WithoutModel(count=4, styles=("title", "headings", "sentence", "span")), STONES)
    body = TEXT.partition("\n\n")[2]
    assert questions["a#1", "title"][2:] == ("Kidney stones", body)
    assert questions["a#1", "headings"][2:] == ("Kidney stones: Treatment", body)
    first = "Small stones pass by themselves within a few weeks."
    assert questions["a#1", "sentence"][2:] == (first, body.removeprefix(f"{first} "))
    span = questions["a#1", "span"]
    assert span.text in body.replace("\n", " ") and span.text != first and span.text.endswith(".")
    assert span.text not in span.positive.replace("\n", " ")
    assert sorted((span.text + " " + span.positive).split()) == sorted(body.split())


@pytest.mark.parametrize(("text", "question"), [
    ("Which gene(s) matter (if any)? Nobody knows of one that would, and many have been looked at.",
     "Which gene(s) matter (if any)?"),
    ("Is it common? About one person in ten has a stone once in life, men more often.", "Is it common?"),
    ("A stone is a hard thing. How is it  found ?\nBy an X-ray, or by sound. Why? Nobody knows.", "How is it found ?"),
    ("腎結石とは何ですか？腎臓の中にできる硬い塊である。", "腎結石とは何ですか？"),
    ("ما هي حصى الكلى؟ كتلة صلبة تتكون في الكلى من أملاح البول وتسبب ألما", "ما هي حصى الكلى؟"),
])  # fmt: skip
@pytest.mark.parametrize("count", [1, 3])
def test_a_question_of_the_text_is_asked_and_nothing_else(monkeypatch, text, question, count):
    monkeypatch.setattr(without_model, "REMOVED", 1.0)
    questions = made(WithoutModel(count=count), replace(BIKES, text=text))
    assert [*questions] == [("b#1", "question")]
    asked = questions["b#1", "question"]
    assert asked.text == question and question not in asked.positive and len(asked.positive) > len(text) / 3


def test_of_several_questions_as_many_are_asked_as_are_wanted(monkeypatch):
    monkeypatch.setattr(without_model, "REMOVED", 1.0)
    chunk = replace(
        BIKES, text="Is it oiled? Look at it. Does it squeak? Listen to it. Is it rusty? Then buy a new one."
    )
    for count in (1, 2, 4):
        generator = WithoutModel(count=count)
        (job,) = generator.jobs(chunk)
        (((answer,),),) = ([*generator.answers([job])],)
        assert [q.text for q in answer.questions] == ["Is it oiled?", "Does it squeak?", "Is it rusty?"][:count]
        assert len({q.positive for q in answer.questions}) == job.count == min(count, 3)


@pytest.mark.parametrize("text", [
    "See http://a.example/b?page=1 for the whole list of all of the stones that were found there.",
    "Why? Nobody knows what they are made of, or where they come from, or how long they stay.",
    "int sign(int x) {\n  return x > 0 ? 1 : 0; // of a number, which may be any number that fits into an int\n}",
    "let found = cache.get(key) ? key : other(key) // of the cache, or else of all the others that are known",
    "Does " + "a very " * 40 + "long question end here? Nobody reads that far, so it is none that anyone asks.",
])  # fmt: skip
def test_what_nobody_would_ask_is_no_question(text):
    jobs = WithoutModel(count=4).jobs(replace(BIKES, text=text))
    assert jobs and "question" not in [job.style for job in jobs]


def test_documents_are_as_search_embeds_them_but_for_the_query(monkeypatch):
    monkeypatch.setattr(without_model, "REMOVED", 1.0)
    context, text = "Kidney stones > Treatment", TEXT.partition("\n\n")[2]
    chunk = replace(STONES, text=text, context=context)
    questions = made(WithoutModel(count=4, styles=("title", "headings", "sentence", "crop")), chunk)
    assert [questions["a#1", style].positive for style in ("title", "headings")] == [text, text]
    assert questions["a#1", "sentence"].positive.startswith(f"{context}\nDrinking a lot")
    assert questions["a#1", "crop"].positive.startswith(f"{context}\n")
    asked = store.row_of(Job(chunk, "question"), Question("a#1", "question", "why?"), Listed({}))
    assert asked["positive"] == f"{context}\n{text}"


def test_a_tenth_of_the_queries_stays_in_its_document():
    chunks = [replace(STONES, id=f"a#{i}") for i in range(400)]
    questions = made(WithoutModel(styles=("sentence",), count=1), *chunks)
    assert 0.05 < sum(question.positive is None for question in questions.values()) / 400 < 0.15


def test_crops_are_drawn_independently_and_are_parts_of_the_chunk():
    chunks = [replace(BIKES, id=f"b#{i}") for i in range(60)]
    questions = [*made(WithoutModel(styles=("crop",), count=1), *chunks).values()]
    documents = [q.positive or BIKES.text for q in questions]
    assert all(
        q.text in BIKES.text and document in BIKES.text for q, document in zip(questions, documents, strict=True)
    )
    lengths = [len(q.text.split()) for q in questions]
    assert min(lengths) >= without_model.FEWEST and max(lengths) <= len(BIKES.text.split()) // 2
    assert all(len(document.split()) >= len(BIKES.text.split()) // 2 for document in documents)
    assert {q.text in document for q, document in zip(questions, documents, strict=True)} == {True, False}


def test_the_same_seed_gives_the_same_queries_whatever_the_other_chunks_are():
    alone, both = made(WithoutModel(seed=3), STONES), made(WithoutModel(seed=3), BIKES, STONES)
    assert alone == {key: question for key, question in both.items() if key[0] == "a#1"}
    others = [made(WithoutModel(seed=seed, styles=("span", "crop")), STONES) for seed in range(8)]
    assert len({question.text for each in others for question in each.values()}) > 8


@pytest.mark.parametrize(("count", "styles"), [(1, ()), (2, ()), (4, ()), (4, ("title", "span"))])
def test_a_chunk_has_at_most_so_many_queries(count, styles):
    chunks = [replace(STONES, id=f"a#{i}") for i in range(40)]
    generator = WithoutModel(styles, count)
    expected = {*(styles or without_model.STYLES)} - {"question"}  # there is none
    assert {len(generator.jobs(chunk)) for chunk in chunks} == {min(count, len(expected))}
    assert {job.style for chunk in chunks for job in generator.jobs(chunk)} == expected


def test_chunks_without_enough_words_have_no_queries():
    assert not WithoutModel().jobs(replace(STONES, text="# Kidney stones\n## Treatment\n"))
    assert not WithoutModel().jobs(replace(BIKES, text="1 2 3"))
    assert not WithoutModel().jobs(replace(BIKES, text=""))
    long = replace(BIKES, text="a few words that never end " * 50)
    assert {len(q.text.split()) for q in made(WithoutModel(styles=("sentence",), count=1), long).values()} == {32}


def test_queries_begin_without_the_marks_of_lists():
    chunk = replace(BIKES, text="- a chain that squeaks is dry.\n- a drop of oil on each of its links helps it.")
    assert (
        made(WithoutModel(styles=("sentence",), count=1), chunk)["b#1", "sentence"].text
        == "a chain that squeaks is dry."
    )


def test_scripts_without_blanks_are_cut_by_signs():
    text = "腎結石は腎臓の中にできる硬い塊である。小さな石は数週間で自然に排出される。水をたくさん飲むとよい。"
    questions = made(WithoutModel(styles=("sentence", "crop"), count=2), replace(BIKES, text=text))
    assert questions["b#1", "sentence"].text == "腎結石は腎臓の中にできる硬い塊である。"
    assert questions["b#1", "crop"].text in text and len(questions["b#1", "crop"].text) <= len(text) // 2


def test_unknown_styles_counts_and_generators_are_refused():
    for call, message in (
        (lambda: WithoutModel(("titel",)), "did you mean title"),
        (lambda: WithoutModel(count=5), "must be 1 to 4"),
        (lambda: open_generator("smollm2"), "none, mlx:MODEL"),
        (lambda: open_generator("none", max_tokens=3), "no model"),
    ):
        with pytest.raises(UserError, match=message):
            call()


# --- answers of a model -----------------------------------------------------------------------------------------------

Q1, Q2 = "What is a kidney stone?", "How long does it take to pass?"


@pytest.mark.parametrize(
    "answer",
    [
        f"{Q1}\n{Q2}",
        f"1. {Q1}\n2. {Q2}",
        f"Here are two questions:\n\n1) {Q1}\n\n2) {Q2}\n",
        f"- **{Q1}**\n- **{Q2}**",
        f'"{Q1}"\n"{Q2}"',
        f"Question: {Q1}\nQuestion: {Q2}",
        f"Question 1: {Q1}\nAnswer: A hard piece of material.\nQ2: {Q2}\nA: A few weeks.",
        f"1. {Q1} 2. {Q2}",
        json.dumps([Q1, Q2]),
        f"```json\n{json.dumps([Q1, Q2], indent=1)}\n```",
        f"Sure! {json.dumps({'questions': [{'question': Q1}, {'question': Q2}]})} I hope this helps.",
        f"<think>1. Which?\n2. Not these?</think>\n* “{Q1}”\n* “{Q2}”",
        f'["{Q1}",\n"{Q2}",',
    ],
)
def test_answers_of_many_shapes_are_read(answer):
    assert answers.parse(answer) == [Q1, Q2]


@pytest.mark.parametrize(
    "answer", ["", "\n \n", "[]", "{}", "```\n```", "Sure, here are the questions:", "<think>What?", "1.\n2.\n"]
)
def test_answers_without_a_question_have_none(answer):
    assert answers.parse(answer) == []


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (Q1, ""),
        ("kidney stone pain", ""),
        ("C. elegans lifespan", ""),
        ("How do I change the text color in the header?", ""),
        ("Who is the author of War and Peace?", ""),
        ("I'm sorry, but I cannot help with that.", answers.REFUSAL),
        ("As an AI, I have no kidneys.", answers.REFUSAL),
        ("What does the passage say about stones?", answers.MENTION),
        ("According to the text, what helps?", answers.MENTION),
        ("What is the main idea of this paragraph?", answers.MENTION),
        ("What is described above?", answers.MENTION),
        ("What is the text?", answers.MENTION),
        ("The text is about stones of the kidney.", answers.MENTION),
        ("I'm ready to help. What's your question?", answers.REFUSAL),
        ("stone stone stone stone stone stone stone", answers.NONSENSE),
        ("?", answers.NONSENSE),
        ("1234 5678", answers.NONSENSE),
        ("word " * 80, answers.NONSENSE),
        ("Что такое камень в почке?", answers.LANGUAGE),
        ("什么是肾结石？", answers.LANGUAGE),
    ],
)
def test_useless_questions_have_a_reason(question, reason):
    assert answers.flaw(question, TEXT) == reason


def test_scripts_that_a_language_mixes_are_one():
    japanese = "腎結石は腎臓の中にできる硬い塊である。カルシウムが多い。"
    assert answers.flaw("カルシウムとは なに ですか", japanese) == ""
    assert answers.flaw("What is a stone?", japanese) == answers.LANGUAGE
    assert answers.flaw("What is a stone?", "12 + 30 = 42") == ""


def test_an_answer_gives_as_many_questions_as_were_asked_for_and_counts_the_rest():
    job = Job(STONES, "question", 2)
    text = f"1. {Q1}\n2. {Q1.lower()}\n3. What does the text say?\n4. {Q2}\n5. Why does it hurt?\n6. And the la"
    answer = prompted.read(prompted.Completion(job, text, is_cut=True))
    assert [question.text for question in answer.questions] == [Q1, Q2]
    assert Counter(reason for reason, _ in answer.dropped) == {
        answers.CUT: 1, base.REPEATED: 1, answers.MENTION: 1, answers.EXTRA: 1
    }  # fmt: skip
    for text, reason in (("", answers.EMPTY), ("[]", answers.EMPTY), ("I cannot answer:", answers.REFUSAL)):
        assert prompted.read(prompted.Completion(job, text)).dropped == [(reason, text)]
    failed = prompted.read(prompted.Completion(job, "", failure="no answer"))
    assert not failed.done and not failed.questions


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_filled_and_can_be_a_file(tmp_path):
    message = Prompt().fill(Job(STONES, "keywords", 3))
    assert TEXT in message and "Kidney stones > Treatment" in message and "Write 3 different searches" in message
    file = tmp_path / "prompt.txt"
    file.write_text('\ufeffWrite {count} as {"json": []}: {style}\n\n\n\n{text}{unknown}\n', encoding="utf-8")
    job = Job(BIKES, "claim")
    expected = f'Write 1 as {{"json": []}}: one {STYLES["claim"][0]}\n\n{BIKES.text}{{unknown}}'
    assert Prompt.read(file).fill(job) == expected
    assert Prompt.read(file).fill(job, "cut").endswith("cut{unknown}")
    for content, reason in (
        (b"Write {txt}", "{text}, where the chunk is put; did you mean text"),
        (b"\xff", "not UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"prompt.txt: .*{reason}"):
            Prompt.read(file)
    with pytest.raises(UserError, match="No such file"):
        Prompt.read(tmp_path / "none.txt")


@pytest.mark.parametrize(("count", "styles", "expected"), [
    (1, (), [1]),
    (2, (), [1, 1]),
    (4, (), [1, 1, 1, 1]),
    (3, ("claim", "everyday"), [2, 1]),
    (4, ("everyday", "question", "keywords"), [2, 1, 1]),
    (4, ("everyday",), [4]),
])  # fmt: skip
def test_each_chunk_draws_styles_and_fewer_ones_are_asked_for_more(count, styles, expected):
    chunks, known = [replace(STONES, id=f"a#{i}") for i in range(60)], styles or (*STYLES,)
    generator = prompted.Prompted(None, styles, count, seed=1)
    jobs = [generator.jobs(chunk) for chunk in chunks]
    for each, chunk in zip(jobs, chunks, strict=True):
        places = [known.index(job.style) for job in each]
        assert places == sorted({*places}) and [job.count for job in each] == expected
        assert all(job.chunk == chunk for job in each)
    assert {job.style for each in jobs for job in each} == {*known}
    assert jobs == [generator.jobs(chunk) for chunk in chunks]  # always the same ones
    others = [prompted.Prompted(None, styles, count, seed=2).jobs(chunk) for chunk in chunks]
    assert (others == jobs) == (len(expected) == len(known))
    assert not generator.jobs(replace(STONES, text="1 2 3"))


def test_each_style_asks_for_its_kind():
    for style, (one, several) in STYLES.items():
        alone, more = (Prompt().fill(Job(STONES, style, count)) for count in (1, 3))
        assert f"Write one {one}." in alone and f"Write 3 {several}." in more
    assert "knows no terms" in STYLES["everyday"][0]


# --- kept in a file ---------------------------------------------------------------------------------------------------


class Listed:
    """A generator that answers each chunk with questions from a list, and records its jobs."""

    name = "listed"

    def __init__(self, questions: dict[str, list[str]], lot: int = 1, prompt: str = "p", fails_at: str = ""):
        self.questions, self.lot, self.prompt, self.fails_at, self.asked = questions, lot, prompt, fails_at, []

    def jobs(self, chunk):
        return [Job(chunk, "question")]

    def prompt_digest(self, job):
        return self.prompt

    def answers(self, jobs):
        jobs = list(jobs)
        for first in range(0, len(jobs), self.lot):
            lot = []
            for job in jobs[first : first + self.lot]:
                if job.chunk.id == self.fails_at:
                    raise UserError("http://localhost: no answer in 5 s")
                self.asked.append(job.chunk.id)
                texts = self.questions[job.chunk.id]
                questions = [Question(job.chunk.id, job.style, text) for text in texts if text]
                lot.append(Answer(job, questions, [(answers.EMPTY, "")] * (not questions)))
            yield lot


def chunk(number: int, text: str = "") -> Chunk:
    return Chunk(f"c{number}", text or f"text of number {number}", Place("docs/c.md", number + 1))


CHUNKS = [chunk(i) for i in range(6)]
ASKED = {"c0": ["what is zero"], "c1": ["what is one", "why one"], "c2": [""], "c3": ["What is ONE?"], "c4": ["four?"]}
ASKED["c5"] = ["what is five"]


def run(path: Path, generator, chunks=CHUNKS) -> list[Question]:
    with store.open_store(path) as opened:
        return list(store.generate(chunks, generator, opened, notify=lambda line: None))


def test_rows_are_training_data_with_their_origin_and_nothing_is_remarked_on(tmp_path):
    path = tmp_path / "questions.jsonl"
    questions = run(path, Listed(ASKED))
    assert [q.text for q in questions] == ["what is zero", "what is one", "why one", "four?", "what is five"]
    rows = read(path)
    assert rows[1] == {
        "query": "what is one", "positive": "text of number 1", "source": "docs/c.md:2", "chunk_id": "c1",
        "chunk_hash": base.chunk_digest(CHUNKS[1]), "generator_name": "listed", "question_type": "question",
        "prompt_hash": "p", "job_hash": store.job_key(Job(CHUNKS[1], "question"), Listed(ASKED)),
    }  # fmt: skip
    loaded = Rows([path])
    assert loaded.ignored == {} and [loaded[i].query for i in range(5)] == [q.text for q in questions]
    with store.open_store(path) as opened:
        assert opened.dropped.counts == {answers.EMPTY: 1, base.REPEATED: 1}
        assert opened.dropped.lines()[1] == (base.REPEATED, "1 question; 'What is ONE?'")


def test_no_job_is_done_twice_unless_chunk_prompt_or_generator_changed(tmp_path):
    path = tmp_path / "questions.jsonl"
    run(path, Listed(ASKED))
    before = path.read_bytes()
    again = Listed(ASKED)
    assert run(path, again) == [] and again.asked == [] and path.read_bytes() == before
    changed = Listed(ASKED)
    run(path, changed, [chunk(0, "another text"), *CHUNKS[1:]])
    assert changed.asked == ["c0"]
    other_prompt = Listed(ASKED, prompt="other")
    run(path, other_prompt)
    assert len(other_prompt.asked) == 6


def test_a_question_may_be_asked_again_when_its_chunk_has_changed(tmp_path, cache):
    """Regression: the row of a chunk that was no more kept the same question of another chunk from the file."""
    path, questions = tmp_path / "questions.jsonl", {"c0": ["what about boilers?"], "c1": ["what about roofs?"]}
    old = [chunk(0, "all about boilers"), chunk(1, "all about roofs")]
    new = [chunk(0, "all about boilers and how they hiss"), old[1]]
    run(path, Listed(questions), old)
    assert [q.text for q in run(path, Listed(questions), new)] == ["what about boilers?"]
    rows = read(path)
    assert [(row["query"], row["positive"]) for row in rows] == [
        ("what about boilers?", "all about boilers"),
        ("what about roofs?", "all about roofs"),
        ("what about boilers?", "all about boilers and how they hiss"),
    ]
    result = filtering.keep(rows, new, Words(), cache, filtering.Rules(k=2))
    assert result.kept == [1, 2] and result.dropped.counts == {filtering.GONE: 1}
    # A chunk that is still there keeps its question for itself, whichever of the two comes first.
    again = [*new, chunk(2, "more about roofs")]
    assert not run(path, Listed(questions | {"c2": ["What about ROOFS"]}), again)
    with store.open_store(path) as opened:
        assert opened.dropped.counts == {base.REPEATED: 1}


def test_jobs_of_other_settings_are_not_done_again(tmp_path, monkeypatch):
    """Regression: each setting had a file of its own, and all of its jobs were done again."""
    monkeypatch.setattr(store, "TAKEN_AT_ONCE", 2)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    run(first, Listed(ASKED), CHUNKS[:4])
    more, told = Listed(ASKED), []
    with store.open_store(second, [first, tmp_path / "none.jsonl"]) as opened:
        assert opened.is_done(Job(CHUNKS[1], "question"), more) and not opened.is_done(Job(CHUNKS[4], "question"), more)
        assert [q.chunk for q in store.generate(CHUNKS, more, opened, notify=told.append)] == ["c4", "c5"]
        assert (opened.count, opened.taken) == (5, 3)
    assert more.asked == ["c4", "c5"] and told == ["3 questions of other settings taken over"]
    whole = tmp_path / "whole.jsonl"
    run(whole, Listed(ASKED))
    assert read(second) == read(whole)
    assert run(second, Listed({})) == [] and read(second) == read(whole)  # all is done here now
    other = Listed(ASKED, prompt="other")
    with store.open_store(tmp_path / "third.jsonl", [first, second]) as opened:
        assert len([*store.generate(CHUNKS, other, opened, notify=print)]) == 5 and len(other.asked) == 6


def test_a_run_killed_while_it_takes_over_goes_on(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    run(first, Listed(ASKED))
    with pytest.raises(KeyboardInterrupt), store.open_store(second, [first]) as opened:
        for chunk in CHUNKS[:3]:
            opened.has(Job(chunk, "question"), Listed(ASKED))
        raise KeyboardInterrupt
    assert len(read(second)) == 3
    with store.open_store(second, [first]) as opened:
        assert not [*store.generate(CHUNKS, Listed({}), opened, notify=lambda line: None)]
    assert read(second) == read(first)


@pytest.mark.parametrize("damage", [b"{}\n", b'{"query": "of an earlier version"}\n', b"broken\n"])
def test_other_files_that_do_not_name_their_jobs_give_none(tmp_path, damage):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    run(first, Listed(ASKED))
    first.write_bytes(damage + first.read_bytes())
    generator = Listed(ASKED)
    with store.open_store(second, [first]) as opened:
        assert len([*store.generate(CHUNKS, generator, opened, notify=print)]) == 5
    assert len(generator.asked) == 6


@pytest.mark.parametrize("lot", [1, 2])
def test_a_run_killed_at_any_byte_ends_like_one_that_was_not(tmp_path, lot, monkeypatch):
    path, whole = tmp_path / "questions.jsonl", tmp_path / "whole.jsonl"
    done = tmp_path / ".questions.jsonl.done"
    run(whole, Listed(ASKED, lot))
    rows, jobs = whole.read_bytes(), (tmp_path / ".whole.jsonl.done").read_bytes()
    monkeypatch.setattr(store.files, "flush", lambda handle: None)
    for cut in [*range(0, len(rows), 41), len(rows) - 1, len(rows)]:
        # Rows are written first: at any time the other file is about no more than these.
        ends = [0] + [i + 1 for i, byte in enumerate(jobs) if byte == 10]
        possible = [end for end in ends if not end or json.loads(jobs[:end].splitlines()[-1])["end"] <= cut]
        path.write_bytes(rows[:cut])
        done.write_bytes(jobs[: possible[-1]] + jobs[possible[-1] :][: cut % 50])
        resumed = Listed(ASKED, lot)
        run(path, resumed)
        assert path.read_bytes() == rows and done.read_bytes() == jobs, cut
        assert len(resumed.asked) == 6 - lot * len(jobs[: possible[-1]].splitlines()), cut


def test_lost_rows_are_asked_for_again(tmp_path):
    """As after a power failure that lost the end of one file and not of the other."""
    path = tmp_path / "questions.jsonl"
    run(path, Listed(ASKED))
    rows = path.read_bytes()
    path.write_bytes(rows[:100])
    run(path, Listed(ASKED))
    assert path.read_bytes() == rows


def test_a_generator_that_ends_in_the_middle_leaves_its_questions_and_says_so(tmp_path):
    path = tmp_path / "questions.jsonl"
    with pytest.raises(
        UserError, match=r"no answer in 5 s; 3 questions kept in .*questions.jsonl; the same command goes"
    ):
        run(path, Listed(ASKED, fails_at="c3"))
    resumed = Listed(ASKED)
    run(path, resumed)
    assert resumed.asked == ["c3", "c4", "c5"] and len(read(path)) == 5


def test_jobs_that_failed_are_tried_again(tmp_path):
    class Failing(Listed):
        def answers(self, jobs):
            for lot in super().answers(jobs):
                yield [
                    answer._replace(questions=(), done=False) if answer.job.chunk.id == "c1" else answer
                    for answer in lot
                ]

    path = tmp_path / "questions.jsonl"
    run(path, Failing(ASKED))
    resumed = Listed(ASKED)
    assert [q.text for q in run(path, resumed)] == ["why one"]  # the other one was c3's meanwhile
    assert resumed.asked == ["c1"]


def test_other_files_and_a_second_process_are_refused(tmp_path, write_rows):
    path = write_rows([{"query": "q", "document": "d"}], "mine.jsonl")
    with pytest.raises(UserError, match="mine.jsonl: not a file of questions"), store.open_store(path):
        pass
    assert read(path) == [{"query": "q", "document": "d"}]
    ours = tmp_path / "questions.jsonl"
    with store.open_store(ours), pytest.raises(UserError, match="another process"), store.open_store(ours):
        pass


# --- the filter -------------------------------------------------------------------------------------------------------


class Words:
    """An embedding model that compares words."""

    name, dtype, dimensions = "words", "float32", 512

    def fingerprint(self):
        return "words"

    def encode(self, texts, prompt=None, show_progress=None):
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().replace("?", " ").replace(".", " ").split():
                vectors[row, int(base.digest(word), 16) % self.dimensions] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


SUBJECTS = ("kidney stones", "dry chains", "cold boilers", "steep roofs", "deep wells", "old clocks", "red paint")
CORPUS = [
    chunk(i, f"All that is known about {s}: they were studied for years by many.") for i, s in enumerate(SUBJECTS)
]


def row(number: int, query: str, positive: str = "", generator: str = "listed", corpus=CORPUS) -> dict:
    job = Job(corpus[number], "question")
    named = Listed({})
    named.name = generator
    return store.row_of(job, Question(job.chunk.id, "question", query, positive or None), named)


@pytest.fixture
def cache(tmp_path) -> ResumableCache:
    (tmp_path / "work").mkdir()
    return ResumableCache(tmp_path / "work")


def test_questions_stay_if_their_chunk_is_found_and_they_are_neither_copies_nor_duplicates(cache):
    copied = "they were studied for years by many"
    rows = [
        row(0, "what about kidney stones?"),
        row(1, "what about old clocks?"),  # finds another chunk
        row(2, copied),
        row(3, copied, "All that is known about steep roofs: they", generator="none"),  # a part by its nature
        row(4, "What about KIDNEY stones"),  # duplicates, and not found
        row(5, "old clocks"),
        row(6, "Red paint?"),
        row(6, "red paint"),
        row(6, "red paint everywhere") | {"chunk_hash": "of another time"},
    ]
    result = filtering.keep(rows, CORPUS, Words(), cache)
    assert result.kept == [0, 5, 6]
    assert result.dropped.counts == {
        filtering.NOT_FOUND: 3, filtering.COPY: 1, filtering.DUPLICATE: 1, filtering.GONE: 1
    }  # fmt: skip
    assert result.dropped.examples[filtering.COPY] == [copied]
    assert result.dropped.examples[filtering.DUPLICATE] == ["red paint"]
    assert result.ranks.tolist() == [1, 0, 0, 0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize(("question", "is_found"), [("kidney stones: was hilft?", True), ("steine: was hilft?", False)])
def test_in_another_language_of_the_same_script_the_base_model_decides(cache, question, is_found):
    """Only another script is told from the question alone; a model that knows both languages would find the second."""
    corpus = [*CORPUS, chunk(7, "all das hilft gegen kalte boiler und es dauert")]
    assert answers.flaw(question, corpus[0].text) == ""
    result = filtering.keep([row(0, question, corpus=corpus)], corpus, Words(), cache)
    assert bool(result.kept) == is_found and result.dropped.counts == ({} if is_found else {filtering.NOT_FOUND: 1})


def test_ranks_are_those_of_all_chunks_sorted_by_their_products(cache):
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(60)]
    corpus = [chunk(i, " ".join(rng.choice(words, 12))) for i in range(300)]
    rows = [row(i % 300, " ".join(rng.choice(words, 4)), corpus=corpus) for i in range(500)]
    part = " ".join(corpus[7].text.split()[:5])
    rows.append(row(7, "w1 w2", part, "none", corpus))
    model, rules = Words(), filtering.Rules(k=30)
    result = filtering.keep(rows, corpus, model, cache, rules)
    vectors = model.encode([c.text for c in corpus]).astype(np.float64)
    expected = []
    for number, each in enumerate(rows):
        own = int(each["chunk_id"][1:])
        query = model.encode([each["query"]])[0].astype(np.float64)
        scores, document = vectors @ query, model.encode([each["positive"]])[0]
        above = int((np.delete(scores, own) > float(document @ query) + 1e-7).sum())
        expected.append(above + 1 if above < 30 else 0)
        assert (number in result.kept) <= (above < 30)
    assert result.ranks.tolist() == expected
    assert 1 < len(result.kept) < 500


def test_a_reranker_orders_the_first_chunks(cache):
    rows = [row(0, "old clocks"), row(1, "dry chains")]
    judged = []

    def judge(groups):
        judged.extend(groups)
        return [np.array([("kidney" in d) - ("chains" in d) for d in documents], np.float32) for _, documents in groups]

    result = filtering.keep(rows, CORPUS, Words(), cache, filtering.Rules(k=1, candidates=3), judge, "stones first")
    assert result.kept == [0] and result.ranks.tolist() == [1, 0]
    assert [(query, len(documents)) for query, documents in judged] == [("old clocks", 4), ("dry chains", 4)]
    assert judged[0][1][0] == CORPUS[0].text


def test_the_filter_continues_with_vectors_and_blocks_that_are_there(cache, monkeypatch):
    monkeypatch.setattr(filtering, "QUERIES", 2)
    rows = [row(i, f"what about {subject}?") for i, subject in enumerate(SUBJECTS)]
    expected = filtering.keep(rows, CORPUS, Words(), cache)
    assert expected.kept == [*range(7)]
    (cache.folder / "block-000002.npz").unlink()

    class Counting(Words):
        texts = 0

        def encode(self, texts, prompt=None, show_progress=None):
            Counting.texts += len(texts)
            return super().encode(texts)

    again = filtering.keep(rows, CORPUS, Counting(), cache)
    assert again.kept == expected.kept and Counting.texts == 2


@pytest.mark.parametrize(
    ("question", "copy"),
    [
        ("Every tooth of the gear counts once in a turn", True),
        ("every TOOTH of the gear — counts once, in a turn!", True),
        ("does every tooth of the gear count", False),
        ("why: every tooth of the gear counts once in a row", True),  # 9 of 11 words in a row
        ("why so: every tooth of the gear counts in a turn", False),
        ("the gear counts once", False),  # too short to be one
        ("in a turn once counts gear the of tooth every", False),
    ],
)
def test_a_copy_is_a_long_run_of_the_chunk_s_words(question, copy):
    assert filtering.is_copy(question, GRID) is copy
    assert not filtering.is_copy(question, "")


def test_copies_are_told_in_scripts_without_blanks():
    text = "腎結石は腎臓の中にできる硬い塊である。"
    assert filtering.is_copy("腎臓の中にできる硬い塊", text)
    assert not filtering.is_copy("腎臓にできる石とは何か", text)


def test_how_deep_is_searched_depends_on_how_many_chunks_there_are():
    assert [filtering.Rules().depth(count) for count in (1, 7, 50, 200, 100_000)] == [1, 1, 5, 20, 20]
    for wrong in ({"k": 0}, {"k": 200}, {"copy_share": 0}):
        with pytest.raises(UserError):
            filtering.Rules(**wrong)
