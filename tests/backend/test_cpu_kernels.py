"""Kernels are rewritten so that they vectorise, and compute the same, whatever the layout of their inputs.

python -m pytest tests/backend/test_cpu_kernels.py
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from mlx_retrieval.backend import cpu_kernels, kernel_compiler, mx

import numpy as np
import pytest
from kernel_texts import COMPILER, INCLUDE, KERNEL, without_kernels

from mlx_retrieval import backend
from mlx_retrieval.utils.errors import UserError

pytestmark = [
    pytest.mark.skipif(not backend.KERNELS, reason="no g++, or not a Linux CPU"),
    pytest.mark.compiled,
]


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
    real = COMPILER
    if compiler == "refuses flags":
        wrapper = tmp_path / "g++"
        wrapper.write_text(f'#!/bin/sh\nfor w; do [ "$w" = -march=native ] && exit 1; done\nexec {real} "$@"\n')
        wrapper.chmod(0o700)
        real = str(wrapper)
    for folder in ("mlx", "else"):
        (tmp_path / folder).mkdir()
        source, library = tmp_path / folder / "a.cpp", tmp_path / folder / "a.so"
        source.write_text('extern "C" {\nint f() {\n  return 3;\n}\n}\n')
        command = [sys.executable, kernel_compiler.__file__, real, "-fPIC", "-shared", str(source), "-o", str(library)]
        assert subprocess.run(command, check=False).returncode == 0 and library.stat().st_size > 0
        assert sorted(p.name for p in source.parent.iterdir()) == ["a.cpp", "a.so"]
    (tmp_path / "mlx" / "a.cpp").write_text("not C++")
    broken = [*command[:-3], str(tmp_path / "mlx" / "a.cpp"), "-o", str(library)]
    assert subprocess.run(broken, check=False, capture_output=True).returncode != 0


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        ("  float* A = (float*)args[0];", "  auto A = (float*)args[0];"),  # regression: AttributeError
        ("  A += A_strides[1];\n  }\n", "  A += A_strides[1]; }\n"),
        ("tmp_A = *A;", "tmp_A = A[0];\n  float tmp_C = *A + 1;"),
        ("  *B++ = tmp_B;", "  B[i1] = tmp_B;"),
        ("Exp()(tmp_A);", "Exp()(tmp_A) * 2;"),
        ("  float tmp_A", "  for (int k = 0; k < 2; ++k) {}\n  float tmp_A"),
        ('extern "C"', 'extern "C++"'),
    ],
)
def test_a_kernel_of_an_unknown_form_is_compiled_as_it_is(tmp_path, known, unknown):
    assert known in KERNEL and kernel_compiler.vectorisable(KERNEL) != KERNEL
    text = KERNEL.replace(known, unknown)
    assert kernel_compiler.vectorisable(text) == text
    assert kernel_compiler.vectorisable("\n  for (;;) {\n") == "\n  for (;;) {\n"
    source, library = tmp_path / "mlx" / "f.cpp", tmp_path / "mlx" / "f.so"
    source.parent.mkdir()
    source.write_text(
        f"#include <cmath>\n#include <cstdint>\nstruct Exp {{ float operator()(float x) {{ return x; }} }};\n{text}"
    )
    asked = tmp_path / "asked"
    (tmp_path / "g++").write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexec {COMPILER} "$@"\n')
    (tmp_path / "g++").chmod(0o700)
    command = [
        sys.executable,
        kernel_compiler.__file__,
        str(tmp_path / "g++"),
        "-fPIC",
        "-shared",
        str(source),
        "-o",
        str(library),
    ]
    assert subprocess.run(command, check=False).returncode == 0 and library.is_file()
    assert asked.read_text().count("\n") == 1 and "march" not in asked.read_text()


def test_the_header_is_compiled_once_and_read_by_every_kernel(tmp_path):
    """`g++ -H` marks a header that was read in its compiled form with "!"."""
    program = tmp_path / "kernel_compiler.py"
    shutil.copy(kernel_compiler.__file__, program)
    wrapper = tmp_path / "g++"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec {COMPILER} -H "$@" 2>> {tmp_path}/read\n')
    wrapper.chmod(0o700)
    (tmp_path / "mlx").mkdir()
    waiting = []
    for name in ("a", "b", "c"):  # at the same time: one compiles the header, the others wait for it
        source = tmp_path / "mlx" / f"{name}.cpp"
        source.write_text(f'#include "{kernel_compiler.HEADER}"\nusing namespace mlx::core::detail;\n{KERNEL}')
        words = ["-shared", "-I", str(INCLUDE), str(source), "-o", str(source.with_suffix(".so"))]
        command = [sys.executable, str(program), str(wrapper), *kernel_compiler.MLX_FLAGS, *words]
        waiting.append(subprocess.Popen(command))
    assert [process.wait() for process in waiting] == [0, 0, 0]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4 and sum("c++-header" in call for call in calls) == 1
    (compiled,) = (tmp_path / "headers").rglob("*.gch")
    assert (tmp_path / "read").read_text().count(f"! {compiled}") == 3
    assert len(list((tmp_path / "mlx").glob("*.so"))) == 3 and not list(tmp_path.rglob("draft*"))


def test_environments_share_a_compiled_header_and_other_headers_have_their_own(tmp_path):
    """Regression: each environment left 52 MB in the folder for temporary files, also when it was gone."""
    for name in ("one", "other", "changed"):
        for folder in ("types", "backend/cpu"):
            shutil.copytree(INCLUDE / "mlx" / folder, tmp_path / name / "mlx" / folder)
    with (tmp_path / "changed" / "mlx" / "backend" / "cpu" / "unary_ops.h").open("a") as file:
        file.write("// changed\n")
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    folder = kernel_compiler.precompile(COMPILER, tmp_path / "one", kernels)
    assert kernel_compiler.precompiled(kernels, tmp_path / "other") == folder / f"{kernel_compiler.HEADER}.gch"
    assert not kernel_compiler.precompiled(kernels, tmp_path / "changed").exists()
    shutil.rmtree(tmp_path / "one")
    source = tmp_path / "kernel.cpp"
    source.write_text(f'#include "{kernel_compiler.HEADER}"\nusing namespace mlx::core::detail;\n{KERNEL}')
    words = [*kernel_compiler.MLX_FLAGS, *kernel_compiler.FLAGS, f"-I{folder}", f"-I{tmp_path}/other", "-shared"]
    command = [COMPILER, "-H", *words, str(source), "-o", str(tmp_path / "kernel.so")]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert f"! {folder}" in result.stderr


def test_without_space_no_header_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_compiler, "PRECOMPILED_SPACE", 1 << 62)
    assert kernel_compiler.precompile(COMPILER, INCLUDE, tmp_path) is None and not list(tmp_path.iterdir())


FAILING = (
    "import sys; from mlx_retrieval import backend; backend.prepare(); from mlx_retrieval.backend import mx\n"
    "from mlx_retrieval.backend import cpu_kernels\n"
    "try: mx.eval(mx.compile(lambda x: mx.exp(x) * 2.5 - x)(mx.zeros(3)))\n"
    "except RuntimeError as error: print(cpu_kernels.failure(error), '/', cpu_kernels.failure(RuntimeError('other')))"
)


def test_a_failed_compilation_says_why(tmp_path, monkeypatch, run_python):
    """Regression: whatever the compiler said, the user was asked whether the disk is full."""
    (tmp_path / "g++").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "In file included from a.h:"\n'
        'echo "a.h:3: fatal error: cstdint: No such file or directory" >&2\necho "terminated." >&2\nexit 1\n'
    )
    (tmp_path / "g++").chmod(0o700)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{without_kernels()}")
    done = run_python(FAILING)
    assert done.stdout == "a.h:3: fatal error: cstdint: No such file or directory / None\n", done.stdout + done.stderr


@pytest.mark.parametrize(("limit", "message"), [(500, "is incomplete"), (4_000, "File (too large|size limit)")])
def test_a_full_disk_is_told(tmp_path, monkeypatch, run_python, limit, message):
    """A limit on file sizes stands in for it. Regression: mlx hands half a kernel to the compiler without noticing."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PATH", without_kernels())
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from mlx_retrieval import backend; backend.prepare(); size = int(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
    )
    done = run_python(script + FAILING, limit)
    assert re.search(message, done.stdout), done.stdout + done.stderr


