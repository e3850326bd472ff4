"""The queries that two evaluations answer most differently.

python -m pytest tests/evaluation/test_changes.py
"""

import pytest
from beir_folders import WordCounts, write_folder

from mlx_retrieval.evaluation.changes import DOCUMENT_LENGTH, Found, largest_changes
from mlx_retrieval.evaluation.results import METRICS, Evaluation
from mlx_retrieval.evaluation.retrieval import evaluate, load_tasks

LONG = "grape " * 40_000  # 240 KB


@pytest.fixture
def shop(tmp_path):
    """A folder's tasks: three queries, and documents of which d5 is long."""
    corpus = [
        {"_id": f"d{i}", "title": "T", "text": text} for i, text in enumerate(["pear", "plum", "fig", "kiwi", "lime"])
    ]
    corpus.append({"_id": "d5", "text": LONG})
    queries = [{"_id": f"q{i}", "text": text} for i, text in enumerate(["pears\nfor\tall", "plums", "figs"])]
    folder = write_folder(
        tmp_path / "shop", corpus, queries, "q0\td0\t1\nq1\td1\t2\nq1\td9\t0\nq2\td2\t1\n".replace("d9", "d4")
    )
    return load_tasks([str(folder)])[0]


def by_hand(scores: dict[str, float], found: dict[str, list[str]]) -> Evaluation:
    return Evaluation(
        "m", {"shop": dict.fromkeys(METRICS, 0.5)}, {"shop": dict.fromkeys(METRICS, scores)}, {}, {"shop": found}
    )


def test_what_gained_and_what_lost(shop):
    found = {"q0": ["d5", "d4", "d0", "d1"], "q1": ["d1"], "q2": ["d3"]}
    before = by_hand({"q0": 0.5, "q1": 1.0, "q2": 0.0}, found)
    after = by_hand({"q0": 1.0, "q1": 0.25, "q2": 0.0}, found | {"q0": ["d0", "d1", "d2", "d3"], "q1": []})
    gained, lost = largest_changes(before, after, shop)
    (gain,), (loss,) = gained, lost  # q2 did neither
    assert (gain.id, gain.text, gain.before, gain.after, gain.difference) == ("q0", "pears for all", 0.5, 1.0, 0.5)
    assert (gain.rank_before, gain.rank_after) == (3, 1)
    assert gain.documents_after == [
        Found("d0", "T pear", True),
        Found("d1", "T plum", False),
        Found("d2", "T fig", False),
    ]
    assert [d.id for d in gain.documents_before] == ["d5", "d4", "d0"]
    assert len(gain.documents_before[0].text) <= DOCUMENT_LENGTH + 1 and gain.documents_before[0].text.endswith(
        "grape…"
    )
    assert (loss.id, loss.rank_before, loss.rank_after, loss.documents_after) == ("q1", 1, None, [])
    assert loss.documents_before[0].relevant and loss.difference == -0.75


def test_the_largest_of_many(words):
    before, after = (evaluate(WordCounts(seed=s, dimensions=48), [str(words)]) for s in (1, 2))
    tasks = load_tasks([str(words)])[0]
    gained, lost = largest_changes(before, after, tasks, count=5)
    old, new = (e.per_query["words"]["ndcg_at_10"] for e in (before, after))
    differences = sorted((new[q] - old[q] for q in old), reverse=True)
    assert [change.difference for change in gained] == differences[:5]
    assert [change.difference for change in lost] == differences[:-6:-1]
    assert all(len(change.documents_after) == 3 for change in gained + lost)
    assert largest_changes(before, before, tasks) == ([], [])


def test_evaluations_without_documents_have_no_changes(shop):
    """A run that was begun by an older version has none in its before.json."""
    scores = {"q0": 0.5, "q1": 1.0, "q2": 0.0}
    old = Evaluation("m", {"shop": {}}, {"shop": {"ndcg_at_10": scores}}, {})
    assert largest_changes(old, by_hand(scores, {}), shop) == ([], [])


def test_documents_that_are_gone_have_no_text(shop):
    """A resumed run whose corpus has changed, with --accept-changed-data."""
    before = by_hand({"q0": 0.0}, {"q0": ["gone", "d1"]})
    (gain,), _ = largest_changes(before, by_hand({"q0": 1.0}, {"q0": ["d0"]}), shop)
    assert gain.documents_before == [Found("gone", "", False), Found("d1", "T plum", False)]


@pytest.mark.slow
def test_changes_in_a_task_of_mteb(words):
    from mteb_folder import mteb_task

    from mlx_retrieval.evaluation import mteb_tasks, retrieval

    direct = largest_changes(*(evaluate(WordCounts(seed=s, dimensions=48), [str(words)]) for s in (1, 2)),
                             load_tasks([str(words)])[0])  # fmt: skip
    task, evaluations = mteb_tasks.MtebTask(mteb_task(words)), []
    for seed in (1, 2):
        evaluations.append(Evaluation("toy", {}, {}, {}))
        model = WordCounts(seed=seed, dimensions=48)
        retrieval.add_task(evaluations[-1], retrieval.searcher_for(model, "words"), task)
    assert largest_changes(*evaluations, {"words": task}) == direct
