"""Compile a kernel of mlx so that it runs fast: the program that `mlx.compile` calls instead of g++ on Linux CPUs.

mlx writes a C++ loop for the operations it fuses and compiles it with `g++ -O3` alone: for the oldest x86-64, with a
function call for every exp, and with steps between elements that are known only at run time. This program rewrites the
loops so that they run over contiguous memory, and adds flags: the same arithmetic, 3 to 30 times faster
(benchmarks/LOG.md). A kernel that it does not know goes to g++ unchanged. See `cpu_kernels.install`.

    python kernel_compiler.py /usr/bin/g++ -O3 ... kernel.cpp -o kernel.so       what mlx's call becomes
    python kernel_compiler.py /usr/bin/g++ ahead INCLUDE FIRST VERSION           in the background of a first run

Three quarters of a compilation are the header that all kernels include, so it is precompiled. `ahead` does that, and
then compiles the kernels of a file, on all cores: the first run of a command waits for one kernel after the other.
It imports nothing but the standard library, and little of that: it starts for every kernel.
"""

import contextlib
import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
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
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")
# Of mlx's own call: a precompiled header is only read if it was compiled with the same.
MLX_FLAGS = ["-std=c++17", "-O3", "-Wall", "-fPIC"]
HEADER = "mlx/backend/cpu/compiled_preamble.h"
PRECOMPILED_SPACE = 256 << 20  # free bytes without which no header is precompiled; it takes 52 MB
READY = "ready"  # folder of the kernels that are compiled ahead
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


def precompiled(kernels: Path, include: Path) -> Path:
    """Return where the compiled form of the header in the folder `include` lies.

    It goes by the contents of what the header includes: environments with the same mlx share it, and one that is
    removed leaves nothing behind.
    """
    import hashlib

    digest = hashlib.sha256()
    for folder in ("types", "backend/cpu"):
        for path in sorted((include / "mlx" / folder).rglob("*.h")):
            digest.update(path.read_bytes())
    return kernels / "headers" / digest.hexdigest()[:12] / f"{HEADER}.gch"


def precompile(compiler: str, include: Path, kernels: Path) -> Path | None:
    """Compile mlx's header unless it is there, or another process is just doing it: then wait.

    Returns the folder that has to come before `include` in the compiler's search; None where there is no compiled
    header, as without space.
    """
    compiled = precompiled(kernels, include)
    folder = compiled.parents[HEADER.count("/")]
    if compiled.exists():
        return folder
    if not (include / HEADER).exists() or shutil.disk_usage(kernels).free < PRECOMPILED_SPACE:
        return None
    compiled.parent.mkdir(parents=True, exist_ok=True)
    with (kernels / "headers" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if compiled.exists():
            return folder
        draft = compiled.with_name(f"draft.{os.getpid()}")
        words = [*MLX_FLAGS, *FLAGS, f"-I{include}", "-x", "c++-header", str(include / HEADER), "-o", str(draft)]
        try:
            if subprocess.run([compiler, *words], check=False, capture_output=True).returncode != 0:
                return None
            draft.replace(compiled)
        finally:
            draft.unlink(missing_ok=True)
    return folder


def compile_ahead(compiler: str, include: Path, kernels: Path, texts: list[str]) -> None:
    """Compile kernels before mlx asks for them. `texts`: as mlx writes them, in the order in which they are needed."""
    from concurrent.futures import ThreadPoolExecutor  # not when a kernel waits

    header = precompile(compiler, include, kernels)
    (kernels / READY).mkdir(exist_ok=True)

    def compile_one(text: str) -> None:
        source = ready(kernels, text)
        library, draft = source.with_suffix(".so"), source.with_suffix(".draft")
        with source.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                source.write_text(vectorisable(text), encoding="utf-8")
                words = [*MLX_FLAGS, "-shared", f"-I{include}", str(source), "-o", str(draft), *FLAGS]
                before = [f"-I{header}"] if header else []
                if subprocess.run([compiler, *before, *words], check=False, capture_output=True).returncode == 0:
                    draft.replace(library)

    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(compile_one, texts))


def ready(kernels: Path, text: str) -> Path:
    """Return where the source of a kernel lies that is compiled ahead. `text`: mlx's, or that of `vectorisable`."""
    name = re.search(r"^void (\w+)\(", text, re.MULTILINE)
    return kernels / READY / f"{name.group(1)[-100:] if name else 'unknown'}.cpp"  # its end has a hash of the whole


def taken(source: Path, text: str, library: Path) -> bool:
    """Copy a kernel that was compiled ahead to `library`, or wait for it. Return whether there is one of this text."""
    with contextlib.suppress(OSError), source.with_suffix(".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # of `compile_ahead`
        if source.read_text(encoding="utf-8") == text:
            shutil.copyfile(source.with_suffix(".so"), library)
            return True
    return False


def main(compiler: str, arguments: list[str]) -> int:
    """Compile a kernel of mlx, vectorised; compile anything else, or what cannot be improved, exactly as asked."""
    kernels = Path(__file__).parent
    if arguments[:1] == ["ahead"]:
        _, include, first, version = arguments
        import json  # not when a kernel waits

        recorded = json.loads(Path(first).read_text(encoding="utf-8"))
        os.nice(10)  # what the run waits for goes first
        compile_ahead(compiler, Path(include), kernels, recorded["kernels"] if recorded["mlx"] == version else [])
        return 0
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
                if taken(ready(kernels, rewritten), rewritten, library):
                    library.replace(target)
                    return 0
                draft.write_text(rewritten, encoding="utf-8")
                include = arguments[arguments.index("-I") + 1] if "-I" in arguments else None
                header = precompile(compiler, Path(include), kernels) if include else None
                words = [str(draft) if word == source else word for word in asked]
                commands.insert(0, [compiler, *([f"-I{header}"] if header else []), *words, *FLAGS])
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
