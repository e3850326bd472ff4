"""Quantised models on a CPU: useful tokens a second with packed weights, in blocks, as copies, and of the whole model.

    python benchmarks/quantised_speed.py --data ../shared/data/medquad
    python benchmarks/quantised_speed.py --bits 8 --rounds 1

all-MiniLM-L6-v2, written in 4 and 8 bits by `export.py --quantize`. Each side is a process of its own, and all take
turns: embedding answers of MedQuAD, and training steps (LoRA r = 16, as train_speed.py), whose peak of memory stands
beside the one that the run planned. Packed weights get a tenth of the texts and batches of 4, as they take so long.
Vectors and first losses must agree. Figures in benchmarks/README.md.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sides
import train_speed
from sides import Side, Turn

WAYS = {"off": "packed", "blocks": "blocks", "on": "copies"}
SHARE = 10  # of the texts, a tenth, for packed weights
PACKED_BATCH = 4


class Step(NamedTuple):
    """The loss of a training step, and the peak of mlx's arrays that its run planned, in bytes."""

    loss: float
    planned: int


def embedding(folder: str, texts: list[str], max_length: int, way: str) -> Callable[[int], Turn]:
    from mlx_retrieval import backend
    from mlx_retrieval.inference import embedder

    backend.prepare()  # as commands do
    backend.set_dequantize(way)
    model = embedder.load(folder, max_length=max_length)
    tokens = int(model.tokenizer(texts, "document").lengths.sum())

    def turn(_: int) -> Turn:
        began = time.perf_counter()
        vectors = model.encode(texts, prompt="document", show_progress=False)
        return Turn(time.perf_counter() - began, tokens, backend.peak_memory(), value=vectors)

    return turn


def training(folder: str, rows: Path, max_length: int, way: str, batch_size: int, steps: int) -> Callable[[int], Turn]:
    from mlx_retrieval import backend

    run = train_speed.prepared(folder, rows, batch_size, max_length, dequantize=way)
    trainer, expected = run.trainer, run.outlook.expected
    stream = trainer.batches.stream(0, steps + 2)

    def turn(k: int) -> Turn:
        began = time.perf_counter()
        metrics = trainer.update(next(stream), k + 1)
        seconds = time.perf_counter() - began
        value = Step(metrics["loss"], expected.total)
        return Turn(seconds, metrics["tokens"], backend.peak_memory(), value=value)

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl")
    parser.add_argument("--texts", type=int, default=200, help="embed the first so many answers")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a training step")
    parser.add_argument("--max-length", type=int, default=256, help="most tokens of a text")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], choices=(4, 8), help="bits of a weight")
    parser.add_argument("--rounds", type=int, default=3, help="measured turns of each side")
    args = parser.parse_args()

    print(sides.machine())
    texts = [positive for _, positive in sides.read_pairs(args.data)[: args.texts]]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        rows = sides.write_distinct(args.data, scratch / "rows.jsonl")
        folders = {bits: exported(bits, scratch) for bits in args.bits}
        for bits, folder in folders.items():
            compare(args, bits, embedding_sides(args, folder, texts), f"embedding {args.texts} answers")
            compare(args, bits, training_sides(args, folder, rows), f"training steps of {args.batch_size} rows")


def exported(bits: int, scratch: Path) -> str:
    """Return the folder of all-MiniLM in so many bits."""
    target = scratch / f"{bits}-bits"
    command = [sys.executable, "export.py", "--model", sides.minilm(), "--output", str(target)]
    command += ["--format", "mlx", "--quantize", str(bits)]
    subprocess.run(command, cwd=sides.ROOT, check=False, stdout=subprocess.DEVNULL)  # 1 = a limit is missed
    if not (target / "config.json").is_file():
        sys.exit("export.py has written nothing")
    return str(target)


def embedding_sides(args: argparse.Namespace, folder: str, texts: list[str]) -> list[Side]:
    some = {"off": texts[::SHARE]}
    ways = [Side(label, embedding, folder, some.get(way, texts), args.max_length, way) for way, label in WAYS.items()]
    return [*ways, Side("float32", embedding, sides.minilm(), texts, args.max_length, "off")]


def training_sides(args: argparse.Namespace, folder: str, rows: Path) -> list[Side]:
    given = rows, args.max_length
    sizes = {"off": PACKED_BATCH}
    steps = args.rounds + 1
    ways = [
        Side(label, training, folder, *given, way, sizes.get(way, args.batch_size), steps)
        for way, label in WAYS.items()
    ]
    return [*ways, Side("float32", training, sides.minilm(), *given, "off", args.batch_size, steps)]


def compare(args: argparse.Namespace, bits: int, some: Sequence[Side], work: str) -> None:
    """Let the sides take turns and print a line for each; end the script if the ways to compute differ."""
    for _ in range(args.rounds + 1):
        for side in some:
            side.take_turn()
    *ways, whole = some
    print(f"\nall-MiniLM in {bits} bits, {work}, medians of {args.rounds} rounds")
    print(f"{'':10}{'tokens/s':>10}{'least - most':>18}{'of float32':>12}{'mlx peak MB':>13}{'planned MB':>12}")
    for side in some:
        speeds = [turn.throughput for turn in side.measured]
        value = side.turns[0].value
        planned = f"{value.planned / 1e6:,.0f}" if isinstance(value, Step) else ""
        shares = [a.throughput / b.throughput for a, b in zip(side.measured, whole.measured, strict=True)]
        print(
            f"{side.name:10}{statistics.median(speeds):>10,.0f}{f'{min(speeds):,.0f} - {max(speeds):,.0f}':>18}"
            f"{statistics.median(shares):>12.3f}{side.turns[-1].peak_memory_bytes / 1e6:>13,.0f}{planned:>12}",
            flush=True,
        )
        side.__exit__()
    packed, blocks, copies = (side.turns[0].value for side in ways)
    if isinstance(copies, np.ndarray):
        worst = max(np.abs(copies - blocks).max(), np.abs(copies[::SHARE] - packed).max())
    else:
        worst = abs(copies.loss - blocks.loss)
    print(f"largest difference between the ways: {worst:.1e}", flush=True)
    if worst > 1e-4:
        sys.exit("the ways to compute differ")


if __name__ == "__main__":
    main()
