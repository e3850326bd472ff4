"""Write mlx_retrieval/backend/first_kernels.json: the kernels that `python train.py` needs up to its first step.

    python tools/first_kernels.py              on a Linux CPU with g++, after an update of mlx or a change of the step

mlx leaves the C++ text of each kernel beside it. A first run has those of the file compiled on all cores while it
loads its model (mlx_retrieval/backend/cpu_kernels.py). tests/backend/test_first_kernels.py says when it is out of date.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_retrieval.backend import cpu_kernels, mx

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def kernels_of_a_first_run(folder: Path) -> list[str]:
    """Return the texts of the kernels of a run of one step, in the order in which they were asked for.

    `folder`: for its temporary files and its output; has to be empty.
    """
    command = [sys.executable, str(TRAIN), "--steps", "1", "--output", str(folder / "adapters")]
    path = [entry for entry in os.environ["PATH"].split(os.pathsep) if cpu_kernels.FOLDER not in entry]
    environment = os.environ | {"TMPDIR": str(folder), "PATH": os.pathsep.join(path)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    sources = sorted(folder.glob("*/mlx/*/cpu/*.cpp"), key=lambda source: source.stat().st_mtime_ns)
    return [source.read_text(encoding="utf-8") for source in sources]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        texts = kernels_of_a_first_run(Path(folder))
    recorded = {"mlx": mx.__version__, "kernels": texts}
    cpu_kernels.FIRST.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    print(f"{len(texts)} kernels written to {cpu_kernels.FIRST}")


if __name__ == "__main__":
    main()
