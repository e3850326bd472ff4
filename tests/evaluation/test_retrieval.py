"""Evaluation: figures by hand, bad folders, unreachable tasks, intervals. Offline.

python -m pytest tests/evaluation/test_retrieval.py
"""

import errno
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from beir_folders import WordCounts, write_folder
from mteb_folder import mteb_task

import eval as evaluation
from mlx_retrieval.dataset import beir
from mlx_retrieval.evaluation import mteb_tasks, retrieval
from mlx_retrieval.evaluation import tasks as evaluation_tasks
from mlx_retrieval.evaluation.results import METRICS, Evaluation, VectorFormat, compare, print_comparison, print_table
from mlx_retrieval.evaluation.retrieval import evaluate, load_tasks
from mlx_retrieval.inference import quantization
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).parent.parent.parent
MEDQUAD = ROOT.parent / "shared" / "data" / "medquad" / "dev"
NANO = "NanoMSMARCORetrieval"


class Table:
    """Vectors given by hand: text -> vector."""

    name = "by hand"

    def __init__(self, vectors: dict[str, list[float]]):
        self.vectors = vectors

    def encode(self, texts, prompt=None, show_progress=False):
        return np.array([self.vectors[text] for text in texts], np.float32)


FRUIT = {
    "corpus": [
        {"_id": "d1", "title": "Apple", "text": "a red fruit"},
        {"_id": "d2", "title": "", "text": "green pear"},
        {"_id": "d3", "text": "blue plum"},
    ],
    "queries": [{"_id": "q1", "text": "red apple"}, {"_id": "q2", "text": "green pear"}, {"_id": "q3", "text": "plum"}],
    "qrels": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n",
}


@pytest.fixture
def fruit(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "fruit", **FRUIT)


# --- figures ---


def test_metrics_by_hand(tmp_path):
    """Twelve documents in a known order for every query."""
    corpus = [{"_id": f"d{i:02}", "text": f"text {i}"} for i in range(12)]
    queries = [{"_id": name, "text": name} for name in ("first", "third", "eleventh")]
    # first: d00 (rank 1, gain 2) and d04 (rank 5, gain 1). third: d02. eleventh: d10, beyond the tenth rank.
    qrels = "first\td00\t2\nfirst\td04\t1\nthird\td02\t1\neleventh\td10\t1\n"
    vectors = {row["text"]: [1 - i / 20, 0.0] for i, row in enumerate(corpus)}
    vectors |= {row["text"]: [1.0, 0.0] for row in queries}
    result = evaluate(Table(vectors), [str(write_folder(tmp_path / "hand", corpus, queries, qrels))])
    first = (2 + 1 / math.log2(6)) / (2 + 1 / math.log2(3))
    third = 1 / math.log2(4)
    expected = {
        "ndcg_at_10": {"first": first, "third": third, "eleventh": 0.0},
        "mrr_at_10": {"first": 1.0, "third": 1 / 3, "eleventh": 0.0},
        "recall_at_100": {"first": 1.0, "third": 1.0, "eleventh": 1.0},
        "precision_at_1": {"first": 1.0, "third": 0.0, "eleventh": 0.0},
    }
    for metric, by_query in expected.items():
        assert result.per_query["hand"][metric] == pytest.approx(by_query, abs=1e-7)
        assert result.tasks["hand"][metric] == pytest.approx(sum(by_query.values()) / 3, abs=1e-5)
    assert result.average() == pytest.approx(result.tasks["hand"])
    assert list(result.tasks["hand"]) == list(METRICS)
    record = {"model": "by hand", "tasks": result.tasks, "per_query": result.per_query}
    record |= {"top_documents": result.top_documents, "digests": result.digests}
    assert json.loads(json.dumps(result.to_json())) == record


def test_figures_are_the_means_of_the_queries(words):
    scores = evaluate(WordCounts(), [str(words)])
    for metric, figure in scores.tasks["words"].items():
        by_query = scores.per_query["words"][metric]
        assert len(by_query) == 40
        assert 0 < figure < 1
        assert np.mean(list(by_query.values())) == pytest.approx(figure, abs=5.1e-6)  # as rounded to 5 decimals


