"""Describe one export, and check the folders that it reads and writes."""

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.exporters.config_json import MARK
from mlx_retrieval.exporters.soup import METHODS
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.outputs import check_parent, entries, holds_model
from mlx_retrieval.utils.text import quantity

FORMATS = ("sentence-transformers", "mlx", "hf")
DTYPES = ("float32", "bfloat16", "float16")
CHOSEN = ("auto", "guards")  # ways to choose the share of --merge-with-base
TASKS = ("embed", "late", "rerank")


@dataclass
class Export:
    """One export: its fields are the command's flags. UserError if they contradict each other."""

    output: str
    adapter: str | None = None
    model: str | None = None
    task: str | None = None
    format: str | None = None  # None = mlx for a chat adapter, else sentence-transformers
    quantize: int | None = None
    gguf_ready: bool = False
    dtype: str | None = None
    merge_with_base: float | str | None = None  # share of the trained model, "auto", "guards", or None = all of it
    guard: Sequence[str] = ()  # tasks that decide "auto" and "guards"; () = those of the adapter's run
    guard_tolerance: float | None = None  # nDCG@10 or Spearman that one may lose; None = that of the run
    largest_share: float = 1.0  # that "auto" and "guards" may choose
    merge_with: Sequence[str] = ()  # models that the adapter's is mixed with, all with the same share
    merge_method: str = METHODS[0]
    keep_layers: Sequence[int] = ()  # numbers of blocks, counted from 0; () = all
    push_to_hub: str | None = None  # OWNER/NAME of a repository
    private: bool = False  # a new one
    revision: str | None = None  # a branch of it; None = the default one
    overwrite_repository: bool = False  # replace all files that are there
    dry_run: bool = False
    overwrite: bool = False
    skip_library_check: bool = False

    def __post_init__(self) -> None:
        if self.adapter is None and self.model is None:
            raise UserError("nothing to export: name --adapter, for example adapters/best, or --model for a base model")
        if self.keep_layers and self.adapter is not None:
            raise UserError(
                "--keep-layers takes layers of a whole model: export the --adapter first, and name it --model"
            )
        if self.adapter is not None:
            check_adapter(self.adapter)
        if self.format is None:
            self.format = "mlx" if self.is_chat else FORMATS[0]
        if self.format not in FORMATS:
            raise UserError(f"--format {self.format}: known are {', '.join(FORMATS)}")
        if self.is_chat and (self.gguf_ready or self.format == FORMATS[0]):
            given = "--gguf-ready" if self.gguf_ready else f"--format {self.format}"
            raise UserError(f"{given} is for retrieval models: a chat adapter is exported with --format mlx or hf")
        if self.merge_with_base is not None and (self.adapter is None or self.is_chat):
            reason = "is for the adapters of retrieval models" if self.adapter else "needs an --adapter"
            raise UserError(f"--merge-with-base {self.merge_with_base}: {reason}")
        if (self.guard or self.guard_tolerance is not None) and self.merge_with_base not in CHOSEN:
            raise UserError("--guard and --guard-tolerance choose the share of --merge-with-base auto or guards")
        if not 0 < self.largest_share <= 1:  # nan, too
            raise UserError(f"--largest-share {self.largest_share:g}: above 0, and 1 at most")
        if self.largest_share != 1 and self.merge_with_base not in CHOSEN:
            raise UserError("--largest-share bounds the share that --merge-with-base auto or guards chooses")
        if self.guard_tolerance is not None and not self.guard_tolerance >= 0:  # nan, too
            raise UserError(f"--guard-tolerance {self.guard_tolerance:g}: 0 or more")
        self._check_mixture()
        if self.task is not None and self.adapter is not None:
            raise UserError("--task is for a base model: an adapter's files tell what it was trained for")
        if self.quantize and self.format != "mlx":
            raise UserError(f"--quantize writes a folder that only mlx reads: use --format mlx, not {self.format}")
        if self.gguf_ready and self.format == "mlx":
            raise UserError("--gguf-ready needs --format sentence-transformers or hf: the converter reads those")

        if self.push_to_hub is not None:
            check_repository(self.push_to_hub)
        elif self.private or self.revision is not None or self.overwrite_repository:
            given = "--private" if self.private else "--overwrite-repository"
            raise UserError(f"{given if self.revision is None else '--revision'} is for --push-to-hub")

    def _check_mixture(self) -> None:
        """Raise UserError for models that cannot be mixed; their weights are compared later."""
        if self.merge_with and (self.adapter is None or self.is_chat):
            reason = (
                "is for the adapters of retrieval models" if self.adapter else "needs an --adapter to mix them with"
            )
            raise UserError(f"--merge-with {' '.join(self.merge_with)}: {reason}")
        models = [Path(name or "").expanduser().resolve() for name in (self.adapter, *self.merge_with)]
        if len({*models}) < len(models):
            raise UserError(f"--merge-with {' '.join(self.merge_with)}: names a model twice")
        for name in self.merge_with:
            inside = [str(Path(name) / part) for part in ("best", "final") if (Path(name) / part).is_dir()]
            if inside:
                raise UserError(f"--merge-with {name}: a run was saved there; name {' or '.join(inside)}")
        if self.merge_method not in METHODS:
            raise UserError(f"--merge-method {self.merge_method}: known are {', '.join(METHODS)}")
        if self.merge_method == "slerp" and len(self.merge_with) > 1:
            raise UserError(f"--merge-method slerp: goes from one model to another, and these are {len(models)}")
        if self.merge_method != METHODS[0] and not self.merge_with and self.merge_with_base is None:
            raise UserError(f"--merge-method {self.merge_method}: is for --merge-with and --merge-with-base")

    def merged(self, tensors: int) -> str:
        """Return what was merged into the base model, in words."""
        others = f" and {', '.join(self.merge_with)}, {self._manner}" if self.merge_with else ""
        share = (
            "" if self.merge_with_base is None else f", share {self.merge_with_base:g}, the rest is the base model's"
        )
        return f"{self.adapter}{others}: {quantity(tensors, 'tensor')}{share}"

    @property
    def _manner(self) -> str:
        return "half way by slerp" if self.merge_method == "slerp" else "their mean"

    @property
    def mixture(self) -> str:
        """What weights the exported ones were mixed of, in words for a model's card; "" = they are one model's."""
        sentences = []
        if self.merge_with:
            count = 1 + len(self.merge_with)
            sentences.append(f"The trained weights are those of {count} models, {self._manner}.")
        if (share := self.merge_with_base) is not None and self.adapter is not None:
            slerp = " by slerp" if self.merge_method == "slerp" else ""
            sentences.append(f"The weights are {share:g} of the trained model's and {1 - share:g} of its base model's"
                             f"{slerp}.")  # fmt: skip
        before = "Figures before and after training are of the trained model itself."
        before = "Figures before and after training are of the first one alone." if self.merge_with else before
        return " ".join([*sentences, before]) if sentences else ""

    @property
    def is_measured(self) -> bool:
        """Whether the figures of the adapter's run are those of the exported weights."""
        return self.adapter is not None and not (self.mixture or self.quantize or self.model)

    @property
    def public_name(self) -> str:
        """The name by which the card says to load the model: OWNER/NAME on the Hub, or that of the folder."""
        return self.push_to_hub or Path(self.output).name

    @property
    def is_chat(self) -> bool:
        """Whether the adapter is a chat model's."""
        from mlx_retrieval.models import kinds

        return self.adapter is not None and kinds.is_chat_adapter(Path(self.adapter).expanduser())

    @property
    def source(self) -> str:
        """The name of the exported model: the adapter's folder, or the base model."""
        return self.adapter or self.model


