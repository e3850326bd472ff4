"""mine.py negatives and mine.py score: their output, killed runs, refusals; a teacher's scores.

python -m pytest tests/mining/test_mining_run.py
"""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from random_rerankers import cross_encoder
from sample_texts import SENTENCES

import mine
from mlx_retrieval.backbones import lora
from mlx_retrieval.dataset import rows as row_files
from mlx_retrieval.inference import embedder, reranker
from mlx_retrieval.mining import cache, collection, hard_negatives, teacher
from mlx_retrieval.mining import output as mining_output
from mlx_retrieval.mining import run as mining_run
from mlx_retrieval.mining.cache import ResumableCache
from mlx_retrieval.mining.elastic_corpus import ElasticCorpus
from mlx_retrieval.models import heads, loading
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError

ROWS = [{"query": f"what is {text[:12]}", "positive": text} for text in SENTENCES]


def run(*arguments) -> int:
    return mine.main(["negatives", *map(str, arguments)])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def pairs(write_rows) -> Path:
    return write_rows(ROWS, "pairs.jsonl")


def test_a_row_keeps_all_its_positives(small, write_rows, tmp_path, capsys):
    """Regression: each was written as a row of its own, so that training took one for a negative of the other."""
    pairs = zip(SENTENCES[::2], SENTENCES[1::2], strict=True)
    rows = [{"ask": f"what is {i}", "pos": list(pair), "rank": 2, "from": "here"} for i, pair in enumerate(pairs)]
    mined, scored = tmp_path / "mined.jsonl", tmp_path / "scored.jsonl"
    flags = ("--columns", "query=ask", "--model", small, "--relative-margin", "off", "--take", 2, "--scores")
    assert run("--data", write_rows(rows), "--output", mined, *flags) == 0
    assert score("--data", mined, "--teacher", small, "--output", scored) == 0
    assert f"{scored} ({len(rows)} rows, " in capsys.readouterr().out
    for file in (mined, scored):
        for row, before in zip(read(file), rows, strict=True):
            assert row["positive"] == before["pos"] and row["rank"] == 2 and row["from"] == "here"
            assert len(row["negatives"]) == 2 and len(row["scores"]) == 4
    one, other = row_files.Rows([mined]), row_files.Rows([scored])
    assert len(one) == len(other) == len(SENTENCES)
    for i in range(len(one)):
        assert one[i]._replace(scores=()) == other[i]._replace(scores=())
        assert (one[i].positive, one[i].other_positives) == (SENTENCES[i], (SENTENCES[i ^ 1],))
        np.testing.assert_allclose(one[i].scores, other[i].scores, atol=1e-5)


def test_mined_rows_are_training_data_and_scores_are_cosines(small, pairs, tmp_path, capsys):
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "mined.jsonl"
    corpus.write_text(
        "".join(json.dumps({"_id": str(i), "title": "on", "text": f"{t}."}) + "\n" for i, t in enumerate(SENTENCES))
    )
    flags = ("--relative-margin", "off", "--take", 3, "--skip", 1, "--scores")
    assert run("--data", pairs, "--corpus", corpus, "--model", small, "--output", output, *flags) == 0
    rows, model = read(output), embedder.load(small)
    loaded = row_files.Rows([output])
    assert loaded.has_negatives and loaded.has_scores
    documents = [f"on {text}." for text in SENTENCES] + SENTENCES
    vectors = dict(zip(documents, model.encode(documents, "document"), strict=True))
    for i, (row, before) in enumerate(zip(rows, ROWS, strict=True)):
        query = model.encode(before["query"], "query")
        scores = {text: float(query @ vectors[text]) for text in documents if text != before["positive"]}
        best = sorted(scores.values(), reverse=True)[1:4]
        assert list(row) == ["query", "positive", "negatives", "scores"]
        np.testing.assert_allclose([scores[text] for text in row["negatives"]], best, atol=1e-5)
        np.testing.assert_allclose(row["scores"], [float(query @ vectors[row["positive"]]), *best], atol=1e-5)
        assert loaded[i].negatives == tuple(row["negatives"]) and loaded[i].scores == tuple(row["scores"])
    told = capsys.readouterr().out
    assert "8, 8 distinct queries" in told and "16 distinct of 16" in told and "positives" in told
    assert "skip: the first of the rest" in told and "negatives   24\n" in told
    assert f"python train.py --data {output}" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "mined.jsonl", "pairs.jsonl"]