class Exact(WordCounts):
    """Multiples of 1/256: their products are exact, so that no order of sums decides between equal documents."""

    def encode(self, texts, prompt=None, show_progress=False):
        return np.round(super().encode(texts, prompt) * 256) / 256


@pytest.mark.parametrize("data", ["words", "eval-data"])
@pytest.mark.parametrize("dimensions", [64, 8])
def test_figures_are_those_of_a_plain_mteb_run(words, data, dimensions):
    """An encoder and a task made as mteb's documentation has it. Asking for only 100 ranks gave another recall. With 8
    dimensions many documents have the very same score."""
    import mteb
    from mteb.models import ModelMeta

    class Plain:
        mteb_model_meta = ModelMeta.create_empty(overwrites={"name": "plain/words", "revision": "1"})

        def encode(self, inputs, **kwargs):
            return np.concatenate([Exact(dimensions=dimensions).encode(batch["text"]) for batch in inputs])

        def similarity(self, a, b):
            return a @ b.T

        def similarity_pairwise(self, a, b):
            return (a * b).sum(-1)

    folder = words if data == "words" else ROOT / data
    plain = mteb.evaluate(Plain(), mteb_task(folder), cache=None, co2_tracker=False, show_progress_bar=False)
    ours = evaluate(Exact(dimensions=dimensions), [str(folder)]).tasks[data]
    expected = plain.task_results[0].scores["test"][0]
    assert ours == {metric: round(expected[metric], 5) for metric in METRICS}  # mteb itself rounds all but MRR


@pytest.mark.parametrize("late", [False, True])
def test_folders_and_tasks_of_mteb_give_the_same(words, late):
    """The same data, searched by the toolkit alone and through mteb: figures, and every query's scores."""

    class Model(Exact):
        config = RetrievalConfig()

        def encode(self, texts, prompt=None, show_progress=False):
            if not self.late:
                return super().encode(texts, prompt)
            return [super(Model, self).encode(text.split() or [""]) for text in texts]

    model = Model(dimensions=64)
    model.late = late
    found, direct = Evaluation("toy", {}, {}, {}), evaluate(model, [str(words)])
    parts = retrieval.add_task(found, retrieval.searcher_for(model, "words"), mteb_tasks.MtebTask(mteb_task(words)))
    assert replace(found, digests=direct.digests) == direct
    assert [part.key for part in parts] == [("test", "default")] and len(parts[0].rankings) == 40


def test_large_corpora_are_embedded_in_parts(words, monkeypatch):
    whole, model = evaluate(Exact(), [str(words)]), Exact()
    monkeypatch.setattr(retrieval, "DOCUMENTS", 64)
    assert evaluate(model, [str(words)]) == whole
    assert [len(texts) for _, texts in model.calls] == [40, 64, 64, 22]


def test_prompts_and_document_texts(fruit):
    model = WordCounts()
    evaluate(model, [str(fruit)])
    assert model.calls == [
        ("query", ["red apple", "green pear"]),  # q3 has no judgement
        ("document", ["Apple a red fruit", "green pear", "blue plum"]),
    ]


def test_changed_model_of_the_same_name_is_evaluated_anew(words):
    """mteb's result cache knows a model by name and revision: it gave a changed model its old figures."""
    before = evaluate(WordCounts(seed=0), [str(words)])
    after = evaluate(WordCounts(seed=0, dimensions=8), [str(words)])
    assert after.tasks["words"]["ndcg_at_10"] < before.tasks["words"]["ndcg_at_10"] - 0.1


def test_same_model_gives_the_same_digits(words):
    assert evaluate(WordCounts(), [str(words)]) == evaluate(WordCounts(), [str(words)])


def test_order_of_the_files_does_not_matter(words, tmp_path):
    """With ties: 8 dimensions give many documents the very same score."""
    turned = shutil.copytree(words, tmp_path / "turned" / "words")
    for file in (turned / "corpus.jsonl", turned / "queries.jsonl", turned / "qrels" / "test.tsv"):
        file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    model = WordCounts(dimensions=8)
    assert evaluate(model, [str(words)]) == evaluate(model, [str(turned)])