def test_the_cause_comes_first_and_the_free_space_with_it():
    error = RuntimeError(
        '[Compile::eval_cpu] Failed to compile function f: Failed to execute command with return code 256: "g++", '
        "the output is: /usr/bin/ld: final link failed: No space left on device\n"
        "collect2: error: ld returned 1 exit status\n\n/tmp/k: 0 bytes free\n"
    )
    expected = "/usr/bin/ld: final link failed: No space left on device (/tmp/k: 0 bytes free)"
    assert cpu_kernels.failure(error) == expected


def test_processes_share_one_folder_and_children_inherit_it(run_python):
    code = (
        "import os, subprocess, sys; from mlx_retrieval import backend\n"
        "backend.prepare(); print(os.environ['TMPDIR'], backend.KERNELS, flush=True)\n"
        "if len(sys.argv) < 2: subprocess.run([sys.executable, '-c', os.environ['CODE'], 'child'])"
    )
    parent, child = run_python(f"import os; os.environ['CODE'] = {code!r}; exec({code!r})").stdout.splitlines()
    assert child == parent == f"{os.environ['TMPDIR']} True"


def test_checkouts_share_kernels(tmp_path, monkeypatch):
    """Regression: each checkout compiled all kernels again, which takes half a minute."""
    monkeypatch.setenv("PATH", without_kernels())
    monkeypatch.setenv("TMPDIR", os.environ["TMPDIR"])
    folders = []
    for checkout in ("one", "two"):
        (tmp_path / checkout).mkdir()
        shutil.copy(kernel_compiler.__file__, tmp_path / checkout / "kernel_compiler.py")
        monkeypatch.setattr(kernel_compiler, "__file__", str(tmp_path / checkout / "kernel_compiler.py"))
        assert cpu_kernels.install()
        folders.append(os.environ["TMPDIR"])
        monkeypatch.setenv("PATH", without_kernels())
    assert folders[0] == folders[1] and (Path(folders[0]) / "kernel_compiler.py").is_file()


