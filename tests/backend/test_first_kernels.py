"""The kernels of a first run are known, compiled ahead, and taken from there.

python -m pytest tests/backend/test_first_kernels.py
"""

import json
import shutil
import subprocess
import sys
import threading

from mlx_retrieval.backend import cpu_kernels, kernel_compiler, mx

import pytest
from kernel_texts import COMPILER, INCLUDE, KERNEL

from mlx_retrieval import backend
from tools.first_kernels import kernels_of_a_first_run

pytestmark = [
    pytest.mark.skipif(not backend.KERNELS, reason="no g++, or not a Linux CPU"),
    pytest.mark.compiled,
]
RECORDED = json.loads(cpu_kernels.FIRST.read_text(encoding="utf-8"))
TEXT = f'#include "{kernel_compiler.HEADER}"\nusing namespace mlx::core::detail;\n{KERNEL}'


def test_a_kernel_compiled_ahead_is_taken_only_for_its_own_text(tmp_path):
    program = tmp_path / "kernel_compiler.py"
    shutil.copy(kernel_compiler.__file__, program)
    kernel_compiler.compile_ahead(COMPILER, INCLUDE, tmp_path, [TEXT, TEXT.replace("void f(", "void g(")])
    ahead = {path.name: path.read_bytes() for path in (tmp_path / "ready").glob("*.so")}
    assert sorted(ahead) == ["f.so", "g.so"]
    (tmp_path / "mlx").mkdir()
    source, library = tmp_path / "mlx" / "a.cpp", tmp_path / "mlx" / "a.so"
    command = [sys.executable, str(program), "false", "-shared", "-I", str(INCLUDE), str(source), "-o", str(library)]
    for text, code in ((TEXT, 0), (TEXT.replace("Exp()", "Sin()"), 1)):  # `false` compiles nothing
        library.unlink(missing_ok=True)
        source.write_text(text)
        assert subprocess.run(command, check=False, capture_output=True).returncode == code
        assert library.exists() == (code == 0) and (code or library.read_bytes() == ahead["f.so"])


def test_a_cold_machine_compiles_them_in_the_background(tmp_path, monkeypatch):
    """The g++ that is first on the PATH is asked to, unless a kernel is there."""
    folder, done = tmp_path / f"{cpu_kernels.FOLDER}-0-program", threading.Event()
    folder.mkdir()
    (folder / "g++").touch(0o700)
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: (calls.append(command), done.set()))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    cpu_kernels.compile_ahead(INCLUDE, "1.2")
    assert done.wait(10) and calls == [[str(folder / "g++"), "ahead", str(INCLUDE), str(cpu_kernels.FIRST), "1.2"]]
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "libk.so").touch()
    cpu_kernels.compile_ahead(INCLUDE, "1.2")
    assert len(calls) == 1


def test_what_cannot_be_compiled_ahead_is_left_to_mlx(tmp_path):
    kernel_compiler.compile_ahead(COMPILER, INCLUDE, tmp_path, ["void f() { not C++ }", "nothing"])
    assert not list((tmp_path / "ready").glob("*.so"))
    assert not kernel_compiler.taken(kernel_compiler.ready(tmp_path, TEXT), TEXT, tmp_path / "a.so")


def test_recorded_kernels_are_those_that_are_rewritten():
    places = {kernel_compiler.ready(INCLUDE, text) for text in RECORDED["kernels"]}
    assert len(places) == len(RECORDED["kernels"]) > 30
    assert all(kernel_compiler.vectorisable(text) != text for text in RECORDED["kernels"])


@pytest.mark.slow
@pytest.mark.skipif(RECORDED["mlx"] != mx.__version__, reason="first_kernels.json is of another version of mlx")
def test_a_first_run_asks_for_recorded_kernels_only(tmp_path):
    """If it fails: python tools/first_kernels.py."""
    assert set(kernels_of_a_first_run(tmp_path)) <= set(RECORDED["kernels"])