def test_non_finite_embeddings_are_refused(fruit):
    with pytest.raises(
        FloatingPointError, match="the vectors of 1 of 3 texts are not finite, the first is fruit: document d2"
    ):
        evaluate(WordCounts(break_at=1), [str(fruit)])


def test_non_finite_scores_are_refused(fruit):
    """Regression: finite vectors whose product is -inf ended in an IndexError."""

    class Huge(WordCounts):
        def encode(self, texts, prompt=None, show_progress=False):
            return super().encode(texts, prompt) * np.float32(-3e38 if prompt == "document" else 3e38)

    with np.errstate(over="ignore"), pytest.raises(FloatingPointError, match="fruit: products .* are not finite"):
        evaluate(Huge(), [str(fruit)])


def test_queries_without_a_positive_judgement_do_not_count(tmp_path):
    extra = FRUIT["qrels"] + "q3\td1\t0\n"
    plain = evaluate(WordCounts(), [str(write_folder(tmp_path / "a" / "fruit", **FRUIT))])
    more = evaluate(WordCounts(), [str(write_folder(tmp_path / "b" / "fruit", **FRUIT | {"qrels": extra}))])
    assert plain == more
    assert set(more.per_query["fruit"]["ndcg_at_10"]) == {"q1", "q2"}


def test_several_folders_and_their_average(fruit, words, tmp_path):
    twin = shutil.copytree(fruit, tmp_path / "other" / "fruit")
    result = evaluate(WordCounts(), [str(fruit), str(words), str(fruit), str(twin)])
    assert list(result.tasks) == [str(fruit), "words", str(twin)]
    means = result.average()
    assert means["mrr_at_10"] == pytest.approx(np.mean([s["mrr_at_10"] for s in result.tasks.values()]))
    assert evaluate(WordCounts(), []).average() == {}


def test_no_folder_takes_the_place_of_another(fruit, tmp_path, monkeypatch):
    """Regression: of a/x and x only the second was evaluated, and x and ./x counted twice."""
    smaller = write_folder(tmp_path / "other" / "fruit", FRUIT["corpus"][:2], FRUIT["queries"], "q1\td1\t1\n")
    monkeypatch.chdir(fruit.parent)
    loaded, _ = load_tasks([str(smaller), "fruit", "./fruit"])
    assert {label: len(task.corpus.ids) for label, task in loaded.items()} == {str(smaller): 2, str(fruit): 3}
    loaded, _ = load_tasks(["./fruit", "fruit"])
    assert list(loaded) == ["fruit"]


def test_a_folder_is_read_once(fruit, monkeypatch):
    """Training evaluates every N steps: reading a large folder again each time would take longer than ranking it."""
    read = []
    read_texts = beir.read_texts
    monkeypatch.setattr(beir, "read_texts", lambda *args, **kwargs: read.append(args) or read_texts(*args, **kwargs))
    first = evaluate(WordCounts(), [str(fruit)])
    assert len(read) == 2  # queries and documents
    assert evaluate(WordCounts(), [str(fruit)]).tasks == first.tasks and len(read) == 2


# --- folders ---


def test_folder_is_read_again_only_when_a_file_changes(fruit):
    names = [str(fruit)]
    assert evaluation_tasks.load(fruit) is evaluation_tasks.load(fruit)
    with (fruit / "qrels" / "test.tsv").open("a") as file:
        file.write("q3\td1\t1\n")
    assert evaluate(WordCounts(), names).tasks["fruit"]["precision_at_1"] == pytest.approx(2 / 3, abs=1e-5)


