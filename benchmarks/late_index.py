"""Late interaction in a compressed index: what is lost, how large it is, and how fast, beside fast-plaid.

    pip install -r benchmarks/requirements.txt
    python benchmarks/late_index.py --data ../shared/data/medquad --work FOLDER     # an hour on 2 cores, at first
    python benchmarks/late_index.py --work FOLDER --parts quality --chunks 5000
    python benchmarks/late_index.py --work FOLDER --parts quality peer --peer-python fast-plaid-venv/bin/python

Trains all-MiniLM-L6-v2 on MedQuAD as a late-interaction model of 128 dimensions, and embeds chunks of 120 tokens: the
documents of MedQuAD's test folder, and pieces of its other documents and of Python's standard library, half and half.
MedQuAD's test questions, and docstrings, search among them.

quality  recall@10 of exhaustive MaxSim over the vectors as they are, and nDCG@10 of the questions, by bits and pooling
size     MB on disk, memory and time of a search in an index of 100,000 chunks: the real ones, and copies of them in
         which a fifth of the tokens come from other chunks; in a process of its own

What is in FOLDER from an earlier call is not computed again. Figures in benchmarks/README.md.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from sides import minilm

import train
from mlx_retrieval import backend
from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.chunks import Chunk
from mlx_retrieval.dataset.source_code.file_tree import walk
from mlx_retrieval.evaluation.retrieval import score_rankings
from mlx_retrieval.inference.embedder import load
from mlx_retrieval.mining.code_pairs import pairs
from mlx_retrieval.retrieval import late_interaction, residual_codes
from mlx_retrieval.retrieval.base import FileRecord, IndexInfo
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.retrieval.late_interaction import LateIndex
from mlx_retrieval.retrieval.token_pooling import pool
from mlx_retrieval.retrieval.token_store import Segment, TokenStore
from mlx_retrieval.retrieval.token_vectors import TokenVectors
from mlx_retrieval.training import config
from mlx_retrieval.utils.console import print_lines, print_rows

backend.prepare()  # as commands do

TOKENS = 120  # of a chunk, special tokens included
SHARD = 1_000  # chunks embedded and kept together
VARIANTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (4, 3)]  # bits, pooling
SWAPPED = 0.2  # share of a copied chunk's tokens that come from other chunks


# --- vectors ---


def trained(work: Path, data: Path) -> Path:
    """Return the folder of the late-interaction model, trained if it is missing."""
    folder = work / "model"
    if not folder.is_dir():
        train.train(
            config.Settings(
                model=minilm(), task="late", projection_dim=128, data=[str(data / "train.jsonl")], batch_size=64,
                steps=24, learning_rate=5e-4, similar_rows=4, max_length=128, query_max_length=32, eval_tasks=[],
                save_steps=0, output=str(folder),
            )
        )  # fmt: skip
    return next(iter(sorted(folder.glob("step-*"))), folder / "final")


def pieces_of(texts: Iterator[str], tokenizer) -> list[str]:
    """Return pieces of texts, of TOKENS each together with the special tokens, in random order."""
    found = []
    for text in texts:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        size = TOKENS - 2
        firsts = range(0, len(offsets) - size + 1, size)
        found += [text[offsets[i][0] : offsets[i + size - 1][1]] for i in firsts]
    random.Random(0).shuffle(found)
    return found


def chunk_texts(work: Path, data: Path) -> list[str]:
    """Return the pieces: of MedQuAD's documents and of the standard library in turn."""
    file = work / "chunks.json"
    if not file.exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(minilm())
        documents = {json.loads(line)["document"]: None for line in open(data / "train.jsonl")}
        source = Path(sysconfig.get_paths()["stdlib"])
        code = (source / path.path for path in walk(source, 1_000_000).files if path.path.endswith(".py"))
        sides = (
            pieces_of(iter(documents), tokenizer),
            pieces_of((path.read_text("utf-8", "replace") for path in code), tokenizer),
        )
        file.write_text(json.dumps([text for pair in zip(*sides, strict=False) for text in pair]))
    return json.loads(file.read_text())


