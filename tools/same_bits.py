"""Compare what two checkouts compute, byte for byte: proof that a change of the code changed no result.

python tools/same_bits.py OLD NEW                       every case, in some ten minutes on two cores
python tools/same_bits.py OLD NEW --only 'rerank-*'     some of them; --list names them all
python tools/same_bits.py OLD OLD                       are runs repeatable on this machine?
python tools/same_bits.py OLD NEW --any-wording         messages to people may be reworded
python tools/same_bits.py OLD NEW --work work --keep    look at what both wrote, under work/old and work/new

Both sides are given the same small random models and data, and run the same commands on this machine, one process each:
short seeded training runs of every task, vectors, rankings, exports, mined files, searches; with and without
MLX_RETRIEVAL_PLAIN=1. Then all files and all that was printed are compared. Only times, speeds, bytes in memory and the
places of the checkouts may differ: same_bits_compare.py names them.

The checkouts are called by their commands and by what notebooks import, so their modules may have any layout.

Exit codes: 0 the same, 1 different (or a command failed), 2 bad usage.
"""

import argparse
import fnmatch
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from same_bits_cases import CASES, WARM_UP, Case
from same_bits_compare import WORDED, compare
from same_bits_inputs import make_inputs

SIDES = ("old", "new")
COMMANDS = ("train.py", "eval.py", "embed.py", "rerank.py", "search.py", "mine.py", "export.py")


@dataclass
class Outcome:
    """What became of a case: files compared, seconds of each side, and what differs or failed."""

    name: str
    files: int = 0
    seconds: list[float] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        """In a word or two."""
        same = "same" if self.files else "same exit codes"
        return f"{len(self.differences)} DIFFERENT" if self.differences else same


@dataclass(frozen=True)
class Bench:
    """Where and with what the cases run."""

    checkouts: dict[str, Path]
    work: Path
    python: str
    words: dict[str, str]
    left_out: tuple[str, ...] = ()

    def warm_up(self) -> None:
        """Compile a checkout's first kernels: a run that does it says so, and the other side's would not."""
        for side in SIDES:
            self._run_side(WARM_UP, False, f"warm-up/{side}", "warm-up", self.checkouts[side])

    def run(self, case: Case, plain: bool) -> Outcome:
        """Run a case on both sides, one after the other, and compare."""
        outcome = Outcome(f"{case.name} plain" if plain else case.name)
        place = outcome.name.replace(" ", "-")
        for side in SIDES:
            began = time.monotonic()
            failures = self._run_side(case, plain, side, place, self.checkouts[side])
            outcome.seconds.append(time.monotonic() - began)
            outcome.differences += failures
        folders = [self.work / side / place for side in SIDES]
        outcome.files, differences = compare(*folders, *map(self._places, SIDES), self.left_out)
        outcome.differences += differences
        return outcome

    def _run_side(self, case: Case, plain: bool, side: str, place: str, checkout: Path) -> list[str]:
        """Run a case's commands for one side; returns what failed. stderr goes to the logs, stdout is compared."""
        folder, logs = self.work / side / place, self.work / "logs" / side
        for path in (folder, logs):
            path.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLX_RETRIEVAL_PLAIN", "PYTHONPATH"))}
        environment |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "COLUMNS": "120"}
        environment |= {"MLX_RETRIEVAL_PLAIN": "1"} if plain else {}
        for number, line in enumerate(case.commands, start=1):
            command = shlex.split(line.format(folder=folder, **self.words))
            name = f"{number}-{Path(command[0]).stem}"
            if command[0] in COMMANDS:
                command[0], found_by = str(checkout / command[0]), {}
            else:  # a script of ours, which imports from the checkout
                found_by = {"PYTHONPATH": str(checkout)}
            done = subprocess.run(
                [self.python, *command],
                cwd=checkout if case.here else folder,
                env=environment | found_by,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                encoding="utf-8",
            )
            printed = "json" if "--json" in command else "printed.txt"
            (folder / f"{name}.{printed}").write_text(done.stdout, "utf-8")
            (logs / f"{place}-{name}.txt").write_text(f"{shlex.join(command)}\n{done.stderr}", "utf-8")
            if case.code:
                (folder / f"{name}.errors.txt").write_text(done.stderr, "utf-8")
            if done.returncode != case.code:
                last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
                return [f"{side.upper()}: {line.split()[0]} (command {number}) ended with {done.returncode}: {last}"]
        return []

    def _places(self, side: str) -> dict[str, str]:
        """The paths that are a side's own, and a word for each."""
        places = {self.checkouts[side]: "<checkout>", self.work / side: "<work>"}
        return {str(form): word for path, word in places.items() for form in (path, path.resolve())}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("old", nargs="?", type=Path, metavar="OLD", help="checkout to compare with")
    out.add_argument("new", nargs="?", type=Path, metavar="NEW", help="checkout that should compute the same")
    out.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="cases whose names match, such as late*"
    )
    out.add_argument("--list", action="store_true", help="print the cases and their commands, run nothing")
    plain = "with MLX_RETRIEVAL_PLAIN=1, without, or both (default: both)"
    out.add_argument("--plain", choices=("with", "without", "both"), default="both", help=plain)
    wording = f"leave out what people read: {', '.join(WORDED)}; what --json prints is compared"
    out.add_argument("--any-wording", action="store_true", help=wording)
    out.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at a time (default: 2)")
    work = "folder to work in, empty or new (default: a temporary one)"
    out.add_argument("--work", type=Path, metavar="DIR", help=work)
    out.add_argument("--keep", action="store_true", help="keep that folder, where nothing differs too")
    out.add_argument("--python", default=sys.executable, metavar="FILE", help="interpreter of both (default: this one)")
    return out


