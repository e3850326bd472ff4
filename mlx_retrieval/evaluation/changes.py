"""The queries that two evaluations answer most differently, with the documents that each found first.

gained, lost = largest_changes(before, after, load_tasks(["my-eval"])[0])
gained[0].before, gained[0].after          # nDCG@10
gained[0].documents_after[0].text          # the beginning of the first document
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlx_retrieval.evaluation.results import Evaluation
from mlx_retrieval.evaluation.tasks import Judged, Task
from mlx_retrieval.utils.text import excerpt

METRIC = "ndcg_at_10"
SHOWN = 3  # documents of a ranking
QUERY_LENGTH, DOCUMENT_LENGTH = 300, 240  # characters


@dataclass(frozen=True)
class Found:
    """A document in a ranking: its id, the beginning of its text, and whether it is judged relevant."""

    id: str
    text: str
    relevant: bool


@dataclass(frozen=True)
class QueryChange:
    """One query in two evaluations. `rank`: of the first relevant document, from 1; None = not among the first ten."""

    task: str
    id: str
    text: str
    before: float
    after: float
    rank_before: int | None
    rank_after: int | None
    documents_before: list[Found]
    documents_after: list[Found]

    @property
    def difference(self) -> float:
        return self.after - self.before


def largest_changes(
    before: Evaluation, after: Evaluation, tasks: Mapping[str, Task], count: int = 20
) -> tuple[list[QueryChange], list[QueryChange]]:
    """Return the queries that gained most in nDCG@10 and those that lost most, `count` of each at most.

    Args:
        before, after: evaluations of the same queries.
        tasks: their tasks by label, from `retrieval.load_tasks`.
    """
    changes = []
    for label in after.tasks:
        if label in before.tasks and label in before.top_documents and label in after.top_documents:
            old, new = (evaluation.per_query[label][METRIC] for evaluation in (before, after))
            changes += [(new[query] - old[query], label, query) for query in new if query in old]
    ordered = sorted(changes, key=lambda change: (-change[0], *change[1:]))
    gained = [tuple(place) for difference, *place in ordered[:count] if difference > 0]
    lost = [tuple(place) for difference, *place in reversed(ordered[-count:]) if difference < 0]
    described: dict[tuple[str, str], QueryChange] = {}
    for label in {label for label, _ in gained + lost}:
        queries = [query for name, query in gained + lost if name == label]
        described |= {(label, c.id): c for c in _describe(before, after, label, queries, _judged(label, tasks))}
    return [described[place] for place in gained], [described[place] for place in lost]


def _judged(label: str, tasks: Mapping[str, Task]) -> Judged:
    """Return the data of a label: a task's, or one of its splits and subsets, as in `retrieval.add_task`."""
    if label in tasks:
        return tasks[label].judged()
    name, split, subset = label.rsplit("/", 2)
    return tasks[name].judged((split, subset))


def _describe(
    before: Evaluation, after: Evaluation, label: str, queries: Sequence[str], judged: Judged
) -> Iterator[QueryChange]:
    """Yield the changes of these queries, with the texts of the documents that are shown."""
    rankings = {q: [evaluation.top_documents[label].get(q, []) for evaluation in (before, after)] for q in queries}
    wanted = {name for pair in rankings.values() for ranking in pair for name in ranking[:SHOWN]}
    # One pass: a corpus may have millions of documents.
    numbers = {name: i for i, name in enumerate(judged.corpus.ids) if name in wanted}
    texts = dict(zip(numbers, judged.corpus.texts(list(numbers.values())), strict=True))
    for query in queries:
        relevant = {document for document, grade in judged.qrels.get(query, {}).items() if grade > 0}
        ranks = [next((i for i, name in enumerate(r, 1) if name in relevant), None) for r in rankings[query]]
        documents = [
            [Found(name, excerpt(texts.get(name, ""), DOCUMENT_LENGTH), name in relevant) for name in ranking[:SHOWN]]
            for ranking in rankings[query]
        ]
        scores = (evaluation.per_query[label][METRIC][query] for evaluation in (before, after))
        text = excerpt(judged.queries.get(query, ""), QUERY_LENGTH)
        yield QueryChange(label, query, text, *scores, *ranks, *documents)
