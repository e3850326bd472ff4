"""What a sample of the training rows is like: lengths, duplicates, negatives that may be answers.

python -m pytest tests/training/test_data_survey.py
"""

import itertools
import json
import random
from pathlib import Path

import pytest

from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.training import data_survey
from mlx_retrieval.training.data_survey import BINS, survey_rows, words_of

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    """Two special tokens and a prompt of one token before the text; ten tokens at most."""
    limits = {"query": 10, "document": 10}
    return TextTokenizer(ROOT / "gemma-3-tiny-mlx", {"query": "<unused0>"}, limits, append_eos=True)


@pytest.fixture
def rows_of(tmp_path):
    def write(*rows: dict) -> Rows:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Rows([file])

    return write


def pair(query: str, document: str, *negatives: str) -> dict:
    return {"query": query, "positive": document} | ({"negatives": list(negatives)} if negatives else {})


def test_lengths_are_those_that_the_model_would_read(rows_of, tokenizer):
    texts = [" ".join(["a"] * n) for n in (1, 3, 8, 30)]
    survey = survey_rows(rows_of(*(pair(text, text) for text in texts)), tokenizer, 2)
    whole = TextTokenizer(
        ROOT / "gemma-3-tiny-mlx", {"query": "<unused0>"}, {"query": 99, "document": 99}, append_eos=True
    )
    for side, name in ((survey.queries, "query"), (survey.documents, "document")):
        lengths = whole(texts, name).lengths
        assert (side.count, side.longest, side.limit) == (4, lengths.max(), 10)
        assert side.truncated == (lengths > 10).mean()
        assert sum(side.counts) == 4 and len(side.counts) == BINS == len(side.edges) - 1
        bins = [max(i for i, edge in enumerate(side.edges[:-1]) if edge <= length) for length in lengths]
        assert [side.counts[i] for i in range(BINS)] == [bins.count(i) for i in range(BINS)]
        assert max(height for height, _, _ in side.bars()) == 1
    assert survey.documents.truncated == 0.25 and survey.queries.truncated == 0.5  # the prompt counts


def test_same_words_are_the_same():
    assert words_of("  How, DO\tyou? ") == words_of("how do you") == "how do you"
    assert words_of("Straße") == words_of("STRASSE")
    assert words_of("?!") == "?!" != words_of("...")


def test_duplicates_and_pairs(rows_of, tokenizer):
    rows = rows_of(pair("a", "one"), pair("A!", "One."), pair("b", "one"), pair("a", "two"), pair("c", "three"))
    survey = survey_rows(rows, tokenizer, batch_size=5)  # a batch holds all rows: its means are the counts
    assert (survey.rows, survey.sampled, survey.repeated) == (5, 5, 1)
    assert survey.shared_documents == pytest.approx(2)  # b and both of a
    assert survey.shared_queries == pytest.approx(2)  # two, and both of one
    half = survey_rows(rows, tokenizer, batch_size=2)  # one pair of rows in place of ten
    assert half.shared_documents == pytest.approx(2 / 10)
    assert survey_rows(rows, tokenizer, 0).shared_documents is None


def wrong_documents(rows: list[dict], in_batch: list[int]) -> tuple[int, int]:
    """By hand: the documents in a batch that are an answer to a query by another row, and those that are respelt."""
    elsewhere = respelt = 0
    answers = {(words_of(row["query"]), words_of(row["positive"])) for row in rows}
    for i, j in itertools.permutations(in_batch, 2):
        one, other = rows[i], rows[j]
        query, document = words_of(one["query"]), words_of(other["positive"])
        if query == words_of(other["query"]) or document == words_of(one["positive"]):
            known = one["query"] == other["query"] or one["positive"] == other["positive"]
            respelt += not known
        else:
            elsewhere += (query, document) in answers
    return elsewhere, respelt


