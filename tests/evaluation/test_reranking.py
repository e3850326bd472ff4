"""Evaluation of rerankers: figures by hand, depth, ties, first stages of every kind, mteb's own two stages, the flags.

python -m pytest tests/evaluation/test_reranking.py
"""

import gc
import json
import math
import runpy
import shutil
import sys
import weakref
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from beir_folders import WordCounts, write_folder
from mteb_folder import mteb_task

import eval as evaluation
from mlx_retrieval.evaluation import tasks as evaluation_tasks
from mlx_retrieval.evaluation.first_stages import Hybrid, bm25_stage, open_stage
from mlx_retrieval.evaluation.reranking import evaluate_reranker
from mlx_retrieval.evaluation.results import METRICS, Evaluation, compare
from mlx_retrieval.evaluation.retrieval import evaluate, score_rankings
from mlx_retrieval.inference import reranker
from mlx_retrieval.retrieval import fusion
from mlx_retrieval.retrieval.bm25 import bm25, bm25_scorer
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
NANO = "NanoMSMARCORetrieval"


class Judge:
    """A reranker that looks scores up, by document or by (query, document); it remembers what it was asked."""

    name = "judge"

    def __init__(self, scores=None, default: float = 0.0):
        self.scores, self.default = scores or {}, default
        self.calls: list[list[tuple[str, list[str]]]] = []

    def score(self, query: str, document: str) -> float:
        return self.scores.get((query, document), self.scores.get(document, self.default))

    def score_groups(self, groups):
        self.calls.append([(query, list(documents)) for query, documents in groups])
        return [np.array([self.score(q, d) for d in documents], np.float32) for q, documents in groups]

    @property
    def asked(self) -> dict[str, list[str]]:
        return {query: documents for call in self.calls for query, documents in call}


class Hash(Judge):
    """Scores without order or ties."""

    def score(self, query: str, document: str) -> float:
        return zlib.crc32(f"{query}|{document}".encode()) / 2**32


# BM25 prefers short documents: "apple" finds d1 to d4 in this order, and never d5.
TEXTS = ["apple", "apple pear", "apple pear plum", "apple pear plum cherry", "kiwi"]
SHELF = {
    "corpus": [{"_id": f"d{i}", "text": text} for i, text in enumerate(TEXTS, start=1)],
    "queries": [{"_id": "q1", "text": "apple"}],
    "qrels": "q1\td3\t1\nq1\td5\t1\n",
}


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "shelf", **SHELF)


def order_of(scores: Evaluation, task: str = "shelf") -> float:
    return scores.per_query[task]["ndcg_at_10"]["q1"]


def dcg(*gains: int) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


# --- figures ---


def test_figures_by_hand(shelf):
    judge = Judge({TEXTS[2]: 9.0, TEXTS[3]: 5.0})
    before, after = evaluate_reranker(judge, [str(shelf)])
    ideal = dcg(1, 1)
    assert before.per_query["shelf"] == {
        "ndcg_at_10": {"q1": pytest.approx(dcg(0, 0, 1) / ideal)},
        "mrr_at_10": {"q1": pytest.approx(1 / 3)},
        "recall_at_100": {"q1": 0.5},
        "precision_at_1": {"q1": 0.0},
    }
    assert after.per_query["shelf"] == {
        "ndcg_at_10": {"q1": pytest.approx(dcg(1) / ideal)},
        "mrr_at_10": {"q1": 1.0},
        "recall_at_100": {"q1": 0.5},
        "precision_at_1": {"q1": 1.0},
    }
    for result in (before, after):  # of one query: its mean, as mteb rounds it
        for metric, by_query in result.per_query["shelf"].items():
            assert result.tasks["shelf"][metric] == pytest.approx(by_query["q1"], abs=5.1e-6)
    assert (before.model, after.model) == ("BM25", "judge")
    assert judge.calls == [[("apple", TEXTS[:4])]]  # best first


