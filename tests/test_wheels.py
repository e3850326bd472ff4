"""tools/wheels.py names what has no wheel, for systems and Pythons that this machine has not.

python -m pytest tests/test_wheels.py
"""

import re
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import wheels  # noqa: E402  (tools/ has to be on the path first)
from wheels import Resolution, Target  # noqa: E402

MACOS, LINUX = Target("3.14", "macos"), Target("3.11", "linux")


def test_every_requirement_is_read():
    requirements = wheels.read_requirements(ROOT / "tests" / "requirements.txt")
    names = [wheels.name_of(requirement) for requirement in requirements]
    assert {"mlx", "numpy", "pytest", "tree-sitter-c"} <= set(names) and not any(map(str.isspace, "".join(names)))
    assert not [requirement for requirement in requirements if "#" in requirement or requirement.startswith("-")]


@pytest.mark.parametrize(
    ("requirement", "name"),
    [("mlx[cpu]>=0.32; sys_platform == 'linux'", "mlx"), ("MLX_LM>=0.3,<1", "mlx-lm"), ("a.b_c ~=1", "a-b-c")],
)
def test_name_of_a_requirement(requirement, name):
    assert wheels.name_of(requirement) == name


def test_a_report_for_another_machine_is_an_error():
    """As of a pip that no longer reads the markers where this script puts them."""
    item = {"metadata": {"name": "mlx"}, "download_info": {"url": "somewhere/mlx-1-py3-none-any.whl"}}
    report = {"environment": MACOS.markers | {"os_name": "posix"}, "install": [item]}
    assert wheels.read_report(report, MACOS) == {"mlx": "mlx-1-py3-none-any.whl"}
    with pytest.raises(wheels.PipError, match="for its own machine"):
        wheels.read_report(report, LINUX)


def test_all_that_is_missing_is_named(monkeypatch, capsys):
    """Also what a package needs and no line of the file names; the exit code is 1."""
    absent = {"bm25s": "bm25s<0.4,>=0.3.16", "mlx-data": "mlx-data<0.2,>=0.1"}

    def resolve_once(requirements, target):
        names = set(map(wheels.name_of, requirements))
        if target == MACOS and (gone := names & set(absent)):
            return absent[min(gone)]
        return "hidden>=1 (from lancedb)" if target.python == "3.12" else dict.fromkeys(names, "a.whl")

    monkeypatch.setattr(wheels, "resolve_once", resolve_once)
    monkeypatch.setattr(sys, "argv", ["wheels.py", "--python", "3.12", "3.14"])
    assert wheels.main() == 1
    count = len(set(map(wheels.name_of, wheels.read_requirements(ROOT / "requirements.txt"))))
    assert capsys.readouterr().out.splitlines() == [
        "Python  macos               linux",
        "3.12    no hidden           no hidden",
        f"3.14    no bm25s, mlx-data  {count} wheels",
    ]
    monkeypatch.setattr(sys, "argv", ["wheels.py", "--python", "3.14", "--system", "linux"])
    assert wheels.main() == 0


def test_every_page_names_the_same_pythons():
    """README, CONTRIBUTING, docs and the workflow for Macs: those whose wheels are resolved."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "macos.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["cpu"]["strategy"]["matrix"]["python"] == list(wheels.PYTHONS)
    assert workflow["jobs"]["metal"]["continue-on-error"] is True
    for page in ("README.md", "CONTRIBUTING.md", "docs/backends.md"):
        assert f"Python {wheels.PYTHONS[0]} to {wheels.PYTHONS[-1]}" in (ROOT / page).read_text(encoding="utf-8"), page
    for job in workflow["jobs"].values():
        scripts = " ".join(step.get("run", "") for step in job["steps"])
        assert all((ROOT / name).is_file() for name in re.findall(r"python ([\w/]+\.py)", scripts))
        assert all((ROOT / name).is_file() for name in re.findall(r"-r (\S+)", scripts))


def write_wheel(folder: Path, name: str, tags: str, *needs: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-{tags}.whl", "w") as wheel:
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            "Version: 1.0",
            *(f"Requires-Dist: {need}" for need in needs),
        ]
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tags}\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


@pytest.mark.slow
def test_pip_resolves_for_machines_of_another_kind(tmp_path, monkeypatch):
    """Markers and tags are those of the target, in the requirements of requirements as well."""
    write_wheel(tmp_path, "top", "py3-none-any", "metal; sys_platform == 'darwin'", "blas; sys_platform == 'linux'")
    write_wheel(tmp_path, "metal", "cp314-cp314-macosx_13_0_arm64")
    write_wheel(tmp_path, "blas", "cp311-abi3-manylinux_2_28_x86_64")
    write_wheel(tmp_path, "new", "cp314-cp314-macosx_15_0_arm64")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    requirements = ["top", 'old; python_version < "3.14"', "new; sys_platform == 'darwin'"]
    resolution = wheels.resolve(requirements, MACOS)
    assert resolution.cell == "no new" and set(resolution.wheels) == {"top", "metal"}
    resolution = wheels.resolve(requirements, Target("3.13", "macos"))
    assert set(map(wheels.name_of, resolution.missing)) == {"metal", "old", "new"} and not resolution.wheels
    assert set(wheels.resolve(requirements[:1], LINUX).wheels) == {"top", "blas"}
    assert Resolution(wheels={"top": "", "blas": ""}).cell == "2 wheels"
