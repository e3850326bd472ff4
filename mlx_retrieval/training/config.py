"""Every setting of a run. One dataclass defines the flags, the YAML file and the settings saved beside the weights.

Defaults are here, or in `defaults.py` if they depend on the model. `settings_checks.py` says which values make sense;
`flags.py` reads settings from the command line, `settings_file.py` from YAML.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from loss import DENOMINATORS, DIRECTIONS, DISTILL_METRICS, FILTERS, HARDNESS_OF, LOSSES
from mlx_retrieval import backend
from mlx_retrieval.backbones.finding import toolkit_relative
from mlx_retrieval.dataset.beir import FolderRules
from mlx_retrieval.dataset.columns import ELASTIC_DEFAULT
from mlx_retrieval.dataset.sources import weight_of
from mlx_retrieval.models import rerankers
from mlx_retrieval.models.heads import POOLING
from mlx_retrieval.training import settings_checks, source_settings
from mlx_retrieval.training.setting_fields import option
from mlx_retrieval.training.setting_paths import DATA, FILES, MODEL, with_paths
from mlx_retrieval.utils import toolkit
from mlx_retrieval.utils.errors import SettingError

DEFAULT_DATA = ["train-data.jsonl"]
OUTPUT = "adapters"  # the default folder of a run

# Tasks that a setting applies to.
VECTORS = ("embed", "late")
LATE = ("late",)
RERANK = ("rerank",)
CHAT = ("chat",)
RETRIEVAL = (*VECTORS, *RERANK)
TASK_DEFAULTS = {"chat": {"data": ["data"], "batch_size": 4, "eval_tasks": []}}  # that differ from the other tasks'


@dataclass
class Settings:
    """The settings of one training run. `None` means: as the model's files define it."""

    model: str = option(
        "model",
        "gemma-3-tiny-mlx",
        "model folder (MLX or Hugging Face safetensors), GGUF file, name on the Hugging Face hub, or an adapter to go "
        "on with, such as adapters/best",
        aliases=("--model-path",),
        names=MODEL,
    )
    task: str | None = option(
        "model",
        None,
        "what to train: embed = one vector per text, late = one vector per token, rerank = a score per query and "
        "document, chat = answers in conversations (default: chat if the data are conversations, else the model's own "
        "task, else embed; without --data too, mlx-lm's names --iters, --save-every and --steps-per-eval and the flags "
        "that only chat has select chat on the folder data/)",
        choices=("embed", "late", "rerank", "chat"),
    )
    reranker_type: str | None = option(
        "model",
        None,
        "rerank: kind of reranker (default: as the model's files define it)",
        choices=rerankers.KINDS,
        tasks=RERANK,
    )
    instruction: str | None = option(
        "model", None, "rerank: instruction that tells qwen3 and listwise models how to judge relevance", tasks=RERANK
    )
    pooling: str | None = option(
        "model",
        None,
        "embed: how token states become one vector (default: as the model's files define it)",
        choices=POOLING,
        tasks=("embed",),
    )
    query_prompt: str | None = option(
        "model", None, "text to put before every query; it may contain special tokens", tasks=VECTORS
    )
    document_prompt: str | None = option("model", None, "text to put before every document", tasks=VECTORS)
    bidirectional: bool | None = option(
        "model", None, "let a decoder's tokens attend to the whole text, not only to earlier tokens", tasks=VECTORS
    )
    dtype: str | None = option(
        "model",
        None,
        "compute in this dtype; auto = the checkpoint's on GPUs, float32 on CPUs (default: auto, or the dtype of an "
        "adapter given as --model)",
        choices=backend.DTYPES,
    )
    max_length: int | None = option(
        "model",
        None,
        "truncate documents to N tokens, special tokens included; rerank: query and document together; "
        "chat: conversations (default: the model's own limit; chat: 2048)",
    )
    query_max_length: int | None = option(
        "model",
        None,
        "embed, late and listwise rerankers: truncate queries to N tokens (default: the length of the model's query "
        "expansion, else --max-length)",
        tasks=RETRIEVAL,
    )
    projection_dim: int = option(
        "model", 0, "late: add a trained layer that projects token vectors to N dimensions; 0 = none", tasks=LATE
    )
    maxsim: str | None = option(
        "model",
        None,
        "late: combine the MaxSim of a query's tokens by their mean or sum (default: mean)",
        choices=("mean", "sum"),
        tasks=LATE,
    )
    skip_punctuation: bool = option("model", False, "late: ignore punctuation in documents", tasks=LATE)
    query_expansion: int | None = option(
        "model", None, "late: pad queries with mask tokens to N tokens, and truncate them there", tasks=LATE
    )
    attend_expansion: bool | None = option(
        "model", None, "late: let a query's tokens attend to the mask tokens of --query-expansion", tasks=LATE
    )
    impute: int | None = option(
        "model", None, "late: score as XTR does in use, from N retrieved tokens; 0 = plain MaxSim", tasks=LATE
    )

    data: list[str] = option(
        "data",
        DEFAULT_DATA,
        "files of JSON lines, a JSON array, CSV, TSV, Parquet or Arrow (.gz too), folders with train.jsonl and "
        "valid.jsonl, folders in BEIR layout with qrels/train.tsv, hf://owner/name[:split], es://index; SOURCE:2 "
        "SOURCE:1 mixes two parts of the first with one of the second; --config takes `sources:` instead",
        names=DATA,
    )
    sources: list[dict] = option(
        "data",
        [],
        "in place of data: mappings, each of a source, with its data, weight, prompts, lengths and loss",
        tasks=RETRIEVAL,
        file_only=True,
    )
    columns: str | None = option(
        "data",
        None,
        "columns, keys or fields that rows are made of: query=question,document=title+body,negatives=neg; several are "
        f"joined by line breaks (default: by their own names; es://: {ELASTIC_DEFAULT})",
        tasks=RETRIEVAL,
        aliases=("--es-fields",),
    )
    es_query: str | None = option(
        "data", None, "es://: read only documents that match this JSON query", tasks=RETRIEVAL
    )
    batch_size: int = option("data", 64, "examples in one loss: 256 = 255 in-batch negatives for each query")
    batches: str = option(
        "data",
        "homogeneous",
        "with several sources that are mixed: each batch from one of them (homogeneous), or every batch from all "
        "(mixed), which then have one loss",
        choices=("homogeneous", "mixed"),
        tasks=RETRIEVAL,
    )
    similar_rows: int = option(
        "data",
        1,
        "put groups of N rows whose queries share rare words into each batch, as hard negatives of each other; "
        "1 = rows in random order",
        tasks=VECTORS,
    )
    source_temperature: float | None = option(
        "data",
        None,
        "mix several sources by their sizes to the power of 1/X: 1 = in proportion, larger = more evenly (default: by "
        "the weights in --data; without any they are read as one)",
        tasks=RETRIEVAL,
    )
    skip_bad_rows: bool = option(
        "data", False, "leave out rows that cannot be used, counted and listed; else they are errors"
    )
    ignore_keys: list[str] = option(
        "data", [], "treat these keys of rows and messages as absent, also a label, a score or negatives"
    )
    skip_bad_batches: bool = option(
        "data",
        False,
        "leave out batches whose loss or gradient is not finite, counted and reported; else the run stops",
    )
    random_negatives: int = option(
        "data",
        0,
        "rerank: add N documents of the batch's other rows to each query's negatives: their positives, with info_nce "
        "random ones of all their documents; 0 = none",
        tasks=RERANK,
    )
    seed: int = option("data", 0, "random seed of the data's order, dropout and new weights")

    loss: str | None = option(
        "objective",
        None,
        "loss function; kl_distill (short: kl) and margin_mse learn from a teacher's scores, distill_vectors from its "
        "vectors; cosent, angle and cosine_mse from pairs with a score of their similarity (default: info_nce; "
        "rerankers: yes_no for qwen3, list_bce for cross-encoder, list_softmax for listwise)",
        choices=(*LOSSES, "kl"),
        tasks=RETRIEVAL,
    )
    temperature: float | None = option(
        "objective",
        None,
        "divide scores by X; the inverse of sentence-transformers' scale (default: 0.05; qwen3, cross-encoder: 1, "
        "info_nce 0.1)",
        tasks=RETRIEVAL,
    )
    beta: float = option(
        "objective", 1.0, "hard_negative_info_nce: how much more weight close negatives get; 0 = none", tasks=VECTORS
    )
    directions: list[str] = option(
        "objective",
        [DIRECTIONS[0]],
        "info_nce: what competes with a query's positive: other documents (query-document), other queries "
        "(query-query), and both seen from the positive (document-query, document-document)",
        choices=DIRECTIONS,
        tasks=VECTORS,
    )
    denominator: str = option(
        "objective",
        "one",
        "info_nce with several --directions: one denominator for all, or each its own",
        choices=DENOMINATORS,
        tasks=VECTORS,
    )
    mask_above: float | None = option(
        "objective",
        None,
        "info_nce: leave out negatives whose similarity exceeds the positive's by more than X, such as 0.1 (default: "
        "none are left out)",
        tasks=VECTORS,
    )
    guide: str | None = option(
        "objective",
        None,
        "info_nce: file of a guide's vectors of all texts of --data, by mine.py score --vectors: leave out negatives "
        "that it finds nearer than the positive",
        tasks=VECTORS,
        whole_run=True,
        names=FILES,
    )
    guide_margin: float = option(
        "objective",
        0.0,
        "with --guide: leave out negatives whose similarity is above the positive's less X as well, such as 0.05",
        tasks=VECTORS,
        whole_run=True,
    )
    hardness: float = option(
        "objective",
        0.0,
        "info_nce: add X times its similarity to a negative's logit, such as 5; 0 = none",
        tasks=VECTORS,
    )
    hardness_of: str = option(
        "objective",
        "hard",
        "the negatives that --hardness applies to: those of the query's own row, of other rows (in-batch), or all",
        choices=HARDNESS_OF,
        tasks=VECTORS,
    )
    positive_aware: str = option(
        "objective",
        "off",
        "drop negatives that score above margin x positive (perc) or above positive - margin (abs); off = none",
        choices=FILTERS,
        tasks=VECTORS,
    )
    positive_aware_margin: float = option(
        "objective", 0.95, "margin of --positive-aware: about 0.95 for perc, 0.05 for abs", tasks=VECTORS
    )
    margin_weight: float = option(
        "objective", 0.0, "weight of an added margin loss on the hardest negative; 0 = none", tasks=VECTORS
    )
    margin: float = option(
        "objective", 0.2, "margin loss: how far the positive should score above the hardest negative", tasks=VECTORS
    )
    spread_weight: float = option(
        "objective",
        0.0,
        "embed: add X times the spread-out loss, which keeps different texts' vectors apart; 0 = none",
        tasks=("embed",),
    )
    binary_weight: float = option(
        "objective",
        0.0,
        "embed: add X times the loss with the documents' vectors as bits, for vectors that are stored so; 0 = none",
        tasks=("embed",),
    )
    xtr_k: int = option("objective", 320, "xtr: tokens of the batch that each query token retrieves", tasks=RETRIEVAL)
    teacher_temperature: float = option("objective", 1.0, "kl_distill: divide teacher scores by X", tasks=RETRIEVAL)
    teacher_vectors: str | None = option(
        "objective",
        None,
        "embed: file of a teacher's vectors of all texts of --data, by mine.py score --vectors: for distill_vectors "
        "and --distill-weight",
        tasks=("embed",),
        whole_run=True,
        names=FILES,
    )
    distill_weight: float = option(
        "objective",
        0.0,
        "embed: add X times distill_vectors, of --teacher-vectors, to another loss; a source whose loss it is counts X "
        "times beside others; 0 = none, and such a source once",
        tasks=("embed",),
    )
    distill_metric: str = option(
        "objective",
        DISTILL_METRICS[0],
        "distill_vectors: compare with the teacher's vectors by 1 - cosine, or by a dimension's squared error",
        choices=DISTILL_METRICS,
        tasks=("embed",),
    )
    teacher_projection: bool = option(
        "objective",
        False,
        "distill_vectors: compare through a linear layer to the teacher's dimensions, trained with the run and no part "
        "of its model; needed if they are not the model's",
        tasks=("embed",),
        whole_run=True,
    )
    matryoshka_dims: list[int] = option(
        "objective",
        [],
        "embed: train the first N dimensions as well, for each N given",
        tasks=("embed",),
        whole_run=True,
    )

    rounds: int = option(
        "rounds",
        0,
        "mine hard negatives with the model and train on them, N times, each time from the best model so far; --steps "
        "are those of a round; 0 = train on the rows as they are",
        tasks=("embed",),
    )
    rounds_negatives: int = option("rounds", 1, "negatives to mine for a query in each round", tasks=("embed",))
    rounds_teacher: str | None = option(
        "rounds",
        None,
        "reranker or larger embedding model that scores what each round has mined: kl_distill and margin_mse learn its "
        "scores, other losses train without the negatives that it takes for answers",
        tasks=("embed",),
        names=MODEL,
    )

    # None = those of the adapter that --model names, or else defaults.WEIGHTS.
    train_type: str | None = option(
        "weights",
        None,
        "what to train: a low-rank update (lora, dora), or all weights (full) (default: lora; where --model is an "
        "adapter, this and the next five are the adapter's)",
        choices=("lora", "dora", "full"),
    )
    lora_rank: int | None = option("weights", None, "rank of the update of lora and dora (default: 16)")
    lora_alpha: float | None = option("weights", None, "scale the update by X / rank (default: 32)")
    lora_dropout: float | None = option(
        "weights", None, "share of the update's inputs to drop, from 0 to below 1; 0 = none (default: 0)"
    )
    lora_keys: list[str] = option(
        "weights", [], "linear layers to train, as names or regular expressions (default: all but routers)"
    )
    num_layers: int | None = option("weights", None, "train only the last N blocks; -1 = all (default: -1)")

    steps: int | None = option(
        "schedule",
        None,
        "optimizer steps (default: those of one epoch; for the data that come with the toolkit: 150)",
        mlx_lm_names=("--iters",),
    )
    epochs: float | None = option(
        "schedule",
        None,
        "passes through the data, in place of --steps; 0.5 = half of the data; in a --config file they win over steps",
    )
    learning_rate: float | None = option(
        "schedule",
        None,
        "peak learning rate of AdamW (default: 2e-4, full: 2e-5; below 10 million parameters: 4e-3, full: 2e-3)",
    )
    schedule: str = option(
        "schedule", "cosine", "course of the learning rate after warm-up", choices=("cosine", "linear", "constant")
    )
    warmup: float = option("schedule", 0.1, "steps of linear warm-up; below 1, the share of all steps; 0 = none")
    weight_decay: float = option("schedule", 0.0, "decoupled weight decay of AdamW; 0 = none")
    ema: float = option(
        "schedule",
        0.0,
        "evaluate and save the moving average of the trained weights, which keeps a share of X at each step, such as "
        "0.99; 0 = the weights themselves",
        tasks=RETRIEVAL,
    )
    max_grad_norm: float = option("schedule", 1.0, "clip the gradient to norm X; 0 = no clipping")

    gradient_accumulation_steps: int = option(
        "memory", 0, "split a batch into at least N micro-batches; the loss stays the same; 0 = by --micro-batch-tokens"
    )
    micro_batch_tokens: int | str = option(
        "memory",
        0,
        "tokens of a micro-batch, at most, padding included; 0 = as suits the device and, on Macs, its memory; auto = "
        "as many as fit into memory, measured before the first step",
        tasks=RETRIEVAL,
        words=("auto",),
    )
    grad_checkpoint: bool = option("memory", False, "recompute blocks in the backward pass: less memory, slower")

    compile: str = option(
        "memory",
        "auto",
        "compile the model's passes, one graph a shape; auto = on CPUs only, as GPUs have not been measured",
        choices=backend.COMPILE,
        tasks=RETRIEVAL,
    )
    dequantize: str = option(
        "memory",
        "auto",
        "what CPUs compute with if the model is quantised: on = float32 copies of its weights, blocks = each weight "
        "dequantised for its product, off = the packed weights, about 20 times slower; auto = copies if there is "
        "memory for them, else blocks. GPUs always compute with the packed weights",
        choices=backend.DEQUANTIZE,
    )

    eval_tasks: list[str] | None = option(
        "evaluation",
        None,
        "MTEB task names, folders in BEIR layout, or files of scored pairs; none = no evaluation (default: questions "
        "or pairs of your data, see --holdout; for the toolkit's own data, eval-data)",
        tasks=RETRIEVAL,
        names=FILES,
    )
    holdout: float | None = option(
        "evaluation",
        None,
        "share of the queries to keep from training, with their answers, and to judge the run on: at least 50 and at "
        "most 500, and never more than a third; 0 = none. A valid.jsonl beside the data is taken instead (default: "
        "0.05)",
        tasks=RETRIEVAL,
    )
    guard: list[str] = option(
        "evaluation",
        [],
        "MTEB tasks, folders in BEIR layout and files of scored pairs on which the model must not get worse: no step "
        "that loses more than --guard-tolerance on one of them is kept as the best",
        tasks=RETRIEVAL,
        names=FILES,
    )
    guard_tolerance: float = option(
        "evaluation", 0.002, "nDCG@10, or Spearman of scored pairs, that a --guard may lose", tasks=RETRIEVAL
    )
    strict: bool = option(
        "evaluation",
        False,
        "refuse untidy evaluation folders: contradicting judgements, judgements of missing texts, null texts",
        tasks=RETRIEVAL,
    )
    ignore_identical_ids: bool = option(
        "evaluation",
        False,
        "leave out of a query's results the document that has its id, as BEIR does",
        tasks=RETRIEVAL,
    )
    eval_steps: int | None = option(
        "evaluation",
        None,
        "evaluate every N steps, and at the end; 0 = only before and after training (default: 3 to 10 times a run, "
        "evenly: about every 50 steps, at least 10 apart; once or twice in fewer than 30 steps)",
        mlx_lm_names=("--steps-per-eval",),
    )
    skip_eval_init: bool = option("evaluation", False, "do not evaluate before training")
    rerank_depth: int = option("evaluation", 100, "rerank: evaluate on the first N documents of BM25", tasks=RERANK)
    early_stopping: int = option(
        "evaluation",
        0,
        "stop after N evaluations without a better nDCG@10, Spearman of scored pairs, or validation loss in chat; "
        "0 = never",
    )
    require_improvement: bool = option(
        "evaluation", False, "exit with code 4 if no evaluated step is better than the untrained model"
    )

    mask_prompt: bool = option("chat", False, "train on the assistant's turns only", tasks=CHAT)
    val_batches: int = option("chat", 25, "evaluate on the first N batches of valid.jsonl; -1 = all", tasks=CHAT)
    steps_per_report: int = option("chat", 10, "report the mean training loss every N steps", tasks=CHAT)

    output: str | None = option(
        "run", None, f"folder of the run (default: {OUTPUT}, or {OUTPUT}-2, {OUTPUT}-3 ... if runs are there)"
    )
    save_steps: int = option("run", 50, "save every N steps; 0 = only at the end", mlx_lm_names=("--save-every",))
    keep: int = option("run", 0, "keep only the newest N saved steps, besides best and final; 0 = keep all")
    resume: bool = option(
        "run",
        False,
        "continue the run in --output from its last saved step; a finished one with more --steps or --epochs",
    )
    accept_changed_data: bool = option(
        "run", False, "with --resume: continue although the data or the evaluation have changed since the run was begun"
    )
    overwrite: bool = option("run", False, "first remove the run in --output")
    stop_after: int = option("run", 0, "stop after step N, saved and resumable; 0 = run to the end")
    dry_run: bool = option(
        "run", False, "plan and measure one step, say on which Macs it fits, then end; nothing is trained or written"
    )
    profile: int = option(
        "run", 0, "time the phases of N steps, print a table, then end; nothing is written; 0 = off", tasks=RETRIEVAL
    )
    rank_timeout: int = option(
        "run", 1_800, "with mlx.launch: save and end if another rank is silent for N seconds; 0 = never"
    )
    wandb: bool = option("run", False, "log to Weights & Biases; offline if not logged in")
    wandb_project: str = option("run", "mlx-retrieval", "Weights & Biases project")

    def __post_init__(self) -> None:
        self.loss = "kl_distill" if self.loss == "kl" else self.loss
        self.guard = [toolkit.find(name) for name in self.guard]
        settings_checks.check(self)  # before its sources: what is wrong in all of them is no fault of the first
        if self.sources:
            source_settings.check(self)
            self.sources = [source_settings.with_paths(source, toolkit.find) for source in self.sources]
            theirs = [path for source in self.sources for path in source_settings.paths(source)]
            if self.data not in (DEFAULT_DATA, theirs):
                raise SettingError("{data}: beside sources, which say what is read")
            self.data = theirs
        paths = [weight_of(name)[0] for name in self.data]
        self.data = [toolkit.find(p) + name.removeprefix(p) for p, name in zip(paths, self.data, strict=True)]
        if self.eval_tasks is not None:
            self.eval_tasks = [toolkit.find(name) for name in self.eval_tasks]

    def check_task(self, task: str) -> None:
        """Raise UserError for a setting that does not apply to this task: embed, late, rerank or chat."""
        defaults = for_task(task, {})
        for f in dataclasses.fields(self):
            tasks = f.metadata.get("tasks")
            if tasks and task not in tasks and getattr(self, f.name) != getattr(defaults, f.name):
                raise SettingError(
                    f"{{{f.name}}} is for {{task}} {{tasks}}, and this is {{actual}}",
                    tasks=" or ".join(tasks),
                    actual=task,
                )

    @property
    def is_directed(self) -> bool:
        """Whether `loss.directed_info_nce` is asked for: other competitors than those of plain InfoNCE."""
        chosen = self.mask_above is not None or self.guide is not None or self.hardness > 0
        return chosen or self.directions != [DIRECTIONS[0]]

    @property
    def vectors_weight(self) -> float:
        """The weight of `loss.distill_vectors` in the loss; 0 = none."""
        return self.distill_weight or float(self.loss == "distill_vectors")

    @property
    def only_measures(self) -> bool:
        """Whether steps are measured, and nothing is written: --dry-run and --profile."""
        return self.dry_run or self.profile > 0

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.output or OUTPUT).expanduser()

    @property
    def folder_rules(self) -> FolderRules:
        """How evaluation folders are read."""
        return FolderRules(self.strict, self.ignore_identical_ids)

    @property
    def warmup_steps(self) -> int:
        """Warm-up in steps."""
        return round(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    @property
    def steps_per_evaluation(self) -> int:
        """Steps from one evaluation to the next; 0 = none but the last."""
        if self.eval_steps is not None:
            return self.eval_steps
        evaluations = min(10, max(self.steps // 50, min(3, self.steps // 10), 1))
        return math.ceil(self.steps / evaluations)

    def with_absolute_paths(self) -> "Settings":
        """Return a copy that means the same in any current folder: its files and folders are named by whole paths."""

        def absolute(name: str) -> str:
            path = Path(name).expanduser()
            return str(path.absolute()) if "://" not in name and path.exists() else name

        settings = with_paths(self, absolute, model=toolkit_relative)
        return dataclasses.replace(settings, output=self.output and str(self.folder.absolute()))

    def to_dict(self) -> dict:
        """Return plain values, for YAML and JSON."""
        return dataclasses.asdict(self)


def for_task(task: str | None, given: dict) -> Settings:
    """Return the given settings, with the task's defaults for the others."""
    return Settings(**TASK_DEFAULTS.get(task, {}) | given | {"task": task})
