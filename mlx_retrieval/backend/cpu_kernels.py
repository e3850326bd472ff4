"""Vectorise mlx's CPU kernels on Linux: put a program of ours between `mx.compile` and g++ (kernel_compiler.py).

`install` is called by `backend.prepare`. On a machine without kernels, `python train.py` also calls `compile_ahead`: it
has those of FIRST compiled in the background, which it needs up to its first step (tools/first_kernels.py). Otherwise
each would be compiled when it is needed, while nothing else happens.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from mlx_retrieval.backend import kernel_compiler

from mlx_retrieval.utils.errors import UserError

FOLDER = "mlx-retrieval-kernels"
FIRST = Path(__file__).with_name("first_kernels.json")


def install() -> bool:
    """Let `mx.compile` in this process call kernel_compiler.py instead of g++. Return whether there is a g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        return False
    if Path(compiler).parent.name.startswith(FOLDER):  # a child of a process that did this
        return True
    # mlx keeps kernels in the folder for temporary files, by their names alone: kernels made in another way or for
    # another processor have to lie elsewhere. Their folder goes by contents, so that checkouts and environments share
    # them; the g++ in front of them, which names a Python, has a folder of its own.
    program = Path(kernel_compiler.__file__).read_text(encoding="utf-8")
    kernels = private_folder(program + compiler + _processor())
    if kernels is None:
        return False
    script = kernels / "kernel_compiler.py"
    text = f'#!/bin/sh\nexec "{sys.executable}" -I -S "{script}" "{compiler}" "$@"\n'
    if (folder := private_folder(text)) is None:
        return False
    _write_once(script, program, 0o600)
    _write_once(folder / "g++", text, 0o700)
    os.environ["TMPDIR"] = str(kernels)  # Python's own idea of that folder stays: `private_folder` has asked for it
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return True


def compile_ahead(include: Path, version: str) -> None:
    """Have the kernels of FIRST compiled in the background, if this machine has none yet. `install` comes first.

    `include`: the folder of mlx's headers. `version`: mlx's.
    """
    program = Path(shutil.which("g++") or "")
    if not program.parent.name.startswith(FOLDER) or not cold():
        return
    command = [str(program), "ahead", str(include), str(FIRST), version]
    threading.Thread(target=subprocess.run, args=(command,), kwargs={"capture_output": True}, daemon=True).start()


def private_folder(contents: str) -> Path | None:
    """Return a folder for files compiled from `contents` that only this user can write; None if another owns it."""
    digest = hashlib.sha256(contents.encode()).hexdigest()[:12]
    base = Path(tempfile.gettempdir())
    base = base.parent if base.name.startswith(FOLDER) else base  # a child of a process that called `install`
    folder = base / f"{FOLDER}-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder if folder.stat().st_uid == os.getuid() else None


def _write_once(path: Path, text: str, mode: int) -> None:
    """Write a file that other processes may be reading or writing, too. UserError where that is not possible."""
    if path.exists():
        return
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.chmod(mode)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"CPU kernels could not be compiled: {path}: {error.strerror}") from error


def cold() -> bool:
    """Return whether there is no kernel from earlier runs, nor one that mlx asked for in this run."""
    folders = os.walk(Path(os.environ["TMPDIR"]) / "mlx")  # passes over folders that another process removes meanwhile
    return not any(name.endswith(".so") for _, _, names in folders for name in names)


def failure(error: RuntimeError) -> str | None:
    """Return why a kernel could not be compiled, in the compiler's words; None for an error of another kind."""
    if "[Compile::eval_cpu]" not in str(error):
        return None
    _, _, output = str(error).partition("the output is: ")
    lines = [line.strip() for line in (output or str(error)).splitlines() if line.strip()]
    # The first error is the cause; the lines after it follow from it. The note on free space comes last.
    cause = next(
        (line for line in lines if re.search(r"error|failed|cannot|No space", line)), lines[0] if lines else ""
    )
    space = next((line for line in lines if line != cause and line.endswith("bytes free")), None)
    return cause + (f" ({space})" if space else "")


def _processor() -> str:
    """Return what `-march=native` depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
