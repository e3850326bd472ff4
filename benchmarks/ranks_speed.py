"""Two processes of one core each that train as one, beside one process of one core: useful tokens a second.

    python benchmarks/ranks_speed.py --data ../shared/data/medquad
    python benchmarks/ranks_speed.py --model gemma-3-tiny-mlx --batch-size 32 --rounds 3

The two are ranks over mlx's ring on loopback, as `mlx.launch -n 2 --backend ring` starts them. Each process is bound to
a core and its libraries to a thread. A turn is a whole step, from token ids to updated weights; both sides have the
same batches, so their losses must agree. Linux only: other systems cannot bind a process to a core. Figures
in benchmarks/README.md.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peers
import sides
from sides import Turn
from train_speed import prepared

THREADS = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


def held(core: int, environment: dict[str, str], arguments: tuple, steps: int) -> Callable[[int], Turn]:
    """Bind this process to a core; the first turn loads everything, so that ranks do it at the same time."""
    os.sched_setaffinity(0, {core})
    os.environ.update({name: "1" for name in THREADS} | environment)
    run = []

    def turn(k: int) -> Turn:
        if not run:
            from mlx_retrieval.training import distributed

            distributed.start(timeout=600)
            trainer = prepared(*arguments).trainer
            run.extend((trainer, trainer.batches.stream(0, steps + 2)))
        trainer, stream = run
        batch = next(stream)
        began = time.perf_counter()
        metrics = trainer.update(batch, k + 1)
        return Turn(time.perf_counter() - began, metrics["tokens"], sides.peak_memory_of_mlx(), 0, metrics["loss"])

    return turn


class Ranks:
    """One process or several, each on a core of its own, that take turns together."""

    def __init__(self, name: str, cores: list[int], hosts: Path, arguments: tuple, steps: int):
        self.name, self.turns = name, []
        ports = [socket.create_server(("127.0.0.1", 0)) for _ in cores]
        hosts.write_text(json.dumps([[f"127.0.0.1:{port.getsockname()[1]}"] for port in ports]))
        for port in ports:
            port.close()
        self.ranks = []
        for rank, core in enumerate(cores):
            environment = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if len(cores) > 1 else {}
            self.ranks.append(sides.Side(f"{name}, rank {rank}", held, core, environment, arguments, steps))

    def take_turn(self) -> None:
        """All ranks at the same time; the slowest one's time counts."""
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            list(pool.map(sides.Side.take_turn, self.ranks))
        self.turns.append(max((side.turns[-1] for side in self.ranks), key=lambda turn: turn.seconds))

    def close(self) -> None:
        for side in self.ranks:
            side.__exit__()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="minilm, gemma (270m's shape, random weights) or a folder")
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl, or a file")
    parser.add_argument("--batch-size", type=int, default=64, help="rows that one loss sees")
    parser.add_argument("--max-length", type=int, default=256, help="most tokens of a query and of a document")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each side")
    args = parser.parse_args()
    if not hasattr(os, "sched_setaffinity") or len(cores := sorted(os.sched_getaffinity(0))) < 2:
        sys.exit("ranks_speed.py: two cores are needed, and a system that holds a process to one: Linux")
    print(sides.machine())
    model = peers.model_folder(args.model)
    with tempfile.TemporaryDirectory() as folder:
        rows = sides.write_distinct(args.data, Path(folder) / "rows.jsonl")
        work = (model, rows, args.batch_size, args.max_length)
        one = Ranks("one process", cores[:1], Path(folder) / "one.json", work, args.rounds + 1)
        two = Ranks("two processes", cores[:2], Path(folder) / "two.json", work, args.rounds + 1)
        for _ in range(args.rounds + 1):  # the first turn also loads and compiles
            one.take_turn()
            two.take_turn()
        one.close()
        two.close()
    pairs = list(zip(one.turns, two.turns, strict=True))
    ratio = statistics.median(b.throughput / a.throughput for a, b in pairs[1:])
    print(f"\n{args.model}, batch {args.batch_size}, up to {args.max_length} tokens, medians of {args.rounds} rounds")
    print(f"{'':16}{'tokens/s':>10}{'least - most':>18}{'s a step':>10}{'first loss':>12}{'peak MB':>9}")
    for side in (one, two):
        speeds = [turn.throughput for turn in side.turns[1:]]
        spread = f"{min(speeds):,.0f} - {max(speeds):,.0f}"
        seconds = statistics.median(turn.seconds for turn in side.turns[1:])
        figures = f"{statistics.median(speeds):>10,.0f}{spread:>18}{seconds:>10.2f}"
        print(f"{side.name:16}{figures}{side.turns[0].value:>12.4f}{side.turns[-1].peak_memory_bytes / 1e6:>9,.0f}")
    print(f"ratio {ratio:.2f} (rounds: {', '.join(f'{b.throughput / a.throughput:.2f}' for a, b in pairs[1:])})")
    difference = max(abs(a.value - b.value) / abs(a.value) for a, b in pairs)
    print(f"losses differ by {difference:.1e} of themselves at most")
    return 0 if difference < 1e-3 and all(a.tokens == b.tokens for a, b in pairs) else 1


if __name__ == "__main__":
    sys.exit(main())
