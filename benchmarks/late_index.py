"""Late interaction in a compressed index: what is lost, how large it is, and how fast, beside fast-plaid.

    pip install -r benchmarks/requirements.txt
    python benchmarks/late_index.py --work FOLDER           # an hour on 2 cores at first, then ten minutes
    python benchmarks/late_index.py --work FOLDER --peer-python fast-plaid-venv/bin/python
    python benchmarks/late_index.py --work FOLDER --parts quality --bits 2/2        # 2 bits, token pooling by 2

Trains all-MiniLM-L6-v2 on MedQuAD as a late-interaction model of 128 dimensions, and embeds chunks of 120 tokens: the
documents of MedQuAD's test folder, and pieces of its other documents and of Python's standard library, half and half.
MedQuAD's test questions, and docstrings, search among them.

quality  recall@10 of exhaustive MaxSim over the vectors as they are, and nDCG@10 of the questions, by bits; the share
         of the ten best that the candidates hold, and recall where all chunks are decoded
peer     the same of fast-plaid, by bits and probes
size     MB on disk, memory, time and recall@10 in an index of 100,000 chunks: the real ones, and cuts of them, each the
         first half of one and the second half of another; in a process of its own

What is in FOLDER from an earlier call is not computed again. Figures in benchmarks/README.md.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_retrieval.backend import mx

import numpy as np
from late_vectors import DOCSTRINGS, SHARD, TOKENS, Corpus

from mlx_retrieval import backend
from mlx_retrieval.dataset.chunks import Chunk
from mlx_retrieval.retrieval import late_interaction, residual_codes
from mlx_retrieval.retrieval.base import FileRecord, IndexInfo
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.retrieval.late_interaction import LateIndex
from mlx_retrieval.retrieval.token_pooling import pool
from mlx_retrieval.retrieval.token_store import Segment, TokenStore
from mlx_retrieval.retrieval.token_vectors import TokenVectors
from mlx_retrieval.utils.console import print_lines, print_rows

backend.prepare()  # as commands do

HALF = TOKENS // 2


# --- quality ---

Rankings = Sequence[list[tuple[int, float]]]


def recall(exact: Rankings, rankings: Rankings) -> float:
    """Return the share of the exact ten best that is among the ten best."""
    kept = [len({n for n, _ in a} & {n for n, _ in b}) / 10 for a, b in zip(exact, rankings, strict=True)]
    return sum(kept) / len(kept)


def exhaustive(work: Path, corpus: Corpus) -> Rankings:
    """Return the ten best of every query by the vectors as they are; kept in `work`."""
    file = work / f"exact-{len(corpus.documents)}-{len(corpus.queries)}.json"
    if not file.exists():
        file.write_text(json.dumps(LateIndex(corpus.documents).search(corpus.queries, 10)))
    return json.loads(file.read_text())


def qualities(corpus: Corpus, exact: Rankings, rankings: Rankings) -> list[str]:
    """Return recall@10 of questions and of docstrings, and nDCG@10 of the questions."""
    asked = len(corpus.questions)
    sides = ((exact[:asked], rankings[:asked]), (exact[asked:], rankings[asked:]))
    return [*(f"{recall(*side):.4f}" for side in sides), f"{corpus.ndcg(rankings[:asked]):.4f}"]


QUALITIES = ("recall@10 of questions", "of docstrings", "nDCG@10", "ms")


def measure_quality(corpus: Corpus, exact: Rankings, variants: Sequence[str]) -> None:
    """Print what compression and candidates lose."""
    rows = [("as they are, all compared", "256", *qualities(corpus, exact, exact), *[""] * 4)]
    for variant in variants:
        began = time.perf_counter()
        bits, pooling = bits_and_pooling(variant)
        whole = TokenVectors.of([pool(each, pooling) for each in corpus.documents])
        chosen = np.random.default_rng(0).permutation(len(whole.vectors))[: late_interaction.SAMPLE]
        codebook = residual_codes.train(whole.vectors[chosen], bits)
        index = LateIndex([whole.coded(codebook)], codebook=codebook)
        seconds, began = time.perf_counter() - began, time.perf_counter()
        rankings = index.search(corpus.queries, 10)
        milliseconds = 1e3 * (time.perf_counter() - began) / len(rankings)
        candidates = [index.candidates(query, late_interaction.CANDIDATES) for query in corpus.queries]
        held = recall(exact, [[(number, 0.0) for number in numbers.tolist()] for numbers in candidates])
        everything, some = np.arange(len(index)), slice(None, None, 20)
        full = [late_interaction._best(everything, index.scores(q, everything), 10) for q in corpus.queries[some]]
        size = codebook.token_bytes * len(whole.vectors) / sum(map(len, corpus.documents))
        found = (*qualities(corpus, exact, rankings), f"{milliseconds:.0f}")
        apart = (f"{held:.4f}", f"{recall(exact[some], rankings[some]):.4f} and {recall(exact[some], full):.4f}")
        rows.append((f"{bits} bits, pooling {pooling}", f"{size:.1f}", *found, *apart, f"{seconds:.0f}"))
        print(*rows[-1], f"{len(codebook.centroids)} centroids", flush=True)
    columns = ("stored", "bytes a token", *QUALITIES, "candidates hold", "some queries, and of all", "s to encode")
    print_rows(f"{len(corpus.documents):,} chunks", columns, rows)


def bits_and_pooling(variant: str) -> tuple[int, int]:
    """Return the bits and the pooling of 4 or 2/2."""
    bits, _, pooling = variant.partition("/")
    return int(bits), int(pooling or 1)


# --- size and speed ---


def cuts(real: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers (count,) of the chunks that the first and the second half of every chunk come from."""
    first, second = np.random.default_rng(0).integers(real, size=(2, count))
    first[:real] = second[:real] = np.arange(real)
    return first, second


