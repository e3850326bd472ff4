"""Describe one export and check its folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_retrieval.utils.errors import UserError

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
    from mlx_retrieval.models import loading

    folder = Path(adapter).expanduser()
    if folder.is_dir() and not loading.is_adapter(folder):
        inside = [str(Path(adapter) / name) for name in ("best", "final") if (folder / name).is_dir()]
        hint = f"; a run was saved there, so export {' or '.join(inside)}" if inside else ""
        raise UserError(f"--adapter {adapter}: no adapter folder ({loading.ADAPTERS}){hint}")


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