def test_forms_of_a_sound_folder(tmp_path, fruit):
    """gzip, no header line, a byte order mark, Windows line ends, `id` and numbers for ids, dev.tsv, another .tsv."""
    expected = evaluate(WordCounts(), [str(fruit)]).tasks["fruit"]
    other = write_folder(tmp_path / "other", None, FRUIT["queries"], "q1\td1\t1\r\nq2\td2\t1\r\n", "dev.tsv")
    with gzip.open(other / "corpus.jsonl.gz", "wt", encoding="utf-8-sig") as file:
        file.writelines(json.dumps(row) + "\n\n" for row in FRUIT["corpus"])
    assert evaluate(WordCounts(), [str(other)]).tasks["other"] == expected
    (other / "qrels" / "train.tsv").write_text("nonsense")  # dev.tsv goes before it
    assert evaluate(WordCounts(), [str(other)]).tasks["other"] == expected
    numbers = [{"id": int(row["_id"][1:]), "text": row["text"], "title": None} for row in FRUIT["corpus"]]
    single = write_folder(tmp_path / "single", numbers, FRUIT["queries"], "q1\t1\t1\nq2\t2\t1\n", "validation.tsv")
    assert set(evaluate(WordCounts(), [str(single)]).tasks["single"]) == set(METRICS)


BROKEN_JSON = '{"_id": "d1", "text": "x"}\n{"_id": "d2", \n'
TWICE = [{"_id": "d1", "text": "x"}, {"_id": "d1", "text": "y"}]
BAD_FOLDERS = {
    "no corpus": ({"corpus": None}, r"corpus\.jsonl: no such file"),
    "no queries": ({"queries": None}, r"queries\.jsonl: no such file"),
    "no qrels": ({"qrels": None}, r"test\.tsv: no such file, nor dev\.tsv or a single other"),
    "empty corpus": ({"corpus": []}, r"corpus\.jsonl: empty"),
    "empty queries": ({"queries": "\n"}, r"queries\.jsonl: empty"),
    "empty qrels": ({"qrels": ""}, r"test\.tsv: no query has a positive judgement"),
    "broken JSON": ({"corpus": BROKEN_JSON}, r"corpus\.jsonl:2: broken JSON"),
    "no object": ({"corpus": "[1]\n"}, r"corpus\.jsonl:1: not a JSON object"),
    "no id": ({"corpus": [{"text": "x"}]}, r'corpus\.jsonl:1: "_id" is missing'),
    "no text": ({"queries": [{"_id": "q1"}]}, r'queries\.jsonl:1: "text" is missing'),
    "text is a number": ({"queries": [{"_id": "q1", "text": 3}]}, r'queries\.jsonl:1: "text" is missing or not a text'),
    "title is a list": ({"corpus": [{"_id": "d", "text": "x", "title": ["y"]}]}, r'corpus\.jsonl:1: "title"'),
    "id twice": ({"corpus": TWICE}, r"corpus\.jsonl:2: the id d1 occurs twice"),
    "two fields": ({"qrels": "q1\td1\n"}, r"test\.tsv:1: 2 fields between tabs, not 3"),
    "spaces": ({"qrels": "q1 d1 1\n"}, r"test\.tsv:1: 1 field between tabs, not 3"),
    "unknown queries": ({"qrels": "q9\td1\t1\n"}, r"test\.tsv: no query has a positive judgement"),
    "unknown documents": ({"qrels": "q1\td9\t1\n"}, r"test\.tsv: no judged document is in the corpus"),
    "a query of null": (
        {"queries": [{"_id": "q1", "text": None}]},
        r'queries\.jsonl:1: "text" is missing or not a text',
    ),
    "not an integer": ({"qrels": "a\tb\tc\nq1\td1\t0.5\n"}, r"test\.tsv:2: the judgement '0\.5' is not an integer"),
    "of ten digits": (
        {"qrels": "q1\td1\t9999999999\n"},
        r"tsv:1: the judgement '9999999999' has more than nine digits",
    ),
    "first not an integer": ({"qrels": "q1\td1\tyes\n"}, r"test\.tsv:1: the judgement 'yes' is not an integer"),
    "no positive": ({"qrels": "q1\td1\t0\nq2\td1\t-1\n"}, r"test\.tsv: no query has a positive judgement"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder(tmp_path, case):
    change, message = BAD_FOLDERS[case]
    folder = write_folder(tmp_path / "bad", **FRUIT | change)
    with pytest.raises(UserError, match=message):
        beir.check_folders([str(folder)])
    with pytest.raises(UserError, match=message):
        evaluate(WordCounts(), [str(folder)])


def test_bad_bytes(tmp_path):
    folder = write_folder(tmp_path / "bad", **FRUIT)
    (folder / "queries.jsonl").write_bytes(b'{"_id": "q1", "text": "\xff"}\n')
    with pytest.raises(UserError, match=r"queries\.jsonl:1: not UTF-8 \(byte 24 of the line\)"):
        beir.check_folders([str(folder)])
    (folder / "corpus.jsonl").rename(folder / "corpus.jsonl.gz")
    with pytest.raises(UserError, match=r"corpus\.jsonl\.gz: Not a gzipped file"):
        beir.check_folders([str(folder)])
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(b'{"_id": "d1", "text": "x"}\n')[:-12])
    with pytest.raises(UserError, match=r"corpus\.jsonl\.gz: "):
        beir.check_folders([str(folder)])


# --- tasks of MTEB ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NanoMSMARCORetrievl", f"neither a folder nor an MTEB task; close: {NANO}"),
        ("Banking77Classification", "a task of type Classification; only Retrieval and STS can be evaluated"),
        ("CQADupstackRetrieval", "a bundle; name the tasks: CQADupstackAndroidRetrieval "),
        ("VisRAGRetArxivQA", "about text, image; only tasks of text"),
    ],
)
def test_wrong_task_names(name, message):
    with pytest.raises(UserError, match=message):
        evaluate(WordCounts(), [name])


