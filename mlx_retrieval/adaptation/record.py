"""Which stages of an adaptation are done, in `adapt.json`: a stage is skipped while all that decides it is the same.

    record = Record(Path("handbook-model"))
    record.is_done("read", key)
    record.note("read", key, seconds=3.2, figures={"chunks": 812})

A stage's key is a hash of its settings and of the keys of the stages that it builds on, so that a change begins the
work again from the first stage that it concerns.
"""

import json
from pathlib import Path
from typing import Any

from mlx_retrieval.adaptation.job import FILE
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError

UNFINISHED = "unfinished"  # among a stage's figures: why it is to go on in the next call, though others may follow now


class Record:
    """The finished stages of a folder. `seconds` of unfinished ones are kept as well, for the budget."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                stages = json.loads(self.path.read_text(encoding="utf-8"))["stages"]
                self.stages = {name: dict(stage) for name, stage in stages.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{self.path}: not the record of an adaptation; was the file edited?") from error

    def is_done(self, name: str, key: str) -> bool:
        """Return whether a stage was finished with this key."""
        stage = self.stages.get(name, {})
        return bool(stage.get("done")) and stage.get("key") == key

    def figures(self, name: str) -> dict[str, Any]:
        """Return the figures of a stage; {} if it is not done."""
        stage = self.stages.get(name, {})
        return stage.get("figures", {}) if stage.get("done") else {}

    def seconds(self, name: str, key: str) -> float:
        """Return how long a stage has taken so far with this key, earlier calls included."""
        stage = self.stages.get(name, {})
        return stage.get("seconds", 0.0) if stage.get("key") == key else 0.0

    def note(self, name: str, key: str, seconds: float, figures: dict[str, Any] | None = None) -> None:
        """Note a stage and how long it has taken; with `figures` it is done, unless they say UNFINISHED."""
        done = figures is not None and UNFINISHED not in figures
        self.stages[name] = {"key": key, "done": done, "seconds": round(seconds, 1)}
        self.stages[name] |= {"figures": figures} if figures is not None else {}
        text = json.dumps({"stages": self.stages}, indent=2, ensure_ascii=False)
        files.write_file(self.path, text + "\n")

    def forget(self, name: str) -> None:
        """Do a stage again, although nothing has changed."""
        self.stages.pop(name, None)
