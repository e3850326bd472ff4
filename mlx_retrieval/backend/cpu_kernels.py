"""Vectorised CPU kernels: what stands between `mx.compile` and g++ on Linux.

mlx writes a C++ loop for what it fuses and compiles it with `g++ -O3` alone: for the oldest x86-64, with a function
call for every exp, and with steps between elements that are known only at run time. `install` puts a g++ of ours first
on the PATH of this process. It rewrites the loops so that they run over contiguous memory, and adds flags: the same
arithmetic, 3 to 30 times faster (benchmarks/LOG.md). Called by backend.py; it imports neither mlx nor the toolkit.

    python kernels.py /usr/bin/g++ -O3 ... kernel.cpp -o kernel.so        what mlx's call becomes
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


def install() -> bool:
    """Let `mx.compile` in this process call `main` instead of g++; whether there is a g++ to call."""
    compiler = shutil.which("g++")
    if compiler is None:
        return False
    if Path(compiler).parent.name.startswith(FOLDER):  # a child of a process that did this
        return True
    # mlx keeps kernels in the folder for temporary files, by their names alone: those made in another way or for
    # another processor have to lie elsewhere. Python's own idea of that folder stays as it is.
    script = Path(__file__).resolve()
    text = f'#!/bin/sh\nexec "{sys.executable}" -I -S "{script}" "{compiler}" "$@"\n'
    folder = private_folder(text + script.read_text(encoding="utf-8") + _processor())
    if folder is None:
        return False
    wrapper = folder / "g++"
    if not wrapper.exists():
        new = folder / f"g++.{os.getpid()}"
        new.write_text(text, encoding="utf-8")
        new.chmod(0o700)
        new.replace(wrapper)
    os.environ["TMPDIR"] = str(folder)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return True


def private_folder(made_from: str) -> Path | None:
    """A folder for temporary files that only this user writes, for what is compiled from this; None where it is not."""
    mark = hashlib.sha256(made_from.encode()).hexdigest()[:12]
    base = Path(tempfile.gettempdir())
    base = base.parent if base.name.startswith(FOLDER) else base  # a child of a process that called `install`
    folder = base / f"{FOLDER}-{os.getuid()}-{mark}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder if folder.stat().st_uid == os.getuid() else None


def cold() -> bool:
    """Whether `install` found no kernel from earlier runs: the first ones take about half a minute in all."""
    return not any(Path(os.environ["TMPDIR"]).rglob("*.so"))


def _processor() -> str:
    """What `-march=native` depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def vectorisable(source: str) -> str:
    """A kernel of mlx whose innermost loop runs over contiguous rows.

    mlx's loops over arrays that are broadcast or transposed step through them by strides from memory. Here each row is
    taken in blocks, and an input that is not contiguous is copied into a small buffer first.
    """
    loops = list(re.finditer(r"^  for \(int (i\d+) = 0; \1 < shape\[(\d+)\]; \+\+\1\) \{\n", source, re.MULTILINE))
    if not loops:  # everything is contiguous
        return source.replace("\n  for (", f"\n{SAFE}  for (")
    axis = loops[-1].group(2)
    head, rest = source[: loops[-1].start()], source[loops[-1].end() :]
    body, tail = rest.split("\n  }\n", 1)
    step = re.compile(rf"^  (\w+) \+= \1_strides\[{axis}\];\n", re.MULTILINE)
    inputs, body = step.findall(body + "\n"), step.sub("", body + "\n")
    outputs = re.findall(r"^  \*(\w+)\+\+ = ", body, re.MULTILINE)
    rows, steps = "", ""
    for name in inputs:
        kind = re.search(rf"^  (\S+)\* {name} = ", head, re.MULTILINE).group(1)
        rows += f"  {kind} {name}_buffer[BLOCK];\n"
        rows += f"  const {kind}* {name}_row = contiguous_row({name}, {name}_strides[{axis}], count, {name}_buffer);\n"
        steps += f"  {name} += count * {name}_strides[{axis}];\n"
        body = body.replace(f"= *{name};", f"= {name}_row[j];")
    for name in outputs:
        steps += f"  {name} += count;\n"
        body = body.replace(f"  *{name}++ = ", f"  {name}[j] = ")
    loop = (
        f"  for (int start = 0; start < shape[{axis}]; start += BLOCK) {{\n"
        f"  const int count = shape[{axis}] - start < BLOCK ? shape[{axis}] - start : BLOCK;\n"
        f"{rows}{SAFE}  for (int j = 0; j < count; ++j) {{\n{body}  }}\n{steps}  }}\n"
    )
    return head.replace('extern "C"', ROW + 'extern "C"', 1) + loop + tail


def main(compiler: str, arguments: list[str]) -> int:
    """Compile as asked; what is not a kernel of mlx, or cannot be made better, goes to the compiler as it is."""
    source = next((word for word in arguments if word.endswith(".cpp") and "/mlx/" in word), None)
    target = next((word for word in arguments if word.endswith(".so")), None)
    if source is None or target is None:
        return subprocess.run([compiler, *arguments], check=False).returncode
    draft, library = f"{source}.{os.getpid()}.cpp", f"{target}.{os.getpid()}"
    flags = [*FLAGS, *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])]
    ours = [{source: draft, target: library}.get(word, word) for word in arguments]
    with open(source, encoding="utf-8") as file:
        text = file.read()
    with open(draft, "w", encoding="utf-8") as file:
        file.write(vectorisable(text))
    try:
        if subprocess.run([compiler, *ours, *flags], check=False, capture_output=True).returncode == 0:
            os.replace(library, target)  # another process never sees half a library
            return 0
    finally:
        os.unlink(draft)
    return subprocess.run([compiler, *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
