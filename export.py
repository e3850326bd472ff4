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
from dataclasses import dataclass
from pathlib import Path

import backend
from backend import UserError

FORMATS = ("sentence-transformers", "mlx", "hf")
DTYPES = ("float32", "bfloat16", "float16")
TASKS = ("embed", "late", "rerank")


@dataclass
class Export:
    """What is to be written; the flags of the command."""

    output: str
    adapter: str | None = None
    model: str | None = None
    task: str | None = None
    format: str = FORMATS[0]
    quantize: int | None = None
    gguf_ready: bool = False
    dtype: str | None = None
    overwrite: bool = False
    skip_library_check: bool = False

    def __post_init__(self) -> None:
        if self.adapter is None and self.model is None:
            raise UserError("say what to export: --adapter adapters/best, or --model for a base model")
        if self.format not in FORMATS:
            raise UserError(f"--format {self.format}: known are {', '.join(FORMATS)}")
        if self.task is not None and self.adapter is not None:
            raise UserError("--task is for a base model: an adapter says itself what it was trained for")
        if self.quantize and self.format != "mlx":
            raise UserError(f"--quantize writes what only mlx reads: use --format mlx, not {self.format}")
        if self.gguf_ready and self.format == "mlx":
            raise UserError("--gguf-ready goes with --format sentence-transformers or hf: the converter reads those")
        if self.adapter is not None:
            check_adapter(self.adapter)


def check_adapter(adapter: str) -> None:
    """UserError where this is no adapter folder, naming those that are in it."""
    import checkpoint

    folder = Path(adapter).expanduser()
    if folder.is_dir() and not checkpoint.is_adapter(folder):
        inside = [str(Path(adapter) / name) for name in ("best", "final") if (folder / name).is_dir()]
        hint = f"; a run was saved there, so export {' or '.join(inside)}" if inside else ""
        raise UserError(f"--adapter {adapter}: no adapter folder ({checkpoint.ADAPTERS}){hint}")


