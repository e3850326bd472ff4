"""Memory and time of MaxSim and its gradient: tiles beside the whole tensor of similarities.

    python benchmarks/maxsim_memory.py

256 queries of 32 tokens with 256 documents of 180 tokens, 128 dimensions, float32: what one batch of 256 pairs needs.
Each side runs in a process of its own. Figures in benchmarks/README.md.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sides import in_child

SHAPES = (256, 32, 128), (256, 180, 128)


def measure(side: str) -> tuple[float, float]:
    """Return (seconds, peak MB beyond the arguments) of scores and both gradients, in the second of two runs."""
    from mlx_retrieval.backend import mx

    from mlx_retrieval import backend
    from mlx_retrieval.models import maxsim

    backend.prepare()  # as commands do
    queries, documents = (mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(SHAPES))
    gradient = mx.random.normal((256, 32, 256), key=mx.random.key(2))
    mx.eval(queries, documents, gradient)
    held = mx.get_active_memory()

    def tiles() -> None:
        _, place = maxsim.nearest(queries, documents)
        mx.eval(maxsim.nearest_gradient(queries, documents, place, gradient))

    def whole() -> None:
        def loss(queries: mx.array, documents: mx.array) -> mx.array:
            similarities = queries.reshape(-1, 128) @ documents.reshape(-1, 128).T
            return (similarities.reshape(256, 32, 256, 180).max(axis=-1) * gradient).sum()

        mx.eval(mx.grad(loss, argnums=(0, 1))(queries, documents))

    for _ in range(2):
        mx.reset_peak_memory()
        began = time.perf_counter()
        {"tiles": tiles, "whole": whole}[side]()
        seconds = time.perf_counter() - began
    return seconds, (backend.peak_memory() - held) / 1e6


def main() -> None:
    for side in ("tiles", "whole"):
        seconds, peak = in_child(measure, side)
        print(f"{side:6}{seconds:8.2f} s{peak:10,.0f} MB")


if __name__ == "__main__":
    main()
