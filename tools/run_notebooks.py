"""Run the notebooks of examples/ and store their outputs in them, without paths of this machine.

python tools/run_notebooks.py examples/csv_to_search.ipynb
"""

import argparse
import json
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def run(path: Path) -> None:
    """Execute a notebook in its own folder and write it back."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":  # warnings of libraries about this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    text = nbformat.writes(notebook)
    for place, name in ((str(ROOT), "mlx-retrieval"), (str(Path.home()), "~")):
        text = text.replace(json.dumps(place)[1:-1], name)
    if lost := re.search(r"/(?:tmp|home|Users)/[^\"\\ ]*", text):
        raise SystemExit(f"{path}: the outputs name {lost[0]}, which is on this machine only")
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    for path in parser.parse_args().notebooks:
        run(path)


if __name__ == "__main__":
    main()