def files_of(first: int, texts: Sequence[str]) -> list[tuple[FileRecord, list[Chunk]]]:
    """Return files of ten chunks each."""
    chunks = [Chunk(i + 1, i + 1, "text", "text", "", "", text) for i, text in enumerate(texts)]
    names = [f"{first}-{i}" for i in range(0, len(chunks), 10)]
    return [(FileRecord(name, 1, 1, name, 10, ""), chunks[10 * i : 10 * i + 10]) for i, name in enumerate(names)]


def build(folder: Path, corpus: Corpus, count: int, variant: str) -> dict[str, float]:
    """Make an index of the real chunks, and bring it to `count` by cuts. Return seconds a 1,000 real chunks."""
    bits, pooling = bits_and_pooling(variant)
    info = IndexInfo("/", False, "made", "", 128, 2_000, 200, maxsim="mean", token_bits=bits, token_pooling=pooling)
    index, began, texts, full = Index.create(folder, info), time.perf_counter(), corpus.texts, corpus.full
    for first in range(0, len(full), SHARD):
        some = full[first : first + SHARD]
        index.add(files_of(first, [texts[i] for i in some]), [corpus.documents[i] for i in some], set())
    index.finish()
    seconds = 1e3 * (time.perf_counter() - began) / len(full)
    store = index.late.store
    parts = [segment.tokens.arrays for segment in store.segments()]
    tokens = TokenVectors(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    index.late.add = lambda part: add_codes(store, part)
    heads, tails = cuts(len(full), count)
    for first in range(len(full), count, SHARD):
        a, b = heads[first : first + SHARD], tails[first : first + SHARD]
        part, other = tokens.take(a), tokens.take(b)
        for name in ("centroids", "codes") if pooling == 1 else ():
            whole, tail = (getattr(each, name).reshape(len(a), TOKENS, -1) for each in (part, other))
            whole[:, HALF:] = tail[:, HALF:]
        pairs = ((texts[full[i]], texts[full[j]]) for i, j in zip(a, b, strict=True))
        cut = [one[: len(one) // 2] + two[len(two) // 2 :] for one, two in pairs]
        index.add(files_of(first, cut), part, set())
    index.finish()
    return {"s a 1,000 real chunks": seconds}


def add_codes(store: TokenStore, part: TokenVectors) -> np.ndarray:
    """Store documents that are codes already. Return their slots."""
    segments = store.segments()
    first = int(segments[-1].slots[-1]) + 1
    slots = np.arange(first, first + len(part.lengths))
    Segment.write(store._next(segments), slots, part)
    return slots


def exhaustive_of_cuts(work: Path, corpus: Corpus, count: int, queries: Sequence[np.ndarray]) -> Rankings:
    """Return the ten best of `count` chunks by exact vectors, and all others as good as the tenth; kept in `work`."""
    file = work / f"exact-of-cuts-{len(corpus.full)}-{count}-{len(queries)}.json"
    if not file.exists():
        vectors = np.stack([corpus.documents[i] for i in corpus.full]).astype(np.float16)  # (N, 120, d)
        scores, (heads, tails) = np.empty((len(queries), count), np.float32), cuts(len(vectors), count)
        tokens, firsts = np.concatenate(queries), np.cumsum([0, *map(len, queries)])[:-1]
        # A token has the same similarities in every chunk: the best of the halves are computed once.
        best = np.empty((2, len(vectors), len(tokens)), np.float32)
        for first in range(0, len(vectors), 200):
            block = vectors[first : first + 200].astype(np.float32)
            similar = np.array(mx.array(block.reshape(-1, block.shape[-1])) @ mx.array(tokens).T)
            best[:, first : first + 200] = similar.reshape(len(block), 2, HALF, -1).max(axis=2).swapaxes(0, 1)
        for first in range(0, count, SHARD):
            some = slice(first, first + SHARD)
            of_tokens = np.maximum(best[0, heads[some]], best[1, tails[some]])
            scores[:, some] = np.add.reduceat(of_tokens, firsts, axis=1).T
        good = [np.flatnonzero(row >= np.partition(row, -10)[-10] - 1e-5) for row in scores]
        file.write_text(
            json.dumps([[(int(n), float(row[n])) for n in some] for row, some in zip(scores, good, strict=True)])
        )
    return json.loads(file.read_text())


def memory() -> dict[str, float]:
    """Return the resident memory of this process in MB, now and at its peak."""
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    kinds = {"VmRSS": "resident MB", "RssAnon": "not files", "VmHWM": "peak"}
    return {label: int(status[name].split()[0]) / 1e3 for name, label in kinds.items()}


def ask(folder: Path, queries: Sequence[np.ndarray]) -> None:
    """Print what searches find, their times and their memory, as JSON; in a process of its own."""
    began = time.perf_counter()
    index = Index.open(folder)
    index.semantic(queries[0], 10)
    first = time.perf_counter() - began
    opened = index.late._opened
    numbers = dict(zip(opened.rows.tolist(), opened.numbers.tolist(), strict=True))  # in the order they came
    spent, found = [], []
    for query in queries:
        began = time.perf_counter()
        hits = index.semantic(query, 10)
        spent.append(1e3 * (time.perf_counter() - began))
        found.append([(numbers[hit.row], hit.score) for hit in hits])
    times = {"first s": first, "p50 ms": np.median(spent[5:]), "p95 ms": np.percentile(spent[5:], 95)}
    print(json.dumps(times | memory() | {"found": found}))


def measure_size(corpus: Corpus, work: Path, count: int, variants: Sequence[str]) -> None:
    """Print the figures of a large index, by bits."""
    rows, columns = [], ()
    exact = exhaustive_of_cuts(work, corpus, count, corpus.some)
    lengths = [len(query) for query in corpus.some]
    np.savez(work / "vectors" / "some.npz", tokens=np.concatenate(corpus.some), lengths=lengths)
    for variant in variants:
        folder = work / f"index-{count}-{variant.replace('/', '-')}"
        built = {}
        if not folder.exists():
            built = build(unfinished := folder.with_suffix(".unfinished"), corpus, count, variant)
            unfinished.rename(folder)
        figures = run_json(sys.executable, __file__, "--work", str(work), "--ask", str(folder))
        found = figures.pop("found")
        # Pooled vectors cannot be cut in halves, so these chunks are not those that were compared exactly.
        figures["recall@10"] = recall(exact, found) if bits_and_pooling(variant)[1] == 1 else math.nan
        figures["MB"] = megabytes(folder)
        figures |= {"of these tokens": megabytes(folder / "tokens")} | built
        columns = tuple(figures)
        rows.append(
            (f"{variant} bits", *(f"{value:.3f}" if value < 2 else f"{value:.0f}" for value in figures.values()))
        )
        print(dict(zip(("stored", *columns), rows[-1], strict=True)), flush=True)


# --- the peer ---

PEER = """
import json, resource, sys, time
import numpy as np, torch
from fast_plaid import search
folder, vectors, bits, docstrings = sys.argv[1:]
torch.set_num_threads(2)
index = search.FastPlaid(index=folder, device="cpu")

def read(name):
    with np.load(f"{vectors}/{name}.npz") as arrays:
        return np.split(arrays["tokens"].astype(np.float32), np.cumsum(arrays["lengths"])[:-1])

began = time.perf_counter()
index.create(documents_embeddings=[torch.from_numpy(each) for each in read("all")], nbits=int(bits))
results = {"built": time.perf_counter() - began}
for probes in (8, 32):
    spent, found = [], []
    for query in [*read("queries"), *read("code-queries")[:int(docstrings)]]:
        began = time.perf_counter()
        asked = torch.from_numpy(query)[None]
        ranking = index.search(asked, top_k=10, n_ivf_probe=probes, show_progress=False)[0]
        spent.append(1e3 * (time.perf_counter() - began))
        found.append([[int(number), float(score)] for number, score in ranking])
    results[probes] = {"ms": np.median(spent[5:]), "found": found}
print(json.dumps(results))
"""


def measure_peer(corpus: Corpus, work: Path, exact: Rankings, python: str, widths: Sequence[int]) -> None:
    """Print the same of fast-plaid: with its own number of probes, and with more."""
    lengths = [len(each) for each in corpus.documents]
    np.savez(work / "vectors" / "all.npz", tokens=np.concatenate(corpus.documents).astype(np.float16), lengths=lengths)
    rows = []
    for bits in widths:
        folder = work / f"fast-plaid-{bits}"
        results = run_json(python, "-c", PEER, str(folder), str(work / "vectors"), str(bits), str(DOCSTRINGS))
        seconds, size = results.pop("built"), 1e6 * megabytes(folder) / sum(lengths)
        for probes, found in results.items():
            quality = qualities(corpus, exact, found["found"])
            rows.append(
                (f"{bits} bits, {probes} probes", f"{size:.1f}", *quality, f"{found['ms']:.0f}", f"{seconds:.0f}")
            )
    print_rows("fast-plaid", ("stored", "bytes a token", *QUALITIES, "s to build"), rows)


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
    parts = ("quality", "peer", "size")
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--chunks", type=int, default=4_163, help="real ones, of quality and peer")
    parser.add_argument("--size-from", type=int, default=4_163, help="real ones of the large index")
    parser.add_argument("--size", type=int, default=100_000, help="chunks of the large index")
    parser.add_argument("--bits", nargs="+", default=["1", "2", "4"], help="of a dimension, and perhaps /pooling")
    parser.add_argument("--peer-python", help="a Python with fast-plaid; left out without it")
    parser.add_argument("--ask", help="(internal) the index that this process searches")
    args = parser.parse_args()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    if args.ask:
        with np.load(work / "vectors" / "some.npz", allow_pickle=False) as arrays:
            return ask(Path(args.ask), np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1]))
    print_lines([("device", backend.describe())])
    corpus = Corpus(work, Path(args.data), args.chunks)
    exact = exhaustive(work, corpus) if {"quality", "peer"} & set(args.parts) else []
    if "quality" in args.parts:
        measure_quality(corpus, exact, args.bits)
    if "peer" in args.parts and args.peer_python:
        widths = sorted({bits_and_pooling(variant)[0] for variant in args.bits} & {2, 4})
        measure_peer(corpus, work, exact, args.peer_python, widths)
    elif "peer" in args.parts:
        print("fast-plaid: left out; --peer-python names a Python that has it")
    if "size" in args.parts:
        measure_size(Corpus(work, Path(args.data), args.size_from), work, args.size, args.bits)
    return None


if __name__ == "__main__":
    main()