def test_suspects_are_those_of_a_plain_loop(rows_of, tokenizer):
    rng = random.Random(3)
    queries, documents = ["a b", "A b", "c", "d", "e f", "e  f"], ["one two", "One two.", "three", "four", "five"]
    rows = [pair(rng.choice(queries), rng.choice(documents)) for _ in range(60)]
    survey = survey_rows(rows_of(*rows), tokenizer, batch_size=60)
    assert (survey.answers_elsewhere, survey.respelt) == pytest.approx(wrong_documents(rows, range(60)))
    assert survey.respelt > 0 and survey.answers_elsewhere > 0
    kinds = [suspect.kind for suspect in survey.suspects]
    assert {"a third row names it as an answer", "the same question, spelt differently"} <= set(kinds)
    assert max(map(kinds.count, kinds)) == data_survey.EXAMPLES
    place = survey.suspects[0].places[0]
    assert json.loads(Path(place.rpartition(":")[0]).read_text().splitlines()[int(place.rpartition(":")[2]) - 1])


def test_the_loss_knows_the_other_answers_of_a_row(rows_of, tokenizer):
    both, other = {"query": "a", "positive": ["one", "two"]}, pair("b", "two")
    assert survey_rows(rows_of(both, other), tokenizer, 3).answers_elsewhere == 0
    apart = rows_of(pair("a", "one"), pair("a", "two"), other)
    survey = survey_rows(apart, tokenizer, 3)  # two is wrong for a where its own row is in another batch
    assert survey.answers_elsewhere == 1 and [suspect.document for suspect in survey.suspects] == ["two"]


def test_negatives_that_are_answers(rows_of, tokenizer):
    rows = rows_of(pair("a", "one", "two", "ONE"), pair("A", "three", "one!", "four"), pair("b", "four", "one", "two"))
    survey = survey_rows(rows, tokenizer, 3)
    assert (survey.negatives, survey.own_answers) == (6, 2)
    assert {suspect.document for suspect in survey.suspects if "its own row" in suspect.kind} == {"ONE", "one!"}


def test_a_bounded_seeded_sample(rows_of, tokenizer, monkeypatch):
    monkeypatch.setattr(data_survey, "ROWS", 50)
    rows = rows_of(*(pair(f"q{i}", f"d{i}") for i in range(500)))
    read = []
    monkeypatch.setattr(Rows, "__getitem__", lambda self, i, get=Rows.__getitem__: read.append(i) or get(self, i))
    first = survey_rows(rows, tokenizer, 8)
    assert (first.rows, first.sampled, len(read), len(set(read))) == (500, 50, 50, 50)
    assert survey_rows(rows, tokenizer, 8) == first and read[50:] == read[:50]
    survey_rows(rows, tokenizer, 8, seed=1)
    assert read[100:] != read[:50]
    monkeypatch.setattr(data_survey, "CHARACTERS", 40)
    assert survey_rows(rows, tokenizer, 8).sampled < 12


def test_megabytes_of_text_are_not_tokenised(rows_of, tokenizer, monkeypatch):
    rows = rows_of(*(pair(f"q {i}", "word " * 200_000) for i in range(8)))  # 1 MB each
    tokenised = []
    with monkeypatch.context() as counted:
        bodies = type(tokenizer).bodies
        counted.setattr(
            type(tokenizer), "bodies", lambda self, texts, *args: tokenised.extend(texts) or bodies(self, texts, *args)
        )
        survey = survey_rows(rows, tokenizer, 4)
    assert max(map(len, tokenised)) == data_survey.TOKENISED
    assert survey.sampled == 2 and survey.documents.truncated == 1
    (ids,) = tokenizer.bodies(["word " * 10_000])
    assert survey.documents.longest == pytest.approx(20 * len(ids), rel=0.01)


def test_rerankers_truncate_pairs(rows_of, tmp_path):
    from random_models import word_tokenizer

    from mlx_retrieval.models.pair_tokenizers import CrossEncoderTokenizer

    word_tokenizer(tmp_path / "bert", False)
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert", "type_vocab_size": 2}')
    rows = rows_of(pair("a", "b"), pair("a", "b " * 40))
    survey = survey_rows(rows, CrossEncoderTokenizer(tmp_path / "bert", 16), 0)
    assert survey.pairs_truncated == 0.5 and survey.documents.limit == 0 and survey.respelt is None
    assert survey.documents.longest > 40