def check_output(output: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    """Refuse to replace what may be wanted: other people's files, or the models that are read."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: this is a file")
    whole = output.resolve()
    for source in sources:
        if whole == source.resolve() or whole in source.resolve().parents:
            raise UserError(f"--output {output}: the model that is exported is in there ({source})")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--output {output}: the folder is not empty; --overwrite replaces it, and all that is in it")
    if not (output / "retrieval_config.json").is_file() or not (output / "config.json").is_file():
        raise UserError(f"--output {output}: --overwrite replaces exported folders only, and this is none")


# --- writing --------------------------------------------------------------------------------------------------------


def export(job: Export) -> Path:
    """Do it, and say on stdout what was done; returns the folder. UserError leaves nothing behind."""
    import checkpoint
    from models import resolve
    from reporting import print_lines

    output = Path(job.output).expanduser()
    sources = [Path(job.adapter).expanduser()] if job.adapter else []
    if job.model:
        sources.append(resolve(job.model))
    check_output(output, job.overwrite, sources)
    task = {"task": job.task} if job.task else {}
    model, config, base = checkpoint.open_model(job.model, job.adapter, **task)
    check_output(output, job.overwrite, [base])
    print_lines([("device", backend.describe()), ("model", job.model or config.base_model)])
    kind = Writer
    if config.task == "rerank":
        from rerankers import exporting

        kind = exporting.RerankWriter
    writer = kind(job, model, config, base)
    checkpoint.write_folder(output, writer.fill)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    lines = [*writer.lines, ("written", f"{output}, {size / 1e6:,.1f} MB")]
    if job.gguf_ready:
        dense = " --sentence-transformers-dense-modules" if config.dense else ""
        lines.append(("next", f"python convert_hf_to_gguf.py {output}{dense}"))
    rerank = "--task rerank " if config.task == "rerank" else ""
    print_lines([*lines, ("next", f"python eval.py {rerank}--model {output}")])
    return output


class Writer:
    """Fills a folder with a model, and checks it. `lines` gets what is to be said of it.

    Args:
        model, config, base: as `checkpoint.open_model` returns them. The model is changed, and empty in the end.
    """

    def __init__(self, job: Export, model: "RetrievalModel", config: "RetrievalConfig", base: Path):  # noqa: F821
        self.job, self.model, self.config, self.base = job, model, config, base
        self.tokenizer = config.override(query_expansion=0).tokenizer(base)  # which the tokenizer's files know not of
        self.kind = model.backbone.config["model_type"]
        self.limit = max(config.max_length, config.query_max_length)
        self.for_sentence_transformers = job.format == FORMATS[0] or job.gguf_ready
        self.lines: list[tuple[str, str]] = []
        if job.gguf_ready and config.task == "late":
            raise UserError("--gguf-ready: llama.cpp gives one vector a text, and this model gives one a token")

    def fill(self, folder: Path) -> None:
        """Write everything, and compare with the model as it was. UserError where anything is not as it should be."""
        import agreement
        from models import ENCODERS

        self._in_float32()
        expected = theirs = self._vectors(self.config)
        one_limit = self.for_sentence_transformers and self.config.task != "late"
        if one_limit and self.config.query_max_length != self.config.max_length:
            theirs = self._vectors(self.config.override(max_length=self.limit))
            self._say("lengths", f"sentence-transformers has one limit: {self.limit} tokens, of queries too")
        self._write(folder)
        reader = "embed.load"
        if self.job.quantize:
            whole, reader = expected, "embed.load, to the quantised model in memory"
            self._in_float32()
            expected = self._vectors(self.config)
            worst, mean = agreement.compare(expected, whole)
            self._say("check", f"quantised, to the whole model: worst cosine {worst:.4f}, mean {mean:.4f}")
        agreement.release(self.model)
        self._say("check", agreement.check_own(folder, expected, self.limit, reader))
        if self.job.format == "mlx" and self.kind not in ENCODERS:
            self._say("check", agreement.check_mlx_lm(folder))
        if self.for_sentence_transformers and self.job.skip_library_check:
            self._say("check", "sentence-transformers: left out, as --skip-library-check says")
        elif self.for_sentence_transformers:
            self._say("check", agreement.check_sentence_transformers(folder, theirs, self.limit))

    def _say(self, what: str, text: str) -> None:
        self.lines.append((what, text))

    def _in_float32(self) -> None:
        from backend import mx

        from models import set_dtype

        set_dtype(self.model.backbone, mx.float32)

    def _vectors(self, config: "RetrievalConfig") -> dict:  # noqa: F821
        """What the model, as it is now, makes of the check's texts under `config`."""
        import agreement
        from embed import Model

        model = Model(self.model, config, config.tokenizer(self.base), "in memory")
        return agreement.vectors(model.encode, config.prompts, self.limit)

    def _write(self, folder: Path) -> None:
        from backend import mx

        import exported_config
        import late_layout
        import merging
        import model_card
        import sentence_layout
        import tokenizer_files

        job, config, backbone = self.job, self.config, self.model.backbone
        trained = merging.merge(backbone)
        self._say("merged", f"{job.adapter}: {len(trained):,} tensors" if job.adapter else "nothing: a base model")
        stored = merging.stored_dtype(self.base)
        one_dtype = job.dtype or job.gguf_ready or job.format == "mlx"
        dtype = (getattr(mx, job.dtype) if job.dtype else stored) if one_dtype else None
        name = job.dtype or str(stored).rpartition(".")[-1]
        settings = exported_config.make(self.base, backbone, job.format, name if one_dtype else None)
        if job.format == "mlx":
            merging.cast(backbone, dtype)
            if job.quantize:
                settings["quantization"] = merging.quantise(backbone, job.quantize)
                settings["quantization_config"] = settings["quantization"]
                name = f"{job.quantize} bits in groups of {settings['quantization']['group_size']}, scales {name}"
            merging.write(folder, merging.mlx_tensors(backbone), "mlx")
        else:
            drop = exported_config.dropped(self.kind, job.format)
            merging.write(folder, merging.stored_tensors(self.base, backbone, trained, dtype, drop), "pt")
        config.dense = [layer | {"path": layer["path"] or late_layout.PROJECTION} for layer in config.dense]
        for layer, described in zip(self.model.head.dense, config.dense, strict=True):
            values = {f"linear.{key}": v.astype(dtype or mx.float32) for key, v in layer.linear.parameters().items()}
            merging.write(sentence_layout.write_dense(folder, described), values, "pt")
        self._say("weights", name)

        config.write(folder)
        if self.for_sentence_transformers and config.task == "late":
            frame = [*self.tokenizer.opening, *self.tokenizer.closing]
            for note in late_layout.write(folder, config, frame, backbone.hidden_size):
                self._say("layout", note)
        elif self.for_sentence_transformers:
            rows = max(settings.get("vocab_size", 0), self.tokenizer.tokenizer.get_vocab_size())
            sentence_layout.write(folder, config, self.tokenizer, backbone.hidden_size, rows)
        exported_config.write(folder, settings)  # transformers looks into it for the tokenizer
        self._say("tokenizer", tokenizer_files.write(self.base, folder, self.tokenizer, self.limit))
        if job.gguf_ready:
            for note in exported_config.settle_gguf(settings, folder, config, self.tokenizer):
                self._say("llama.cpp", note)
            exported_config.write(folder, settings)
        adapter = Path(job.adapter).expanduser() if job.adapter else None
        base = job.model or config.base_model
        card = model_card.write(config, base, adapter, job.format, name, Path(job.output).name)
        (folder / "README.md").write_text(card, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
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
    sys.exit(main())