@pytest.mark.parametrize(
    ("depth", "gains"),
    [
        (1, (4, 3, 2, 1)),
        (2, (3, 4, 2, 1)),
        (3, (2, 3, 4, 1)),  # what lies behind the depth stays there, however well it would score
        (4, (1, 2, 3, 4)),
        (100, (1, 2, 3, 4)),  # more than there are
    ],
)
def test_depth(tmp_path, depth, gains):
    """Every document has its own gain, so nDCG knows the order; the judge turns it round."""
    qrels = "q1\td1\t4\nq1\td2\t3\nq1\td3\t2\nq1\td4\t1\n"
    shelf = write_folder(tmp_path / "shelf", SHELF["corpus"], SHELF["queries"], qrels)
    judge = Judge({text: float(i) for i, text in enumerate(TEXTS)})
    before, after = evaluate_reranker(judge, [str(shelf)], depth=depth)
    assert order_of(before) == pytest.approx(1.0)
    assert order_of(after) == pytest.approx(dcg(*gains) / dcg(4, 3, 2, 1))
    assert after.tasks["shelf"]["recall_at_100"] == before.tasks["shelf"]["recall_at_100"] == 1.0
    assert judge.asked == {"apple": TEXTS[:4][:depth]}


def test_equal_scores_keep_the_order_of_the_first_stage(words, shelf):
    """With the ids as the scores' tie-break, as trec_eval has it, d4 would come first."""
    for first_stage in ("bm25", WordCounts(dimensions=8)):  # whose scores have ties too
        before, after = evaluate_reranker(Judge(), [str(words), str(shelf)], first_stage, depth=50)
        assert (after.tasks, after.per_query) == (before.tasks, before.per_query)
        assert 0 < after.tasks["words"]["ndcg_at_10"] < 1
    assert order_of(before) != order_of(evaluate_reranker(Judge({TEXTS[0]: -1.0}), [str(shelf)])[1])


def test_equal_scores_of_bm25_are_in_the_order_of_the_ids(tmp_path):
    corpus = [{"_id": name, "text": "apple"} for name in ("d3", "d1", "d4", "d2")]
    shelf = write_folder(tmp_path / "shelf", corpus, SHELF["queries"], "q1\td1\t4\nq1\td2\t3\nq1\td3\t2\nq1\td4\t1\n")
    before, after = evaluate_reranker(Judge(), [str(shelf)])
    assert order_of(before) == order_of(after) == pytest.approx(1.0)
    assert bm25({"b": "apple", "a": "apple"}, {"q": "apple"}) == {"q": ["a", "b"]}


def test_queries_for_which_bm25_finds_nothing(tmp_path):
    """They count, with 0, and nobody scores documents for them."""
    queries = [
        *SHELF["queries"],
        *({"_id": f"q{i}", "text": text} for i, text in enumerate(("zebra", "of the", "?"), 2)),
    ]
    qrels = "q1\td1\t1\nq2\td1\t1\nq3\td1\t1\nq4\td1\t1\n"
    shelf = write_folder(tmp_path / "shelf", SHELF["corpus"], queries, qrels)
    judge = Judge()
    for result in evaluate_reranker(judge, [str(shelf)]):
        for metric in METRICS:
            assert result.per_query["shelf"][metric] == {"q1": 1.0, "q2": 0.0, "q3": 0.0, "q4": 0.0}
            assert result.tasks["shelf"][metric] == 0.25
    assert list(judge.asked) == ["apple"]


def test_a_corpus_without_words(tmp_path):
    corpus = [{"_id": "d1", "text": "the"}, {"_id": "d2", "text": "?"}]
    shelf = write_folder(tmp_path / "shelf", corpus, SHELF["queries"], "q1\td1\t1\n")
    judge = Judge()
    _, after = evaluate_reranker(judge, [str(shelf)])
    assert after.tasks["shelf"]["recall_at_100"] == 0.0 and judge.calls == []


