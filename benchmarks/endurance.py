"""Does a run last? Kills it at random moments, and watches its memory over thousands of steps.

    python benchmarks/endurance.py                            100 kills and 2,000 steps
    python benchmarks/endurance.py --kills 3 --steps 150      in a minute

Kills: `train.py` starts on a small random model and continues with --resume, until it has been sent SIGKILL --kills
times at random moments of its work, saving included. Each time the newest checkpoint must load, and no more than
--save-steps of the reported steps may be lost; at the end the trained weights must equal those of an uninterrupted run,
bit for bit. Memory: texts of 1 to 60 words, so that hardly two batches have equal shapes; resident
memory after the last step beside that after the first ones (a tenth of them, 200 at most). Exit code 1: a check failed.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sides
from sides import ROOT

sys.path.insert(0, str(ROOT / "tests"))
WORDS = ("boiler", "drips", "night", "bike", "squeaks", "rains", "cold", "grey", "morning", "town")
GROWTH = 0.05  # most that resident memory may grow


def write_rows(path: Path, count: int, longest: int, seed: int = 0) -> Path:
    """Write rows of texts of 1 to `longest` words."""
    draw = random.Random(seed)

    def text(i: int, most: int) -> str:
        return f"{i} " + " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    rows = ({"query": text(i, longest // 4 + 1), "positive": text(i, longest)} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings_of(folder: Path, steps: int, longest: int, **changes) -> dict:
    """Return settings without evaluation for a small random model, which is made in `folder` if it is missing."""
    from small_gemma import make_small_gemma

    model = folder / "model"
    if not model.is_dir():
        make_small_gemma(model)
        write_rows(folder / "rows.jsonl", 400, longest)
    given = {"model": str(model), "data": [str(folder / "rows.jsonl")], "steps": steps, "eval_tasks": []}
    return given | {"batch_size": 8, "lora_rank": 4, "lora_dropout": 0.1, "max_length": 256} | changes


# --- kills ----------------------------------------------------------------------------------------------------------


def kill(folder: Path, kills: int, steps: int, save_steps: int, seed: int = 0, tell=print) -> dict:
    """Kill and resume a run; return `kills`, `lost` (steps, one number a kill), `loadable`, `same`, `seconds`.

    Each process is killed at a random moment after a random number of steps. Kills are counted in steps
    since a step's time differs tenfold between the first process, which compiles, and the others; on average they
    divide the run evenly.
    """
    from mlx_retrieval.training.config import Settings
    from mlx_retrieval.training.settings_file import write_yaml

    draw, began, run = random.Random(seed), time.perf_counter(), folder / "killed"
    files = {}
    for name in ("whole", "killed"):
        made = settings_of(folder, steps, 12, save_steps=save_steps, keep=2, output=str(folder / name))
        files[name] = folder / f"{name}.yaml"
        write_yaml(Settings(**made), files[name])
    _train("--config", str(files["whole"])).wait()
    pace = statistics.median(record["seconds"] for record in _records(folder / "whole"))
    lost, loadable = [], True
    while len(lost) < kills and not (run / "final").is_dir():
        before = _reported(run)
        resume = (
            ["--resume", "--output", str(run)]
            if (run / "config.yaml").is_file()
            else ["--config", str(files["killed"])]
        )
        process = _train(*resume)
        left = steps - _saved(run)
        goal = _saved(run) + 1 + int(draw.uniform(0, 2 / (kills - len(lost) + 1)) * left)
        while process.poll() is None and ((told := _reported(run)) < goal or told == before):
            time.sleep(0.002)  # a resumed run cuts the file back first
        time.sleep(draw.uniform(0, pace))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode == -signal.SIGKILL:
            lost.append(max(0, _reported(run) - _saved(run)))
            loadable = loadable and _loads(run)
            tell(f"kill {len(lost)}: {_reported(run)} steps told, {_saved(run)} saved", file=sys.stderr, flush=True)
        elif process.returncode:
            raise RuntimeError(f"train.py ended with {process.returncode}")
    if not (run / "final").is_dir():
        _train("--resume", "--output", str(run)).wait()
    names = ("adapters.safetensors", "optimizer.safetensors", "trainer_state.json")
    same = all((run / "final" / n).read_bytes() == (folder / "whole" / "final" / n).read_bytes() for n in names)
    return {
        "kills": len(lost),
        "lost": lost,
        "loadable": loadable,
        "same": same,
        "seconds": time.perf_counter() - began,
    }


def _train(*flags: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)


def _records(run: Path) -> list[dict]:
    from mlx_retrieval.training.curves import read_metrics

    return read_metrics(run / "metrics.jsonl")


def _reported(run: Path) -> int:
    """Return the steps that metrics.jsonl reports."""
    return max((record["step"] for record in _records(run)), default=0)


def _saved(run: Path) -> int:
    """Return the step that --resume would continue from."""
    from mlx_retrieval.training import checkpoint

    last = checkpoint.last_step(run)
    return int(last.name.removeprefix("step-")) if last else 0


def _loads(run: Path) -> bool:
    """Return whether the newest checkpoint opens as a model and its optimizer state is complete."""
    from mlx_retrieval.backend import mx

    from mlx_retrieval.models import loading
    from mlx_retrieval.training import checkpoint

    if (last := checkpoint.last_step(run)) is None:
        return True  # killed before the first save
    model, _, _ = loading.open_model(None, str(last))
    mx.eval(model.parameters(), checkpoint.read_safetensors(last / checkpoint.OPTIMIZER))
    return json.loads((last / checkpoint.STATE).read_text(encoding="utf-8"))["step"] == _saved(run)


# --- memory ---------------------------------------------------------------------------------------------------------


def watch(folder: Path, steps: int, longest: int = 60) -> list[tuple[int, int]]:
    """Run in this process; return (step, resident bytes) at about twenty steps. Texts have 1 to `longest` words."""
    from mlx_retrieval import backend
    from mlx_retrieval.training import config
    from mlx_retrieval.training import run as training_run
    from mlx_retrieval.training.reporting import Reporter

    backend.prepare()  # as commands do
    run = training_run.prepare(
        config.Settings(**settings_of(folder, steps, longest, save_steps=0, output=str(folder / "long")))
    )
    found, every = [], max(1, steps // 20)

    class Watching(Reporter):
        def step(self, record: dict) -> None:
            super().step(record)
            if record["step"] % every == 0:
                found.append((record["step"], resident()))

    training_run.begin(run)
    with Watching(run.folder, steps) as report:
        run.trainer.reporter = report
        training_run.take_steps(run.trainer)
    return found


def resident() -> int:
    """Return the resident bytes of this process."""
    status = Path("/proc/self/status")
    if status.is_file():
        return (
            int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:")).split()[1]) * 1024
        )
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], check=True, capture_output=True, text=True)
    return int(told.stdout) * 1024


def growth(found: list[tuple[int, int]], first: int) -> float:
    """Return the share by which memory grew from step `first` to the last one."""
    before = next(size for step, size in found if step >= first)
    return found[-1][1] / before - 1


# --- the command ----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="0 = none (default: 100)")
    parser.add_argument(
        "--steps", type=int, default=2_000, metavar="N", help="of the long run; 0 = none (default: 2000)"
    )
    parser.add_argument("--save-steps", type=int, default=5, metavar="N", help="of the killed run (default: 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    args = parser.parse_args()
    print(sides.machine())
    bad = False
    with tempfile.TemporaryDirectory() as folder:
        if args.kills:
            steps = max(40, 20 * args.kills)
            found = kill(Path(folder), args.kills, steps, args.save_steps, args.seed)
            bad = not found["loadable"] or not found["same"] or max(found["lost"]) > args.save_steps
            print(f"\n{steps} steps, saved every {args.save_steps}, {found['kills']} kills, {found['seconds']:.0f} s\n")
            print("| what | found | wanted |\n|---|---|---|")
            print(f"| steps lost, most | {max(found['lost'])} | {args.save_steps} |")
            print(f"| steps lost, mean | {statistics.mean(found['lost']):.1f} | |")
            print(f"| newest checkpoint loads, every time | {_yes(found['loadable'])} | yes |")
            print(f"| weights, optimizer and state those of an unkilled run | {_yes(found['same'])} | yes |")
    with tempfile.TemporaryDirectory() as folder:
        if args.steps:
            began = time.perf_counter()
            found = sides.in_child(watch, Path(folder), args.steps)
            first = min(200, args.steps // 10)
            grown = growth(found, first)
            bad = bad or grown >= GROWTH
            print(f"\n{args.steps} steps with varying lengths, {time.perf_counter() - began:.0f} s\n")
            print("| step | resident MB |\n|---|---|")
            print("\n".join(f"| {step} | {size / 1e6:,.0f} |" for step, size in found))
            print(f"\ngrowth after the first {first} steps: {grown:+.1%}, wanted: below {GROWTH:.0%}")
    return int(bad)


def _yes(found: bool) -> str:
    return "yes" if found else "NO"


if __name__ == "__main__":
    sys.exit(main())
