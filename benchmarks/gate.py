"""Has anything become slower? Two checkouts take turns on small workloads: training, encoding, searching, serving ...

    git worktree add ../before main
    python benchmarks/gate.py ../before .
    python benchmarks/gate.py ../before . --only "train embed" encode --rounds 15

Each checkout computes in a process of its own, with the Python that runs this script. Both take turns, old and new, new
and old, after one turn that does not count. After half of the rounds both begin again, the other one first, as a
process that was started later may be some percent slower. A turn of training is the median step of a short run; of
serving, 64 requests of 8 clients; any other is a whole command on data of a few seconds, loading included. Prints old /
new time, above 1 = faster now: the geometric mean of the rounds with its 95 % interval (bootstrap over rounds). Exit
code 1: a workload is slower by more than --tolerance, and its whole interval says so. 2: one failed in either checkout,
or OLD could not make the models and the index that both read.
"""

import argparse
import atexit
import contextlib
import importlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TRAIN = "train --output {new} --data {rows} --save-steps 0 --eval-tasks --skip-eval-init"
WORKLOADS = {
    "train embed": f"{TRAIN} --model {{minilm}} --batch-size 64 --steps 7",
    "train late": f"{TRAIN} --task late --model {{minilm}} --batch-size 32 --steps 7",
    "train rerank": f"{TRAIN} --task rerank --model {{minilm}} --batch-size 8 --steps 7",
    "train chat": f"{TRAIN} --task chat --model {{tiny}} --data {{chat}} --batch-size 8 --steps 12",
    "encode": "embed --model {minilm} --input {texts} --output {new}.npy",
    "rerank": "rerank --model {cross} --query boiler --documents {few}",
    "eval": "eval --model {tiny} --eval-tasks {eval_data}",
    "index": "search index {folder} --model-path {minilm} --index {new}",
    "search": "search search boiler --index {index}",
    "serve": "",
}
WORDS = ("boiler", "drips", "night", "bike", "squeaks", "rains", "cold", "grey", "morning", "town")


# --- a checkout, in a process of its own ------------------------------------------------------------------------------


def answer(checkout: str, workload: str, names: dict[str, str]) -> None:
    """Take a turn for each line of standard input, and answer each with its seconds; a traceback ends the process."""
    sys.path[0] = checkout
    os.chdir(checkout)
    told, sys.stdout = sys.stdout, io.StringIO()
    turn = serving(checkout, names) if workload == "serve" else command(workload, names)
    for number, _ in enumerate(sys.stdin):
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                seconds = turn(number)
            except (Exception, SystemExit):  # argparse and errors of users end in SystemExit; told to the parent
                error = traceback.format_exc(limit=-2) + errors.getvalue()[-2000:]
                print(json.dumps({"error": error}), file=told, flush=True)
                return
        print(json.dumps({"seconds": seconds}), file=told, flush=True)


def command(workload: str, names: dict[str, str]):
    """Return a turn of a command: its seconds, or in training those of its median step."""
    name, *flags = WORKLOADS[workload].split()
    module = importlib.import_module(name)

    def turn(number: int) -> float:
        new = f"{names['scratch']}/{number}"
        began = time.perf_counter()
        code = module.main([flag.format(**names, new=new) for flag in flags])
        seconds = time.perf_counter() - began
        if code:
            raise RuntimeError(f"{name}.py ended with {code}")
        if name != "train":
            return seconds
        records = map(json.loads, (Path(new) / "metrics.jsonl").read_text().splitlines())
        return statistics.median([record["seconds"] for record in records if record["type"] == "train"][1:])

    return turn


def serving(checkout: str, names: dict[str, str]):
    """Return a turn of 64 requests of 8 clients to a server that stays up."""
    line = [sys.executable, "serve.py", "--port", "0", "--model", names["minilm"]]
    with open(Path(names["scratch"]) / "log", "w") as log:
        server = subprocess.Popen(line, cwd=checkout, stdout=subprocess.PIPE, stderr=log, text=True)
    atexit.register(server.terminate)
    found = re.search(r"http://[\d.:]+", server.stdout.readline())
    if found is None:
        raise RuntimeError(Path(log.name).read_text()[-2000:] or "serve.py said no address")
    texts = [text for line in open(names["few"], encoding="utf-8") for text in [json.loads(line)["text"]]]

    def ask(number: int) -> None:
        body = json.dumps({"model": "any", "input": texts[number % 40 : number % 40 + 4]}).encode()
        request = urllib.request.Request(f"{found[0]}/v1/embeddings", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=120).read()

    def turn(_: int) -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(8) as clients:
            list(clients.map(ask, range(64)))
        return time.perf_counter() - began

    return turn


class Turns(NamedTuple):
    """The seconds of a checkout's turns, and why it takes no more."""

    times: list[float]
    error: str = ""


class Checkout:
    """A checkout that takes turns on a workload; `error` has why it no longer does."""

    def __init__(self, folder: Path, workload: str, names: dict[str, str], scratch: Path):
        scratch.mkdir(parents=True)
        self.times: list[float] = []
        self.error = ""
        given = [str(folder.resolve()), workload, json.dumps(names | {"scratch": str(scratch)})]
        line = [sys.executable, __file__, "--answer", *given]
        self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(self) -> None:
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline() or '{"error": "the process ended"}')
        self.error = found.get("error", "")
        self.times.append(found.get("seconds", 0.0))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