def test_documents_have_their_titles_and_queries_come_in_blocks(tmp_path):
    corpus = [{"_id": "d1", "title": "Red", "text": "apple"}, {"_id": "d2", "title": "", "text": "apple"}]
    queries = [{"_id": f"q{i:02}", "text": f"apple {i}"} for i in range(35)]
    qrels = "".join(f"q{i:02}\td1\t1\n" for i in range(35))
    judge = Judge({(f"apple {i}", "Red apple"): 1.0 for i in range(0, 35, 2)})
    _, after = evaluate_reranker(judge, [str(write_folder(tmp_path / "shelf", corpus, queries, qrels))])
    assert [len(call) for call in judge.calls] == [16, 16, 3]
    assert judge.asked == {f"apple {i}": ["apple", "Red apple"] for i in range(35)}  # the shorter one first
    ranks = [after.per_query["shelf"]["mrr_at_10"][f"q{i:02}"] for i in range(35)]
    assert ranks == [1.0 if i % 2 == 0 else 0.5 for i in range(35)]  # each query got its own scores


def test_bm25_is_lucenes_formula():
    rng = np.random.default_rng(0)
    vocabulary = [f"{a}o{b}" for a in "bcfghkmp" for b in "bdgklmnp"]
    documents = {f"d{i:02}": " ".join(rng.choice(vocabulary, rng.integers(5, 40))) for i in range(50)}
    asked = {f"q{i}": " ".join(rng.choice(vocabulary, 4, replace=False)) for i in range(20)}
    counts = {name: Counter(text.split()) for name, text in documents.items()}
    mean = np.mean([c.total() for c in counts.values()])
    having = Counter(word for c in counts.values() for word in c)

    def by_hand(query: str, name: str) -> float:
        c, total = counts[name], 0.0
        for word in query.split():
            weight = math.log(1 + (50 - having[word] + 0.5) / (having[word] + 0.5))
            total += weight * c[word] / (c[word] + 1.2 * (1 - 0.75 + 0.75 * c.total() / mean))
        return total

    wordy = {name: f"The {text} is" + " and the" * int(rng.integers(9)) for name, text in documents.items()}
    queries = {query: f"Of {text} the" for query, text in asked.items()}  # stop words count on neither side
    found = bm25(wordy, queries)
    for query, text in asked.items():
        scores = {name: by_hand(text, name) for name in documents}
        assert set(found[query]) == {name for name, score in scores.items() if score > 0}
        assert all(np.diff([scores[name] for name in found[query]]) <= 1e-6)
    assert bm25(wordy, queries, 7) == {query: names[:7] for query, names in found.items()}


def test_bm25_in_another_language(tmp_path):
    corpus = [{"_id": "d1", "text": "Die Häuser"}, {"_id": "d2", "text": "und der Mann"}]
    shelf = write_folder(tmp_path / "shelf", corpus, [{"_id": "q1", "text": "das Haus und der"}], "q1\td1\t1\n")
    assert [order_of(evaluate_reranker(Judge(), [str(shelf)])[0])] == [0.0]
    german, _ = evaluate_reranker(Judge(), [str(shelf)], open_stage(None, language="german"))
    assert order_of(german) == 1.0
    with pytest.raises(UserError, match="--language germn"):
        open_stage("bm25", language="germn")


