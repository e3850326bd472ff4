"""Tuning a search: the best settings are the best, figures come from other queries, and the index keeps them.

python -m pytest tests/evaluation/test_index_tuning.py
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import search
from mlx_retrieval.dataset.chunks import Chunk
from mlx_retrieval.evaluation import index_search, index_tuning
from mlx_retrieval.evaluation.index_search import Query, Searched, Target, figures_of
from mlx_retrieval.evaluation.index_tuning import SHARES, Scaled, Settings, Tuner
from mlx_retrieval.retrieval import fusion
from mlx_retrieval.retrieval.analyzer import analyzer
from mlx_retrieval.retrieval.base import EVERYWHERE, FileRecord, Hit, IndexInfo, sort_hits
from mlx_retrieval.retrieval.bm25f import FieldedBm25
from mlx_retrieval.retrieval.fields import FIELDS, fields_of
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.utils.errors import UserError

WORDS = ("boiler", "bike", "kettle", "lamp", "radio", "door", "window", "chair", "table", "clock", "shelf", "stove")


def vectors_of(count: int) -> np.ndarray:
    """Vectors without any meaning."""
    vectors = np.random.default_rng(0).standard_normal((count, 8)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def index(tmp_path) -> Index:
    """Of each word a function that is named after it, and a longer one that says it three times."""
    index = Index.create(tmp_path / "index", IndexInfo("/", False, "", "", 8, 2_000, 200))
    files = []
    for word in WORDS:
        named = Chunk(1, 2, "python", "function", f"open_{word}", "", f"def open_{word}():\n    return 1")
        said = Chunk(3, 4, "python", "function", "other", "", f"def other():\n    return {word} + {word} + {word}")
        files.append((FileRecord(f"{word}.py", 1, 1, "", 2, ""), [said, named]))
    index.add(files, vectors_of(2 * len(WORDS)), set())
    index.finish()
    return index


def queries_of(line: int) -> list[Query]:
    """A query for each word, whose answer is the chunk at this line."""
    return [Query(f"the {word}", {Target(f"{word}.py", line): 1}) for word in WORDS]


def searched(index: Index, queries: list[Query]) -> list[Searched]:
    vectors = vectors_of(99)[-len(queries) :]
    return [
        Searched(vector, index.bm25(query.text, fusion.POOL), index.semantic(vector, fusion.POOL))
        for query, vector in zip(queries, vectors, strict=True)
    ]


def test_it_learns_that_names_count_and_meaning_does_not(index):
    """Without a weight on names, the function that says a word three times is first."""
    queries = queries_of(1)
    tuned = Tuner(index, queries, searched(index, queries)).tune()
    weights = dict(zip(FIELDS, tuned.settings.fields, strict=True))
    assert tuned.helps and tuned.settings.weight < 0.5 and weights["name"] > 1
    figures = {mode: result.tasks["queries"]["ndcg_at_10"] for mode, result in tuned.evaluations.items()}
    assert figures["tuned"] > max(figures["hybrid"], figures["bm25"], figures["semantic"])
    assert figures["tuned"] == 1.0
    index_tuning.keep(index, tuned.settings)
    kept = Index.open(index.folder)
    assert (kept.info.fields, kept.info.weight) == (weights, tuned.settings.weight)
    for query, each in zip(queries, searched(kept, queries), strict=True):
        hits = fusion.hybrid(kept, query.text, each.vector, 5)
        assert (hits[0].path, hits[0].line) == (next(iter(query.targets)).path, 1)


def test_its_scores_are_those_of_a_search(index):
    """Whatever the settings: words are counted in memory, and nDCG by a short formula."""
    queries = queries_of(3)
    queries[0] = Query("boiler or bike", {Target("boiler.py"): 2, Target("bike.py", 1): 1}, ignored="bike.py")
    lamp = {Target("lamp.py", 3): 1, Target("lamp.py", 4): 3, Target("lamp.py"): 2, Target("radio.py", 1): 1}
    queries[1] = Query("lamp or radio", lamp)  # several answers in one chunk
    results = searched(index, queries)
    tuner = Tuner(index, queries, results)
    for weight in (0.0, 0.35, 1.0):
        hits = [
            fusion.hybrid(index, query.text, each.vector, fusion.POOL, weight)
            for query, each in zip(queries, results, strict=True)
        ]
        ranked = [tuner._ranked(Settings(weight, tuner.before.fields), n) for n in range(len(queries))]
        assert [[hit.id for hit in row] for row in ranked] == [[hit.id for hit in row] for row in hits]
        expected = figures_of("", queries, hits).per_query["queries"]["ndcg_at_10"]
        (scores,) = tuner._scores([Settings(weight, tuner.before.fields)])
        assert scores.tolist() == pytest.approx([expected[f"q{n}"] for n in range(len(queries))], abs=1e-6)


def test_a_query_is_judged_by_settings_that_did_not_see_it(index, monkeypatch):
    """Each query alone has a setting that is perfect for it, and bad for all others."""
    queries = queries_of(1)
    tuner = Tuner(index, queries, searched(index, queries))
    choices = [tuner.before, *(Settings(share, tuner.before.fields) for share in SHARES[: len(queries)])]
    scores = np.vstack([np.full(len(queries), 0.1), np.eye(len(queries))])
    monkeypatch.setattr(tuner, "_choices", lambda: choices)
    monkeypatch.setattr(tuner, "_scores", lambda _: scores)
    used = []
    monkeypatch.setattr(tuner, "_ranked", lambda settings, query: used.append((settings, query)) or [])
    tuner.tune()
    settings = dict((int(query), each) for each, query in used[: len(queries)])
    assert len(settings) == len(queries)
    assert all(each != choices[query + 1] for query, each in settings.items())


def test_memory_does_not_grow_with_the_choices(index, monkeypatch):
    """Regression: candidates were kept for each of 64 choices of fields, about 2 MB a query."""
    alive, most = Counter(), Counter()

    def counted(kind: type) -> type:
        class Counted(kind):
            def __new__(cls, *values):
                alive[kind] += 1
                most[kind] = max(most[kind], alive[kind])
                return super().__new__(cls, *values)

            def __del__(self):
                alive[kind] -= 1

        return Counted

    queries = queries_of(1)
    tuner = Tuner(index, queries, searched(index, queries))
    for name in ("Scaled", "Candidate"):
        monkeypatch.setattr(index_tuning, name, counted(getattr(index_tuning, name)))
    tuner.tune()
    assert len({each.fields for each in tuner._choices()}) == 4**2  # no chunk has a docstring
    assert 0 < most[Scaled] <= 2 * len(queries)  # those of a choice, and of the one before
    assert 0 < most[fusion.Candidate] <= 2 * len(queries) * 2 * len(WORDS)


def test_settings_that_do_not_help_are_not_kept(index):
    """No setting is better than another: those before stay."""
    queries = [Query("zebra", {Target("boiler.py"): 1}) for _ in range(10)]
    results = [Searched(each.vector, [], []) for each in searched(index, queries)]
    tuned = Tuner(index, queries, results).tune()
    assert not tuned.helps and tuned.settings == tuned.before


def test_what_was_learnt_can_be_forgotten(index, capsys):
    """Regression: not even --rebuild gave an index its default weights again."""
    folder = ["--index", str(index.folder)]
    before = [index.bm25(query.text, 5) for query in queries_of(1)]
    index_tuning.keep(index, Settings(0.3, (1, 4, 2, 1)))
    learnt = Index.open(index.folder)
    assert learnt.info.weight == 0.3 and [learnt.bm25(query.text, 5) for query in queries_of(1)] != before
    assert search.main(["tune", "--forget", *folder]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "before weight 0.3; path 1, name 4, doc 2, text 1" in out
    assert "now weight 0.8; path 1, name 1, doc 1, text 1, the defaults" in out
    forgotten = Index.open(index.folder)
    assert forgotten.info.weight is None and [forgotten.bm25(query.text, 5) for query in queries_of(1)] == before


def test_a_weight_alone_is_forgotten_alone(index):
    class Elastic:
        info, kept = dataclasses.replace(index.info, weight=0.4), 0.4

        def keep_weight(self, weight):
            self.kept = weight

    elastic = Elastic()
    assert index_tuning.forget(elastic) == (Settings(0.4), Settings(None)) and elastic.kept is None


def test_few_queries_are_refused(index):
    queries = queries_of(1)[:9]
    with pytest.raises(UserError, match="9 queries are too few to learn from: at least 10"):
        Tuner(index, queries, searched(index, queries))


def test_elasticsearch_learns_the_weight_alone(index):
    class Elastic:
        """The same searches, without access to the texts."""

        info, bm25, semantic = index.info, index.bm25, index.semantic

        def keep_weight(self, weight):
            self.kept = weight

    queries, elastic = queries_of(3), Elastic()
    tuned = Tuner(elastic, queries, searched(index, queries)).tune()
    assert tuned.settings.weight in SHARES and tuned.settings.fields == ()
    assert index_tuning.described(tuned.settings) == f"weight {tuned.settings.weight:g}"
    index_tuning.keep(elastic, tuned.settings)
    assert elastic.kept == tuned.settings.weight


def test_elasticsearch_learns_the_weights_of_its_fields(index):
    """The server is asked for every choice; nothing is written but the weights."""

    class Elastic:
        """The searches of an index whose words may have other weights."""

        word_fields = ("name", "path")

        def __init__(self, info, bm25):
            self.info, self.semantic, self.counted = info, index.semantic, bm25

        def bm25(self, query, top, within=EVERYWHERE):
            scores = self.counted.scorer(self.info.fields).scores(query)
            found = [Hit(text="", score=float(s), **row) for s, row in zip(scores, rows, strict=True) if s]
            return sort_hits(hit for hit in found if within.ids is None or hit.id in within.ids)[:top]

        def weighted(self, weights):
            return Elastic(dataclasses.replace(self.info, fields=weights), self.counted)

        def keep_weight(self, weight, weights=None):
            self.kept = Settings(weight, tuple(weights[name] for name in FIELDS))

    rows, queries = index.chunk_texts(), queries_of(1)
    texts = [fields_of(row["path"], row["name"], row["language"], row.pop("context"), row.pop("text")) for row in rows]
    results = searched(index, queries)
    elastic = Elastic(index.info, FieldedBm25(texts, [query.text for query in queries], analyzer()))
    tuned, expected = Tuner(elastic, queries, results).tune(), Tuner(index, queries, results).tune()
    assert tuned.settings == expected.settings and tuned.helps and tuned.settings.fields[1] > 1
    assert tuned.evaluations["tuned"].tasks == expected.evaluations["tuned"].tasks
    index_tuning.keep(elastic, tuned.settings)
    assert elastic.kept == tuned.settings


def test_the_command_tunes(small, tmp_path, capsys):
    root, index = tmp_path / "tree", ["--index", str(tmp_path / "index")]
    root.mkdir()
    for word in WORDS:
        (root / f"{word}.txt").write_text(f"what is said of it\n{word} {word}\n")
    assert search.main(["index", str(root), "--model-path", small, *index]) == 0
    rows = [{"query": f"a {word} in the house", "path": f"{word}.txt"} for word in WORDS]
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert search.main(["tune", str(queries), *index]) == 0
    out = capsys.readouterr().out
    assert "tuned by cross-validation: 12 queries" in " ".join(out.split()) and "difference to hybrid as it was" in out
    about = json.loads((tmp_path / "index/index.json").read_text())
    verdict = [line for line in out.splitlines() if line.startswith(("kept", "unchanged"))]
    assert len(verdict) == 1
    if verdict[0].startswith("kept"):
        assert f"weight {about['weight']:g}; path " in verdict[0]
        assert f"defaults python search.py tune --forget --index={index[1]}" in " ".join(out.split())
    assert index_search.read_queries(str(queries)) and Path(index[1]).is_dir()
