"""Resolve requirements.txt with all that it needs, as wheels, for each Python on macOS and Linux; install nothing.

python tools/wheels.py                          every Python on both systems, in a few minutes
python tools/wheels.py --python 3.14 --system macos
python tools/wheels.py --requirements tests/requirements.txt

pip resolves from the metadata that the index serves, for systems and Pythons that this machine has not. A cell of the
table is the number of wheels, or names what has none. A requirement without a wheel is left out and the rest resolved
again, so that all of them are named.

Exit codes: 0 everything has its wheel, 1 something has none, 2 bad usage or the index was not reached.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# The oldest systems that mlx's own wheels run on: macOS 14, and glibc 2.35 as of Ubuntu 22.04. pip adds the older tags
# of a macOS by itself, and those of a glibc not.
GLIBCS = range(35, 16, -1)
PLATFORMS = {
    "macos": ("macosx_14_0_arm64",),
    "linux": (*(f"manylinux_2_{minor}_x86_64" for minor in GLIBCS), "manylinux2014_x86_64", "linux_x86_64"),
}
MARKERS = {
    "macos": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
}
MISSING = re.compile(r"^ERROR: No matching distribution found for (.+)$", re.MULTILINE)
# `--platform` and `--python-version` choose wheels, while pip reads markers such as `sys_platform == "darwin"` for the
# machine it runs on. So the markers of the target are put in their place; the report repeats them, which is checked.
PIP = """
import json, sys
from pip._vendor.packaging import markers
environment = markers.default_environment() | json.loads(sys.argv.pop(1))
markers.default_environment = lambda: dict(environment)
from pip._internal.cli.main import main
sys.exit(main())
"""


class PipError(Exception):
    """pip could not resolve, for another reason than a missing wheel."""


@dataclass(frozen=True)
class Target:
    """A Python on a system, such as 3.14 on macos."""

    python: str
    system: str

    @property
    def markers(self) -> dict[str, str]:
        """The values of environment markers there."""
        version = {"python_version": self.python, "python_full_version": f"{self.python}.0"}
        return version | {"implementation_version": f"{self.python}.0"} | MARKERS[self.system]


@dataclass
class Resolution:
    """File names of wheels by package, and the requirements that have none."""

    wheels: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def cell(self) -> str:
        """For the table."""
        return "no " + ", ".join(map(name_of, self.missing)) if self.missing else f"{len(self.wheels)} wheels"


def name_of(requirement: str) -> str:
    """Return the package's name in a requirement, in lower case and with hyphens: `mlx-lm` of `MLX_LM[x]>=0.3`."""
    return re.sub(r"[-_.]+", "-", re.match(r"\s*([\w.-]*\w)?", requirement)[0].strip()).lower()


def read_requirements(file: Path) -> list[str]:
    """Return the requirements of a file and of those that it includes by `-r`, without comments."""
    requirements = []
    for line in file.read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            requirements += read_requirements(file.parent / line[3:].strip())
        elif line:
            requirements.append(line)
    return requirements


def read_report(report: dict, target: Target) -> dict[str, str]:
    """Return the file name of each package's wheel in pip's report; PipError if it is for another target."""
    if any(report["environment"].get(key) != value for key, value in target.markers.items()):
        raise PipError("this version of pip reads markers for its own machine; try pip 26.3")
    return {item["metadata"]["name"]: item["download_info"]["url"].rsplit("/", 1)[-1] for item in report["install"]}


def resolve_once(requirements: list[str], target: Target) -> dict[str, str] | str:
    """Return the file name of each package's wheel, or the requirement for which pip finds none."""
    with tempfile.TemporaryDirectory() as folder:
        listed, report = Path(folder, "requirements.txt"), Path(folder, "report.json")
        listed.write_text("\n".join(requirements), encoding="utf-8")
        command = [sys.executable, "-c", PIP, json.dumps(target.markers), "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--only-binary", ":all:", "--target", folder, "--report", str(report)]
        command += ["--python-version", target.python, "--requirement", str(listed)]
        command += [word for platform in PLATFORMS[target.system] for word in ("--platform", platform)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            return read_report(json.loads(report.read_text(encoding="utf-8")), target)
    if match := MISSING.search(result.stderr):
        return match[1]
    raise PipError(result.stderr.strip() or f"pip ended with exit code {result.returncode}")


def resolve(requirements: list[str], target: Target) -> Resolution:
    """Resolve the requirements for a target, again without each that has no wheel."""
    resolution, rest = Resolution(), list(requirements)
    while isinstance(outcome := resolve_once(rest, target), str):
        resolution.missing.append(outcome)
        shorter = [requirement for requirement in rest if name_of(requirement) != name_of(outcome)]
        if len(shorter) == len(rest):  # needed by another package: which one, only pip knows
            return resolution
        rest = shorter
    resolution.wheels = outcome
    return resolution


def table(resolutions: dict[Target, Resolution]) -> str:
    """Return a row for each Python and a column for each system."""
    pythons, systems = ([*dict.fromkeys(getattr(t, name) for t in resolutions)] for name in ("python", "system"))
    rows = [["Python", *systems]]
    rows += [[python, *(resolutions[Target(python, system)].cell for system in systems)] for python in pythons]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this script's flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    file = CHECKOUT / "requirements.txt"
    parser.add_argument(
        "--requirements", type=Path, default=file, metavar="FILE", help="resolve this file (default: the toolkit's)"
    )
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="VERSION", help=f"default: {' '.join(PYTHONS)}")
    parser.add_argument("--system", nargs="+", default=[*PLATFORMS], choices=PLATFORMS, help="default: both")
    parser.add_argument("--list", action="store_true", help="print the file name of every wheel as well")
    return parser


def main() -> int:
    """Resolve for every target and print the table."""
    args = make_parser().parse_args()
    try:
        requirements, resolutions = read_requirements(args.requirements), {}
        for target in (Target(python, system) for python in args.python for system in args.system):
            resolutions[target] = resolution = resolve(requirements, target)
            print(f"Python {target.python} on {target.system}: {resolution.cell}", file=sys.stderr, flush=True)
            if args.list:
                print("\n".join(sorted(resolution.wheels.values(), key=str.lower)) + "\n")
    except (OSError, PipError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(resolutions))
    return int(any(resolution.missing for resolution in resolutions.values()))


if __name__ == "__main__":
    sys.exit(main())
