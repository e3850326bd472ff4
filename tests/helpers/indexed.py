"""A small folder and its index, for the tests of what searches it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from mlx_retrieval.inference import embedder
from mlx_retrieval.retrieval.indexer import update

SCRIPT = "<script>document.title = 'broken'</script>"
TEXTS = {
    "src/reader.py": "def readLine(file):\n    # gives what comes before the end\n    return file.readline()\n",
    "docs/read.txt": "read it and read it again 🚲 then read on\n",
    "docs/boiler.md": "# Boiler\nIt drips, and hisses all night.\n",
    "docs/bike.md": "# Bike\nThe chain squeaks or jumps.\n",
    "docs/odd.md": f"# Odd\nA page of <b>bold</b> claims & {SCRIPT} in it.\n",
}


def make_index(folder: Path, model: str) -> Path:
    """Write TEXTS into `folder`/tree, index them into `folder`/index, and return that."""
    for name, text in TEXTS.items():
        path = folder / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    update(folder / "tree", folder / "index", embedder.load(model))
    return folder / "index"


class LastLetters:
    """A reranker that puts texts in the order of their last letters."""

    name, kind = "last-letters", "cross-encoder"
    runner = SimpleNamespace(workers=1)

    def limit_shapes(self, models) -> None:
        pass

    def count_tokens(self, query, documents) -> int:
        return len(documents)

    def score_groups(self, groups) -> list[np.ndarray]:
        return [np.array([-ord(text.strip()[-1]) for text in texts], np.float32) for _, texts in groups]