def vectors_of(work: Path, name: str, texts: Sequence[str], prompt: str, model) -> list[np.ndarray]:
    """Return the token vectors of texts, embedded by `model()` if they are not in a file yet."""
    file = work / "vectors" / f"{name}.npz"
    if not file.exists():
        vectors = model().encode(list(texts), prompt=prompt)
        file.parent.mkdir(exist_ok=True)
        np.savez(file, tokens=np.concatenate(vectors).astype(np.float16), lengths=[len(each) for each in vectors])
    with np.load(file, allow_pickle=False) as arrays:
        return np.split(arrays["tokens"].astype(np.float32), np.cumsum(arrays["lengths"])[:-1])


class Corpus:
    """Documents and queries with their vectors. The first documents are those of MedQuAD's test folder."""

    def __init__(self, work: Path, data: Path, chunks: int):
        def model():
            if not loaded:
                loaded.append(load(trained(work, data), max_length=TOKENS, query_max_length=32))
            return loaded[0]

        loaded: list = []
        test = data / "test"
        documents = {name: beir.document_text(*text) for name, text in beir.read_texts(test, "corpus").items()}
        questions = {name: text for name, (_, text) in beir.read_texts(test, "queries").items()}
        self.ids, self.query_ids = list(documents), list(questions)
        self.texts = list(documents.values())
        self.documents = vectors_of(work, "test", self.texts, "document", model)
        pieces = chunk_texts(work, data)
        for first in range(0, chunks - len(self.texts), SHARD):
            shard = pieces[first : first + SHARD]
            self.documents += vectors_of(work, f"shard{first // SHARD:02}", shard, "document", model)
            self.texts += shard
        self.questions = vectors_of(work, "queries", list(questions.values()), "query", model)
        docstrings = work / "code-queries.json"
        if not docstrings.exists():
            found = [pair.query for pair in pairs([sysconfig.get_paths()["stdlib"]])]
            docstrings.write_text(json.dumps(random.Random(1).sample(found, 200)))
        self.docstrings = vectors_of(work, "code-queries", json.loads(docstrings.read_text()), "query", model)
        self.qrels: dict[str, dict[str, int]] = {}
        for line in (test / "qrels" / "test.tsv").read_text().splitlines()[1:]:
            query, document, grade = line.split("\t")
            self.qrels.setdefault(query, {})[document] = int(grade)

    def ndcg(self, rankings: Sequence[list[tuple[int, float]]]) -> float:
        """Return nDCG@10 of the questions."""
        names = {i: name for i, name in enumerate(self.ids)}
        ranked = {
            query: {names.get(number, f"piece {number}"): score for number, score in ranking}
            for query, ranking in zip(self.query_ids, rankings, strict=True)
        }
        scores = score_rankings(self.qrels, ranked)["ndcg_at_10"]
        return sum(scores.values()) / len(scores)


# --- quality ---


def recall(exact: Sequence[list[tuple[int, float]]], rankings: Sequence[list[tuple[int, float]]]) -> float:
    """Return the share of the exact ten best that is among the ten best."""
    kept = [len({n for n, _ in a} & {n for n, _ in b}) / len(a) for a, b in zip(exact, rankings, strict=True)]
    return sum(kept) / len(kept)


def measure_quality(corpus: Corpus, variants: Sequence[tuple[int, int]]) -> None:
    """Print what compression and candidates lose."""
    queries, asked = corpus.questions + corpus.docstrings, len(corpus.questions)
    exact = LateIndex(corpus.documents).search(queries, 10)
    rows = [("as they are, all compared", "256", "1", "1", f"{corpus.ndcg(exact[:asked]):.4f}", "", "")]
    for bits, pooling in variants:
        began = time.perf_counter()
        documents = [pool(each, pooling) for each in corpus.documents]
        whole = TokenVectors.of(documents)
        chosen = np.random.default_rng(0).permutation(len(whole.vectors))[: late_interaction.SAMPLE]
        codebook = residual_codes.train(whole.vectors[chosen], bits)
        coded = whole.coded(codebook)
        seconds = time.perf_counter() - began
        index = LateIndex([coded], codebook=codebook)
        everything = np.arange(len(index))
        began = time.perf_counter()
        rankings = index.search(queries, 10)
        milliseconds = 1e3 * (time.perf_counter() - began) / len(queries)
        all_scores = [index.scores(query, everything) for query in queries[::5]]
        full = [late_interaction._best(everything, scores, 10) for scores in all_scores]
        size = codebook.token_bytes * len(whole.vectors) / sum(map(len, corpus.documents))
        rows.append(
            (
                f"{bits} bits, pooling {pooling}",
                f"{size:.1f}",
                f"{recall(exact[:asked], rankings[:asked]):.4f}",
                f"{recall(exact[asked:], rankings[asked:]):.4f}",
                f"{corpus.ndcg(rankings[:asked]):.4f}",
                f"{recall(full, rankings[::5]):.4f}",
                f"{milliseconds:.0f}",
            )
        )
        print(*rows[-1], f"{len(codebook.centroids)} centroids, {seconds:.0f} s", flush=True)
    columns = ("stored", "bytes a token", "recall@10 of questions", "of docstrings", "nDCG@10", "by candidates", "ms")
    print_rows(f"{len(corpus.documents):,} chunks", columns, rows)


