"""Held-out questions: groups by hand, what leaves training, and that nothing held out is ever trained on.

python -m pytest tests/dataset/test_held_out.py
"""

import json
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_retrieval.dataset import beir, choice, held_out
from mlx_retrieval.dataset.choice import Keys, choose, groups_of, wanted
from mlx_retrieval.dataset.held_out import hold_out, leave_out, read_questions, take_validation
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.dataset.sources import Source, open_source
from mlx_retrieval.dataset.text_keys import text_key, words_of
from mlx_retrieval.dataset.views import StreamWithout, remaining

# --- keys of texts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is a kettle?", "  what is a KETTLE "),
        ("an e-mail", "an e mail"),
        ("snake_case", "snake case"),
        ("ＦＵＬＬ width ﬁne", "full width fine"),
        ("Straße", "STRASSE"),
        ("cafe\u0301", "café"),
        ("«été»", "été"),
        ("résumé", "resume"),
        ("don’t", "don't"),
        ("don't", "dont"),
        ("co\u00adop", "coop"),
        ("ز\u200cب", "زب"),
        ("日 本", "日本"),
        ("½", "1/2"),
        ("x>y", "X > y"),
        ("## A - title", "a title"),
    ],
)
def test_texts_that_differ_in_case_form_and_punctuation_have_one_key(one, other):
    assert words_of(one) == words_of(other) and text_key(one) == text_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1.5 mg", "25 mg"), ("कि", "की"), ("+", "-"), ("\ud800 a", "b"), ("C", "C++"), ("C", "C#"), ("2+2", "2-2"),
     ("x > y", "x < y"), ("5", "-5"), ("2*3", "2/3"), ("5 %", "5")],
)  # fmt: skip
def test_other_texts_have_other_keys(one, other):
    assert text_key(one) != text_key(other)


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_texts_have_the_words_that_the_general_rule_gives(text):
    general = words_of(text + " ы")
    assert f"{words_of(text)} ы".strip() == general or not any(map(str.isalnum, text))


# --- groups and choice ------------------------------------------------------------------------------------------------


def keys_of(pairs, relevant=None) -> Keys:
    query, positive = (np.array(side, np.uint64) for side in zip(*pairs, strict=True))
    return Keys(query, positive, np.ones(len(query), bool) if relevant is None else np.array(relevant))


def test_groups_by_hand():
    one, other = np.array([0, 1, 5, 6, 3]), np.array([1, 2, 4, 6, 4])
    assert groups_of(8, one, other).tolist() == [0, 0, 0, 3, 3, 3, 6, 7]
    chain = np.random.default_rng(0).permutation(1000)
    assert set(groups_of(1000, chain[:-1], chain[1:]).tolist()) == {0}


def test_how_many_queries_are_held_out():
    counts = {n: wanted(n, 0.05) for n in (0, 29, 30, 90, 150, 900, 2_000, 10_000, 10**7)}
    assert counts == {0: 0, 29: 0, 30: 10, 90: 30, 150: 50, 900: 50, 2_000: 100, 10_000: 500, 10**7: 500}
    assert wanted(1_000, 0.2) == 200 and wanted(1_000, 0.5) == 333