def test_other_keys_and_all_formats(tmp_path, write_rows):
    flags = ("--relative-margin", "off", "--take", 1)
    for name, row in {
        "rank": {"query": "cat", "document": SENTENCES[1], "rank": 3, "path": "a.py"},
        "own": {
            "query": "cat",
            "positive": SENTENCES[1],
            "negatives": [SENTENCES[5], SENTENCES[7]],
            "scores": [1, 2, 3],
        },
        "anchor": {"anchor": "cat", "positive": SENTENCES[1], "negative": SENTENCES[5]},
    }.items():
        other = {"query": "kidney", "document": SENTENCES[5]}
        data = write_rows([row, other] if name == "rank" else [row], f"{name}.jsonl")
        assert run("--data", data, "--output", tmp_path / "out.jsonl", "--overwrite", *flags) == 0
        found = read(tmp_path / "out.jsonl")[0]
        assert (found["query"], found["positive"], found["negatives"]) == ("cat", SENTENCES[1], [SENTENCES[5]])
        assert found.get("rank") == row.get("rank") and found.get("path") == row.get("path") and "scores" not in found
        assert row_files.Rows([tmp_path / "out.jsonl"])[0].rank == row.get("rank", 1)


def test_flags_have_their_effect(small, pairs, tmp_path, capsys):
    output = tmp_path / "mined.jsonl"
    work = ("--work", tmp_path / "work")

    def mined(*flags) -> list[tuple]:
        arguments = ("--data", pairs, "--output", output, "--overwrite", *work, *flags)
        assert run("--model", small, *arguments) == 0
        return [tuple(row["negatives"]) for row in read(output)]

    off = ("--relative-margin", "off")
    plain = mined(*off)
    assert all(len(row) == 4 for row in plain)
    assert mined(*off, "--num-negatives", 2) == [row[:2] for row in plain]
    assert [row[:2] for row in mined(*off, "--range-min", 2)] == [row[2:] for row in plain]
    assert mined("--absolute-margin", "0", *off) == mined("--relative-margin", "0")
    assert mined("--absolute-margin", "0", *off) != plain
    assert mined(*off, "--sampling", "random", "--seed", 1) != plain
    assert mined(*off, "--by", "both") != mined(*off, "--by", "bm25")
    assert mined(*off, "--by", "bm25", "--language", "none") != mined(*off, "--by", "bm25")
    assert mined(*off, "--max-length", 5) != plain
    capsys.readouterr()
    assert run("--model", small, "--data", pairs, "--output", output, "--overwrite", *work, "--max-score=-2") == 2
    told = capsys.readouterr()
    assert "no negative was found" in told.err and "max score: above --max-score" in told.out
    assert (tmp_path / "work").is_dir()


def test_names_of_flags_that_other_commands_have():
    required = ["negatives", "--data", "a", "--output", "b"]
    assert mine.parser().parse_args([*required, "--model-path", "m"]).model == "m"


def test_a_reranker_judges(pairs, tmp_path):
    cross_encoder("bert", tmp_path / "judge")
    output = tmp_path / "mined.jsonl"
    flags = ("--reranker", tmp_path / "judge", "--relative-margin", "off", "--scores", "--take", 2)
    assert run("--data", pairs, "--output", output, *flags) == 0
    judge = reranker.Reranker(str(tmp_path / "judge"), raw_scores=True)  # its files name no activation
    rows = read(output)
    assert any(row["negatives"] for row in rows)
    for row in rows:
        scores = judge.score(row["query"], [row["positive"], *row["negatives"]])
        np.testing.assert_allclose(row["scores"], scores, atol=1e-5)
        assert row["scores"][1:] == sorted(row["scores"][1:], reverse=True)