# --- size and speed ---


def files_of(number: int, texts: Sequence[str]) -> list[tuple[FileRecord, list[Chunk]]]:
    """Return files of ten chunks each."""
    chunks = [Chunk(i + 1, i + 1, "text", "text", "", "", text) for i, text in enumerate(texts)]
    names = [f"folder/{number}-{first}" for first in range(0, len(chunks), 10)]
    return [(FileRecord(name, 1, 1, name, 10, ""), chunks[10 * i : 10 * i + 10]) for i, name in enumerate(names)]


def build(folder: Path, corpus: Corpus, count: int, bits: int, pooling: int) -> dict[str, float]:
    """Make an index of the real chunks, and bring it to `count` by copies. Return seconds a 1,000 real chunks."""
    info = IndexInfo("/", False, "made", "", 128, 2_000, 200, maxsim="mean", token_bits=bits, token_pooling=pooling)
    index, began = Index.create(folder, info), time.perf_counter()
    full = [i for i, each in enumerate(corpus.documents) if len(each) == TOKENS]
    for first in range(0, len(full), SHARD):
        some = full[first : first + SHARD]
        index.add(files_of(first, [corpus.texts[i] for i in some]), [corpus.documents[i] for i in some], set())
    index.finish()
    seconds = 1e3 * (time.perf_counter() - began) / len(full)
    store, rng = index.late.store, np.random.default_rng(0)
    tokens = TokenVectors(**{name: np.array(array) for name, array in store.segments()[-1].tokens.arrays.items()})
    for segment in store.segments()[:-1]:
        raise SystemExit(f"{segment.folder}: the real chunks should be one segment")
    index.late.add = lambda part: add_codes(store, part)
    for first in range(len(full), count, SHARD):
        numbers = rng.integers(len(full), size=min(SHARD, count - first))
        part = tokens.take(numbers)
        swapped = rng.permutation(len(part.codes))[: int(SWAPPED * len(part.codes))]
        others = rng.integers(len(tokens.codes), size=len(swapped))
        part.centroids[swapped], part.codes[swapped] = tokens.centroids[others], tokens.codes[others]
        index.add(files_of(first, [corpus.texts[full[i]] for i in numbers]), part, set())
    index.finish()
    return {"s a 1,000 real chunks": seconds}


def add_codes(store: TokenStore, part: TokenVectors) -> np.ndarray:
    """Store documents that are codes already. Return their slots."""
    segments = store.segments()
    first = int(segments[-1].slots[-1]) + 1
    slots = np.arange(first, first + len(part.lengths))
    Segment.write(store._next(segments), slots, part)
    return slots