def share_of(text: str) -> float | str:
    """Read the value of --merge-with-base: a number from 0 to 1, "auto" or "guards"; else ArgumentTypeError."""
    if text in CHOSEN:
        return text
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: neither a number from 0 to 1 nor auto or guards")


def check_repository(name: str) -> None:
    """Raise UserError for a name that no repository on the Hub can have, or that lacks its owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"--push-to-hub {name}: not a name that the Hub allows, which is OWNER/NAME of letters, digits, -, _ and ."
        ) from error
    if "/" not in name:
        raise UserError(f"--push-to-hub {name}: the owner is missing: OWNER/{name}, you or an organisation")


def check_adapter(adapter: str) -> None:
    """Raise UserError if this folder is not an adapter, and name the adapters in it."""
    from mlx_retrieval.models import kinds

    folder = Path(adapter).expanduser()
    if folder.is_dir() and not kinds.is_adapter(folder):
        inside = [str(Path(adapter) / name) for name in ("best", "final") if (folder / name).is_dir()]
        hint = f"; a run was saved there, so export {' or '.join(inside)}" if inside else ""
        raise UserError(f"--adapter {adapter}: not an adapter folder, it has no {kinds.ADAPTERS}{hint}")


def check_output(output: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    """Refuse to replace files that are not an export, or the models in `sources`."""
    files.check_name(output, "--output")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: this is a file")
    check_parent(output)
    target = output.resolve()
    for source in sources:
        if target == source.resolve() or target in source.resolve().parents:
            raise UserError(f"--output {output}: the model to export is in there ({source})")
    if holds_model(target.parent):
        raise UserError(f"--output {output}: {target.parent} holds a model, which reads the weights below it as well")
    if not output.is_dir() or not entries(output):
        return
    if not is_export(output):
        raise UserError(f"--output {output}: the folder is not empty, and not an export: name another folder")
    if not overwrite:
        raise UserError(f"--output {output}: an export is in this folder; --overwrite replaces it and everything in it")


def is_export(folder: Path) -> bool:
    """Return whether `export.py` wrote this folder."""
    config = folder / "config.json"
    return config.is_file() and ((folder / "retrieval_config.json").is_file() or MARK in read_json(config))
