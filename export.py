"""Export a trained model as a folder that other libraries load.

python export.py --adapter adapters/best --output my-model                      # for sentence-transformers
python export.py --adapter adapters/best --output my-model-4bit --format mlx --quantize 4
python export.py --adapter adapters/best --output my-model --merge-with-base auto     # keeps more of the base model
python export.py --adapter a/best --merge-with b/best c/best --output my-model        # the mean of three trained models
python export.py --adapter adapters/best --output my-model --gguf-ready         # and prints llama.cpp's next command
python export.py --model tuned --keep-layers 0 2 4 --output student             # to be trained by tuned's vectors
python export.py --model intfloat/e5-small-v2 --output e5-8bit --format mlx --quantize 8      # an untrained base model
python export.py --model Qwen/Qwen3-Reranker-0.6B --task rerank --output r --format mlx --quantize 4
python export.py --adapter adapters/best --output my-model --push-to-hub me/my-model --private   # token: HF_TOKEN
python export.py --adapter adapters/chat/final --output my-chat                  # a chat model, for mlx-lm

from export import Export, export
export(Export(adapter="adapters/best", output="my-model"))                      # the same from Python

The adapter is merged into the weights. Every exported folder of a retrieval model also holds retrieval_config.json, so
`embed.py`, `rerank.py`, `eval.py` and `train.py` take it as --model. A folder appears under its name only after its
vectors, a reranker's scores, or a chat model's logits, were compared with those of the original model.
"""

import argparse
import sys
from collections.abc import Sequence

from mlx_retrieval.backend import device_errors

from mlx_retrieval import backend
from mlx_retrieval.exporters.job import DTYPES, FORMATS, TASKS, Export, share_of
from mlx_retrieval.exporters.run import export, export_with_warnings
from mlx_retrieval.exporters.soup import METHODS
from mlx_retrieval.utils import imports
from mlx_retrieval.utils.command import Parser, command, user_path

__all__ = ["Export", "export"]


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's flags."""
    out = Parser(
        prog="export.py",
        description="Export a trained model, its adapter merged, as a folder that other libraries load.",
        epilog="Exit codes: 0 = written and checked; 1 = written, but quantised weights miss their limit; 2 = bad "
        "input or a failed check, and nothing was written.",
    )
    out.add_argument("--adapter", type=user_path, metavar="DIR", help="adapter folder, for example adapters/best")
    out.add_argument(
        "--model",
        "--model-path",
        type=user_path,
        metavar="MODEL",
        help="base model, a folder, GGUF or hub name: without --adapter it is exported itself, with it the adapter is "
        "put on it (default: the base model that the adapter was trained on)",
    )
    out.add_argument(
        "--task",
        choices=TASKS,
        help="what a base model is used for: embed = one vector a text, late = one vector a token, rerank = a score a "
        "query and document (default: the task that the model's files tell)",
    )
    out.add_argument("--output", required=True, type=user_path, metavar="DIR", help="folder to write")
    out.add_argument(
        "--format",
        choices=FORMATS,
        help="the library to write for: sentence-transformers, mlx = mlx_lm.load, hf = transformers' own classes "
        "(default: sentence-transformers, and mlx for a chat adapter)",
    )
    out.add_argument(
        "--quantize",
        type=int,
        choices=(4, 8),
        help="bits a weight of linear layers and embeddings, with --format mlx (default: not quantised)",
    )
    out.add_argument(
        "--gguf-ready",
        action="store_true",
        help="write weights and settings as llama.cpp's convert_hf_to_gguf.py reads them, in one dtype, and print the "
        "command to run next",
    )
    out.add_argument(
        "--merge-with-base",
        type=share_of,
        metavar="X|auto|guards",
        help="share of the trained weights, the rest being the base model's, which forgets less: 1 = the trained "
        "model; auto = the share of 0, 0.1 ... 1 that is best on what the run was judged on while its --guard tasks "
        "hold, with a table; guards = the largest one at which they hold, which is quicker (default: 1)",
    )
    out.add_argument(
        "--guard",
        nargs="+",
        default=(),
        type=user_path,
        metavar="TASK",
        help="evaluation folders or MTEB tasks at which the share of --merge-with-base auto or guards must not lose "
        "more than --guard-tolerance (default: those of the run)",
    )
    out.add_argument(
        "--guard-tolerance",
        type=float,
        metavar="X",
        help="nDCG@10, or Spearman of scored pairs, that a --guard may lose (default: that of the run)",
    )
    out.add_argument(
        "--largest-share",
        type=float,
        default=1.0,
        metavar="X",
        help="try no larger share than this with --merge-with-base auto or guards (default: %(default)g)",
    )
    out.add_argument(
        "--merge-with",
        nargs="+",
        default=(),
        type=user_path,
        metavar="MODEL",
        help="mix the adapter's model with these, adapters or whole models of the same shape: each weight becomes the "
        "mean of all models'",
    )
    out.add_argument(
        "--merge-method",
        choices=METHODS,
        default=METHODS[0],
        help="how --merge-with and --merge-with-base go from one weight to the other: on a straight line, or slerp = "
        "on an arc, with one MODEL (default: %(default)s)",
    )
    out.add_argument(
        "--keep-layers",
        type=int,
        nargs="+",
        default=(),
        metavar="N",
        help="keep only these layers of --model, by their numbers from 0 in ascending order: a smaller, faster model "
        "to train by the vectors of the whole one (default: all)",
    )
    out.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the base model's)")
    out.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="also upload the folder, once it is checked, to this repository of the Hub, which is made if it is "
        "missing; the token is that of HF_TOKEN or of hf auth login",
    )
    out.add_argument("--private", action="store_true", help="make the new repository of --push-to-hub private")
    out.add_argument(
        "--revision", metavar="BRANCH", help="branch of --push-to-hub, made if it is missing (default: the main one)"
    )
    out.add_argument(
        "--overwrite-repository",
        action="store_true",
        help="replace all files that the repository of --push-to-hub holds, in a new commit",
    )
    out.add_argument(
        "--dry-run",
        action="store_true",
        help="make and check the folder and list its files with their sizes, but keep and upload nothing; needs no "
        "token",
    )
    out.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the exported folder in --output; what --push-to-hub finds has a flag of its own",
    )
    out.add_argument(
        "--skip-library-check",
        action="store_true",
        help="do not load the folder with sentence-transformers, or a chat model's with transformers, to compare; this "
        "toolkit always loads and compares it",
    )
    return out


@command("export.py", explain=device_errors.explain)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 if a limit is missed, or 2 for an error the user can fix."""
    backend.prepare()
    args = parser().parse_args(argv)
    try:
        _, missed = export_with_warnings(Export(**vars(args)))
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or "interrupted, nothing was written") from stop
    return 1 if missed else 0


if __name__ == "__main__":
    imports.hide("wandb")
    sys.exit(main())