def memory() -> dict[str, float]:
    """Return the resident memory of this process in MB, now and at its peak."""
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    now = {name: int(status[name].split()[0]) / 1e3 for name in ("VmRSS", "RssAnon")}
    return {**now, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def ask(folder: Path, queries: Sequence[np.ndarray]) -> None:
    """Print the times and the memory of searches, as JSON; in a process of its own."""
    began = time.perf_counter()
    index = Index.open(folder)
    index.semantic(queries[0], 10)
    first = time.perf_counter() - began
    spent = []
    for query in queries:
        began = time.perf_counter()
        index.semantic(query, 10)
        spent.append(1e3 * (time.perf_counter() - began))
    times = {"first s": first, "p50 ms": np.median(spent[5:]), "p95 ms": np.percentile(spent[5:], 95)}
    print(json.dumps(times | memory()))


PEER = """
import json, resource, sys, time
import numpy as np, torch
from fast_plaid import search
folder, vectors, bits = sys.argv[1:]
torch.set_num_threads(2)
index = search.FastPlaid(index=folder, device="cpu")

def read(name):
    with np.load(f"{vectors}/{name}.npz") as arrays:
        return np.split(arrays["tokens"].astype(np.float32), np.cumsum(arrays["lengths"])[:-1])

began = time.perf_counter()
index.create(documents_embeddings=[torch.from_numpy(each) for each in read("all")], nbits=int(bits))
built = time.perf_counter() - began
spent, found = [], []
for query in [*read("queries"), *read("code-queries")]:
    began = time.perf_counter()
    ranking = index.search([torch.from_numpy(query)], top_k=10, show_progress=False)[0]
    spent.append(1e3 * (time.perf_counter() - began))
    found.append([[int(number), float(score)] for number, score in ranking])
times = {"build s": built, "p50 ms": np.median(spent[5:]), "p95 ms": np.percentile(spent[5:], 95)}
print(json.dumps(times | {"found": found}))
"""


def measure_peer(corpus: Corpus, work: Path, python: str, widths: Sequence[int]) -> None:
    """Print the same of fast-plaid, with its own defaults."""
    lengths = [len(each) for each in corpus.documents]
    np.savez(work / "vectors" / "all.npz", tokens=np.concatenate(corpus.documents).astype(np.float16), lengths=lengths)
    queries, asked = corpus.questions + corpus.docstrings, len(corpus.questions)
    exact = LateIndex(corpus.documents).search(queries, 10)
    for bits in widths:
        folder = work / f"fast-plaid-{bits}"
        found = run_json(python, "-c", PEER, str(folder), str(work / "vectors"), str(bits))
        rankings = found.pop("found")
        found |= {"recall@10 of questions": recall(exact[:asked], rankings[:asked]), "MB": megabytes(folder)}
        found |= {"of docstrings": recall(exact[asked:], rankings[asked:]), "nDCG@10": corpus.ndcg(rankings[:asked])}
        print_lines([(f"fast-plaid, {bits} bits: {name}", f"{value:.4f}") for name, value in found.items()])


def run_json(*command: str) -> dict:
    """Run a command that prints a line of JSON at the end, and return it."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def megabytes(folder: Path) -> float:
    """Return the size of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl and test")
    parser.add_argument("--work", required=True, help="folder of the model, vectors and indices")
    parser.add_argument("--parts", nargs="+", default=["quality", "size"], choices=("quality", "size", "peer"))
    parser.add_argument("--chunks", type=int, default=20_000, help="real ones, that are embedded")
    parser.add_argument("--size", type=int, default=100_000, help="chunks of the large index")
    parser.add_argument("--bits", type=int, nargs="+", default=[1], help="of the large index, or of fast-plaid")
    parser.add_argument("--pooling", type=int, default=1, help="of the large index")
    parser.add_argument("--peer-python", help="a Python with fast-plaid")
    parser.add_argument("--ask", help="(internal) the index that this process searches")
    args = parser.parse_args()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    if args.ask:
        with np.load(work / "vectors" / "queries.npz", allow_pickle=False) as arrays:
            return ask(Path(args.ask), np.split(arrays["tokens"].astype(np.float32), np.cumsum(arrays["lengths"])[:-1]))
    corpus = Corpus(work, Path(args.data), args.chunks)
    print_lines([("device", backend.describe()), ("chunks", f"{len(corpus.documents):,}")])
    if "quality" in args.parts:
        measure_quality(corpus, VARIANTS)
    if "peer" in args.parts:
        measure_peer(corpus, work, args.peer_python, args.bits)
    for bits in args.bits if "size" in args.parts else ():
        folder, figures = work / f"index-{args.size}-{bits}-{args.pooling}", {}
        if not (folder / "index.json").exists():
            figures = build(folder, corpus, args.size, bits, args.pooling)
        figures |= run_json(sys.executable, __file__, "--work", str(work), "--ask", str(folder))
        figures |= {"MB": megabytes(folder), "of these tokens": megabytes(folder / "tokens")}
        label = f"{bits} bits, pooling {args.pooling}"
        print_lines([(f"{label}: {name}", f"{value:.1f}") for name, value in figures.items()])
    return None


if __name__ == "__main__":
    main()