def chosen(patterns: Sequence[str], plain: str = "both") -> list[tuple[Case, bool]]:
    """The cases that match a pattern, each with whether it runs with MLX_RETRIEVAL_PLAIN=1."""
    cases = [case for case in CASES if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)]
    wanted = {"with": (True,), "without": (False,), "both": (False, True)}[plain]
    return [(case, mode) for case in cases for mode in wanted if case.plain or not mode]


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Print what became of every case, then every difference."""
    width = max(len(outcome.name) for outcome in outcomes)
    print(f"\n{'case':<{width}}  files  seconds old, new  result")
    for outcome in outcomes:
        old, new = outcome.seconds
        print(f"{outcome.name:<{width}}  {outcome.files:>5}  {old:>11.1f} {new:>5.1f}  {outcome.result}")
    for outcome in outcomes:
        for line in outcome.differences:
            print(f"\n{outcome.name}: {line}", end="")
    wrong = sum(bool(outcome.differences) for outcome in outcomes)
    verdict = f"DIFFERENT: {wrong} of {len(outcomes)} cases" if wrong else f"the same: {len(outcomes)} cases"
    print(f"\n{verdict}, {sum(outcome.files for outcome in outcomes):,} files")


def run_all(bench: Bench, cases: Sequence[tuple[Case, bool]], jobs: int) -> list[Outcome]:
    """Run cases, several at a time, and tell of each as it ends."""

    def run(pair: tuple[Case, bool]) -> Outcome:
        outcome = bench.run(*pair)
        times = " + ".join(f"{seconds:.1f}" for seconds in outcome.seconds)
        print(f"{outcome.name}: {outcome.result}, {outcome.files} files, {times} s", flush=True)
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, cases))


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    command = parser()
    args = command.parse_args(argv)
    cases = chosen(args.only, args.plain)
    if not cases:
        command.error(f"--only {' '.join(args.only)}: no such case; --list names them")
    if args.list:
        for case, plain in cases:
            print(f"{case.name}{' plain' * plain}", *case.commands, sep="\n    ")
        return 0
    if args.old is None or args.new is None:
        command.error("OLD and NEW: two checkouts are needed")
    checkouts = {side: path.expanduser().absolute() for side, path in zip(SIDES, (args.old, args.new), strict=True)}
    for path in checkouts.values():
        if missing := [name for name in COMMANDS if not (path / name).is_file()]:
            command.error(f"{path}: no checkout, as it has no {missing[0]}")
    if args.jobs < 1:
        command.error(f"--jobs {args.jobs}: at least 1")
    if args.work and args.work.exists() and (not args.work.is_dir() or any(args.work.iterdir())):
        command.error(f"--work {args.work}: not an empty folder")
    work = args.work.expanduser().absolute() if args.work else Path(tempfile.mkdtemp(prefix="same-bits-"))
    began = time.monotonic()
    words = make_inputs(checkouts["old"], work / "inputs", args.python)
    print(f"{len(cases)} cases, in {work}; models and data: {time.monotonic() - began:.1f} s", flush=True)
    bench = Bench(checkouts, work, args.python, words, WORDED if args.any_wording else ())
    if not all(plain for _, plain in cases):  # which compile nothing
        bench.warm_up()
        print(f"kernels compiled: {time.monotonic() - began:.1f} s", flush=True)
    outcomes = run_all(bench, cases, args.jobs)
    print_table(outcomes)
    print(f"{time.monotonic() - began:.0f} s in all")
    different = any(outcome.differences for outcome in outcomes)
    if args.keep or different:
        print(f"kept: {work}")
    else:
        shutil.rmtree(work)
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
