"""Make the files that a fresh checkout trains with: `train-data.jsonl`, `eval-data/` and `gemma-3-tiny-mlx/`.

Run it again only to change them: the results are part of the repository. On one machine the same seed gives the same
bytes; on another the model's weights may differ in their last digits. The data takes a second, the tokenizer a few,
the model about seven minutes of one CPU core.

    python tools/make_default.py --output remade                everything
    python tools/make_default.py --output remade --data-only
"""

import argparse
import os
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS))
# One BLAS thread: sums in one order wherever it runs, and for matrices this small not slower.
os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

from make_data import SEED, make_data

MODEL = "gemma-3-tiny-mlx"
STEPS = 700


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TOOLS.parent, help="folder to write to (default: the checkout)")
    parser.add_argument("--data-only", action="store_true", help="write the data, leave the model alone")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of pretraining (default {STEPS})")
    parser.add_argument("--seed", type=int, default=SEED, help="of data, tokenizer and model (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be at least 2")

    topics = make_data(options.output, options.seed)
    print(f"{options.output / 'train-data.jsonl'}, {options.output / 'eval-data'}")
    if options.data_only:
        return
    from make_model import check, make_model

    folder = options.output / MODEL
    make_model(topics, folder, options.steps, options.seed)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB, hidden states differ by {check(folder):.1e} between MLX and transformers")


if __name__ == "__main__":
    main()
