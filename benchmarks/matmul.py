"""Float32 matrix products: GFLOP/s of mlx as the toolkit sets it up, and the ratio to torch on the same machine.

    python benchmarks/matmul.py

Both libraries in turn, five rounds of each size, medians. Figures in benchmarks/README.md.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_retrieval.backend import mx

import torch

from mlx_retrieval import backend

backend.prepare()  # as commands do

SIZES = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 384, 1536), (4096, 640, 2048)]
ROUNDS = 5


def seconds(product) -> float:
    """Return the seconds of one call, repeated for at least a tenth of a second."""
    time.sleep(0.5)  # the threads of the other side's BLAS spin for a while after their last product
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < 0.1:
        product()
        count += 1
    return (time.perf_counter() - began) / count


def main() -> None:
    print(f"{backend.describe()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'rows x inner x columns':>24}{'mlx GFLOP/s':>14}{'torch GFLOP/s':>15}{'ratio':>8}")
    for m, k, n in SIZES:
        a, b = mx.random.normal((m, k)), mx.random.normal((k, n))
        c, d = torch.randn(m, k), torch.randn(k, n)
        mx.eval(a, b, a @ b)
        torch.mm(c, d)
        rounds = [
            (seconds(lambda a=a, b=b: mx.eval(a @ b)), seconds(lambda c=c, d=d: torch.mm(c, d))) for _ in range(ROUNDS)
        ]
        ours, theirs = (2e-9 * m * k * n / statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(theirs / ours for ours, theirs in rounds)
        print(f"{f'{m} x {k} x {n}':>24}{ours:>14.0f}{theirs:>15.0f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