@pytest.mark.slow
def test_mtebs_own_two_stages_give_the_same_figures(words, tmp_path):
    """A cross-encoder and a saved first stage, as mteb's documentation has them."""
    import mteb
    from mteb.models import ModelMeta

    class First:
        mteb_model_meta = ModelMeta.create_empty(overwrites={"name": "local/bm25", "revision": "1"})

        def index(self, corpus, **_):
            self.documents = dict(zip(corpus["id"], corpus["text"], strict=True))

        def search(self, queries, **_):
            found = bm25(self.documents, dict(zip(queries["id"], queries["text"], strict=True)))
            return {query: {d: -float(i) for i, d in enumerate(names)} for query, names in found.items()}

    class CrossEncoder:
        mteb_model_meta = ModelMeta.create_empty(overwrites={"name": "local/hash", "revision": "1"})

        def predict(self, inputs1, inputs2, **_):
            sides = ([text for batch in side for text in batch["text"]] for side in (inputs1, inputs2))
            return np.array([Hash().score(*pair) for pair in zip(*sides, strict=True)])

    options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
    task = mteb_task(words)
    first = mteb.evaluate(First(), task, prediction_folder=tmp_path, **options).task_results[0].scores["test"][0]
    task.convert_to_reranking(tmp_path, top_k=20)
    second = mteb.evaluate(CrossEncoder(), task, **options).task_results[0].scores["test"][0]
    before, after = evaluate_reranker(Hash(), [str(words)], depth=20)
    assert before.tasks["words"] == {metric: round(first[metric], 5) for metric in METRICS}
    same = ("ndcg_at_10", "mrr_at_10", "precision_at_1")  # mteb drops what lies behind the depth
    assert [after.tasks["words"][m] for m in same] == [round(second[m], 5) for m in same]
    assert after.tasks["words"]["ndcg_at_10"] < before.tasks["words"]["ndcg_at_10"] - 0.05


# --- a model as first stage ---


@pytest.mark.parametrize("task", ["embed", "late"])
def test_a_model_as_first_stage(small, shelf, task):
    from mlx_retrieval.inference import embedder

    model = embedder.load(small, task=task)
    judge = Judge({TEXTS[4]: 1.0, TEXTS[2]: 0.5})
    before, after = evaluate_reranker(judge, [str(shelf)], model)
    alone = evaluate(model, [str(shelf)])
    assert (before.tasks, before.per_query, before.model) == (alone.tasks, alone.per_query, small)
    assert sorted(judge.asked["apple"]) == sorted(TEXTS)  # a model finds every document, the kiwi too
    assert order_of(after) == pytest.approx(1.0) and after.tasks["shelf"]["recall_at_100"] == 1.0
    _, after = evaluate_reranker(judge, [str(shelf)], model, depth=2)
    assert len(judge.asked["apple"]) == 2


@pytest.mark.parametrize("task", ["counts", "embed", "late"])
def test_a_model_and_bm25_together_as_first_stage(small, words, task, monkeypatch):
    """By hand from the scores of both, over all documents."""
    from mlx_retrieval.inference import embedder
    from mlx_retrieval.models import maxsim

    monkeypatch.setattr(fusion, "POOL", 1_000)  # so all are candidates
    model = WordCounts() if task == "counts" else embedder.load(small, task=task)
    before, _ = evaluate_reranker(Judge(), [str(words)], Hybrid(model))
    assert before.model == f"{model.name} with BM25"
    judged = evaluation_tasks.load(words).judged()
    ids, texts = list(judged.corpus.ids), judged.corpus.texts(range(len(judged.corpus.ids)))
    scorer, documents = bm25_scorer(texts), model.encode(texts, prompt="document", show_progress=False)
    queries = model.encode(list(judged.queries.values()), prompt="query", show_progress=False)
    rankings = {}
    for (name, text), vector in zip(judged.queries.items(), queries, strict=True):
        if task == "late":
            lengths = np.array([len(each) for each in documents])
            meaning = maxsim.score(vector, np.concatenate(documents), lengths, model.config.maxsim)
        else:
            meaning = documents @ vector
        weight = fusion.WEIGHTS["scores"]
        scores = weight * fusion.minmax(meaning) + (1 - weight) * fusion.minmax(scorer(text))
        rankings[name] = dict(zip(ids, scores.tolist(), strict=True))
    expected = score_rankings(judged.qrels, rankings)["ndcg_at_10"]
    assert before.per_query["words"]["ndcg_at_10"] == pytest.approx(expected, abs=1e-6)


def test_a_first_stage_has_a_name():
    with pytest.raises(UserError, match="--first-stage hybrid: the model must be named too"):
        open_stage("hybrid")
    assert open_stage(None) is open_stage("bm25") is bm25_stage()