def test_unreachable_task_is_told_in_one_line(no_hub, fruit, capfd):
    result = evaluate(WordCounts(), [NANO, str(fruit)])
    (line,) = result.unreachable.values()
    for part in (
        f"mteb/{NANO}",
        "5a5aa0c3df65d6883d85c8f5cdc88e679633595e",
        str(no_hub),
        "HF_HUB_OFFLINE",
        "hf download",
    ):
        assert part in line
    assert "\n" not in line
    assert list(result.tasks) == ["fruit"]
    assert result.average() == result.tasks["fruit"]
    assert result.to_json()["unreachable"] == result.unreachable
    assert capfd.readouterr() == ("", "")
    print_table(result)
    assert f"{NANO} (unreachable)" in capfd.readouterr().out


def test_copy_in_the_cache_needs_no_hub(no_hub):
    """And the split is the task's own: `train`, for the Nano tasks."""
    from mteb import get_task

    folder = no_hub / f"datasets--mteb--{NANO}" / "snapshots" / get_task(NANO).metadata.dataset["revision"]
    folder.mkdir(parents=True)
    tables = {name: FRUIT[name] for name in ("corpus", "queries")}
    tables["qrels"] = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in (1, 2, 3)]
    card = ["---", "configs:"]
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"title": ""} | row) + "\n" for row in rows))
        card += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {name}.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    result = evaluate(WordCounts(), [NANO])
    assert result.unreachable == {}
    assert result.tasks[NANO]["ndcg_at_10"] == 1.0
    assert set(result.per_query[NANO]["mrr_at_10"]) == {"q1", "q2", "q3"}


# --- comparison ---


def made_up(name: str, scores: dict[str, np.ndarray]) -> Evaluation:
    """An evaluation whose four metrics are alike: task -> scores of its queries."""
    per_query = {task: {m: {f"q{i}": float(v) for i, v in enumerate(x)} for m in METRICS} for task, x in scores.items()}
    tasks = {task: dict.fromkeys(METRICS, round(float(np.mean(x)), 5)) for task, x in scores.items()}
    return Evaluation(name, tasks, per_query, {})


