"""Run every command with broken inputs, bad folders, closed descriptors and signals; check that nothing is silent.

python tools/torture.py                          500 seeded cases, some 15 minutes on two cores
python tools/torture.py --cases 40 --seed 7      other cases
python tools/torture.py --only 'embed*'          cases of some commands alone
python tools/torture.py --case 123 --work work   one case again; its folder is kept, with the command in it

A case is one command with one to three injuries (torture_injuries.py), in a process and a folder of its own, on copies
of small random models and data. It fails for a traceback, a hang, a changed input, a changed file of somebody else's, a
message that is missing or too long, an exit code that does not fit, exit code 0 with a result that is missing,
incomplete, not finite or other than it has to be, or another exit code with an output that looks complete.

Exit codes: 0 no case failed, 1 some did, 2 bad usage.
"""

import argparse
import collections
import fnmatch
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from same_bits_inputs import make_inputs
from torture_commands import COMMANDS, PREPARED, QUERIES, SETTINGS, Command, count_texts, vectors
from torture_damage import Attempt
from torture_injuries import Injury, choose, expected

CHECKOUT = Path(__file__).resolve().parent.parent
TIMEOUT = 300  # seconds
LONGEST_MESSAGE = 1500  # characters
QUERY = "join words with a separator"
# Closes descriptors and limits files in the process that then becomes the command.
LAUNCH = """
import ctypes, json, os, resource, sys
closed, limit, no_override = json.loads(sys.argv[1])
if limit is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if no_override and os.geteuid() == 0:
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: permissions hold for root, too
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
for descriptor in closed:
    os.close(descriptor)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass
class Outcome:
    """What became of a case: its exit code (None: it hung), and what is wrong."""

    number: int
    command: Command
    injuries: list[Injury]
    code: int | None = 0
    faults: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """In one word: right, told, stopped or failed."""
        if self.faults:
            return "failed"
        return "right" if self.code == 0 else "told" if self.code in (1, 2) else "stopped"

    @property
    def title(self) -> str:
        return f"{self.number}: {self.command.name} | {' + '.join(injury.name for injury in self.injuries)}"


@dataclass
class Bench:
    """Where the cases run, and what the commands compute unharmed."""

    work: Path
    inputs: Path
    references: dict[str, object] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the models, data, adapters and the index, and run every command once, unharmed."""
        if not (self.inputs / "queries.jsonl").exists():
            make_inputs(CHECKOUT, self.inputs, sys.executable)
            texts = [
                json.loads(line)["text"] for line in (self.inputs / "documents.jsonl").read_text("utf-8").splitlines()
            ]
            (self.inputs / "plain.txt").write_text("".join(" ".join(t.split()) + "\n" for t in texts), "utf-8")
            (self.inputs / "settings.yaml").write_text(SETTINGS, "utf-8")
            (self.inputs / "prepared").mkdir()
            for name, line in PREPARED.items():
                words = {"inputs": str(self.inputs), "out": str(self.inputs / "prepared" / name)}
                command = [sys.executable, str(CHECKOUT / line.split()[0])]
                command += [word.format(**words) for word in shlex.split(line)[1:]]
                subprocess.run(command, check=True, capture_output=True, cwd=self.inputs, env=environment())
            queries = "".join(json.dumps(row) + "\n" for row in QUERIES)
            (self.inputs / "queries.jsonl").write_text(queries, "utf-8")

    def attempt(self, command: Command, folder: Path) -> Attempt:
        """Return an attempt in a new folder, its inputs copied there."""
        folder.mkdir(parents=True)
        slots = {"query": QUERY, "out": str(folder / command.output)}
        for slot, (path, kind) in command.inputs.items():
            source, target = self.inputs / path, folder / "inputs" / slot / Path(path).name
            target.parent.mkdir(parents=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
            slots[slot] = str(target)
            if kind in ("embed", "rerank"):
                slots["other"] = str(self.inputs / {"embed": "cross", "rerank": "bert"}[kind])
        return Attempt(folder, slots)

    def reference(self, command: Command) -> None:
        """Run a command unharmed; RuntimeError if it does not work."""
        attempt = self.attempt(command, self.work / "unharmed" / command.name.replace(" ", "-"))
        code, printed, errors = run(command, attempt)
        if code != 0:
            raise RuntimeError(f"{command.name}, unharmed, ended with {code}: {errors[-2000:]}")
        self.references[command.name] = command.result(Path(attempt.slots[command.reads]), printed)

    def case(
        self, number: int, command: Command, injuries: list[tuple[Injury, str]], pick: random.Random, keep: bool
    ) -> Outcome:
        """Run one case and judge it; its folder is kept if it failed."""
        folder = self.work / str(number)
        attempt = self.attempt(command, folder)
        attempt.slots["option"] = pick.choice(command.options) if command.options else ""
        outcome = Outcome(number, command, [injury for injury, _ in injuries])
        for injury, slot in injuries:
            injury.apply(attempt, slot, pick)
        before = digests(folder, attempt.slots.get("run"))
        outcome.code, printed, errors = run(command, attempt)
        outcome.faults = self.judge(outcome, attempt, printed, errors)
        outcome.faults += [f"changed {path}" for path, digest in digests(folder, attempt.slots.get("run")).items()
                           if before.get(path, digest) != digest]  # fmt: skip
        outcome.faults += [f"removed {path}" for path in before if not (folder / path).exists()]
        if not outcome.faults and not keep:
            shutil.rmtree(folder)
        return outcome

    def judge(self, outcome: Outcome, attempt: Attempt, printed: str, errors: str) -> list[str]:
        """Return what is wrong with the end of a case."""
        command, code, faults = outcome.command, outcome.code, []
        wanted = expected(outcome.injuries)
        if code is None:
            return [f"still running after {TIMEOUT} s"]
        # Ctrl-C while Python still imports ends as Python ends it.
        importing = errors.rstrip().endswith("KeyboardInterrupt") and "in main" not in errors
        if "Traceback (most recent call last)" in printed + errors and not importing:
            faults.append("a traceback")
        stops = {0, *((-attempt.signal[0], 128 + attempt.signal[0]) if attempt.signal else ())}
        told = {2, 1} if command.name == "embed --check" else {2}
        allowed = {"same": {0}, "accepted": {0}, "refused": told, "either": {0, *told}, "stopped": stops}
        allowed["stopped or refused"] = stops | told
        if code not in allowed[wanted]:
            faults.append(f"exit code {code}, but {wanted} was expected")
        if code in told and 2 not in attempt.closed:
            faults += message_faults(command, code, printed, errors)
        out = Path(attempt.slots[command.reads])
        if code == 0 and not (1 in attempt.closed and not command.output):
            try:
                result = command.result(out, printed)
            except Exception as error:
                if not (attempt.reader_leaves is not None and not command.output):
                    faults.append(f"exit code 0, but the result cannot be read: {type(error).__name__}: {error}")
            else:
                if wanted == "same" and result != self.references[command.name]:
                    faults.append("exit code 0, but another result than unharmed")
                if command.result is vectors and len(result) != (count := count_texts(Path(attempt.slots["texts"]))):
                    faults.append(f"exit code 0, but {len(result)} vectors for {count} texts")
        if code in told and command.output and out.suffix and out.is_file() and outcome_is_new(attempt, out):
            faults.append(f"exit code {code}, but {out.name} was written")
        if code in (*told, 0):
            leftovers = [p.name for p in attempt.folder.rglob(".*") if p.suffix in (".new", ".old")]
            faults += [f"{name} is left" for name in leftovers]
        return faults


def outcome_is_new(attempt: Attempt, out: Path) -> bool:
    """Is a file newer than the folder of inputs, that is, did the command write it?"""
    return out.stat().st_mtime > (attempt.folder / "started").stat().st_mtime


def message_faults(command: Command, code: int, printed: str, errors: str) -> list[str]:
    """Return what is wrong with the message of a command that refused."""
    lines = [line for line in errors.splitlines() if line.startswith(command.script)]
    if not lines:
        return [f"exit code {code} without a message"]
    if "usage:" in errors:
        return ["a page of usage instead of a line"]
    return [f"a message of {len(lines[-1]):,} characters"] if len(lines[-1]) > LONGEST_MESSAGE else []


def environment(**values: str) -> dict[str, str]:
    """Return the environment of a command, without network and with fixed columns."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"} | values


def digests(folder: Path, without: str | None) -> dict[str, str]:
    """Return a digest of every file below a folder, by its path; `without`: a folder that may change."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (without is None or not path.is_relative_to(without))
    }