@pytest.fixture(scope="module")
def late(small, tmp_path_factory) -> Path:
    """A late-interaction adapter with a projection."""
    mx.random.seed(0)
    built, config, _ = loading.build(small, task="late", projection=16)
    folder = tmp_path_factory.mktemp("late") / "adapter"
    adapter = lora.adapt(built.backbone, rank=2)
    files.write_folder(folder, lambda where: loading.save_model(where, built, adapter, config))
    return folder


def test_a_late_model_finds_negatives_by_maxsim(late, pairs, tmp_path):
    output, model = tmp_path / "mined.jsonl", embedder.load(late)
    flags = ("--relative-margin", "off", "--take", 3, "--scores", "--work", tmp_path / "work")
    assert run("--data", pairs, "--model", late, "--output", output, *flags) == 0
    vectors = dict(zip(SENTENCES, model.encode(SENTENCES, "document"), strict=True))
    for row in read(output):
        query = model.encode([row["query"]], "query")[0]
        scores = {text: float((query @ tokens.T).max(axis=1).mean()) for text, tokens in vectors.items()}
        others = sorted((score for text, score in scores.items() if text != row["positive"]), reverse=True)
        expected = [scores[row["positive"]], *others[:3]]
        np.testing.assert_allclose(row["scores"], expected, atol=2e-3)  # float16 on disk
    before = read(output)
    assert len(list((tmp_path / "work" / "tokens").iterdir())) == 1
    assert run("--data", pairs, "--model", late, "--output", output, "--overwrite", *flags) == 0
    assert read(output) == before
    both = ("--by", "both", "--relative-margin", "0.05")
    assert run("--data", pairs, "--model", late, "--output", output, "--overwrite", *both) in (0, 2)


def test_damaged_token_vectors_of_a_cache_are_one_line(late, pairs, tmp_path, capsys, monkeypatch):
    """Regression: a traceback; then advice to remove whole ones, too, if the system could not read them."""
    flags = ("--relative-margin", "off", "--work", tmp_path / "work", "--output", tmp_path / "mined.jsonl")
    assert run("--data", pairs, "--model", late, *flags) == 0
    (lengths,) = (tmp_path / "work/tokens").glob("0*/lengths.npy")
    lengths.write_bytes(lengths.read_bytes()[:-4])
    assert run("--data", pairs, "--model", late, *flags, "--overwrite") == 2
    reason = capsys.readouterr().err.splitlines()[-1]
    assert reason.endswith(f"; remove {tmp_path / 'work/tokens'}, and its vectors are computed again")
    with monkeypatch.context() as patch:
        busy = OSError(errno.EMFILE, "Too many open files")
        patch.setattr(cache.TokenStore, "check", lambda _: (_ for _ in ()).throw(busy))
        assert run("--data", pairs, "--model", late, *flags, "--overwrite") == 2
        assert "Too many open files" in (told := capsys.readouterr().err.splitlines()[-1]) and "remove" not in told
    shutil.rmtree(tmp_path / "work/tokens")
    assert run("--data", pairs, "--model", late, *flags, "--overwrite") == 0


def test_a_late_model_teaches_no_vectors(late, pairs, tmp_path, capsys):
    output = str(tmp_path / "vectors.safetensors")
    assert mine.main(["score", "--vectors", "--teacher", str(late), "--data", str(pairs), "--output", output]) == 2
    assert "a late-interaction model has a vector a token, and not one a text" in capsys.readouterr().err