def test_interval_equals_a_plain_loop():
    rng = np.random.default_rng(1)
    before = {"a": rng.random(60), "b": rng.random(25)}
    after = {task: np.clip(x + rng.normal(0.05, 0.2, len(x)), 0, 1) for task, x in before.items()}
    metric, old, new, difference, low, high = compare(made_up("x", before), made_up("y", after))[0]
    assert metric == "ndcg_at_10"
    assert difference == new - old
    assert new == pytest.approx((after["a"].mean() + after["b"].mean()) / 2, abs=1e-5)
    loop, draws = np.random.default_rng(99), []
    for _ in range(4000):
        means = []
        for task in before:
            rows = loop.integers(len(before[task]), size=len(before[task]))
            means.append(after[task][rows].mean() - before[task][rows].mean())
        draws.append(sum(means) / 2)
    assert [low, high] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.004)


def test_interval_holds_the_true_difference_as_often_as_it_says():
    rng, held = np.random.default_rng(2), 0
    for _ in range(200):
        x, change = rng.random(80), rng.normal(0.03, 0.1, 80)
        row = compare(made_up("x", {"a": x}), made_up("y", {"a": x + change}), resamples=400)[0]
        held += row[4] <= 0.03 <= row[5]
    assert 180 <= held <= 199  # 95 % of 200, give or take


def test_comparison_is_deterministic():
    rng = np.random.default_rng(3)
    x, y = made_up("x", {"a": rng.random(1000)}), made_up("y", {"a": rng.random(1000)})
    rows = compare(x, y)
    assert rows == compare(x, y)
    assert compare(x, y, seed=1) != rows
    assert all(row[3:] == (0.0, 0.0, 0.0) for row in compare(x, x))


def test_comparison_of_what_can_not_be_compared():
    x = made_up("x", {"a": np.ones(3)})
    with pytest.raises(UserError, match="no task in common"):
        compare(x, made_up("y", {"b": np.ones(3)}))
    with pytest.raises(UserError, match="a: the two evaluations asked different queries"):
        compare(x, made_up("y", {"a": np.ones(4)}))


# --- stored forms ---


FORMS = [
    *(
        VectorFormat(*form)
        for form in (("float32", 256), ("int8", 256), ("binary", 256), ("float32", 64), ("uint8", 64))
    ),
    VectorFormat("ubinary", 60, float_queries=True),
]


def test_stored_forms_embed_every_text_once(words, fruit):
    model = WordCounts()
    whole, stored = retrieval.evaluate_formats(model, [str(words), str(fruit)], FORMS)
    assert [prompt for prompt, _ in model.calls] == ["query", "document"] * 2
    assert whole == evaluate(WordCounts(), [str(words), str(fruit)])
    assert stored[FORMS[0]] == whole
    assert list(stored) == FORMS and all(list(result.tasks) == ["words", "fruit"] for result in stored.values())


def test_stored_forms_score_as_a_search_of_them_would(words):
    """Against a search by hand: nDCG@10 of a plain ranking of quantised vectors."""
    corpus, queries = (
        [json.loads(line) for line in (words / f"{name}.jsonl").read_text().splitlines()]
        for name in ("corpus", "queries")
    )
    dense = Dense()
    documents, asked = (dense.encode([row["text"] for row in rows]) for rows in (corpus, queries))
    forms = [VectorFormat("int8", 64), VectorFormat("ubinary", 60), VectorFormat("ubinary", 60, float_queries=True)]
    _, stored = retrieval.evaluate_formats(dense, [str(words)], forms)
    qrels = evaluation_tasks.load(words).qrels

    levels = quantization.quantise(documents, "uint8", quantization.ranges(documents)).astype(np.float64)
    low, high = quantization.ranges(documents)
    by_bytes = asked.astype(np.float64) @ (levels * ((high - low) / 255)).T  # queries stay float32
    bits = [quantization.quantise(quantization.truncate(part, 60), "ubinary") for part in (asked, documents)]
    by_bits = -np.unpackbits(bits[0][:, None] ^ bits[1][None], axis=-1).sum(axis=-1).astype(np.float64)
    signs = 2.0 * np.unpackbits(bits[1], axis=-1)[:, :60] - 1
    by_signs = quantization.truncate(asked, 60).astype(np.float64) @ signs.T
    for form, scores in zip(forms, (by_bytes, by_bits, by_signs), strict=True):
        rankings = {
            query["_id"]: {document["_id"]: float(score) for document, score in zip(corpus, row, strict=True)}
            for query, row in zip(queries, scores, strict=True)
        }
        expected = retrieval.score_rankings(qrels, rankings)["ndcg_at_10"]
        assert stored[form].per_query["words"]["ndcg_at_10"] == pytest.approx(expected, abs=1e-6)
    assert len({str(evaluation.tasks) for evaluation in stored.values()}) == 3