def run(command: Command, attempt: Attempt) -> tuple[int | None, str, str]:
    """Run an attempt; return its exit code (None: it hung), and what it wrote to stdout and stderr."""
    words = [word.format(**attempt.slots) for word in command.line.split()]
    line = [sys.executable, str(CHECKOUT / words[0]), *words[1:], *attempt.extra]
    output, errors = attempt.folder / "stdout.txt", attempt.folder / "stderr.txt"
    (attempt.folder / "command.txt").write_text(shlex.join(line).encode("utf-8", "replace").decode(), "utf-8")
    (attempt.folder / "started").touch()
    launch = [
        sys.executable,
        "-c",
        LAUNCH,
        json.dumps([attempt.closed, attempt.file_limit, attempt.read_only]),
        *line[1:],
    ]
    with open(output, "wb") as out, open(errors, "wb") as err:
        process = subprocess.Popen(
            launch,
            cwd=attempt.folder,
            env=environment(**attempt.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if attempt.reader_leaves is not None else out,
            stderr=err,
        )
        if attempt.reader_leaves is not None:
            process.stdout.read(attempt.reader_leaves)
            process.stdout.close()
        try:
            if attempt.signal:
                number, seconds = attempt.signal
                try:
                    process.wait(seconds)
                except subprocess.TimeoutExpired:
                    process.send_signal(number)
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    read = [path.read_bytes().decode("utf-8", "replace") for path in (output, errors)]
    for path in (output, errors):
        path.rename(path.with_suffix(".log"))
    return code, *read


def torture(work: Path, inputs: Path, cases: int, seed: int, only: str, one: int | None, jobs: int) -> list[Outcome]:
    """Run the cases of a seed and return what became of each, in their order; failures are printed as they come."""
    bench = Bench(work, inputs)
    bench.prepare()
    planned = []
    for number in range(cases if one is None else one + 1):
        pick = random.Random(f"{seed} {number}")
        command, injuries = choose(number, pick)
        if fnmatch.fnmatch(command.name, only) and one in (None, number):
            planned.append((number, command, injuries, pick))
    began, done = time.monotonic(), 0

    def one_case(plan: tuple[int, Command, list[tuple[Injury, str]], random.Random]) -> Outcome:
        nonlocal done
        outcome = bench.case(*plan, keep=one is not None)
        done += 1
        if outcome.faults:
            print(f"{outcome.title}\n    {'; '.join(outcome.faults)[:1000]}", flush=True)
        if sys.stderr.isatty() or done % 50 == 0:
            print(f"{done} of {len(planned)} cases, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        names = {command.name for _, command, *_ in planned}
        list(pool.map(bench.reference, [command for command in COMMANDS if command.name in names]))
        return list(pool.map(one_case, planned))


def print_table(outcomes: list[Outcome]) -> None:
    """Print how many cases of each command ended how."""
    kinds = ("right", "told", "stopped", "failed")
    print(f"| {'command':24} | cases | {' | '.join(kinds)} |\n|---|---|{'---|' * len(kinds)}")
    for name in dict.fromkeys(command.name for command in COMMANDS):
        counts = collections.Counter(outcome.kind for outcome in outcomes if outcome.command.name == name)
        if counts:
            print(f"| {name:24} | {counts.total()} | {' | '.join(str(counts[kind]) for kind in kinds)} |")
    counts = collections.Counter(outcome.kind for outcome in outcomes)
    print(f"| {'all':24} | {counts.total()} | {' | '.join(str(counts[kind]) for kind in kinds)} |")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every command under bad circumstances; see tools/torture.py.")
    parser.add_argument("--cases", type=int, default=500, metavar="N", help="number of cases (default: 500)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the cases (default: 1)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="commands to run, by name (default: all)")
    parser.add_argument("--case", type=int, metavar="N", help="run this case alone, and keep its folder")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at a time (default: 2)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder to work in; kept (default: a temporary one)")
    parser.add_argument("--inputs", type=Path, metavar="DIR", help="models and data, made if missing (default: in DIR)")
    args = parser.parse_args()
    work = (args.work or Path(tempfile.mkdtemp(prefix="torture-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    for path in work.iterdir():
        if path.name.isdigit() or path.name == "unharmed":
            shutil.rmtree(path)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    began = time.monotonic()
    outcomes = torture(work, args.inputs or work / "inputs", args.cases, args.seed, args.only, args.case, args.jobs)
    print_table(outcomes)
    print(f"seed {args.seed}, {time.monotonic() - began:.0f} s", end="")
    failed = [outcome for outcome in outcomes if outcome.faults]
    print(f"; folders of failed cases: {work}" if failed or args.case is not None else "")
    if not failed and args.work is None:
        shutil.rmtree(work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