def test_bad_rows_can_be_left_out(tmp_path, write_rows, capsys):
    data = write_rows([*ROWS, b"{broken", {"query": "a", "positive": "b", "negatives": 3}], "bad.jsonl")
    assert run("--data", data, "--output", tmp_path / "out.jsonl") == 2
    assert "bad.jsonl:9: broken JSON" in capsys.readouterr().err
    assert run("--data", data, "--output", tmp_path / "out.jsonl", "--skip-bad-rows") == 0
    assert len(read(tmp_path / "out.jsonl")) == len(ROWS)
    assert "2 bad rows left out, the first: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "nowhere.jsonl"), "--data nowhere.jsonl: no such file"),
        (("--corpus", "nowhere.jsonl"), "--corpus nowhere.jsonl: no such file"),
        (("--corpus", "folder"), "the folder has no corpus.jsonl"),
        (("--corpus", "packed.jsonl.gz"), "unpack it first"),
        (("--corpus", "empty.jsonl"), "no document in it"),
        (("--corpus", "other.jsonl"), "other.jsonl:1: no text under"),
        (("--take", "0"), "--take 0: must be at least 1"),
        (("--model", "./nowhere"), "no folder"),
        (("--reranker", "./nowhere"), "no folder"),
        (("--by", "both"), "--by both: needs --model"),
        (("--output", "old.jsonl"), "the file exists (--overwrite replaces it)"),
        (("--output", "old.jsonl/where.jsonl"), "old.jsonl is not a folder"),
        (("--output", "folder"), "this is a folder, not a file"),
        (("--data", "labels.jsonl"), "labels.jsonl:1: has the key label"),
        (("--data", "judged.jsonl"), "judged.jsonl:1: has the key documents"),
        (("--data", "mixed.jsonl"), "mixed.jsonl:2: has the key label"),
        (("--data", "empty.jsonl"), "--data: no row in it"),
        (("--work", "folder"), "holds other files"),
        (("--work", "old.jsonl"), "not a folder"),
        (("--data", "one.jsonl"), "no negative was found"),
    ],
)
def test_what_is_refused(flags, message, tmp_path, write_rows, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(ROWS, "pairs.jsonl")
    write_rows([{"query": "a", "document": "b", "label": 1}], "labels.jsonl")
    write_rows([{"query": "a", "documents": ["b", "c"], "scores": [1, 0]}], "judged.jsonl")
    write_rows([{"query": "a", "positive": "b"}, {"query": "a", "document": "c", "label": 0}], "mixed.jsonl")
    write_rows([{"query": "a", "positive": "b"}], "one.jsonl")
    write_rows([{"query": "a"}], "old.jsonl")
    write_rows([{"words": "a"}], "other.jsonl")
    write_rows([], "empty.jsonl")
    (tmp_path / "packed.jsonl.gz").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("precious")
    before = sorted(tmp_path.iterdir())
    settings = {"--data": "pairs.jsonl", "--output": "new.jsonl"} | dict([flags])
    assert run(*(part for pair in settings.items() for part in pair)) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and told.startswith("mine.py: ")
    work = tmp_path / ".new.jsonl.work"
    assert sorted(path for path in tmp_path.iterdir() if path != work) == before
    assert work.exists() == (message == "no negative was found")  # the search is kept, as filters may be changed


@pytest.mark.parametrize("margin", ["relative_margin", "absolute_margin"])
def test_a_margin_of_zero_needs_the_positive_s_score_too(margin):
    """Regression: 0 counted as no margin where Elasticsearch alone finds documents."""
    corpus = ElasticCorpus.__new__(ElasticCorpus)  # without a server
    for value in (0.0, 0.05):
        with pytest.raises(UserError, match="margins compare with the score of the positive"):
            mining_run.check_margins(corpus, hard_negatives.Rules(by="bm25", **{margin: value}), False)
    mining_run.check_margins(corpus, hard_negatives.Rules(by="bm25"), False)
    mining_run.check_margins(corpus, hard_negatives.Rules(**{margin: 0.0}), True)


def test_numbers_that_are_none_and_vectors_that_are_not_finite(small, pairs, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        run("--data", pairs, "--output", tmp_path / "x.jsonl", "--relative-margin", "much")
    monkeypatch.setattr(heads, "unit", lambda vectors: vectors * np.nan)
    assert run("--data", pairs, "--model", small, "--output", tmp_path / "x.jsonl") == 2
    assert "are not finite" in capsys.readouterr().err


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    texts = collection.TextFile(tmp_path)
    texts.add("a")
    monkeypatch.setattr(texts, "_file", SimpleNamespace(write=full, flush=full))
    for write in (lambda: texts.add("b"), texts.close):
        with pytest.raises(UserError, match=f"could not write {tmp_path}: No space left"):
            write()
    texts = collection.TextFile(tmp_path)
    texts.add("a")
    texts.close()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"could not write {tmp_path / cache.VECTORS}: No space left"):
        ResumableCache(tmp_path).vectors(texts, 2, lambda texts: np.zeros((len(texts), 2)))


# --- killed and continued ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that eight rows are several."""
    for module, name, size in ((hard_negatives, "QUERIES", 3), (cache, "DOCUMENTS_AT_ONCE", 3)):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(teacher, "ROWS", dict.fromkeys(teacher.KINDS, 3))


class Stop:
    """A wrapper of `function` that raises at call number `at`, and counts calls and texts."""

    def __init__(self, function, at: int | None, error: type[BaseException] = KeyboardInterrupt):
        self.function, self.at, self.error, self.calls, self.texts = function, at, error, 0, 0

    def __call__(self, model, texts, *rest):
        if self.calls == self.at:
            raise self.error
        self.calls += 1
        self.texts += len(texts)
        return self.function(model, texts, *rest)


@pytest.mark.parametrize("at", (0, 1, 2, 3, 4, 5))
def test_resume_gives_the_identical_file(at, small, small_blocks, pairs, tmp_path, capsys, monkeypatch):
    flags = ("--data", pairs, "--model", small, "--scores", "--sampling", "random", "--relative-margin", "off")
    plain = embedder.embed
    whole = Stop(plain, None)
    monkeypatch.setattr(embedder, "embed", whole)
    assert run(*flags, "--output", tmp_path / "whole.jsonl") == 0
    assert whole.calls == 6  # documents and queries of 3, 3 and 2 texts

    stopped = Stop(plain, at)
    monkeypatch.setattr(embedder, "embed", stopped)
    assert run(*flags, "--output", tmp_path / "mined.jsonl") == 130
    assert "the same command continues" in capsys.readouterr().err
    assert not (tmp_path / "mined.jsonl").exists() and (tmp_path / ".mined.jsonl.work").is_dir()

    with open(tmp_path / ".mined.jsonl.work" / cache.VECTORS, "ab") as file:
        file.write(b"a vector that was not finished"[: 30 * (at < 3)])
    rest = Stop(plain, None)
    monkeypatch.setattr(embedder, "embed", rest)
    assert run(*flags, "--output", tmp_path / "mined.jsonl") == 0
    assert f"continued, {max(0, at - 3)} blocks" in capsys.readouterr().err
    assert stopped.texts + rest.texts == whole.texts
    assert (tmp_path / "mined.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / ".mined.jsonl.work").exists()


def test_resume_after_other_settings_or_texts_starts_over(small, small_blocks, pairs, tmp_path, capsys, monkeypatch):
    work, output = tmp_path / "work", tmp_path / "mined.jsonl"
    calls = Stop(embedder.embed, None)
    monkeypatch.setattr(embedder, "embed", calls)

    def texts(*flags) -> tuple[int, str]:
        """Return how many texts were embedded, and the messages."""
        before = calls.texts
        arguments = ("--data", pairs, "--work", work, "--output", output, "--overwrite", "--relative-margin", "off")
        assert run(*arguments, "--model", small, *flags) == 0
        return calls.texts - before, capsys.readouterr().err

    assert texts() == (16, "")
    assert texts() == (0, f"mine.py: {work}: continued, 3 blocks are finished\n")
    assert texts("--take", 2) == (
        8,
        f"mine.py: {work}: started over, changed since the last run: take\n",
    )  # documents stay
    count, told = texts("--max-length", 6)
    assert (count, told) == (16, f"mine.py: {work}: started over, changed since the last run: take, model\n")
    with open(pairs, "a") as file:
        file.write(json.dumps({"query": "new", "positive": "new too"}) + "\n")
    count, told = texts("--max-length", 6)
    assert count == 18 and "changed since the last run: corpus, queries, positives" in told
    (work / "block-000001.npz").write_bytes(b"broken")
    assert texts("--max-length", 6)[0] == 3  # that block's queries
    (work / cache.ABOUT).write_text("{broken")
    assert texts("--max-length", 6)[0] == 18


def test_a_full_disk_is_one_line(small, pairs, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "block")

    monkeypatch.setattr(ResumableCache, "store", full)
    assert run("--data", pairs, "--model", small, "--output", tmp_path / "x.jsonl", "--relative-margin", "off") == 2
    assert capsys.readouterr().err.endswith("mine.py: block: No space left on device\n")


def test_data_that_change_in_between(pairs, tmp_path, capsys, monkeypatch):
    for change in (ROWS[:-1], [*ROWS, ROWS[0]], [ROWS[1], *ROWS[1:]]):
        pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        done = hard_negatives.mine

        def changing(*arguments, change=change, done=done):
            pairs.write_text("".join(json.dumps(row) + "\n" for row in change))
            return done(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(hard_negatives, "mine", changing)
            assert run("--data", pairs, "--output", tmp_path / "x.jsonl", "--work", tmp_path / "work") == 2
        assert "the file was changed during the run" in capsys.readouterr().err
        assert not (tmp_path / "x.jsonl").exists()


def test_one_run_at_a_time(pairs, tmp_path, capsys):
    work = tmp_path / "work"
    with cache.cache_folder(tmp_path / "y.jsonl", str(work)):
        assert run("--data", pairs, "--output", tmp_path / "x.jsonl", "--work", work) == 2
    assert "another process is mining there" in capsys.readouterr().err


# --- a teacher --------------------------------------------------------------------------------------------------------


def score(*arguments) -> int:
    return mine.main(["score", *map(str, arguments)])


SCORED = [
    {
        "query": "what is a stone",
        "positive": SENTENCES[0],
        "negatives": [SENTENCES[4], SENTENCES[1]],
        "negative": SENTENCES[6],
        "rank": 2,
    },
    {"query": "what is a cat", "positive": SENTENCES[1], "negatives": [], "scores": [7], "path": "a"},
    *({"query": f"animal {i}", "positive": SENTENCES[i], "negatives": [SENTENCES[i - 1]]} for i in range(5)),
]


def test_an_embedders_scores(small, small_blocks, tmp_path, write_rows, capsys):
    data, output = write_rows(SCORED, "mined.jsonl"), tmp_path / "scored.jsonl"
    assert score("--data", data, "--teacher", small, "--output", output) == 0
    model, rows = embedder.load(small), read(output)
    loaded = row_files.Rows([output])
    assert loaded.has_scores
    for i, (row, before) in enumerate(zip(rows, SCORED, strict=True)):
        documents = [loaded[i].positive, *loaded[i].negatives]
        expected = model.encode(documents, "document") @ model.encode(row["query"], "query")
        np.testing.assert_allclose(row["scores"], expected, atol=1e-5)
        assert row == before | {"scores": row["scores"]} and loaded[i].scores == tuple(row["scores"])
    told = capsys.readouterr().out
    assert f"{small}, embedder" in told and "7 rows, 15 scores" in told
    beaten = sum(max(row["scores"]) > row["scores"][0] for row in rows)
    assert f"{beaten} row{'s' * (beaten != 1)} with a negative that scores above the positive" in told
    assert not (tmp_path / ".scored.jsonl.work").exists()


def test_a_rerankers_scores_and_rows_of_documents(tmp_path, write_rows, capsys):
    cross_encoder("bert", tmp_path / "judge")
    rows = [
        {"query": "cat", "documents": SENTENCES[:3]},
        {"query": "mat", "documents": SENTENCES[3:5], "scores": [2, 1]},
    ]
    data, output = write_rows(rows, "rows.jsonl"), tmp_path / "scored.jsonl"
    assert score("--data", data, "--teacher", tmp_path / "judge", "--output", output) == 0
    judge = reranker.Reranker(str(tmp_path / "judge"), raw_scores=True)  # its files name no activation
    for row, before in zip(read(output), rows, strict=True):
        np.testing.assert_allclose(row["scores"], judge.score(row["query"], before["documents"]), atol=1e-5)
        assert row["documents"] == before["documents"]
    example = row_files.Rows([output])[0]
    assert example.scores == tuple(sorted(example.scores, reverse=True))
    assert ", reranker" in capsys.readouterr().out


@pytest.mark.parametrize("at", (0, 1, 2))
def test_resume_of_scoring_gives_the_identical_file(at, small, small_blocks, tmp_path, write_rows, monkeypatch):
    data = write_rows(SCORED, "mined.jsonl")
    flags = ("--data", data, "--teacher", small, "--output")
    assert score(*flags, tmp_path / "whole.jsonl") == 0
    plain = teacher.Teacher._by_vectors
    with monkeypatch.context() as patch:
        stop = Stop(plain, at)
        patch.setattr(teacher.Teacher, "_by_vectors", lambda self, groups: stop(self, groups))
        assert score(*flags, tmp_path / "scored.jsonl") == 130
    assert not (tmp_path / "scored.jsonl").exists()
    count = Stop(plain, None)
    monkeypatch.setattr(teacher.Teacher, "_by_vectors", lambda self, groups: count(self, groups))
    assert score(*flags, tmp_path / "scored.jsonl") == 0
    assert count.calls == 3 - at
    assert (tmp_path / "scored.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_kind_of_teacher_can_be_set(small, tmp_path, write_rows, capsys):
    data = write_rows(SCORED, "rows.jsonl")
    flags = ("--data", data, "--teacher", small, "--output", tmp_path / "out.jsonl")
    assert score(*flags, "--teacher-kind", "reranker") == 0  # probabilities of "yes"
    assert f"{small}, reranker" in capsys.readouterr().out
    assert all(0 < x < 1 for row in read(tmp_path / "out.jsonl") for x in row["scores"])


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"query": "a", "positive": "b"}], (), "no row has negatives"),
        ([{"query": "a", "document": "b", "label": 1}], (), "has the key label"),
        ([{"query": "a", "documents": ["b"]}], (), "documents must be at least two texts"),
        (SCORED, ("--teacher", "./nowhere"), "no folder"),
    ],
)
def test_what_score_refuses(rows, flags, message, small, tmp_path, write_rows, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_rows(rows, "rows.jsonl")
    arguments = {"--teacher": small} | ({flags[0]: flags[1]} if flags else {})
    result = score("--data", data, "--output", "out.jsonl", *(part for pair in arguments.items() for part in pair))
    told = capsys.readouterr().err
    assert result == 2 and message in told and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    assert mining_output.write_rows(tmp_path / "a.jsonl", [{"query": "\ud800 a"}, {"query": "ü"}]) == 2
    assert read(tmp_path / "a.jsonl") == [{"query": "\ufffd a"}, {"query": "ü"}]
    texts = collection.TextFile(tmp_path)
    assert [texts.add(text) for text in ("\ud800 a", "ü", "Ü ")] == [0, 1, 1]
    texts.close()
    assert texts.read([1, 0]) == ["ü", "\ud800 a"]
