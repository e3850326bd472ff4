"""Words, meaning, and both: what hybrid search is worth on texts and on code, before and after training.

    pip install -r benchmarks/requirements.txt
    python benchmarks/hybrid.py --data ../shared/data/medquad --work FOLDER         # 20 minutes on 2 cores, an estimate
    python benchmarks/hybrid.py --work FOLDER --sets stdlib repository --model tuned=adapters/final --steps 0
    python benchmarks/hybrid.py --work FOLDER --sets repository toolkit --reranker adapters/cross/best

Sets: the test folder of MedQuAD; docstrings of held-out modules of the standard library and of NumPy that look for
their functions (code); the same docstrings' first paragraphs that look for the others (prose); the questions of
eval-data/this-repository.jsonl over this repository, and over its commands, package and pages alone (toolkit). Models:
all-MiniLM-L6-v2 as it is; trained on code pairs of the other modules of the standard library; and those of `--model`.
Prints nDCG@10 of words, meaning, both fused by scores and by ranks, the difference of both to the better one with its
interval, and nDCG@10 by the weight of the meaning; of this repository P@1 and MRR@10, too, with a reranker as well.
What is in FOLDER from an earlier call is not computed again. Figures in benchmarks/README.md.
"""

import argparse
import json
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from code_search import hold_out, write_task
from sides import ROOT, minilm

import train
from mlx_retrieval import backend
from mlx_retrieval.dataset.source_code.definitions import definitions
from mlx_retrieval.dataset.source_code.docstrings import strip_markers, summary
from mlx_retrieval.dataset.source_code.languages import LANGUAGES
from mlx_retrieval.evaluation import index_answers, index_search
from mlx_retrieval.evaluation.index_search import Query, figures_of
from mlx_retrieval.evaluation.results import Evaluation, compare
from mlx_retrieval.inference.embedder import Model, load
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.mining.code_pairs import Pair, pairs
from mlx_retrieval.retrieval import fusion, indexer
from mlx_retrieval.retrieval.base import Hit
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.training import config
from mlx_retrieval.utils.console import print_lines, print_rows

backend.prepare()  # as commands do

SETS = ("medquad", "stdlib", "numpy", "prose", "repository", "toolkit")
# Left out of this repository, or the questions would find themselves; and what `toolkit` leaves out besides.
NOT_REPOSITORY = ["eval-data", "adapters", "gemma-3-tiny-mlx", "*.jsonl", "*.ipynb"]
NOT_TOOLKIT = ["tests", "benchmarks", "tools", "CHANGELOG.md"]
QUESTIONS = ROOT / "eval-data" / "this-repository.jsonl"
LIMITS = {"max_length": 180, "query_max_length": 64}
SHARES = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
METRIC = "ndcg_at_10"


# --- sets ---


def make_sets(names: Sequence[str], args: argparse.Namespace, work: Path) -> tuple[dict[str, Path], list[Pair]]:
    """Write the sets as folders in BEIR layout, and return them with the code pairs that are not held out."""
    stdlib = sysconfig.get_paths()["stdlib"]
    known, held_out = hold_out(list(pairs([stdlib])), args.modules)
    sets = {}
    for name in names:
        folder = work / "sets" / name
        if name in ("repository", "toolkit"):
            sets[name] = ROOT
        elif name == "medquad":
            sets[name] = Path(args.data) / "test"
        else:
            sets[name] = folder
            if not folder.is_dir():
                numpy = list(pairs([Path(np.__file__).parent])) if name == "numpy" else []
                {
                    "stdlib": lambda folder: write_task(folder, held_out, args.queries),
                    "numpy": lambda folder, found=numpy: write_task(folder, found, args.queries),
                    "prose": lambda folder: write_prose(folder, Path(stdlib), {p.path for p in held_out}, args.queries),
                }[name](folder)
    return sets, known


def write_prose(folder: Path, source: Path, modules: Iterable[str], queries: int) -> None:
    """Write docstrings as a task: their first paragraphs look for the paragraphs that follow."""
    rows = []
    for name in sorted(modules):
        path = Path(name) if Path(name).is_absolute() else source / name
        for definition in definitions(path.read_bytes(), LANGUAGES["python"]):
            first, _, rest = summary(strip_markers(definition.doc)).partition("\n")
            if len(first.split()) >= 3 and len(rest.split()) >= 10:
                rows.append((first, rest))
    rows = [(first, rest) for rest, first in {rest: first for first, rest in rows}.items()]
    (folder / "qrels").mkdir(parents=True)
    asked = np.random.default_rng(1).permutation(len(rows))[:queries].tolist()
    corpus = ({"_id": f"d{i}", "title": "", "text": rest} for i, (_, rest) in enumerate(rows))
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    questions = ({"_id": f"q{i}", "text": rows[i][0]} for i in asked)
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "qrels" / "test.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in asked))


# --- models ---