class Dense(WordCounts):
    """Vectors without many ties: hashed word counts, turned by a random matrix."""

    def encode(self, texts, prompt=None, show_progress=False):
        turned = super().encode(texts, prompt) @ np.random.default_rng(0).normal(size=(256, 64))
        return (turned / np.linalg.norm(turned, axis=1, keepdims=True)).astype(np.float32)


def test_command_with_stored_forms(monkeypatch, capsys, tmp_path, words):
    from mlx_retrieval.inference import embedder

    monkeypatch.setattr(embedder, "load", lambda *_, **__: WordCounts(name="m"))
    file = tmp_path / "results.json"
    command = ["--model", "m", "--eval-tasks", str(words), "--output", str(file), "--overwrite"]
    assert evaluation.main([*command, "--precision", "float32", "int8", "binary", "--dimensions", "256", "32"]) == 0
    out = capsys.readouterr().out
    record = json.loads(file.read_text())
    whole = evaluate(WordCounts(name="m"), [str(words)])
    assert record == whole.to_json() | {"stored": record["stored"]}
    kinds = (("float32", "float32", 32), ("int8", "float32", 8), ("binary", "bits", 1), ("binary", "float32", 1))
    forms = [(p, d, d * bits // 8) for d in (256, 32) for p, _, bits in kinds]
    assert [(r["precision"], r["dimensions"], r["bytes"]) for r in record["stored"]] == forms
    short = evaluate(WordCounts(), [str(words)]).tasks["words"] | record["stored"][4]["tasks"]["words"]
    for entry in record["stored"]:
        assert entry["ndcg_at_10"] == entry["tasks"]["words"]["ndcg_at_10"]
        assert entry["difference"] == entry["ndcg_at_10"] - whole.tasks["words"]["ndcg_at_10"]
        assert entry["low"] <= entry["difference"] <= entry["high"]
    first = record["stored"][0]
    assert (first["difference"], first["low"], first["high"]) == (0, 0, 0)
    assert short["ndcg_at_10"] < whole.tasks["words"]["ndcg_at_10"] - 0.05  # 32 of 256 hashed words
    assert {"ranges", "Hamming"} <= {*out.split()}
    assert max(map(len, out.splitlines())) <= 80
    rows = [line.split() for line in out.splitlines() if line.strip()]
    for entry, (_, queries, _) in zip(record["stored"], kinds * 2, strict=True):
        figures = [f"{entry['dimensions']}", f"{entry['bytes']:,}"]
        figures += [f"{entry['ndcg_at_10']:.4f}", f"{entry['difference']:+.4f}"]
        assert [entry["precision"], queries, *figures] in [r[:6] for r in rows]
    assert evaluation.main([*command, "--dimensions", "257"]) == 2
    assert "--dimensions 257: the model's vectors have 256" in capsys.readouterr().err
    assert evaluation.main(command) == 0  # without the flags, all is as before
    assert "stored" not in json.loads(file.read_text()) and "stored as" not in capsys.readouterr().out


def test_late_interaction_has_no_stored_forms(fruit):
    model = WordCounts()
    model.late = True
    with pytest.raises(UserError, match="not for late interaction"):
        retrieval.evaluate_formats(model, [str(fruit)], [VectorFormat("binary", 256)])


def test_non_finite_embeddings_are_refused_before_bits_hide_them(fruit):
    with pytest.raises(
        FloatingPointError, match="the vectors of 1 of 3 texts are not finite, the first is fruit: document d2"
    ):
        retrieval.evaluate_formats(WordCounts(break_at=1), [str(fruit)], [VectorFormat("binary", 256)])


# --- tables and command ---


def test_tables_are_plain_when_piped(capsys):
    x = made_up(
        "adapters/[final]", {"eval-data": np.array([0.25, 0.5]), "a-task-with-a-very-long-name" * 3: np.ones(2)}
    )
    print_table(replace(x, unreachable={NANO: "why"}))
    table = capsys.readouterr().out
    print_comparison(x, replace(made_up("y", {"eval-data": np.array([0.5, 0.5])})))
    comparison = capsys.readouterr().out
    for text in (table, comparison):
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= 80
    assert "adapters/[final]" in table
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.strip()}
    assert rows["task"] == ["nDCG@10", "MRR@10", "Recall@100", "P@1"]
    assert rows["eval-data"] == ["0.3750"] * 4
    assert rows["average"] == ["0.6875"] * 4
    row = next(line for line in comparison.splitlines() if "nDCG@10" in line)
    assert row.split() == ["nDCG@10", "0.3750", "0.5000", "+0.1250", "[+0.0000,", "+0.2500]"]
    assert "eval-data: 2 queries" in comparison


def test_command(monkeypatch, capsys, tmp_path, fruit, no_hub):
    from mlx_retrieval.inference import embedder

    seen = []

    def load(path, adapter=None, **overrides):
        seen.append((path, adapter, overrides))
        return WordCounts(name=path)

    monkeypatch.setattr(embedder, "load", load)
    file = tmp_path / "results.json"
    lengths = ["--max-length", "64", "--query-max-length", "16", "--dtype", "bfloat16"]
    command = ["--model", "m", "--adapter", "a", *lengths, "--output", str(file), "--overwrite", "--eval-tasks"]
    assert evaluation.main([*command, str(fruit)]) == 0
    assert seen == [("m", "a", {"max_length": 64, "query_max_length": 16, "dtype": "bfloat16"})]
    assert json.loads(file.read_text()) == evaluate(WordCounts(name="m"), [str(fruit)]).to_json()
    assert "fruit" in capsys.readouterr().out
    assert evaluation.main([*command, str(fruit), NANO]) == 1
    assert f"eval.py: {NANO}: data set mteb/{NANO}" in capsys.readouterr().err
    assert json.loads(file.read_text())["unreachable"].keys() == {NANO}
    assert evaluation.main([*command, NANO]) == 2
    capsys.readouterr()
    monkeypatch.setattr(embedder, "load", lambda *_, **__: WordCounts(break_at=0))
    assert evaluation.main(["--model", "m", "--eval-tasks", str(fruit)]) == 2
    assert "not finite" in capsys.readouterr().err


def test_command_finds_mistakes_before_it_loads_a_model(capsys, tmp_path):
    for arguments, message in (
        (["--eval-tasks", str(tmp_path / "nowhere")], "nowhere: no such folder"),
        (["--eval-tasks", str(tmp_path)], "corpus.jsonl: no such file"),
        (["--output", str(ROOT / "README.md" / "results.json")], "README.md is not a folder"),
        (["--output", str(tmp_path)], "this is a folder, not a file"),
    ):
        assert evaluation.main(["--model", "m", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_command_replaces_its_output_or_leaves_it(monkeypatch, capsys, tmp_path, fruit):
    """Regression: the file was opened for writing in place, and an error named no flag."""
    from mlx_retrieval.inference import embedder

    monkeypatch.setattr(embedder, "load", lambda *_, **__: WordCounts(name="m"))
    file = tmp_path / "results.json"
    file.write_text("old")
    command = ["--model", "m", "--eval-tasks", str(fruit), "--output", str(file), "--overwrite"]

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full_disk:
        full_disk.setattr(os, "fsync", fsync)
        assert evaluation.main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"eval.py: --output {file}: No space left on device"
    assert file.read_text() == "old" and list(tmp_path.glob(".*")) == []
    assert evaluation.main(command) == 0
    assert json.loads(file.read_text())["model"] == "m"


def test_help_is_light():
    code = "import sys, eval; sys.argv[1:] = ['--help']\ntry: eval.main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('mteb', 'torch.nn', 'datasets', 'transformers', 'mlx_lm') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert "--eval-tasks" in run.stdout
