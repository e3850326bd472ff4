"""Data sets of mteb's tasks as the Hub's cache holds them: a folder of parquet files, and a card that names them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Tables = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # configuration -> split -> rows


def publish(cache: Path, task: Any, tables: Tables) -> Path:
    """Write the data of a task into a cache of the Hub, at the revision that mteb asks for, and return its folder."""
    from datasets import Dataset

    dataset = task.metadata.dataset
    folder = cache / f"datasets--{dataset['path'].replace('/', '--')}" / "snapshots" / dataset["revision"]
    card = ["---", "configs:"]
    for config, splits in tables.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            file = Path(config) / f"{split}-00000-of-00001.parquet"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_list([*map(dict, rows)]).to_parquet(folder / file)
            card += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


TOPICS = {"the cat sat on a mat": 0, "rain fell on the town all day": 1}
MORE = ("today", "again", "as ever", "in the end", "they say", "of course", "by night", "at noon", "in May", "twice")
LABELLED = [{"text": f"{text} {more}", "label": label} for text, label in TOPICS.items() for more in MORE]
SAME = [("a cat sat down", "the cat was seated", 4.5), ("it rained", "a cat sat", 0.5), ("it rained", "rain fell", 4.0)]
DOCUMENTS = [{"_id": f"d{i}", "title": "", "text": row["text"]} for i, row in enumerate(LABELLED)]
QUERIES = [{"_id": "q0", "text": "what did the cat do again"}, {"_id": "q1", "text": "did rain fall at noon"}]
QRELS = [{"query-id": f"q{i}", "corpus-id": d, "score": 1} for i, d in ((0, "d1"), (0, "d2"), (1, "d17"))]
RANKED = [{"query-id": f"q{i}", "corpus-ids": [f"d{j}" for j in range(1, 20, 2)] + ["d2"]} for i in (0, 1)]
SUMMARY = {"text": "It rained all day, and the cat sat on its mat.", "human_summaries": ["A cat on a rainy day."]}
JUDGED = {"machine_summaries": ["A cat sat inside as it rained.", "Trains were late."], "relevance": [4.0, 1.0]}


def tables_of(kind: str, split: str) -> Tables:
    """The data of a task of this type, in the layout that mteb's tasks of the type have on the Hub."""
    pairs = [{"sentence1": one, "sentence2": two, "score": score} for one, two, score in SAME]
    sides = {"sent1": [one for one, _, _ in SAME], "sent2": [two for _, two, _ in SAME], "labels": [1, 0, 1]}
    many = LABELLED * 50  # mteb embeds one in 25
    clusters = {"sentences": [row["text"] for row in many], "labels": [row["label"] for row in many]}
    searched = {"corpus": {split: DOCUMENTS}, "queries": {split: QUERIES}, "qrels": {split: QRELS}}
    return {
        "STS": {"default": {split: pairs}},
        "Classification": {"default": {"train": LABELLED, split: LABELLED[::3]}},
        "Clustering": {"default": {split: [clusters]}},
        "PairClassification": {"default": {split: [sides]}},
        "Summarization": {"default": {split: [SUMMARY | JUDGED]}},
        "Retrieval": searched,
        "Reranking": searched | {"top_ranked": {split: RANKED}},
    }[kind]
