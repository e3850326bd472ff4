"""A folder in BEIR layout as a task of mteb's, made as its documentation has it, by none of the toolkit's code."""

import json
from pathlib import Path


def mteb_task(folder: Path):
    from datasets import Dataset
    from mteb import TaskMetadata
    from mteb.abstasks import AbsTaskRetrieval

    documents, queries = (
        [json.loads(line) for line in (folder / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()]
        for stem in ("corpus", "queries")
    )
    qrels: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels" / "test.tsv").read_text().splitlines():
        query, document, judgement = line.split("\t")
        if judgement.lstrip("-").isdigit():
            qrels.setdefault(query, {})[document] = int(judgement)
    metadata = TaskMetadata(
        name="LocalFolder",
        description="A folder in BEIR layout.",
        dataset={"path": str(folder), "revision": "local"},
        type="Retrieval",
        category="t2t",
        eval_langs=["eng-Latn"],
        eval_splits=["test"],
        main_score="ndcg_at_10",
    )
    rows = [{"id": row["_id"], "title": row.get("title") or "", "text": row["text"] or ""} for row in documents]
    asked = [{"id": row["_id"], "text": row["text"]} for row in queries if row["_id"] in qrels]
    task = type("LocalFolder", (AbsTaskRetrieval,), {"metadata": metadata})()
    split = {"corpus": Dataset.from_list(rows), "queries": Dataset.from_list(asked), "relevant_docs": qrels}
    task.dataset, task.data_loaded = {"default": {"test": {**split, "top_ranked": None}}}, True
    return task
