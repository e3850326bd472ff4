"""Vectorise CPU kernels: a program between `mx.compile` and g++ on Linux.

mlx writes a C++ loop for the operations it fuses and compiles it with `g++ -O3` alone: for the oldest x86-64, with a
function call for every exp, and with steps between elements that are known only at run time. `install` puts a g++ of
ours first on the PATH of this process. It rewrites the loops so that they run over contiguous memory, and adds flags:
the same arithmetic, 3 to 30 times faster (benchmarks/LOG.md). A kernel that it does not know goes to g++ unchanged.
Called by `backend.prepare`. This file is also that program, so it imports nothing but the standard library.

    python cpu_kernels.py /usr/bin/g++ -O3 ... kernel.cpp -o kernel.so        what mlx's call becomes
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Inlining, and the vectors of this machine. None of these lets the compiler reorder sums or ignore infinities and NaN;
# __FAST_MATH__ only shows it the C library's vector forms of tanh, log and the like (at most 4 ulp wrong).
FLAGS = [
    "-march=native",
    "-fno-semantic-interposition",
    "-finline-limit=10000",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-D__FAST_MATH__",
]
FOLDER = "mlx-retrieval-kernels"
LITTLE_SPACE = 16 << 20  # bytes: with less free space, a failed compilation reports how much there is
BLOCK = 256  # elements of a row that are made contiguous at once: they stay in the first cache
# Results may overwrite inputs, but only at equal positions; without this pragma gcc fears otherwise.
SAFE = "#pragma GCC ivdep\n"
ROW = f"""
template <typename T> static inline const T* contiguous_row(const T* from, int64_t step, int count, T* buffer) {{
  if (step == 1) return from;
  for (int j = 0; j < count; ++j) buffer[j] = from[j * step];
  return buffer;
}}
constexpr int BLOCK = {BLOCK};
"""
CONTIGUOUS_LOOP = "\n  for (size_t i = 0; i < size; ++i) {\n"
STRIDED_LOOP = re.compile(r"^  for \(int (i\d+) = 0; \1 < shape\[(\d+)\]; \+\+\1\) \{\n", re.MULTILINE)


def install() -> bool:
    """Let `mx.compile` in this process call `main` instead of g++. Return whether there is a g++ to call."""
    compiler = shutil.which("g++")
    if compiler is None:
        return False
    if Path(compiler).parent.name.startswith(FOLDER):  # a child of a process that did this
        return True
    # mlx keeps kernels in the folder for temporary files, by their names alone: kernels made in another way or for
    # another processor have to lie elsewhere. Their folder goes by contents, so that checkouts and environments share
    # them; the g++ in front of them, which names a Python, has a folder of its own.
    program = Path(__file__).read_text(encoding="utf-8")
    kernels = private_folder(program + compiler + _processor())
    if kernels is None:
        return False
    script = kernels / "vectorise.py"
    text = f'#!/bin/sh\nexec "{sys.executable}" -I -S "{script}" "{compiler}" "$@"\n'
    if (folder := private_folder(text)) is None:
        return False
    _write_once(script, program, 0o600)
    _write_once(folder / "g++", text, 0o700)
    os.environ["TMPDIR"] = str(kernels)  # Python's own idea of that folder stays: `private_folder` has asked for it
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return True


def private_folder(contents: str) -> Path | None:
    """Return a folder for files compiled from `contents` that only this user can write; None if another owns it."""
    digest = hashlib.sha256(contents.encode()).hexdigest()[:12]
    base = Path(tempfile.gettempdir())
    base = base.parent if base.name.startswith(FOLDER) else base  # a child of a process that called `install`
    folder = base / f"{FOLDER}-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder if folder.stat().st_uid == os.getuid() else None


def _write_once(path: Path, text: str, mode: int) -> None:
    """Write a file that other processes may be reading or writing, too."""
    if path.exists():
        return
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.chmod(mode)
    draft.replace(path)


def cold() -> bool:
    """Return whether `install` found no kernel from earlier runs: the first ones take about half a minute in all."""
    folders = os.walk(os.environ["TMPDIR"])  # passes over folders that another process removes meanwhile
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


def vectorisable(source: str) -> str:
    """Return a kernel of mlx with its innermost loop over contiguous rows; unchanged where its text is not as expected.

    mlx's loops over arrays that are broadcast or transposed step through them by strides from memory. Here each row is
    taken in blocks, and an input that is not contiguous is copied into a small buffer first.
    """
    loops = list(STRIDED_LOOP.finditer(source))
    if not loops:  # everything is contiguous
        return source.replace(CONTIGUOUS_LOOP, f"\n{SAFE}{CONTIGUOUS_LOOP[1:]}")
    axis = loops[-1].group(2)
    head, rest = source[: loops[-1].start()], source[loops[-1].end() :]
    body, end, tail = rest.partition("\n  }\n")
    step = re.compile(rf"^  (\w+) \+= \1_strides\[{axis}\];\n", re.MULTILINE)
    inputs, body = step.findall(body + "\n"), step.sub("", body + "\n")
    outputs = re.findall(r"^  \*(\w+)\+\+ = ", body, re.MULTILINE)
    rows, steps = "", ""
    for name in inputs:
        declaration = re.search(rf"^  (\S+)\* {name} = ", head, re.MULTILINE)
        if declaration is None:
            return source
        kind = declaration.group(1)
        rows += f"  {kind} {name}_buffer[BLOCK];\n"
        rows += f"  const {kind}* {name}_row = contiguous_row({name}, {name}_strides[{axis}], count, {name}_buffer);\n"
        steps += f"  {name} += count * {name}_strides[{axis}];\n"
        body = body.replace(f"= *{name};", f"= {name}_row[j];")
    for name in outputs:
        steps += f"  {name} += count;\n"
        body = body.replace(f"  *{name}++ = ", f"  {name}[j] = ")
    # A pointer that is used in another way, or another loop, would make wrong results rather than none.
    if not end or not outputs or "*" in body or "strides" in body or "for (" in body or 'extern "C"' not in head:
        return source
    loop = (
        f"  for (int start = 0; start < shape[{axis}]; start += BLOCK) {{\n"
        f"  const int count = shape[{axis}] - start < BLOCK ? shape[{axis}] - start : BLOCK;\n"
        f"{rows}{SAFE}  for (int j = 0; j < count; ++j) {{\n{body}  }}\n{steps}  }}\n"
    )
    return head.replace('extern "C"', ROW + 'extern "C"', 1) + loop + tail


def main(compiler: str, arguments: list[str]) -> int:
    """Compile a kernel of mlx, vectorised; compile anything else, or what cannot be improved, exactly as asked."""
    source = next((word for word in arguments if word.endswith(".cpp") and "/mlx/" in word), None)
    target = next((word for word in arguments if word.endswith(".so")), None)
    if source is None or target is None:
        return subprocess.run([compiler, *arguments], check=False).returncode
    draft, library = Path(f"{source}.{os.getpid()}.cpp"), Path(f"{target}.{os.getpid()}")
    asked = [str(library) if word == target else word for word in arguments]
    commands, output = [[compiler, *asked]], ""
    try:
        try:
            text = Path(source).read_text(encoding="utf-8")
            if text.count("{") != text.count("}"):  # mlx does not look whether it could write everything
                output = f"error: {source} is incomplete\n"
            rewritten = vectorisable(text)
            if rewritten != text:
                draft.write_text(rewritten, encoding="utf-8")
                flags = [*FLAGS, *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])]
                commands.insert(0, [compiler, *(str(draft) if word == source else word for word in asked), *flags])
        except OSError as error:
            output = f"error: {error.strerror}: {draft}\n"
        for command in commands:
            result = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
            if result.returncode == 0:
                library.replace(target)  # another process never sees half a library
                return 0
    finally:
        draft.unlink(missing_ok=True)
        library.unlink(missing_ok=True)
    sys.stderr.write(output + result.stdout + result.stderr)
    folder = Path(target).parent
    if (free := shutil.disk_usage(folder).free) < LITTLE_SPACE:
        sys.stderr.write(f"\n{folder}: {free:,} bytes free\n")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