def test_a_program_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """Regression: on a full disk a run ended with "File too large" alone."""
    monkeypatch.setenv("PATH", without_kernels())
    monkeypatch.setattr(cpu_kernels, "private_folder", lambda text: tmp_path / "gone")
    with pytest.raises(UserError, match="could not be compiled: .*kernel_compiler.py: No such file or directory"):
        cpu_kernels.install()


def test_without_a_compiler_everything_works_and_it_is_said(run_python):
    code = (
        "import os; os.environ['PATH'] = ''\n"
        "from mlx_retrieval import backend; from mlx_retrieval.backend import mx; backend.prepare()\n"
        "print(mx.compile(lambda x: mx.exp(x) * 2)(mx.zeros(3)).tolist(), backend.describe())"
    )
    done = run_python(code)
    assert done.returncode == 0 and "[2.0, 2.0, 2.0]" in done.stdout and "(no g++)" in done.stdout, done.stderr


def test_a_folder_that_another_process_removes_is_passed_over(tmp_path, monkeypatch):
    """Regression: two processes that started together, and one ended with FileNotFoundError."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "mlx").mkdir()
    gone, kept, scan = tmp_path / "mlx" / "a-gone", tmp_path / "mlx" / "b-kept", os.scandir
    gone.mkdir()
    kept.mkdir()

    def scandir(path):
        if Path(path) == gone:
            raise FileNotFoundError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert cpu_kernels.cold()
    (kept / "kernel.so").touch()
    assert not cpu_kernels.cold()
