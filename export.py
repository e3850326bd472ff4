"""Export a trained model: merge the adapter, write a folder that other libraries load, and check that they do.

python export.py --adapter adapters/best --output my-model                      # for sentence-transformers
python export.py --adapter adapters/best --output my-model-4bit --format mlx --quantize 4
python export.py --adapter adapters/best --output my-model --gguf-ready         # and prints what llama.cpp wants next
python export.py --model intfloat/e5-small-v2 --output e5-8bit --format mlx --quantize 8      # a base model as it is
python export.py --model Qwen/Qwen3-Reranker-0.6B --task rerank --output r --format mlx --quantize 4

Whatever the format, the folder also holds retrieval_config.json: `embed.py`, `rerank.py`, `eval.py` and `train.py` take
it as --model. It appears under its name when its vectors, or a reranker's scores, have been compared with those of the
model it was made of.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval import backend
from mlx_retrieval.exporters.job import DTYPES, FORMATS, TASKS, Export, check_output
from mlx_retrieval.utils import imports
from mlx_retrieval.utils.errors import UserError

# --- writing --------------------------------------------------------------------------------------------------------


def export(job: Export) -> Path:
    """Do it, and say on stdout what was done; returns the folder. UserError leaves nothing behind."""
    from mlx_retrieval.backbones import resolve
    from mlx_retrieval.models import loading
    from mlx_retrieval.utils import files
    from mlx_retrieval.utils.console import print_lines

    output = Path(job.output).expanduser()
    sources = [Path(job.adapter).expanduser()] if job.adapter else []
    if job.model:
        sources.append(resolve(job.model))
    check_output(output, job.overwrite, sources)
    task = {"task": job.task} if job.task else {}
    model, config, base = loading.open_model(job.model, job.adapter, **task)
    check_output(output, job.overwrite, [base])
    print_lines([("device", backend.describe()), ("model", job.model or config.base_model)])
    if config.task == "rerank":
        from mlx_retrieval.exporters.reranker import RerankerWriter as Writer
    else:
        from mlx_retrieval.exporters.embedding import EmbeddingWriter as Writer
    writer = Writer(job, model, config, base)
    files.write_folder(output, writer.fill)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    lines = [*writer.lines, ("written", f"{output}, {size / 1e6:,.1f} MB")]
    if job.gguf_ready:
        dense = " --sentence-transformers-dense-modules" if config.dense else ""
        lines.append(("next", f"python convert_hf_to_gguf.py {output}{dense}"))
    rerank = "--task rerank " if config.task == "rerank" else ""
    print_lines([*lines, ("next", f"python eval.py {rerank}--model {output}")])
    return output


def main(argv: Sequence[str] | None = None) -> int:
    backend.prepare()
    parser = argparse.ArgumentParser(
        description="Merge a trained adapter and write a folder that other libraries load.",
        epilog="Exit codes: 0 written and checked, 2 bad input or a failed check, and nothing is written.",
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="adapter folder, for instance adapters/best")
    model = "base model to put the adapter on (default: the one it was trained on), or to export by itself"
    parser.add_argument("--model", help=model)
    parser.add_argument("--task", choices=TASKS, help="what a base model is for (default: what its files say)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write")
    form = "what is to load it: sentence-transformers (default), mlx_lm.load, or transformers' own classes"
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=form)
    quantize = "quantise linear layers and embeddings to so many bits (with --format mlx)"
    parser.add_argument("--quantize", type=int, choices=(4, 8), help=quantize)
    gguf = "write what llama.cpp's convert_hf_to_gguf.py takes, in one dtype, and say what to type next"
    parser.add_argument("--gguf-ready", action="store_true", help=gguf)
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: that of the base model)")
    parser.add_argument("--overwrite", action="store_true", help="replace an exported folder that is in --output")
    skip = "do not load the folder with sentence-transformers to compare; with this toolkit it is always compared"
    parser.add_argument("--skip-library-check", action="store_true", help=skip)
    args = parser.parse_args(argv)
    try:
        export(Export(**vars(args)))
    except UserError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("export.py: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    imports.hide("wandb")
    sys.exit(main())
