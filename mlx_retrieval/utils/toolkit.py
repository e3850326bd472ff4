"""The data and settings that come with the toolkit, found from any current folder.

find("eval-data")                                # the folder of that name here, or else the toolkit's
"""

from pathlib import Path

from mlx_retrieval.utils.text import CHECKOUT

DATA, EVALUATION, CONFIGS = "train-data.jsonl", "eval-data", "configs"
# What a tuned model had better not forget: prose and code.
HELD = (str(CHECKOUT / DATA), str(CHECKOUT / "mlx_retrieval"))


def find(name: str) -> str:
    """Return the path of a file that comes with the toolkit, unless the current folder has one of this name.

    A name that is no such file's is returned as it is. Models are found by `backbones.finding.resolve`.
    """
    path = Path(name)
    if path.parts[:1] not in [(DATA,), (EVALUATION,), (CONFIGS,)] or path.exists() or not (CHECKOUT / path).exists():
        return name
    return str(CHECKOUT / path)