def test_the_first_stage_is_asked_once(words, tmp_path):
    folder = shutil.copytree(words, tmp_path / "words")
    model = WordCounts()
    one, _ = evaluate_reranker(Hash(), [str(folder)], model, depth=10)
    two, deeper = evaluate_reranker(Hash(), [str(folder)], model, depth=20)
    assert [prompt for prompt, _ in model.calls] == ["query", "document"]
    assert one == two
    assert deeper == evaluate_reranker(Hash(), [str(folder)], WordCounts(), depth=20)[1]  # asked anew, found the same
    both, _ = evaluate_reranker(Hash(), [str(words), str(folder)], model)  # two of one name
    assert list(both.tasks) == list(both.per_query) == [str(words), str(folder)]
    before, _ = evaluate_reranker(Hash(), [str(folder)], model)
    assert list(before.tasks) == ["words"]

    calls = len(model.calls)
    qrels = folder / "qrels" / "test.tsv"
    qrels.write_text(qrels.read_text().splitlines(keepends=True)[0])
    before, _ = evaluate_reranker(Hash(), [str(folder)], model)
    assert len(before.per_query["words"]["ndcg_at_10"]) == 1 and len(model.calls) == calls + 2


def test_a_first_stage_is_not_kept_alive(shelf):
    model = WordCounts()
    evaluate_reranker(Judge(), [str(shelf)], model)
    task, alive = evaluation_tasks.load(shelf), weakref.ref(model)
    assert model in task.first_stages
    evaluate_reranker(Judge(), [str(shelf)])
    del model
    gc.collect()
    assert alive() is None and list(task.first_stages) == [bm25_stage()]


def test_rankings_are_by_logits(shelf):
    """Of scores that a sigmoid makes 1, those with higher logits are first."""

    class Sure(Judge):
        def activated(self, raw):
            return np.ones_like(raw)

        def score_groups(self, groups, raw=False):
            scores = super().score_groups(groups)
            return scores if raw else [self.activated(each) for each in scores]

    logits = {"apple pear plum": 20.0, "apple": 18.0}
    _, after = evaluate_reranker(Sure(logits), [str(shelf)])
    assert after.per_query == evaluate_reranker(Judge(logits), [str(shelf)])[1].per_query
    assert after.per_query["shelf"]["mrr_at_10"] == {"q1": 1.0}


# --- what can go wrong ---


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite(words, value):
    text = json.loads((words / "queries.jsonl").read_text().splitlines()[20])
    judge = Hash()
    judge.score = lambda query, document: value if query == text["text"] else 0.0
    with pytest.raises(FloatingPointError, match=rf"^words: query {text['_id']}: 5 of 5 scores are not finite$"):
        evaluate_reranker(judge, [str(words)], depth=5)


def test_a_reranker_that_gives_other_than_a_score_a_document(shelf):
    judge = Judge()
    judge.score_groups = lambda groups: [np.zeros((len(documents), 1)) for _, documents in groups]
    with pytest.raises(ValueError, match=r"judge: scores of shape \(4, 1\) for 4 documents"):
        evaluate_reranker(judge, [str(shelf)])
    judge.score_groups = lambda groups: []
    with pytest.raises(ValueError):
        evaluate_reranker(judge, [str(shelf)])


def test_arguments_that_can_not_be(shelf):
    for depth in (0, -3, 1001):
        with pytest.raises(UserError, match=rf"depth {depth}: from 1 to 1,000"):
            evaluate_reranker(Judge(), [str(shelf)], depth=depth)
    with pytest.raises(UserError, match="first stage 'bm52'"):
        evaluate_reranker(Judge(), [str(shelf)], "bm52")
    with pytest.raises(UserError, match="neither a folder nor an MTEB task"):
        evaluate_reranker(Judge(), ["no-such-task"])


# --- the command ---


@pytest.fixture
def rerankers(monkeypatch) -> list[tuple]:
    """Puts a Hash in the place of Reranker; gives what it was made with."""
    made: list[tuple] = []

    class Reranker(Hash):
        def __init__(self, model, adapter=None, reranker_type=None, max_length=None, raw_scores=False, dtype=None):
            super().__init__()
            self.name = model
            made.append((model, adapter, reranker_type, max_length))

    monkeypatch.setattr(reranker, "Reranker", Reranker)
    return made