def test_whole_groups_are_held_out():
    """Queries 2i and 2i + 1 share a document: both are held out, or neither."""
    pairs = [(i, 1000 + i // 2) for i in range(200)] + [(i, 2000 + i) for i in range(200)]
    chosen = choose(keys_of(pairs), 0.05, 0)
    assert len(chosen.queries) == 50 and set(chosen.queries) == {int(i) ^ 1 for i in chosen.queries}
    assert set(chosen.texts) == {text for pair in pairs if pair[0] in set(chosen.queries) for text in pair}
    assert choose(keys_of(pairs), 0.05, 0).queries.tolist() == chosen.queries.tolist()
    assert choose(keys_of(pairs), 0.05, 1).queries.tolist() != chosen.queries.tolist()


def test_small_groups_come_first():
    """A hundred queries about one document are not a fair half of the questions, where others suffice."""
    pairs = [(i, 10_000) for i in range(45)] + [(i, 20_000 + i) for i in range(100, 250)]
    for seed in range(5):
        assert choose(keys_of(pairs), 0.05, seed).queries.min() >= 100


def test_of_one_giant_group_queries_are_held_out_that_cost_few_rows():
    """All queries share document 0, and each has one of its own; 60 of them do not share it."""
    pairs = [(i, 10_000) for i in range(1, 1001)] + [(i, 20_000 + i // 2) for i in range(1, 1101)]
    chosen = choose(keys_of(pairs), 0.05, 0)
    assert len(chosen.queries) >= 50 and 10_000 not in set(chosen.texts)
    linked = [(i, 10_000 + i // 2) for i in range(1000)] + [(i, 10_001 + i // 2) for i in range(1000)]
    chosen = choose(keys_of(linked), 0.05, 0)
    leaving = sum(q in set(chosen.queries) or p in set(chosen.texts) for q, p in linked)
    assert 10 <= len(chosen.queries) <= 50 and leaving <= 2000 // 5 + 2000 // 20


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([(i, 100 + i) for i in range(29)], "29 queries are too few: 30 are needed"),
        ([(1, 100 + i) for i in range(500)], "1 query is too few"),
        ([(i, 10_000 + i % 2) for i in range(500)], "nearly all rows share a query or an answer"),
        ([(i, 10_000 + j) for i in range(60) for j in range(20)], "nearly all rows share a query or an answer"),
    ],
)
def test_where_nothing_can_be_held_out_the_reason_is_told(pairs, reason):
    chosen = choose(keys_of(pairs), 0.05, 0)
    assert not len(chosen.queries) and not len(chosen.texts) and reason in chosen.reason


def test_a_document_that_a_label_rejects_ties_nothing_together():
    pairs = [(i, 1000 + i) for i in range(150)] + [(i, 5000) for i in range(150)]
    chosen = choose(keys_of(pairs, [True] * 150 + [False] * 150), 0.05, 0)
    assert len(chosen.queries) == 50 and len(chosen.texts) == 100


def test_no_query_is_asked_whose_text_answers_another():
    """Of pairs of duplicates one is asked, of a chain every other one, of a hub and its duplicates all but the hub."""
    assert choice.askable(keys_of([(1, 2), (2, 1), (3, 3), (4, 50)])).tolist() == [1, 3, 4]
    assert len(choice.askable(keys_of([(i, i + 1) for i in range(9)]))) == 5
    assert choice.askable(keys_of([(9, i) for i in range(5)] + [(i, 9) for i in range(5)])).tolist() == [0, 1, 2, 3, 4]
    assert choice.askable(keys_of([(1, 2), (2, 3)], [False, True])).tolist() == [2]
    both = [(2 * i, 2 * i + 1) for i in range(300)] + [(2 * i + 1, 2 * i) for i in range(300)]
    assert len(choose(keys_of(both), 0.05, 0).queries) == 50


# --- rows -------------------------------------------------------------------------------------------------------------


def plain_rows(count=120):
    return [{"query": f"question {i}", "document": f"answer {i}"} for i in range(count)]


def written(tmp_path, rows, name="rows.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / name


def examples_of(source: Source) -> list[Example]:
    return [source[n] for n in islice(source.numbers(0, 0), len(source))]


def texts_trained_on(source: Source) -> set[str]:
    return {words_of(t) for e in examples_of(source) for t in (e.query, e.positive, *e.negatives, *e.other_positives)}


def texts_held_out(questions: held_out.Questions) -> set[str]:
    answers = {name for those in questions.answers.values() for name in those}
    return {words_of(text) for text in (*questions.queries.values(), *(questions.documents[n] for n in answers))}


def test_what_is_left_is_all_but_the_questions_in_an_order_of_every_epoch(tmp_path):
    rows = Rows([written(tmp_path, plain_rows())])
    held = hold_out(rows, 0.05)
    assert (held.examples, held.left_out, len(held.rows), len(held.questions.queries)) == (120, 40, 80, 40)
    asked = set(held.questions.queries.values())
    numbers = list(islice(held.rows.numbers(3, 0), 160))
    assert set(numbers[:80]) == set(numbers[80:]) == {i for i in range(120) if f"question {i}" not in asked}
    assert len(set(numbers[:80])) == 80 and numbers[:80] != numbers[80:]
    assert list(islice(held.rows.numbers(3, 95), 65)) == numbers[95:]
    assert held.rows.where(numbers[0]) == rows.where(numbers[0]) and isinstance(held.rows, Source)
    preview = held.rows.preview(5)
    assert len(preview) == 5 and [place for place, _ in preview[:2]] == [rows.where(i) for i in held.rows.kept[:2]]
    assert {example.query for _, example in preview}.isdisjoint(asked)
    assert held.rows.contents() == rows.contents() and held.rows.cursor(7) == {}


def test_questions_are_searched_among_answers_and_other_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "DOCUMENTS", 70)
    rows = [row | {"negatives": [f"wrong {i}", "ANSWER 5!"]} for i, row in enumerate(plain_rows())]
    questions = hold_out(Rows([written(tmp_path, rows)]), 0.05).questions
    texts = set(questions.documents.values())
    assert len(texts) == len(questions.documents) == len(set(map(words_of, texts))) == 70
    for query, answers in questions.answers.items():
        assert [questions.documents[name] for name in answers] == [
            questions.queries[query].replace("question", "answer")
        ]
    folder = tmp_path / "held-out"
    folder.mkdir()
    questions.write(folder)
    documents, queries, qrels = beir.read_folder(folder)
    assert {name: text for name, (_, text) in documents.items()} == questions.documents
    assert {name: text for name, (_, text) in queries.items()} == questions.queries
    assert {query: list(those) for query, those in qrels.items()} == questions.answers
    assert read_questions(folder).texts == set(map(text_key, texts_held_out(questions)))


def test_no_document_has_the_text_of_a_question(tmp_path):
    """Regression: where questions answer others, each was searched among documents with its own text."""
    pairs = [(f"one {i}", f"Other {i}!") for i in range(150)]
    rows = [{"query": q, "positive": p, "negatives": [q.upper()]} for q, p in pairs]
    rows += [{"query": p.lower(), "positive": q} for q, p in pairs]
    held = hold_out(Rows([written(tmp_path, rows)]), 0.05)
    texts = set(map(words_of, held.questions.documents.values()))
    assert len(held.questions.queries) == 50 and texts.isdisjoint(map(words_of, held.questions.queries.values()))
    assert not texts_trained_on(held.rows) & texts_held_out(held.questions)


def test_questions_and_answers_go_by_their_exact_texts(tmp_path):
    """Regression: spellings were one question, so that the answers to one counted as right for the other."""
    spellings = [("schön {}", "pretty {}"), ("schon {}", "already {}"), ("schön  {}", "fair {}")]
    rows = [{"query": q.format(i), "positive": p.format(i)} for i in range(60) for q, p in spellings]
    questions = hold_out(Rows([written(tmp_path, rows)]), 0.05).questions
    asked = {
        text: [questions.documents[name] for name in questions.answers[q]] for q, text in questions.queries.items()
    }
    assert len(asked) == 20
    for text, answers in asked.items():
        number = text.split()[1]
        assert (text, answers) == (f"schön {number}", [f"pretty {number}", f"fair {number}"])
        assert f"already {number}" not in questions.documents.values()  # it may be right


def test_held_out_answers_leave_the_negatives_of_other_rows(tmp_path):
    rows = [
        {"query": f"q {i}", "positive": f"a {i}", "negatives": [f"A {(i + 1) % 120}.", "x"], "scores": [3, 2, i]}
        for i in range(120)
    ]
    held = hold_out(Rows([written(tmp_path, rows)]), 0.05)
    left = examples_of(held.rows)
    assert held.negatives == sum(len(e.negatives) == 1 for e in left) > 0
    for example in left:
        i = float(example.query.split()[1])
        assert example.scores in ((3.0, 2.0, i), (3.0, i)) and len(example.scores) == 1 + len(example.negatives)
    assert not texts_trained_on(held.rows) & texts_held_out(held.questions)


def test_rows_with_labels(tmp_path):
    """A document that a label rejects is no answer, but it is no training text either if it answers a question."""
    rows = [{"query": f"q {i}", "document": f"a {i}", "label": 1} for i in range(60)]
    rows += [{"query": f"q {i}", "document": f"a {(i + 1) % 60}", "label": 0.5} for i in range(60)]
    held = hold_out(Rows([written(tmp_path, rows)]), 0.05)
    questions = held.questions
    assert len(questions.queries) == 20 and all(len(those) == 1 for those in questions.answers.values())
    assert not texts_trained_on(held.rows) & texts_held_out(questions) and len(held.rows) + held.left_out == 120


def test_scored_documents(tmp_path):
    """The best one is the answer; a row that is left with a single document leaves training."""
    rows = [{"query": f"q {i}", "documents": [f"a {(i + 1) % 90}", f"a {i}"], "scores": [1, 2]} for i in range(90)]
    held = hold_out(Rows([written(tmp_path, rows)]), 0.05)
    names = {questions.documents[those[0]]: questions.queries[q] for questions in [held.questions]
             for q, those in questions.answers.items()}  # fmt: skip
    assert names == {f"a {i}": f"q {i}" for i in (int(text.split()[1]) for text in names)}
    assert all(len(example.scores) == 2 for example in examples_of(held.rows)) and not held.negatives
    assert not texts_trained_on(held.rows) & texts_held_out(held.questions)


def test_all_documents_with_the_best_score_are_answers(tmp_path):
    rows = [{"query": f"q {i}", "documents": [f"{a} {i}" for a in "abc"], "scores": [1, 2, 2]} for i in range(90)]
    held = hold_out(Rows([written(tmp_path, rows)]), 0.05)
    for query, those in held.questions.answers.items():
        number = held.questions.queries[query].split()[1]
        assert {held.questions.documents[name] for name in those} == {f"b {number}", f"c {number}"}


def test_a_mixture_keeps_its_pattern(tmp_path):
    files = [written(tmp_path, plain_rows(), "a.jsonl"), written(tmp_path, plain_rows(30), "b.jsonl")]
    mixed = open_source([f"{files[0]}:3", f"{files[1]}:1"])
    held = hold_out(mixed, 0.05)
    drawn = [held.rows.where(n) for n in islice(held.rows.numbers(0, 0), 400)]
    assert sum("b.jsonl" in place for place in drawn) == 100 and len(held.rows) == 150 - held.left_out
    assert list(islice(held.rows.numbers(0, 133), 100)) == list(islice(held.rows.numbers(0, 0), 233))[133:]
    asked = {text for text in held.questions.queries.values()}
    assert not asked & {example.query for example in examples_of(held.rows)}  # of both files
    assert len(mixed) == 150


def test_validation_rows_are_the_questions(tmp_path):
    train = [*plain_rows(), {"query": "Question 500", "document": "x"}, {"query": "x", "document": "ANSWER 501"}]
    valid = [{"query": f"question {i}", "document": f"answer {i}"} for i in range(500, 1200)]
    files = [written(tmp_path, train), written(tmp_path, valid, "valid.jsonl")]
    held = take_validation(*(Rows([file]) for file in files))
    assert (held.left_out, len(held.rows), len(held.questions.queries)) == (2, 120, 500)
    assert len(held.questions.documents) == 500 + 120  # "x" may be a right answer to question 500
    assert "most rows" in take_validation(Rows([files[0]]), Rows([files[0]])).reason  # it would leave nothing
    wrong = Rows([written(tmp_path, [row | {"label": 0} for row in valid], "wrong.jsonl")])
    assert "all labels are 0.5 or less" in take_validation(Rows([files[0]]), wrong).reason


def test_the_texts_of_a_folder_leave_again_what_has_left_before(tmp_path):
    rows = Rows([written(tmp_path, [row | {"negatives": ["answer 3", "n"]} for row in plain_rows()])])
    held = hold_out(rows, 0.05, seed=4)
    (tmp_path / "held-out").mkdir()
    held.questions.write(tmp_path / "held-out")
    again = leave_out(rows, read_questions(tmp_path / "held-out").texts)
    assert examples_of(again.rows) == examples_of(held.rows) and again.left_out == held.left_out
    assert again.negatives == held.negatives


def test_a_file_that_would_be_left_empty_is_not_held_out(tmp_path):
    small = [{"query": "question 7", "document": "answer 7"}]
    files = [written(tmp_path, plain_rows(60), "a.jsonl"), written(tmp_path, small, "b.jsonl")]
    held = [hold_out(open_source([f"{files[0]}:3", f"{files[1]}:1"]), 0.5, seed) for seed in range(8)]
    assert {bool(each.questions) for each in held} == {True, False}
    assert all(len(each.rows.sources[1]) for each in held)


# --- nothing held out is trained on -----------------------------------------------------------------------------------

word = st.sampled_from(["alpha", "beta", "Gamma", "gamma!", "delta", "epsilon,", "zeta", "eta", "theta", "iota"])
text = st.lists(word, min_size=1, max_size=4).map(" ".join)
row = st.fixed_dictionaries(
    {"query": text, "positive": st.lists(text, min_size=1, max_size=3), "negatives": st.lists(text, max_size=3)}
)


@settings(max_examples=25)
@given(st.lists(row, min_size=12, max_size=50), st.integers(0, 3), st.floats(0, 0.5))
def test_held_out_texts_never_occur_in_training(rows, seed, share):
    """In no case, in no place of a row, and in no spelling; and the rows that stay are rows that were there."""
    source = MemoryRows(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "FEWEST", 2)
        held = hold_out(source, share, seed)
    if held.questions:
        assert len(held.rows) == len(source) - held.left_out > 0
        assert not texts_trained_on(held.rows) & texts_held_out(held.questions)
        assert set(held.questions.queries.values()) <= {example.query for example in source.examples}
        spelt = list(map(words_of, held.questions.documents.values()))
        assert len(spelt) == len(set(spelt)) <= held_out.DOCUMENTS
    else:
        assert held.rows is source and held.reason


class MemoryRows:
    """The least of a source that `hold_out` reads."""

    format, has_negatives = "pair", True

    def __init__(self, rows):
        self.examples = [
            Example(r["query"], p, tuple(r["negatives"]), 1, (), tuple(o for o in r["positive"] if o != p))
            for r in rows
            for p in dict.fromkeys(r["positive"])
        ]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]


# --- a stream ---------------------------------------------------------------------------------------------------------


class Stream(MemoryRows):
    """An index: numbers are positions, and only what was read lately can be read again."""

    def __init__(self, examples):
        self.examples, self.begun, self.names = examples, 0, ["es://index"]

    def __getitem__(self, i):
        return self.examples[i % len(self.examples)]

    def numbers(self, seed, position):
        assert position >= self.begun
        i = position
        while True:
            yield i
            i += 1

    def cursor(self, position):
        return {"begun": position}

    def restore(self, cursor, position):
        assert cursor["begun"] == position
        self.begun = position


@settings(max_examples=30)
@given(st.lists(st.booleans(), min_size=3, max_size=30).filter(any), st.integers(0, 40), st.integers(0, 40))
def test_a_stream_continues_exactly_where_it_was(keeps, position, ahead):
    examples = [Example(f"q{i}" if keep else "held", f"d{i}", (), 1) for i, keep in enumerate(keeps)]
    texts = {text_key("held")}
    straight = list(islice(StreamWithout(Stream(examples), texts).numbers(0, 0), 100))
    assert all(keeps[i % len(keeps)] for i in straight)
    view = StreamWithout(Stream(examples), texts)
    assert list(islice(view.numbers(0, 0), position + ahead)) == straight[: position + ahead]  # reads ahead
    assert list(islice(view.numbers(0, position), 50)) == straight[position : position + 50]  # and again
    saved = json.loads(json.dumps(view.cursor(position)))
    other = StreamWithout(Stream(examples), texts)
    other.restore(saved, position)
    assert list(islice(other.numbers(0, position), 50)) == straight[position : position + 50]
    assert list(islice(other.numbers(0, position + 5), 45)) == straight[position + 5 : position + 50]


def test_a_stream_of_nothing_but_held_out_documents_ends():
    view = StreamWithout(Stream([Example("held", "d", (), 1)]), {text_key("held")})
    with pytest.raises(Exception, match="every document has a text of a held-out question"):
        next(view.numbers(0, 0))


def test_what_remains_of_an_example():
    example = Example("q", "p", ("n", "m", "o"), 1, (4.0, 3.0, 2.0, 1.0), ("r",))
    assert remaining(example, {text_key("x")}, "pair") is example
    assert remaining(example, {text_key("M.")}, "pair") == example._replace(
        negatives=("n", "o"), scores=(4.0, 3.0, 1.0)
    )
    assert remaining(example, {text_key("R")}, "pair") == example._replace(other_positives=())
    assert remaining(example, {text_key("P")}, "pair") is remaining(example, {text_key("Q?")}, "pair") is None
    assert remaining(example, set(map(text_key, "nmo")), "documents") is None
    single = SimpleNamespace(**Example("q", "p", (), 1, (0.5,))._asdict())
    assert remaining(single, {text_key("n")}, "label") is single
