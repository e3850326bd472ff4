"""Every setting of a run: one dataclass is the flags, the YAML file and what is saved beside the weights.

A default stands here and nowhere else. `flags.py` reads settings from the command line and from YAML.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loss import FILTERS, LOSSES
from mlx_retrieval.dataset.elastic import fields
from mlx_retrieval.models.heads import POOLING
from mlx_retrieval.utils.errors import UserError

# The default loss of each kind of reranker.
RERANKER_DEFAULTS = {"qwen3": "yes_no", "cross-encoder": "bce", "listwise": "list_softmax"}

# Tasks that a setting applies to.
VECTORS, LATE, RERANK, CHAT = ("embed", "late"), ("late",), ("rerank",), ("chat",)
RETRIEVAL = (*VECTORS, *RERANK)
TASK_DEFAULTS = {"chat": {"data": ["data"], "batch_size": 4, "eval_tasks": []}}  # where they differ from the others'


def option(group: str, default, help: str, **extra):
    """A field with what argparse needs: its group, help and, where given, choices or metavar."""
    metadata = {"group": group, "help": help, **extra}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """The settings of one training run. `None` means: as the model itself says."""

    model: str = option("model", "gemma-3-tiny-mlx", "local folder (MLX or Hugging Face safetensors) or hub name")
    task: str | None = option(
        "model",
        None,
        "what to train: embed = one vector a text, late = one a token, rerank = a score of query and document, "
        "chat = answers in conversations; default: chat where the data are conversations, else what the model is, "
        "else embed",
        choices=("embed", "late", "rerank", "chat"),
    )
    reranker_type: str | None = option(
        "model", None, "rerank: default: what the model is by its files", choices=tuple(RERANKER_DEFAULTS), tasks=RERANK
    )
    instruction: str | None = option(
        "model", None, "rerank: what qwen3 and listwise models are told to judge by", tasks=RERANK
    )
    pooling: str | None = option("model", None, "token states to vector", choices=POOLING, tasks=("embed",))
    query_prompt: str | None = option(
        "model", None, "text before every query; special tokens are recognised", tasks=VECTORS
    )
    document_prompt: str | None = option("model", None, "text before every document", tasks=VECTORS)
    bidirectional: bool | None = option(
        "model", None, "let a decoder's tokens see the whole text, not only the left", tasks=VECTORS
    )
    max_length: int | None = option(
        "model",
        None,
        "cut documents after this many tokens, special ones included; rerank: query and document together; "
        "chat: conversations (default there: 2048)",
    )
    query_max_length: int | None = option(
        "model", None, "the same for queries; default: that of documents", tasks=RETRIEVAL
    )
    projection_dim: int = option(
        "model", 0, "late: a trained layer makes token vectors of N dimensions; 0 = none", tasks=LATE
    )
    maxsim: str | None = option(
        "model", None, "late: over a query's tokens; default: mean", choices=("mean", "sum"), tasks=LATE
    )
    skip_punctuation: bool = option("model", False, "late: punctuation does not count in documents", tasks=LATE)
    query_expansion: int | None = option(
        "model", None, "late: fill queries with mask tokens up to N, and cut them there", tasks=LATE
    )
    attend_expansion: bool | None = option(
        "model", None, "late: let a query's tokens attend to those mask tokens", tasks=LATE
    )
    impute: int | None = option(
        "model", None, "late: score as XTR in use, from N retrieved tokens; 0 = plain MaxSim", tasks=LATE
    )

    data: list[str] = option(
        "data",
        ["train-data.jsonl"],
        "JSON-lines files (.gz too), Parquet, folders with train.jsonl and valid.jsonl, hf://owner/name[:split], "
        "es://index; SOURCE:2 SOURCE:1 mixes two parts of one with one of the other; chat: default data/",
    )
    es_fields: str = option(
        "data",
        fields.DEFAULT,
        "es://: keys of a row and the fields they are made of; several are joined by line breaks",
        tasks=RETRIEVAL,
    )
    es_query: str | None = option("data", None, "es://: only documents that match this JSON query", tasks=RETRIEVAL)
    batch_size: int = option(
        "data", 64, "examples that one loss sees: 256 = 255 in-batch negatives for each query; chat: default 4"
    )
    skip_bad_rows: bool = option("data", False, "leave out rows that cannot be used (counted, listed)")
    skip_bad_batches: bool = option(
        "data", False, "leave out batches whose loss or gradient is not finite (counted, told); else the run stops"
    )
    random_negatives: int = option(
        "data",
        0,
        "rerank: give every query N documents of the batch's other rows as negatives, besides its own",
        tasks=RERANK,
    )
    seed: int = option("data", 0, "of the order of the data, dropout and fresh weights")

    loss: str | None = option(
        "objective",
        None,
        "name of the loss; default: info_nce; rerankers: yes_no (qwen3), bce (cross-encoder), list_softmax (listwise); "
        "kl_distill, which kl is short for, and margin_mse learn a teacher's scores",
        choices=(*LOSSES, "kl"),
        tasks=RETRIEVAL,
    )
    temperature: float | None = option(
        "objective",
        None,
        "divides similarities; sentence-transformers' scale is its inverse; default: 0.05; 1 for rerankers' logits",
        tasks=RETRIEVAL,
    )
    beta: float = option(
        "objective", 1.0, "hard_negative_info_nce: how much more close negatives weigh; 0 = not", tasks=VECTORS
    )
    positive_aware: str = option(
        "objective",
        "off",
        "drop negatives that score above margin x positive (perc) or above positive - margin (abs)",
        choices=FILTERS,
        tasks=VECTORS,
    )
    positive_aware_margin: float = option(
        "objective", 0.95, "margin of --positive-aware (0.95 suits perc, 0.05 abs)", tasks=VECTORS
    )
    margin_weight: float = option(
        "objective", 0.0, "add so many times the margin loss on the hardest negative; 0 = no", tasks=VECTORS
    )
    margin: float = option(
        "objective", 0.2, "by how much the positive is to score above the hardest negative", tasks=VECTORS
    )
    xtr_k: int = option("objective", 320, "xtr: tokens of the batch that every query token retrieves", tasks=RETRIEVAL)
    teacher_temperature: float = option("objective", 1.0, "kl_distill: divides the teacher's scores", tasks=RETRIEVAL)
    matryoshka_dims: list[int] = option(
        "objective", [], "also train the first N dimensions, for each N given", tasks=("embed",)
    )

    train_type: str = option("weights", "lora", "low-rank update, or all weights", choices=("lora", "dora", "full"))
    lora_rank: int = option("weights", 16, "rank of the update")
    lora_alpha: float = option("weights", 32.0, "the update is scaled by alpha / rank")
    lora_dropout: float = option("weights", 0.0, "share of inputs to the update that are dropped, 0 to 1")
    lora_keys: list[str] = option(
        "weights", [], "linear layers to train, names or regular expressions; default: all, but no routers"
    )
    num_layers: int = option("weights", -1, "train the last N blocks only; -1 = all")

    steps: int = option("schedule", 150, "optimizer steps; 0 = by --epochs", aliases=("--iters",))
    learning_rate: float | None = option(
        "schedule", None, "peak learning rate of AdamW; default: 2e-4, and 4e-3 for models below 10 million parameters"
    )
    schedule: str = option("schedule", "cosine", "after warm-up", choices=("cosine", "linear", "constant"))
    warmup: float = option("schedule", 0.1, "steps of linear warm-up; below 1: share of all steps")
    weight_decay: float = option("schedule", 0.0, "AdamW's decoupled weight decay")
    max_grad_norm: float = option("schedule", 1.0, "clip the gradient to this norm; 0 = do not clip")

    gradient_accumulation_steps: int = option(
        "memory", 0, "cut a batch into at least N micro-batches (loss unchanged); 0 = by --micro-batch-tokens"
    )
    micro_batch_tokens: int | str = option(
        "memory",
        0,
        "most tokens in the backbone at once; 0 = what suits the device, auto = what its memory has room for, "
        "measured before the first step",
        tasks=RETRIEVAL,
        words=("auto",),
    )
    grad_checkpoint: bool = option("memory", False, "recompute blocks in the backward pass: slower, less memory")

    eval_tasks: list[str] = option(
        "evaluation",
        ["eval-data"],
        "MTEB task names and folders in BEIR layout; no name = no evaluation",
        tasks=RETRIEVAL,
    )
    eval_steps: int = option(
        "evaluation",
        50,
        "evaluate every N steps, and at the end; 0 = only before and after",
        aliases=("--steps-per-eval",),
    )
    skip_eval_init: bool = option("evaluation", False, "no evaluation before training")
    rerank_depth: int = option("evaluation", 100, "rerank: BM25's first N documents are reranked", tasks=RERANK)
    early_stopping: int = option(
        "evaluation", 0, "stop after N evaluations without a better nDCG@10 (chat: validation loss); 0 = never"
    )

    epochs: int | None = option(
        "chat",
        None,
        "go through the data so often; instead of --iters, of which this then gives the number",
        tasks=CHAT,
    )
    mask_prompt: bool = option("chat", False, "train on the assistant's turns only", tasks=CHAT)
    val_batches: int = option("chat", 25, "batches of valid.jsonl that an evaluation takes; -1 = all", tasks=CHAT)
    steps_per_report: int = option("chat", 10, "report the mean training loss every N steps", tasks=CHAT)

    output: str = option("run", "adapters", "the run's folder")
    save_steps: int = option("run", 50, "save every N steps; 0 = only at the end", aliases=("--save-every",))
    keep: int = option("run", 0, "keep the newest N saved steps, besides best and final; 0 = all")
    resume: bool = option("run", False, "continue the run in --output from its last saved step")
    overwrite: bool = option("run", False, "remove the run that is in --output first")
    stop_after: int = option("run", 0, "stop at this step, saved and resumable; 0 = run to the end")
    dry_run: bool = option("run", False, "plan and measure one step; train and write nothing")
    profile: int = option(
        "run", 0, "time the phases of this many steps and print a table; write nothing; 0 = do not", tasks=RETRIEVAL
    )
    rank_timeout: int = option(
        "run", 1_800, "with mlx.launch: give up, saved, when another rank says nothing for N seconds; 0 = never"
    )
    wandb: bool = option("run", False, "log to Weights & Biases (offline when not logged in)")
    wandb_project: str = option("run", "mlx-retrieval", "its project there")

    def __post_init__(self) -> None:
        self.loss = "kl_distill" if self.loss == "kl" else self.loss
        positive = ("batch_size", "lora_rank", "xtr_k", "steps_per_report")
        counts = ("gradient_accumulation_steps", "eval_steps", "save_steps", "stop_after", "keep")
        not_negative = (*counts, "profile", "early_stopping", "warmup", "weight_decay", "max_grad_norm", "beta", "seed")
        not_negative += ("projection_dim", "margin_weight", "random_negatives", "rank_timeout")
        checks = [
            *((getattr(self, name) > 0, name, "must be above 0") for name in positive),
            *((getattr(self, name) >= 0, name, "must not be negative") for name in not_negative),
            *((value is None or value > 0, name, "must be above 0") for name, value in self._lengths()),
            (
                self.micro_batch_tokens == "auto" or self.micro_batch_tokens >= 0,
                "micro_batch_tokens",
                "must not be negative",
            ),
            (self.steps > 0 or (self.steps == 0 and self.epochs is not None), "steps", "must be above 0"),
            (self.epochs is None or self.epochs > 0, "epochs", "must be above 0"),
            (self.val_batches == -1 or self.val_batches > 0, "val_batches", "must be above 0, or -1 for all"),
            (self.temperature is None or 0 < self.temperature < float("inf"), "temperature", "must be above 0"),
            (0 < self.teacher_temperature < float("inf"), "teacher_temperature", "must be above 0"),
            *((v is None or v >= 0, name, "must not be negative") for name, v in self._late_counts()),
            (self.learning_rate is None or 0 < self.learning_rate < float("inf"), "learning_rate", "must be above 0"),
            (0 <= self.lora_dropout < 1, "lora_dropout", "must be from 0 up to, not including, 1"),
            (self.warmup < 1 or float(self.warmup).is_integer(), "warmup", "must be a share below 1 or whole steps"),
            (all(d > 0 for d in self.matryoshka_dims), "matryoshka_dims", "must be above 0"),
            (bool(self.data), "data", "needs at least one file or folder"),
            (not (self.resume and self.overwrite), "resume", "and --overwrite exclude each other"),
            (
                self.positive_aware == "off" or self.loss in (None, "info_nce", "hard_negative_info_nce"),
                "positive_aware",
                f"works with info_nce and hard_negative_info_nce, not with {self.loss}",
            ),
        ]
        for good, name, message in (*self._numbers(), *checks):
            if not good:
                raise UserError(f"{flag(name)} {getattr(self, name)}: {message}")

    def _numbers(self) -> Iterator[tuple[bool, str, str]]:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            for number in value if isinstance(value, list) else [value]:
                yield not isinstance(number, float) or math.isfinite(number), f.name, "must be finite"
                yield not isinstance(number, int) or abs(number) < 2**53, f.name, "is too large"

    def _lengths(self) -> list[tuple[str, int | None]]:
        return [("max_length", self.max_length), ("query_max_length", self.query_max_length)]

    def _late_counts(self) -> list[tuple[str, int | None]]:
        return [("query_expansion", self.query_expansion), ("impute", self.impute)]

    def resolve_defaults(self, parameters: int, reranker: str = "") -> None:
        """Put in place what depends on the model: the learning rate, by its number of parameters, and the loss.

        `reranker`: the kind of reranker that it is; "" = none.
        """
        if self.learning_rate is None:
            self.learning_rate = 4e-3 if parameters < 10_000_000 else 2e-4
        if self.task == "chat":
            return
        if self.loss is None:
            self.loss = RERANKER_DEFAULTS.get(reranker, "info_nce")
        if self.temperature is None:
            self.temperature = 1.0 if reranker in ("qwen3", "cross-encoder") else 0.05

    def check_task(self, task: str) -> None:
        """UserError for settings that a model of this task, embed, late, rerank or chat, has no use for."""
        defaults = for_task(task, {})
        for f in dataclasses.fields(self):
            tasks = f.metadata.get("tasks")
            if tasks and task not in tasks and getattr(self, f.name) != getattr(defaults, f.name):
                raise UserError(f"{flag(f.name)} is for --task {' or '.join(tasks)}, and this is {task}")

    @property
    def adapter(self) -> dict:
        """The arguments of `models.lora.adapt`."""
        return {
            "train_type": self.train_type,
            "rank": self.lora_rank,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "keys": self.lora_keys,
            "num_layers": self.num_layers,
        }

    @property
    def trained(self) -> str:
        """What is trained, in words."""
        rank = f"r={self.lora_rank}"
        return {"lora": f"LoRA {rank}", "dora": f"DoRA {rank}", "full": "all weights"}[self.train_type]

    @property
    def warmup_steps(self) -> int:
        """Warm-up in steps."""
        return round(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    def to_dict(self) -> dict:
        """Plain values, as YAML and JSON keep them."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Every setting as YAML; `--config` reads it back."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def write(self, path: Path) -> None:
        """Write `to_yaml` to a file."""
        path.write_text(self.to_yaml(), encoding="utf-8")


def for_task(task: str | None, given: dict) -> Settings:
    """Settings from what is given and, for the rest, the defaults of a task."""
    values = TASK_DEFAULTS.get(task, {}) | given
    if "epochs" in given and "steps" not in given:
        values["steps"] = 0
    return Settings(**values | {"task": task})


def flag(name: str) -> str:
    """`max_length` as the user types it: `--max-length`."""
    return "--" + name.replace("_", "-")