def test_command(rerankers, capsys, tmp_path, words, shelf, no_hub):
    file = tmp_path / "results.json"
    command = ["--task", "rerank", "--model", "[m]", "--output", str(file), "--overwrite", "--eval-tasks", str(words)]
    assert evaluation.main([*command, "--adapter", "a", "--max-length", "64"]) == 0
    assert rerankers == [("[m]", "a", None, 64)]
    out, err = capsys.readouterr()
    before, after = evaluate_reranker(Hash(), [str(words)], depth=100)
    record = json.loads(file.read_text())
    assert record["model"] == "[m]" and record["tasks"] == after.tasks
    assert record["first_stage"] == {"model": "BM25", "depth": 100, "tasks": before.tasks}
    rows = compare(before, after)
    assert record["differences"] == {m: {"difference": d, "low": low, "high": high} for m, _, _, d, low, high in rows}
    assert "[m] reranks the first 100 documents of BM25" in out and "words: 40 queries" in out
    assert ["metric", "BM25", "reranked", "difference"] in [line.split()[:4] for line in out.splitlines()]
    worse = compare(before, after)[0][3] < 0
    assert ("reranking does not help: nDCG@10 " in out) == worse
    assert "\x1b" not in out and max(map(len, out.splitlines())) <= 80
    table = {line.split()[0]: line.split()[1:4] for line in out.splitlines() if line.split()[:1]}
    for metric, old, new, difference, *_ in rows:
        assert table[METRICS[metric]] == [f"{old:.4f}", f"{new:.4f}", f"{difference:+.4f}"]
    assert "reranking" not in err  # no bar where there is no terminal

    assert evaluation.main([*command, str(shelf), NANO, "--depth", "3"]) == 1  # several, and one out of reach
    out, err = capsys.readouterr()
    assert f"eval.py: {NANO}: data set" in err and "first 3 documents" in out
    titles = [line.strip() for line in out.splitlines() if "quer" in line]
    assert titles == ["words: 40 queries", "shelf: 1 query", "words, shelf: 41 queries"]
    record = json.loads(file.read_text())
    assert record["unreachable"].keys() == {NANO} and list(record["tasks"]) == ["words", "shelf"]
    assert record["first_stage"]["depth"] == 3
    assert evaluation.main([*command[:-1], NANO]) == 2  # nothing left
    assert json.loads(file.read_text())["tasks"] == {}


def test_command_with_a_model_as_first_stage(monkeypatch, rerankers, capsys, words):
    from mlx_retrieval.inference import embedder

    loaded = []

    def load(path, *rest, **settings):
        loaded.append((path, rest, settings))
        return WordCounts(name=path)

    monkeypatch.setattr(embedder, "load", load)
    command = ["--task", "rerank", "--model", "m", "--eval-tasks", str(words), "--dtype", "float16", "--first-stage"]
    assert evaluation.main([*command, "adapters/mine"]) == 0
    assert "m reranks the first 100 documents of adapters/mine" in capsys.readouterr().out
    assert evaluation.main([*command, "bm25"]) == 0
    assert "documents of BM25" in capsys.readouterr().out
    assert loaded == [("adapters/mine", (), {"dtype": "float16"})]
    assert evaluation.main([*command, "hybrid:adapters/mine"]) == 0
    assert "documents of adapters/mine with BM25" in capsys.readouterr().out
    assert loaded[1:] == [("adapters/mine", (), {"dtype": "float16"})]
    assert evaluation.main([*command, "bm25", "--language", "elvish"]) == 2


