"""tools/torture.py finds what it looks for, and finds nothing in a sample of its cases.

python -m pytest tests/test_torture.py --all
"""

import collections
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import torture
import torture_commands
from torture_damage import Attempt
from torture_injuries import INJURIES, choose, expected

COMMANDS = {command.name: command for command in torture_commands.COMMANDS}
BY_NAME = {injury.name: injury for injuries in INJURIES.values() for injury in injuries}


def test_every_injury_is_chosen_and_a_seed_repeats_its_cases():
    """500 cases have every injury and every command among them, each time the same."""
    plans = []
    for _ in range(2):
        cases = [choose(number, random.Random(f"1 {number}")) for number in range(500)]
        plans.append([(command.name, [(injury.name, slot) for injury, slot in chosen]) for command, chosen in cases])
    assert plans[0] == plans[1]
    assert {name for name, _ in plans[0]} == set(COMMANDS)
    counts = collections.Counter(name for _, chosen in plans[0] for name, _ in chosen)
    assert set(counts) == set(BY_NAME) and min(counts.values()) >= 500 // len(BY_NAME)


@pytest.mark.parametrize(
    "names, outcome",
    [
        (["byte order mark", "stdin closed"], "same"),
        (["byte order mark", "half a surrogate pair"], "accepted"),
        (["scattered bytes", "20 columns"], "either"),
        (["scattered bytes", "full disk"], "refused"),
        (["byte order mark", "SIGTERM"], "stopped"),
        (["full disk", "SIGTERM"], "stopped or refused"),
    ],
)
def test_what_follows_from_several_injuries(names, outcome):
    assert expected([BY_NAME[name] for name in names]) == outcome


def judged(tmp_path: Path, injury: str, code: int | None, errors: str = "", rows: int | None = None) -> list[str]:
    """Return the faults of a made-up end of `embed.py`, which wrote so many rows of ones."""
    command = COMMANDS["embed .npy"]
    attempt = Attempt(tmp_path, {"out": str(tmp_path / "vectors.npy"), "texts": str(tmp_path / "texts.txt")})
    (tmp_path / "texts.txt").write_text("a text\n" * 40)
    (tmp_path / "started").touch()
    if rows is not None:
        np.save(tmp_path / "vectors.npy", np.ones((rows, 64), np.float32))
    bench = torture.Bench(tmp_path, tmp_path, {command.name: np.zeros((40, 64)).tolist()})
    return bench.judge(torture.Outcome(0, command, [BY_NAME[injury]], code), attempt, "", errors)


@pytest.mark.parametrize(
    "injury, code, errors, rows, fault",
    [
        ("full disk", 2, "embed.py: no space left", None, None),
        ("full disk", 0, "", 40, "exit code 0, but refused"),
        ("full disk", 1, "Traceback (most recent call last)\n", None, "a traceback"),
        ("full disk", 2, "", None, "without a message"),
        ("full disk", 2, "usage: embed.py\nembed.py: error: x", None, "a page of usage"),
        ("full disk", 2, "embed.py: " + "x" * 2000, None, "a message of 2,010 characters"),
        ("scattered bytes", 0, "", 40, None),
        ("scattered bytes", 0, "", 39, "39 vectors for 40 texts"),
        ("scattered bytes", 0, "", None, "the result cannot be read"),
        ("scattered bytes", None, "", None, "still running"),
        ("byte order mark", 0, "", 40, "another result than unharmed"),
    ],
)
def test_faults_are_found(tmp_path, injury, code, errors, rows, fault):
    faults = judged(tmp_path, injury, code, errors, rows)
    assert any(fault in text for text in faults) if fault else not faults


def test_a_changed_input_and_a_leftover_are_found(tmp_path):
    """Files are compared by content, and temporary files of writers are named."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    before = torture.digests(tmp_path, None)
    (tmp_path / "rows.jsonl").write_text("[]\n")
    assert torture.digests(tmp_path, None) != before
    (tmp_path / ".vectors.npy.new").touch()
    assert ".vectors.npy.new is left" in judged(tmp_path, "full disk", 2, "embed.py: full")


def test_results_that_are_not_finite_are_found(tmp_path):
    (tmp_path / "figures.json").write_text(json.dumps({"before": {"ndcg": float("nan")}}))
    with pytest.raises(ValueError, match="/before/ndcg is nan"):
        torture_commands.figures(tmp_path / "figures.json", "")
    np.save(tmp_path / "v.npy", np.full((40, 64), np.inf))
    with pytest.raises(ValueError, match="finite: False"):
        torture_commands.vectors(tmp_path / "v.npy", "")


@pytest.mark.slow
def test_a_sample_of_cases_has_no_fault(tmp_path):
    outcomes = torture.torture(tmp_path, tmp_path / "inputs", 20, 2, "*", None, 2)
    assert len(outcomes) == 20 and not [(outcome.title, outcome.faults) for outcome in outcomes if outcome.faults]
