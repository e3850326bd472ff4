"""Kernels are rewritten so that they vectorise, and compute the same, whatever the layout of their inputs.

python -m pytest tests/backend/test_cpu_kernels.py
"""

import os
import subprocess
import sys
from pathlib import Path

from mlx_retrieval.backend import cpu_kernels, mx

import numpy as np
import pytest

from mlx_retrieval import backend

pytestmark = pytest.mark.skipif(not backend.KERNELS, reason="no g++, or not a Linux CPU")


def layouts() -> dict[str, list[mx.array]]:
    """Three float32 arrays that broadcast to one shape, in every way that memory can lie; rows longer than a block."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape, dtype=np.float32))

    return {
        "contiguous": [array(3, 5, 600), array(3, 5, 600), array(3, 5, 600)],
        "rows and columns": [array(3, 5, 600), array(600), array(3, 5, 1)],
        "transposed": [array(3, 600, 5).transpose(0, 2, 1), array(3, 5, 600), array(1, 5, 600)],
        "permuted": [array(5, 3, 4, 7).transpose(1, 2, 0, 3), array(4, 5, 7), array(3, 4, 1, 7)],
        "every other": [array(3, 5, 1200)[:, :, ::2], array(3, 10, 600)[:, ::2], array(3, 5, 600)[:, ::-1]],
        "one element": [array(1, 1), array(1), array(1, 1)],
    }


@pytest.mark.parametrize("layout", layouts())
def test_fused_is_unfused(layout):
    a, b, c = layouts()[layout]

    def function(a, b, c):
        return mx.exp(a - b) * c + 1.0, mx.where(a > b, a, c) * 2.0, mx.abs(a * b) - c

    fused = mx.compile(function)(a, b, c)
    for found, expected in zip(fused, function(a, b, c), strict=True):
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=2e-6, atol=2e-6)


def test_fused_integers_and_booleans():
    a, b = mx.arange(600).reshape(2, 300), mx.arange(300) % 7
    found = mx.compile(lambda a, b: ((a + b) * 3, (a > b) & (b > 2)))(a, b)
    assert mx.array_equal(found[0], (a + b) * 3) and mx.array_equal(found[1], (a > b) & (b > 2))


def test_a_result_may_take_an_input_s_place():
    """mlx writes over inputs that nobody needs any more."""
    x = np.random.default_rng(0).standard_normal((64, 600), dtype=np.float32)
    twice = mx.compile(lambda x, row: mx.sigmoid(x - row) * 0.5)
    found = twice(twice(mx.array(x) + 0.0, mx.array(x[0])), mx.array(x[1]))
    once = 0.5 / (1 + np.exp(x[0] - x))
    np.testing.assert_allclose(np.array(found), 0.5 / (1 + np.exp(x[1] - once)), rtol=1e-5)


@pytest.mark.parametrize("compiler", ["refuses flags", "works"])
def test_what_is_no_kernel_and_what_cannot_be_made_better_is_compiled_as_asked(tmp_path, compiler):
    real = next(p for p in os.environ["PATH"].split(os.pathsep)[1:] if (Path(p) / "g++").exists()) + "/g++"
    if compiler == "refuses flags":
        wrapper = tmp_path / "g++"
        wrapper.write_text(f'#!/bin/sh\nfor w; do [ "$w" = -march=native ] && exit 1; done\nexec {real} "$@"\n')
        wrapper.chmod(0o700)
        real = str(wrapper)
    for folder in ("mlx", "else"):
        (tmp_path / folder).mkdir()
        source, library = tmp_path / folder / "a.cpp", tmp_path / folder / "a.so"
        source.write_text('extern "C" {\nint f() {\n  return 3;\n}\n}\n')
        command = [sys.executable, cpu_kernels.__file__, real, "-fPIC", "-shared", str(source), "-o", str(library)]
        assert subprocess.run(command, check=False).returncode == 0 and library.stat().st_size > 0
        assert sorted(p.name for p in source.parent.iterdir()) == ["a.cpp", "a.so"]
    (tmp_path / "mlx" / "a.cpp").write_text("not C++")
    broken = [*command[:-3], str(tmp_path / "mlx" / "a.cpp"), "-o", str(library)]
    assert subprocess.run(broken, check=False, capture_output=True).returncode != 0


def test_processes_share_one_folder_and_children_inherit_it(run_python):
    code = (
        "import os, subprocess, sys; from mlx_retrieval import backend; print(os.environ['TMPDIR'], flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import os; from mlx_retrieval import backend; '"
        "'print(os.environ[\"TMPDIR\"], backend.KERNELS)'])"
    )
    parent, child = run_python(code).stdout.splitlines()
    assert child == f"{parent} True" and parent == os.environ["TMPDIR"]


def test_without_a_compiler_everything_works_and_it_is_said(run_python):
    code = (
        "import os; os.environ['PATH'] = ''\n"
        "from mlx_retrieval import backend; from mlx_retrieval.backend import mx\n"
        "print(mx.compile(lambda x: mx.exp(x) * 2)(mx.zeros(3)).tolist(), backend.describe())"
    )
    done = run_python(code)
    assert done.returncode == 0 and "[2.0, 2.0, 2.0]" in done.stdout and "(no g++)" in done.stdout, done.stderr