def test_task_of_a_bi_encoder_can_be_said(monkeypatch, capsys, words):
    from mlx_retrieval.inference import embedder

    seen = []
    monkeypatch.setattr(embedder, "load", lambda path, adapter=None, **settings: seen.append(settings) or WordCounts())
    for flags in ([], ["--task", "embed"], ["--task", "late"]):
        assert evaluation.main(["--model", "m", "--eval-tasks", str(words), *flags]) == 0
    lengths = {"max_length": None, "query_max_length": None, "dtype": None}
    assert seen == [lengths, lengths | {"task": "embed"}, lengths | {"task": "late"}]


RERANK = ["--task", "rerank"]
WRONG = [
    ([*RERANK, "--depth", "0"], "--depth 0: from 1 to 1,000 documents"),
    ([*RERANK, "--depth", "-1"], "--depth -1: from 1 to 1,000 documents"),
    ([*RERANK, "--depth", "1001"], "--depth 1001: from 1 to 1,000 documents"),
    ([*RERANK, "--precision", "int8"], "--precision: not for --task rerank"),
    ([*RERANK, "--dimensions", "64"], "--dimensions: not for --task rerank"),
    ([*RERANK, "--query-max-length", "8"], "--query-max-length: not for --task rerank"),
    ([*RERANK, "--precision", "int8", "--dimensions", "64"], "--precision and --dimensions: not for --task rerank"),
    (["--first-stage", "bm25"], "--first-stage: only for --task rerank"),
    (["--language", "german"], "--language: only for --task rerank"),
    (["--task", "late", "--depth", "5"], "--depth: only for --task rerank"),
    ([*RERANK, "--eval-tasks", "no/where"], "no/where: no such folder"),
    ([*RERANK, "--output", "README.md/where.json"], "README.md is not a folder"),
    (["--overwrite"], "--overwrite: only with --output or --results"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_mistakes_are_found_before_a_model_is_loaded(rerankers, monkeypatch, capsys, flags, message):
    from mlx_retrieval.inference import embedder

    monkeypatch.setattr(embedder, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert evaluation.main(["--model", "m", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eval.py: ") and message in error and error.count("\n") == 1
    assert rerankers == []


def test_mistakes_that_are_found_later(rerankers, monkeypatch, capsys, words):
    command = ["--task", "rerank", "--model", "m", "--eval-tasks"]
    assert evaluation.main([*command, "no-such-task"]) == 2
    assert "no-such-task is neither a folder nor an MTEB task" in capsys.readouterr().err
    assert evaluation.main([*command, str(words), "--first-stage", "./no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
    monkeypatch.setattr(reranker.Reranker, "score", lambda *_: np.nan)
    assert evaluation.main([*command, str(words)]) == 2
    assert "scores are not finite" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(["--task", "chat", "--model", "m"])
    assert stopped.value.code == 2


def test_flags_have_the_spelling_of_other_commands():
    args = evaluation.parser().parse_args(["--model-path", "m", "--rerank-depth", "7"])
    assert (args.model, args.depth) == ("m", 7)
    assert set(evaluation.__all__) <= set(vars(evaluation)) and evaluation.evaluate is evaluate


def test_progress_is_shown_only_on_a_terminal(monkeypatch, capsys, words):
    evaluate_reranker(Hash(), [str(words)])
    capsys.readouterr()
    evaluate_reranker(Hash(), [str(words)], show_progress=True)
    assert "reranking" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    evaluate_reranker(Hash(), [str(words)])
    assert capsys.readouterr().err == ""
    evaluate_reranker(Hash(), [str(words)], show_progress=True)
    out, err = capsys.readouterr()
    assert "reranking" in err and "40/40" in err and out == ""


def test_the_benchmark_says_the_same_of_bm25(monkeypatch, capsys, words):
    before, _ = evaluate_reranker(Judge(), [str(words)])
    monkeypatch.setattr(sys, "argv", ["bm25.py", str(words)])
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds to it
    runpy.run_path(str(ROOT / "benchmarks" / "bm25.py"), run_name="__main__")
    out = capsys.readouterr().out
    for metric, name in METRICS.items():
        assert f"{name:<12}{before.tasks['words'][metric]:.4f}\n" in out