# --- the comparison ---------------------------------------------------------------------------------------------------


def write_data(work: Path) -> dict[str, str]:
    """Write what all workloads read into `work`; return the names that stand in WORKLOADS."""
    draw = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS, int(draw.integers(1, words))))

    def row(i: int) -> dict:
        return {"query": f"{i} {text(10)}", "positive": f"{i} {text(120)}", "negatives": [text(120) for _ in range(3)]}

    rows = [row(i) for i in range(600)]
    said = [{"role": "user", "content": "what drips"}, {"role": "assistant", "content": "the boiler, all night long"}]
    files = {
        "rows": rows,
        "chat": [{"messages": said}] * 200,
        "texts": [{"text": row["positive"]} for row in rows],
        "few": [{"text": row["positive"]} for row in rows[:60]],
    }
    names = {}
    for name, lines in files.items():
        names[name] = str(work / f"{name}.jsonl")
        Path(names[name]).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (work / "folder").mkdir()
    for number, row in enumerate(rows[:200]):
        (work / "folder" / f"{number}.md").write_text(f"# {row['query']}\n\n{row['positive']}\n", encoding="utf-8")
    return names | {"folder": str(work / "folder")}


def make_models(old: Path, work: Path, names: dict[str, str]) -> dict[str, str]:
    """Let the old checkout make what both read: a cross-encoder and an index. Raises RuntimeError if it cannot."""
    import sides

    names |= {"tiny": str(ROOT / "gemma-3-tiny-mlx"), "eval_data": str(ROOT / "eval-data")}
    names |= {"minilm": sides.minilm(), "cross": str(work / "cross" / "final"), "index": str(work / "index")}
    train = ["train.py", "--task", "rerank", "--model", names["minilm"], "--data", names["rows"], "--steps", "2"]
    train += ["--batch-size", "4", "--eval-tasks", "--skip-eval-init", "--output", str(work / "cross")]
    index = ["search.py", "index", names["folder"], "--model-path", names["minilm"], "--index", names["index"]]
    for line in (train, index):
        done = subprocess.run([sys.executable, *line], cwd=old, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{old}: {line[0]} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return names


def ratio(old: list[float], new: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of old / new over the rounds, and its 95 % interval by bootstrap."""
    logs = np.log(np.array(old) / np.array(new))
    drawn = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(axis=1)
    return tuple(np.exp([logs.mean(), *np.percentile(drawn, (2.5, 97.5))]).tolist())


def compare(workload: str, old: Path, new: Path, names: dict[str, str], work: Path, rounds: int) -> tuple[Turns, Turns]:
    """Let both checkouts take `rounds` turns each, the first one changing; return the times of each, and its error."""
    folders = {"old": old, "new": new}
    taken = {name: Turns([]) for name in folders}
    halves = (rounds + 1) // 2, rounds // 2
    for half, order in zip(halves, (("old", "new"), ("new", "old")), strict=True):
        if not half or any(turns.error for turns in taken.values()):
            continue
        both = {
            name: Checkout(folders[name], workload, names, work / f"{workload}-{name}-{order[0]}") for name in order
        }
        for number in range(half + 1):  # the first one does not count
            for name in order if number % 2 else order[::-1]:
                if not any(side.error for side in both.values()):
                    both[name].turn()
        for name, side in both.items():
            side.close()
            taken[name] = Turns(taken[name].times + side.times[1:], side.error)
    return taken["old"], taken["new"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD", help="checkout to compare with")
    parser.add_argument("new", type=Path, metavar="NEW", help="checkout that may have become slower")
    parser.add_argument(
        "--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME", help="of: %(choices)s"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measured turns of each checkout (default: 7)")
    parser.add_argument("--tolerance", type=float, default=0.03, help="share of time that may be lost (default: 0.03)")
    args = parser.parse_args()

    import sides

    print(sides.machine())
    slower, failed = [], []
    print(f"\n{'workload':14}{'old s':>9}{'new s':>9}{'old/new':>9}{'95 % interval':>18}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        try:
            names = make_models(args.old, work, write_data(work))
        except (RuntimeError, OSError) as error:
            print(f"gate.py: {error}", file=sys.stderr)
            return 2
        for workload in args.only:
            old, new = compare(workload, args.old, args.new, names, work, args.rounds)
            for name, side in (("old", old), ("new", new)):
                if side.error:
                    failed.append(workload)
                    print(f"{workload:14}{name} failed: {side.error.strip().splitlines()[-1]}", flush=True)
            if workload in failed:
                continue
            mean, low, high = ratio(old.times, new.times)
            verdict = "SLOWER" if high < 1 - args.tolerance else "faster" if low > 1 + args.tolerance else ""
            slower += [workload] * (verdict == "SLOWER")
            medians = f"{statistics.median(old.times):>9.3f}{statistics.median(new.times):>9.3f}"
            print(f"{workload:14}{medians}{mean:>9.3f}{f'[{low:.3f}, {high:.3f}]':>18}  {verdict}", flush=True)
    if slower:
        print(f"slower: {', '.join(slower)}")
    return 2 if failed else 1 if slower else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer(*sys.argv[2:4], json.loads(sys.argv[4]))
    else:
        sys.exit(main())
