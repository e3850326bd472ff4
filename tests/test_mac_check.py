"""tools/mac_check.py measures what its block promises, and a failure costs one section only.

python -m pytest tests/test_mac_check.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import mac_check  # noqa: E402  (tools/ has to be on the path first)


def steps(*, speed: float = 100.0) -> mac_check.Steps:
    return mac_check.Steps([2.0, 1.0], [9.0, 1.0], [70, int(speed)], [0.1, 0.3], [2, 4], peak=10**9, kept=10**8)


@pytest.fixture
def run_main(monkeypatch, capsys):
    """`run_main(sections)` prints the block of these sections; return the exit code, the block and the progress."""

    def run(sections: dict, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(mac_check, "SECTIONS", sections)
        monkeypatch.setattr(sys, "argv", ["mac_check.py", *words])
        code = mac_check.main()
        return code, *capsys.readouterr()

    return run


def test_a_failure_costs_one_section(run_main):
    def broken(args):
        yield "measured before"
        raise RuntimeError("[METAL] Command buffer execution failed")

    code, block, progress = run_main({"first": broken, "second": lambda args: iter(["all is well"])})
    assert code == 1 and "RuntimeError: [METAL] Command buffer" in progress
    assert re.sub(r"\d+ s", "N s", block).splitlines() == [
        *(
            "```text",
            "first",
            "  measured before",
            "  FAILED: RuntimeError: [METAL] Command buffer execution failed",
            "",
        ),
        *("second", "  all is well", "", "measured in N s, 1 FAILED", "```"),
    ]


def test_ctrl_c_prints_what_was_measured(run_main):
    def stopped(args):
        yield "a line"
        raise KeyboardInterrupt

    code, block, _ = run_main({"first": stopped, "second": stopped})
    assert code == 1 and "  a line\n  interrupted\n" in block and "second" not in block and "1 FAILED" in block


def test_the_first_step_does_not_count(run_main):
    assert steps().speed == 100
    with pytest.raises(SystemExit):
        run_main({}, "--tries", "1")


def test_every_overhead_is_tried_and_the_default_comes_back(monkeypatch, run_main):
    seen, default = [], mac_check.backend.MICRO_BATCH_OVERHEAD

    def take_steps(args, count, most, **changes):
        seen.append((mac_check.backend.MICRO_BATCH_OVERHEAD, changes["compile"]))
        return steps(speed=len(seen))

    monkeypatch.setattr(mac_check, "take_steps", take_steps)
    monkeypatch.setattr(mac_check.backend, "IS_GPU", True)
    _, block, _ = run_main({"speed": mac_check.overheads})
    assert seen == [(overhead, compiled) for compiled in ("off", "on") for overhead in (32, 256, 512, 1_024)]
    assert default == mac_check.backend.MICRO_BATCH_OVERHEAD
    assert [line.split() for line in block.splitlines() if "--compile" in line] == [
        ["--compile", "off", "1", "2", "3", "4"],
        ["--compile", "on", "5", "6", "7", "8"],
    ]
    assert "20.0%" in block


def test_the_losses_at_the_end_are_counted(monkeypatch, run_main):
    """Regression: "last 5" of two steps."""
    monkeypatch.setattr(mac_check, "take_steps", lambda *_, **__: steps())
    for count, name in (("2", "last 2"), ("20", "last 5")):
        assert f"loss 1   {name}" in run_main({"run": mac_check.training}, "--steps", count)[1]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["metal", ""])
def test_the_block(device):
    """On the path of a Mac, and as this machine computes."""
    environment = os.environ | {"MLX_RETRIEVAL_AS": device, "MLX_DISABLE_COMPILE": "1"}  # g++ would take minutes
    command = [
        sys.executable,
        str(ROOT / "tools" / "mac_check.py"),
        "--steps",
        "3",
        "--tries",
        "2",
        "--batch-size",
        "16",
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd="/")
    assert result.returncode == 0, result.stdout + result.stderr
    block = result.stdout.splitlines()
    assert (block[0], block[-1]) == ("```text", "```") and max(map(len, block)) <= 120
    assert [line for line in block if line in mac_check.SECTIONS] == list(mac_check.SECTIONS)
    trained = {line.split()[0]: line.split()[1:] for line in block if line.startswith(("  bfloat16 ", "  float32 "))}
    assert set(trained) == ({"bfloat16", "float32"} if device or mac_check.backend.IS_GPU else {"float32"})
    for first, last, seconds, speed, count, peak, _ in trained.values():
        assert float(last) < float(first) and float(seconds) > 0 and float(speed.replace(",", "")) > 0
        assert count == "3" and float(peak) > 0
    cosines = {line.split()[0]: float(line.split()[1]) for line in block if re.match(r" {4}b?float16", line)}
    assert set(cosines) == {"bfloat16", "float16"} and all(0.99 < cosine <= 1.00001 for cosine in cosines.values())
    assert cosines["bfloat16"] < cosines["float16"]
    speeds = [line.split()[-4:] for line in block if line.strip().startswith("--compile")]
    assert speeds and all(float(speed.replace(",", "")) > 0 for row in speeds for speed in row)