def make_models(args: argparse.Namespace, work: Path, known: list[Pair]) -> dict[str, str]:
    """Return name -> folder of the models, after training one on code pairs."""
    models = {"untrained": minilm()}
    if args.steps:
        final = work / "code" / "final"
        if not final.is_dir():
            data = work / "train.jsonl"
            data.write_text("".join(json.dumps({"query": p.query, "positive": p.positive}) + "\n" for p in known))
            train.train(
                config.Settings(
                    model=minilm(), data=[str(data)], batch_size=64, steps=args.steps, learning_rate=3e-4, holdout=0,
                    eval_tasks=[], save_steps=0, output=str(work / "code"), overwrite=True, **LIMITS,
                )
            )  # fmt: skip
        models["code"] = str(final)
    return models | dict(model.split("=", 1) for model in args.model)


# --- figures ---


class Results:
    """The hits of a set's queries in the index of a model, by words and by meaning."""

    def __init__(self, folder: Path, model: Model, index: Path, exclude: Sequence[str]):
        indexer.update(folder, index, model, exclude=exclude)
        self.index, self.model = Index.open(index), model
        rows = index_search.read_queries(QUESTIONS if folder == ROOT else folder)
        self.queries: list[Query]
        self.queries, notes = index_answers.checked(rows, self.index)
        print_lines([("note", note) for note in notes])
        self.found = index_search.search(self.index, model, self.queries)
        self.candidates = [
            fusion.complete(self.index, query.text, each.vector, each.words, each.meaning)
            for query, each in zip(self.queries, self.found, strict=True)
        ]

    def both(self, weight: float) -> list[list[Hit]]:
        return [fusion.fuse_scores(each, weight) for each in self.candidates]

    def evaluations(self) -> dict[str, Evaluation]:
        hits = {
            "words": [each.words for each in self.found],
            "meaning": [each.meaning for each in self.found],
            "both": self.both(fusion.WEIGHTS["scores"]),
            "by ranks": [fusion.fuse_ranks(each.words, each.meaning) for each in self.found],
        }
        return {name: figures_of(name, self.queries, rows) for name, rows in hits.items()}

    def reranked(self, reranker: Reranker, depth: int) -> Evaluation:
        """Return the figures of both fused, with the first `depth` hits in the order of a reranker."""
        rows = []
        for query, hits in zip(self.queries, self.both(fusion.WEIGHTS["scores"]), strict=True):
            scores = reranker.score(query.text, [hit.text for hit in hits[:depth]])
            order = np.argsort(-scores, kind="stable")
            rows.append([*(hits[i] for i in order), *hits[depth:]])
        return figures_of("reranked", self.queries, rows)


def score(evaluation: Evaluation, metric: str = METRIC) -> float:
    return evaluation.tasks["queries"][metric]


def difference(one: Evaluation, other: Evaluation) -> str:
    """Return by how much `other` is better, with the interval."""
    _, _, _, change, low, high = next(row for row in compare(one, other) if row[0] == METRIC)
    return f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True, help="folder for sets, models and indices")
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with MedQuAD's `test`")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--modules", type=int, default=300, help="modules of the standard library that are held out")
    parser.add_argument("--queries", type=int, default=300, help="of a set of docstrings")
    parser.add_argument("--steps", type=int, default=60, help="of 64 code pairs; 0 = train no model")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="one more model")
    parser.add_argument("--reranker", help="puts the first hits of the repository in order")
    parser.add_argument("--depth", type=int, default=20, help="hits that the reranker scores")
    args = parser.parse_args()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    sets, known = make_sets(args.sets, args, work)
    rows, by_weight, repository = [], [], []
    for name, folder in make_models(args, work, known).items():
        model = load(folder, **({} if name != "untrained" else LIMITS))
        for label, task in sets.items():
            exclude = NOT_REPOSITORY + (NOT_TOOLKIT if label == "toolkit" else [])
            results = Results(task, model, work / "indices" / f"{label}-{name}", exclude)
            found = results.evaluations()
            better = max(("words", "meaning"), key=lambda mode, found=found: score(found[mode]))
            figures = [f"{score(each):.4f}" for each in found.values()]
            rows.append((label, name, *figures, difference(found[better], found["both"])))
            print(*rows[-1], flush=True)
            sweep = (figures_of("", results.queries, results.both(share)) for share in SHARES)
            by_weight.append((label, name, *(f"{score(each):.3f}" for each in sweep)))
            if task == ROOT:
                if args.reranker:
                    found["both, reranked"] = results.reranked(Reranker(args.reranker, raw_scores=True), args.depth)
                for mode, each in found.items():
                    shown = (f"{score(each, metric):.3f}" for metric in ("precision_at_1", "mrr_at_10", METRIC))
                    repository.append((label, name, mode, *shown))
    columns = ("set", "model", "words", "meaning", "both", "by ranks", "both less the better one")
    print_rows(f"nDCG@10, both at weight {fusion.WEIGHTS['scores']}", columns, rows)
    print_rows("nDCG@10 of both by the weight of the meaning", ("set", "model", *map(str, SHARES)), by_weight)
    if repository:
        columns = ("files", "model", "mode", "P@1", "MRR@10", "nDCG@10")
        print_rows(f"{len(QUESTIONS.read_text().splitlines())} questions over this repository", columns, repository)


if __name__ == "__main__":
    main()
