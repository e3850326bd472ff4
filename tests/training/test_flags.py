"""Every flag has an effect: one check a setting, and a test that none was forgotten.

python -m pytest tests/training/test_flags.py
"""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from beir_folders import write_folder
from mlx.utils import tree_flatten

import train
from loss import GROUPS, LOSSES, SCORED_PAIRS
from mlx_retrieval import backend
from mlx_retrieval.backbones import dequantized
from mlx_retrieval.dataset.text_keys import vector_key
from mlx_retrieval.inference import text_vectors
from mlx_retrieval.models.heads import POOLING
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training import objectives, trainer
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.chat.run import prepare as prepare_chat
from mlx_retrieval.training.checkpoint import last_step
from mlx_retrieval.training.config import Settings, for_task
from mlx_retrieval.training.defaults import resolve_defaults
from mlx_retrieval.training.flags import chat_flag, from_flags
from mlx_retrieval.training.run_data import open_data
from mlx_retrieval.training.settings_file import read_yaml, write_yaml
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError, flag

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty rows of short texts, every tenth query with a document of rank 2."""
    file = tmp_path / "rows.jsonl"
    rows = [{"query": f"query number {i}", "document": f"document {i} " + "word " * (i % 7)} for i in range(40)]
    rows[10]["rank"] = 2
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def settings(tmp_path: Path, data: Path, small: str):
    """Settings of a small run without evaluation, changed by keyword."""

    def make(**changes) -> Settings:
        defaults = {"model": small, "data": [str(data)], "batch_size": 8, "steps": 2, "eval_tasks": [], "lora_rank": 2}
        return Settings(**defaults | {"output": str(tmp_path / "run"), "save_steps": 0} | changes)

    return make


def model_of(run):
    return run.trainer.model


def trainable(run) -> dict[str, mx.array]:
    return dict(tree_flatten(model_of(run).trainable_parameters()))


def loss_of(settings: Settings, warm: bool = True) -> float:
    """The first batch's loss, after one large update if `warm` (fresh LoRA changes nothing)."""
    run = training_run.prepare(settings)
    if warm:
        run.trainer.update(run.trainer.batches.batch(1), 1)
    return run.trainer.grad_cache.loss(run.trainer.batches.batch(0))


# --- model ---


def test_model(settings, tmp_path):
    with pytest.raises(UserError, match="no such model|no folder"):
        training_run.prepare(settings(model=str(tmp_path / "nowhere")))
    assert training_run.prepare(settings()).trainer.model.backbone.config["model_type"] == "gemma3_text"


def test_task(settings):
    for task, kind in (
        (None, objectives.EmbedObjective),
        ("embed", objectives.EmbedObjective),
        ("late", objectives.LateObjective),
    ):
        assert type(training_run.prepare(settings(task=task)).trainer.grad_cache.objective) is kind


def test_dtype(settings, tmp_path, as_metal):
    """The run computes in it, and close to float32; its adapter stays float32; folders and runs on it ask for it."""
    dtype = "bfloat16"
    run = training_run.prepare(settings(dtype=dtype))
    half = run.trainer.grad_cache.loss(run.trainer.batches.batch(0))
    plain = loss_of(settings(dtype="float32"), warm=False)
    assert plain != half == pytest.approx(plain, rel=1e-3)
    assert f"computes in {dtype}" in dict(run.headline)["model"]
    assert model_of(run).backbone.layers[0].self_attn.q_proj.linear.weight.dtype == getattr(mx, dtype)
    assert {value.dtype for value in trainable(run).values()} == {mx.float32}
    assert run.outlook.job.dtype == 2  # bytes a number, also in the estimate of memory
    files.write_folder(tmp_path / "saved", run.trainer.write)
    saved = RetrievalConfig.read(tmp_path / "saved"), Settings(**read_yaml(tmp_path / "saved" / "config.yaml"))
    assert [each.dtype for each in saved] == [dtype, dtype]
    again = {"model": str(tmp_path / "saved"), "lora_rank": None}
    runs = [training_run.prepare(settings(**again, dtype=wanted)) for wanted in (None, "auto")]
    assert [each.settings.dtype for each in runs] == [each.retrieval.dtype for each in runs] == [dtype, "auto"]
    assert "computes in float32" in dict(runs[1].headline)["model"]  # auto = the checkpoint's, which is float32
    plain = training_run.prepare(settings())
    assert plain.settings.dtype == "auto" and plain.outlook.job.dtype == 0


def test_an_unknown_dtype_is_refused_with_the_near_miss(settings, capsys):
    for wanted in ("bfloat", "BFLOAT16"):
        with pytest.raises(SystemExit):
            train.main(["--dtype", wanted])
        assert f"{wanted} is not one of auto, float32, bfloat16, float16" in capsys.readouterr().err
    with pytest.raises(UserError, match="--dtype float: not one of .*; did you mean float32"):
        training_run.prepare(settings(dtype="float"))


def test_a_resumed_run_keeps_its_dtype(settings, tmp_path):
    (tmp_path / "run").mkdir()
    write_yaml(settings(dtype="bfloat16"), tmp_path / "run" / "config.yaml")
    given = {"resume": True, "output": str(tmp_path / "run")}
    for same in (given, given | {"dtype": "bfloat16"}):
        assert train.resumed_settings(same).dtype == "bfloat16"
    with pytest.raises(UserError, match="but --dtype was bfloat16"):
        train.resumed_settings(given | {"dtype": "auto"})
    earlier = (tmp_path / "run" / "config.yaml").read_text().replace("dtype: bfloat16\n", "")
    (tmp_path / "run" / "config.yaml").write_text(earlier)  # as versions before --dtype wrote it
    assert train.resumed_settings(given | {"dtype": "auto"}).dtype == "auto"


def representations(run, batch) -> np.ndarray:
    return np.array(run.trainer.grad_cache(batch, seed=0).representations)


def test_projection_dim(settings):
    runs = [
        training_run.prepare(settings(task="late", projection_dim=n, seed=s))
        for n, s in ((0, 0), (8, 0), (8, 0), (8, 1))
    ]
    batch = runs[0].trainer.batches.batch(0)
    found = [representations(run, batch) for run in runs]
    assert [r.shape[-1] for r in found] == [32, 8, 8, 8]
    assert (found[1] == found[2]).all() and (found[1] != found[3]).any()  # fresh, and seeded
    assert "head.dense.0.linear.weight" in trainable(runs[1])


def test_maxsim_and_impute(settings):
    losses = [loss_of(settings(task="late", maxsim=how), warm=False) for how in (None, "mean", "sum")]
    assert losses[0] == losses[1] != losses[2]
    s = settings(task="late", maxsim="sum", impute=30, steps=1)
    train.train(s)
    saved = json.loads((Path(s.output) / "final" / "retrieval_config.json").read_text())
    assert (saved["maxsim"], saved["impute"], saved["task"]) == ("sum", 30, "late")


def test_skip_punctuation(settings, data):
    data.write_text(data.read_text().replace("document ", "document! ! ? "))
    plain, skipping = (loss_of(settings(task="late", skip_punctuation=value), warm=False) for value in (False, True))
    assert plain != skipping


def test_query_expansion_and_attend_expansion(settings, minilm):
    losses = []
    for flags in ({}, {"query_expansion": 16}, {"query_expansion": 16, "attend_expansion": True}):
        losses.append(loss_of(settings(model=str(minilm), task="late", **flags), warm=False))
    assert len(set(losses)) == 3


def test_xtr_k(settings):
    losses = [loss_of(settings(task="late", loss="xtr", xtr_k=k), warm=False) for k in (2, 20)]
    assert losses[0] != losses[1]


def test_margin_and_margin_weight(settings):
    plain, none, half, whole, wider = (
        loss_of(settings(**changes), warm=False)
        for changes in (
            {},
            {"margin_weight": 0.0},
            {"margin_weight": 0.5},
            {"margin_weight": 1.0},
            {"margin_weight": 1.0, "margin": 0.4},
        )
    )
    assert plain == none and whole - plain == pytest.approx(2 * (half - plain), rel=1e-4) and wider > whole > plain


def test_teacher_temperature(settings, data):
    rows = [
        {"query": f"query {i}", "documents": [f"good {i}", f"bad {i}", f"worse {i}"], "scores": [2.0, 1.0, i / 7]}
        for i in range(40)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = [loss_of(settings(loss="kl_distill", teacher_temperature=t), warm=False) for t in (1.0, 5.0)]
    assert losses[0] != losses[1]


@pytest.fixture
def teacher(data, tmp_path):
    """Random vectors of all texts, of a width: the settings that name their file."""

    def make(dimensions: int) -> dict[str, str]:
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        keys = {vector_key(row[side], side) for row in rows for side in ("query", "document")}
        vectors = np.random.default_rng(0).normal(size=(len(keys), dimensions)).astype(np.float32)
        text_vectors.write(tmp_path / "teacher.safetensors", sorted(keys), vectors, {"model": "random"})
        return {"teacher_vectors": str(tmp_path / "teacher.safetensors")}

    return make


def test_teacher_vectors_distill_weight_and_metric(settings, teacher):
    """The total is the other loss and the weight times the distillation, which may be alone."""
    given = teacher(32)

    def loss(**changes) -> float:
        return loss_of(settings(**given | changes), warm=False)

    alone, plain = loss(loss="distill_vectors"), loss_of(settings(), warm=False)
    assert alone == pytest.approx(1, abs=0.1)  # 1 - cosine of random vectors
    assert loss(distill_weight=3.0) == pytest.approx(plain + 3 * alone, rel=1e-4)
    assert loss(loss="distill_vectors", distill_metric="mse") != alone


def test_teacher_projection(settings, teacher):
    given = teacher(48)
    projected = training_run.prepare(settings(loss="distill_vectors", teacher_projection=True, **given))
    assert trainable(projected)["projection.weight"].shape == (48, 32)
    assert "projection.weight" not in trainable(training_run.prepare(settings()))


@pytest.mark.parametrize("pooling", POOLING)
def test_pooling(settings, pooling):
    run = training_run.prepare(settings(pooling=pooling))
    assert model_of(run).head.pooling == pooling


def test_query_prompt_and_document_prompt(settings):
    run = training_run.prepare(settings(query_prompt="find: ", document_prompt="passage: "))
    tokenizer = run.trainer.batches.tokenizer
    plain = tokenizer(["find: dogs"], None).ids.tolist()
    assert tokenizer(["dogs"], "query").ids.tolist() == plain
    assert tokenizer(["dogs"], "document").ids.tolist() != plain


def test_bidirectional(settings):
    causal, both = (training_run.prepare(settings(bidirectional=value)) for value in (False, True))
    batch = causal.trainer.batches.batch(0)
    assert not model_of(causal).backbone.bidirectional and model_of(both).backbone.bidirectional
    first, second = (run.trainer.grad_cache.loss(batch) for run in (causal, both))
    assert first != second


def test_max_length_and_query_max_length(settings):
    tokenizer = training_run.prepare(settings(max_length=9, query_max_length=7)).trainer.batches.tokenizer
    long = ["word " * 50]
    assert tokenizer(long, "document").lengths[0] == 9 and tokenizer(long, "query").lengths[0] == 7
    tokenizer = training_run.prepare(settings(max_length=9)).trainer.batches.tokenizer
    assert tokenizer(long, "query").lengths[0] == 9


# --- data ---


def test_data(settings, data, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text('{"query": "q", "document": "d"}\n')
    assert len(training_run.prepare(settings(data=[str(data), str(more)])).trainer.batches.rows) == 41


def test_batch_size(settings):
    batch = training_run.prepare(settings(batch_size=16)).trainer.batches.batch(0)
    assert len(batch.query) == 16
    run = training_run.prepare(settings(batch_size=64, steps=None))  # regression: the default was refused for 40 rows
    assert len(run.trainer.batches.batch(0).rows) == 40 and run.settings.steps == 1
    assert any("40 rows, batch 40, 1 epoch = 1 step" in text for _, text in run.headline)


def test_skip_bad_rows(settings, data):
    data.write_text(data.read_text() + "broken\n" + '{"query": "q", "document": "d", "title": "t"}\n')
    with pytest.raises(UserError, match="rows.jsonl:41"):
        training_run.prepare(settings())
    run = training_run.prepare(settings(skip_bad_rows=True))
    assert len(run.trainer.batches.rows) == 41
    assert ("reads", "rows.jsonl: query, document, rank; not read: title (1 row)") in run.headline
    assert any("1 bad row left out" in line for _, line in run.headline)
    assert any("rows.jsonl:41" in line for _, line in run.headline)


def test_ignore_keys(settings, data):
    data.write_text(data.read_text() + '{"query": "q", "document": "d", "is_relevant": 0}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:41: is_relevant .*--ignore-keys is_relevant"):
        training_run.prepare(settings())
    run = training_run.prepare(settings(ignore_keys=["is_relevant"]))
    assert len(run.trainer.batches.rows) == 41 and "not read" not in dict(run.headline)["reads"]
    assert run.settings.to_dict()["ignore_keys"] == ["is_relevant"]


def test_skip_bad_batches(settings):
    """What it does is in test_resume.py; here for every task, and it may be given to a run that goes on."""
    assert not settings().skip_bad_batches
    for task in ("embed", "late", "rerank", "chat"):
        made, _ = from_flags("", argv=["--skip-bad-batches", "--task", task])
        made.check_task(task)
        assert made.skip_bad_batches


def test_seed(settings):
    runs = [training_run.prepare(settings(seed=seed)) for seed in (1, 1, 2)]
    orders = [run.trainer.batches.row_numbers(0) for run in runs]
    weights = [np.array(next(v for n, v in trainable(run).items() if n.endswith("lora_a"))) for run in runs]
    assert orders[0] == orders[1] != orders[2]
    assert (weights[0] == weights[1]).all() and (weights[0] != weights[2]).any()


# --- objective ---


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in GROUPS or n == "margin_mse"])
def test_loss(settings, data, teacher, name):
    given = teacher(32) if name == "distill_vectors" else {}
    rows = [
        json.loads(line) | {"negatives": ["other words"], "scores": [1.0, i / 40]} for i, line in enumerate(open(data))
    ]
    if name in SCORED_PAIRS:
        rows = [{"sentence1": row["query"], "sentence2": row["document"], "score": row["scores"][1]} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if name in SCORED_PAIRS:
        values = {other: loss_of(settings(loss=other)) for other in SCORED_PAIRS}
        assert math.isfinite(values[name]) and len({*values.values()}) == len(SCORED_PAIRS)
        return
    task = "late" if name == "xtr" else "embed"
    if given:
        rows = [{key: row[key] for key in ("query", "document")} for row in rows]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given |= {"xtr_k": 5} if name == "xtr" else {}
    assert math.isfinite(loss_of(settings(loss=name, task=task, **given)))
    if name != "info_nce":
        assert loss_of(settings(loss=name, task=task, **given)) != loss_of(settings(loss="info_nce", task=task))


# Rerankers' settings do what they say in test_rerank_training.py: reranker_type, instruction, random_negatives;
# rerank_depth here.
def test_rerank_depth(settings, monkeypatch):
    from mlx_retrieval.training import run_parts

    asked = []
    monkeypatch.setattr(run_parts, "evaluate_reranker", lambda *a, depth, **_: asked.append(depth) or (None, None))
    chosen = settings(task="rerank", random_negatives=2, rerank_depth=7, eval_tasks=["eval-data"], max_length=300)
    training_run.prepare(chosen).evaluations.evaluate()
    assert asked == [7]
    for depth in (0, 5000):  # regression: refused at the first evaluation, under the name of another flag
        with pytest.raises(UserError, match=f"--rerank-depth {depth}: must be from 1 to 1,000"):
            settings(task="rerank", rerank_depth=depth)


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_strict_and_ignore_identical_ids(settings, tmp_path, task):
    """Both are for the folders that a run is evaluated on. Of equal documents, the query's own is the first."""
    other = "d1" if task == "embed" else "r1"  # trec_eval's order of equal scores, and BM25's
    documents = [{"_id": name, "text": "dogs bark"} for name in ("q0", other)]
    folder = write_folder(
        tmp_path / "own", documents, [{"_id": "q0", "text": "dogs bark"}], f"q0\t{other}\t1\nq0\tgone\t0\n"
    )
    chosen = {"task": task, "eval_tasks": [str(folder)], "random_negatives": 2 if task == "rerank" else 0}
    with pytest.raises(UserError, match=r"test\.tsv:2: the document gone is not in the corpus"):
        training_run.prepare(settings(**chosen, strict=True))
    figures = [
        training_run.prepare(settings(**chosen, ignore_identical_ids=ignored)).evaluations.evaluate()[1].tasks["own"]
        for ignored in (False, True)
    ]
    assert [scores["mrr_at_10"] for scores in figures] == [0.5, 1.0]


def test_columns(settings, tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("frage,titel,antwort\n" + "".join(f"q{i},t{i},a{i}\n" for i in range(8)))
    with pytest.raises(UserError, match=r"rows.csv:2: .*--columns query=frage,document=antwort"):
        training_run.prepare(settings(data=[str(table)]))
    for name in ("--columns", "--es-fields"):
        _, given = from_flags("", argv=[name, "query=frage,document=titel+antwort"])
        run = training_run.prepare(settings(data=[str(table)], **given))
        example = run.trainer.batches.rows[3]
        assert (example.query, example.positive) == ("q3", "t3\na3")
        form = "(comma-separated, header)"
        assert ("reads", f"rows.csv: frage -> query, titel+antwort -> document {form}") in run.headline


def test_es_fields_that_earlier_versions_saved(tmp_path):
    """Bug guarded against: they saved the default mapping of an index for every run, also for one of files."""
    saved = tmp_path / "config.yaml"
    saved.write_text("es_fields: query=query,document=title+snippet,rank=rank\n")
    assert read_yaml(saved) == {}
    saved.write_text("es_fields: query=q,document=d\n")
    assert read_yaml(saved) == {"columns": "query=q,document=d"}


# What es_query does, tests/dataset/test_elastic.py shows against a server.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 2.0}, "--beta 2.0: is for --loss hard_negative_info_nce"),
        ({"xtr_k": 9, "task": "late"}, "--xtr-k 9: is for --loss xtr"),
        ({"teacher_temperature": 2.0, "loss": "margin_mse"}, "--teacher-temperature 2.0: is for --loss kl_distill"),
        ({"margin": 0.3}, "--margin 0.3: needs a --margin-weight above 0"),
        ({"positive_aware_margin": 0.9}, "--positive-aware-margin 0.9: needs --positive-aware perc or abs"),
        ({"distill_metric": "mse"}, "--distill-metric mse: is for --loss distill_vectors"),
        (
            {"lora_keys": ["q"], "train_type": "full"},
            "--lora-keys q: are layers of a low-rank update, and --train-type",
        ),
        ({"random_negatives": 2, "batch_size": 1}, "--random-negatives 2: are documents of the batch's other rows"),
    ],
)
def test_flags_that_a_run_would_not_use_are_refused(changes, message):
    """Regression: they were taken, and did nothing."""
    with pytest.raises(UserError, match=message):
        Settings(**changes)


def test_kl_is_short_for_kl_distill():
    assert Settings(loss="kl").loss == "kl_distill"


def test_temperature(settings):
    assert loss_of(settings(temperature=1.0), warm=False) != loss_of(settings(temperature=0.1), warm=False)


def test_beta(settings):
    plain = loss_of(settings(loss="info_nce"), warm=False)
    assert loss_of(settings(loss="hard_negative_info_nce", beta=0.0), warm=False) == pytest.approx(plain, rel=1e-5)
    assert loss_of(settings(loss="hard_negative_info_nce", beta=2.0), warm=False) > plain


def test_positive_aware_and_its_margin(settings):
    """Dropping negatives can only lower the loss; a margin that drops all of them makes it 0."""
    plain = loss_of(settings(), warm=False)
    assert loss_of(settings(positive_aware="perc", positive_aware_margin=0.95), warm=False) < plain
    assert loss_of(settings(positive_aware="abs", positive_aware_margin=3.0), warm=False) == 0.0
    with pytest.raises(UserError, match="positive-aware"):
        settings(positive_aware="perc", loss="nt_xent")


def test_directions_and_denominator(settings):
    """More competitors can only raise the loss; a denominator each gives another one."""
    plain = loss_of(settings(), warm=False)
    both = ["query-document", "query-query"]
    assert loss_of(settings(directions=both), warm=False) > plain
    assert loss_of(settings(directions=both, denominator="each"), warm=False) != loss_of(settings(directions=both))
    for directions, message in ([["query-query"], "--directions query-query: must have"], [both * 2, "twice"]):
        with pytest.raises(UserError, match=message):
            settings(directions=directions)
    with pytest.raises(UserError, match="--denominator each: needs several --directions"):
        settings(denominator="each")
    with pytest.raises(UserError, match="--directions .*: works with info_nce, not with nt_xent"):
        settings(directions=both, loss="nt_xent")
    with pytest.raises(UserError, match="--task late takes no --directions query-query"):
        training_run.prepare(settings(directions=both, task="late"))


def test_mask_above(settings):
    plain = loss_of(settings(), warm=False)
    assert loss_of(settings(mask_above=-3.0), warm=False) == 0.0
    assert loss_of(settings(mask_above=3.0), warm=False) == pytest.approx(plain, rel=1e-6)
    with pytest.raises(UserError, match="--positive-aware"):
        settings(mask_above=0.1, positive_aware="perc")


def test_guide_and_its_margin(settings, teacher):
    """Fewer negatives can only lower the loss; a margin that leaves out all of them makes it 0."""
    guide = {"guide": teacher(8)["teacher_vectors"]}
    losses = [loss_of(settings(**changes), warm=False) for changes in ({}, guide, guide | {"guide_margin": 3.0})]
    assert losses[0] > losses[1] > losses[2] == 0
    assert loss_of(settings(**guide, guide_margin=-3.0), warm=False) == pytest.approx(losses[0], rel=1e-6)
    above = loss_of(settings(**guide, mask_above=0.0), warm=False)
    assert above < min(losses[1], loss_of(settings(mask_above=0.0), warm=False))  # both leave out negatives
    for changes, message in (
        ({"guide_margin": 0.1}, "--guide-margin 0.1: needs a --guide"),
        (guide | {"loss": "nt_xent"}, "--guide .*: works with info_nce, not with nt_xent"),
        (guide | {"positive_aware": "perc"}, "--positive-aware perc: does not go with .* --guide"),
        (guide | {"margin_weight": 0.1}, "--margin-weight 0.1: does not go with --guide: the hardest negative may be"),
    ):
        with pytest.raises(UserError, match=message):
            settings(**changes)


def test_hardness_and_of_what(settings):
    plain = loss_of(settings(), warm=False)
    assert loss_of(settings(hardness=5.0), warm=False) == pytest.approx(plain, rel=1e-6)  # rows without negatives
    assert loss_of(settings(hardness=5.0, hardness_of="all"), warm=False) > plain
    with pytest.raises(UserError, match="--hardness-of all: needs a --hardness above 0"):
        settings(hardness_of="all")


def test_spread_weight(settings):
    """Texts that are alike are pushed apart, which costs."""
    one, two = (loss_of(settings(spread_weight=weight), warm=False) for weight in (0.5, 1.0))
    plain = loss_of(settings(), warm=False)
    assert one > plain and two - plain == pytest.approx(2 * (one - plain), rel=1e-3)


def test_binary_weight(settings):
    """The loss with the documents as bits is added; queries, which nothing stores, stay as they are."""
    plain, half, one = (loss_of(settings(binary_weight=weight), warm=False) for weight in (0.0, 0.5, 1.0))
    assert half > plain and one - plain == pytest.approx(2 * (half - plain), rel=1e-3)
    run = training_run.prepare(settings(binary_weight=1.0))
    objective, batch = run.trainer.grad_cache.objective, run.trainer.batches.batch(0)
    queries, documents = (mx.random.normal((n, 16)) / 4 for n in (batch.queries, len(batch.texts) - batch.queries))
    both = objective(mx.concatenate([queries, documents]), batch)
    bits = mx.where(documents > 0, 0.25, -0.25)
    objective.settings.binary_weight = 0.0
    apart = [objective(mx.concatenate([queries, side]), batch) for side in (documents, bits)]
    assert both.item() == pytest.approx(sum(apart).item(), rel=1e-5)


def test_matryoshka_dims(settings):
    assert loss_of(settings(matryoshka_dims=[8, 32]), warm=False) != loss_of(settings(), warm=False)
    with pytest.raises(UserError, match="--matryoshka-dims 100000"):
        training_run.prepare(settings(matryoshka_dims=[100000]))


# --- weights ---


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_train_type(settings, kind):
    names = trainable(training_run.prepare(settings(train_type=kind)))
    assert any(name.endswith("lora_a") for name in names) == (kind != "full")
    assert any(name.endswith(".m") for name in names) == (kind == "dora")


def test_lora_rank_and_alpha(settings):
    run = training_run.prepare(settings(lora_rank=4, lora_alpha=12.0))
    layer = model_of(run).backbone.layers[0].self_attn.q_proj
    assert layer.lora_a.shape[1] == 4 and layer.scale == 3.0


def test_lora_dropout(settings):
    run = training_run.prepare(settings(lora_dropout=0.5))
    run.trainer.update(run.trainer.batches.batch(0), 1)
    batch = run.trainer.batches.batch(1)
    losses = {run.trainer.compute_grads(batch, step)[0].loss.item() for step in (1, 1, 2)}
    assert len(losses) == 2  # the same step drops the same, another step does not


def test_lora_keys(settings):
    names = trainable(training_run.prepare(settings(lora_keys=["q_proj", ".*up_.*"])))
    assert {name.split(".")[-2] for name in names} == {"q_proj", "up_proj"}
    with pytest.raises(UserError, match="self_attn.q_proj"):
        training_run.prepare(settings(lora_keys=["nothing"]))


def test_num_layers(settings):
    last = len(model_of(training_run.prepare(settings())).backbone.layers) - 1
    names = trainable(training_run.prepare(settings(num_layers=1)))
    assert all(f"layers.{last}." in name for name in names)
    with pytest.raises(UserError, match="--num-layers 99"):
        training_run.prepare(settings(num_layers=99))


# --- schedule ---


def test_steps_and_learning_rate_and_schedule_and_warmup(settings):
    def rates(**changes) -> list[float]:
        s = settings(**{"steps": 10, "learning_rate": 1.0, "warmup": 0.2} | changes)
        return [round(trainer.learning_rate(s, step), 4) for step in range(1, s.steps + 1)]

    assert rates(schedule="constant") == [0.5, 1.0, *[1.0] * 8]
    assert rates(schedule="linear") == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates(schedule="cosine", warmup=5.0)[:6] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert min(rates(schedule="cosine")) > 0 and len(rates(steps=12)) == 12
    assert max(rates(learning_rate=0.5)) == 0.5


def test_weight_decay(settings):
    updated = []
    for decay in (0.0, 0.5):
        run = training_run.prepare(settings(weight_decay=decay, learning_rate=0.1))
        run.trainer.update(run.trainer.batches.batch(0), 1)
        updated.append(sum(v.abs().sum().item() for n, v in trainable(run).items() if n.endswith("lora_a")))
    assert updated[1] < updated[0]


def test_max_grad_norm(settings):
    for limit in (0.001, 0.0):
        run = training_run.prepare(settings(max_grad_norm=limit))
        result, norm = run.trainer.compute_grads(run.trainer.batches.batch(0), 1)
        after = math.sqrt(sum((v.square()).sum().item() for _, v in tree_flatten(result.grads)))
        assert after == pytest.approx(limit or norm.item(), rel=1e-3) and norm.item() > 0.001


# --- memory ---


def test_gradient_accumulation_steps_and_micro_batch_tokens(settings):
    def parts(**changes) -> int:
        run = training_run.prepare(settings(**changes))
        return run.trainer.compute_grads(run.trainer.batches.batch(0), 1)[0].micro_batches

    assert parts(gradient_accumulation_steps=1) == 1
    assert parts(gradient_accumulation_steps=4) >= 4
    assert parts(micro_batch_tokens=30) > parts(micro_batch_tokens=60) > 1
    assert parts(micro_batch_tokens=60) > parts(
        micro_batch_tokens="auto"
    )  # there is room; see tests/training/test_memory.py


def test_grad_checkpoint(settings):
    run = training_run.prepare(settings(grad_checkpoint=True))
    assert type(model_of(run).backbone.layers[0]).__name__.startswith("Checkpointed")


def test_compile(settings, monkeypatch):
    monkeypatch.setattr(backend, "FUSED", False)  # a GPU; on CPUs, tests/models/test_compiled_model_runner.py
    runners = {
        wanted: training_run.prepare(settings(compile=wanted)).trainer.grad_cache.runner for wanted in backend.COMPILE
    }
    assert {wanted: runner.compiled for wanted, runner in runners.items()} == {"auto": False, "on": True, "off": False}
    with pytest.raises(UserError, match="--compile on: cannot be combined with --grad-checkpoint"):
        training_run.prepare(settings(compile="on", grad_checkpoint=True))


@pytest.mark.skipif(backend.IS_GPU, reason="GPUs compute with packed weights")
def test_dequantize(settings, base_folders):
    """tests/backbones/test_dequantized.py has the rest."""
    for wanted in ("off", "blocks", "on"):
        run = training_run.prepare(settings(model=str(base_folders["4-bit"]), dequantize=wanted))
        assert dequantized.way(model_of(run).backbone) == wanted


# --- chat ---


@pytest.fixture
def chat_settings(settings, tmp_path):
    """Settings of a small chat run on ten conversations, with six to validate on."""
    for name, count in (("train", 10), ("valid", 6)):
        rows = [{"prompt": f"question {i}", "completion": "word " * (1 + i)} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes) -> Settings:
        given = {"data": [str(tmp_path)], "batch_size": 4, "steps": 4} | changes
        return for_task("chat", settings().to_dict() | {"learning_rate": 1e-3} | given)

    return make


def test_epochs(settings, chat_settings):
    """Of 40 rows in batches of 8, and of 10 conversations in batches of 4; test_length.py has the rest."""
    for prepare, made, steps in ((training_run.prepare, settings, 10), (prepare_chat, chat_settings, 6)):
        run = prepare(made(steps=None, epochs=2))
        assert run.settings.steps == steps and any(f"2 epochs = {steps} steps" in line for _, line in run.headline)


def test_dtype_of_chat(chat_settings, tmp_path, as_metal):
    """mlx-lm computes in it, too; a run that goes on with the adapter takes it, and resumes nothing else."""
    run = prepare_chat(chat_settings(dtype="bfloat16"))
    assert "computes in bfloat16" in dict(run.headline)["model"]
    model = run.trainer.model
    assert model.layers[0].mlp.up_proj.linear.weight.dtype == mx.bfloat16
    assert model(mx.array([[2, 5, 6]])).dtype == mx.bfloat16
    assert {value.dtype for _, value in tree_flatten(model.trainable_parameters())} == {mx.float32}
    files.write_folder(tmp_path / "saved", run.trainer.write)
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["dtype"] == "bfloat16"
    again = {"model": str(tmp_path / "saved"), "lora_rank": None}
    runs = [prepare_chat(chat_settings(**again, dtype=wanted)) for wanted in (None, "float32")]
    assert [each.settings.dtype for each in runs] == ["bfloat16", "float32"]
    assert "computes in float32" in dict(runs[1].headline)["model"]


def test_mask_prompt(chat_settings):
    whole, masked = (prepare_chat(chat_settings(mask_prompt=value)).trainer.batches for value in (False, True))
    numbers = whole.numbers(0)
    assert masked.counts(numbers).trained < whole.counts(numbers).trained
    assert masked.counts(numbers).tokens == whole.counts(numbers).tokens


@pytest.mark.slow
def test_val_batches_and_steps_per_report(chat_settings):
    losses = set()
    for batches in (1, -1, 5):
        chosen = chat_settings(val_batches=batches, steps_per_report=3, overwrite=True)
        losses.add(train.train(chosen)["before"]["validation_loss"])
        records = [json.loads(line) for line in (Path(chosen.output) / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if record["type"] == "train"] == [3, 4]
    assert len(losses) == 2  # -1 is all, and more than there are too


def test_a_run_says_why_it_is_a_chat_run(tmp_path, monkeypatch):
    """And where data/ is missing, why it is looked for; regression: nobody had written --data."""
    monkeypatch.chdir(tmp_path)
    flags = ["--iters", "7", "--mask-prompt"]
    made, given = from_flags("", argv=flags)
    name = chat_flag(given, flags)
    assert name == "--iters" and chat_flag(given, ["--mask-prompt"]) == "--mask-prompt"
    with pytest.raises(UserError, match="--data data: no such .* --iters selects chat .* data/.*--task embed"):
        train.chat_reason(made, name)
    (tmp_path / "data").mkdir()
    rows = tmp_path / "data" / "train.jsonl"
    rows.write_text('{"prompt": "q", "completion": "a"}\n')
    assert train.chat_reason(made, name).startswith("chat, as --iters is given without --task and --data; for another")
    by_rows = Settings(data=["data"])
    assert train.chat_reason(by_rows, "").startswith("chat, as the first row of data is a conversation;")
    rows.write_text('{"query": "q", "document": "a"}\n')
    assert train.chat_reason(by_rows, "") == train.chat_reason(made, name) == ""
    assert chat_flag({"steps": 7, "data": ["mine"]}, ["--iters"]) == chat_flag({"steps": 7}, ["--steps", "7"]) == ""


def test_the_names_that_mlx_lm_s_users_know(tmp_path, monkeypatch):
    made, given = from_flags("", argv=["--iters", "7", "--steps-per-eval=3", "--save-every", "2"])
    assert (made.steps, made.eval_steps, made.save_steps, made.data) == (7, 3, 2, ["data"])
    assert given == {"steps": 7, "eval_steps": 3, "save_steps": 2}
    for argv, data in (
        (["--steps", "7"], ["train-data.jsonl"]),
        (["--mask-prompt"], ["data"]),
        (["--iters", "7", "--data", "mine"], ["mine"]),
        (["--iters", "7", "--task", "embed"], ["train-data.jsonl"]),
        (["--task", "chat"], ["data"]),
        (["--model-path", "some"], ["train-data.jsonl"]),  # the other commands' word for --model
    ):
        assert from_flags("", argv=argv)[0].data == data
    assert from_flags("", argv=["--model-path", "some"])[0].model == "some"
    assert from_flags("", argv=["--task", "chat"])[0].batch_size == 4
    file = tmp_path / "settings.yaml"
    file.write_text("iters: 7\nsave-every: 3\n")
    assert from_flags("", argv=["--config", str(file)])[1] == {"steps": 7, "save_steps": 3}


# --- evaluation and run: through the command ---


def command(*flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "train.py", *flags], cwd=cwd, capture_output=True, text=True, timeout=300)


def run_flags(settings: Settings, *more: str) -> list[str]:
    base = ["--model", settings.model, "--data", *settings.data, "--batch-size", "8", "--lora-rank", "2"]
    return [*base, "--output", settings.output, *more]


@pytest.fixture
def small_task(tmp_path: Path) -> Path:
    """A task of three documents, so that an evaluation takes no time."""
    folder = tmp_path / "small-task"
    (folder / "qrels").mkdir(parents=True)
    documents = ["dogs bark", "cats meow", "cows moo"]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "title": "", "text": t}) + "\n" for i, t in enumerate(documents))
    )
    (folder / "queries.jsonl").write_text(
        '{"_id": "q0", "text": "which animal barks"}\n{"_id": "q1", "text": "meow"}\n'
    )
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n")
    return folder


# ema: test_moving_average.py.
# What guard and guard_tolerance do, test_guards.py shows; rounds, rounds_negatives, rounds_teacher: test_rounds.py.
def test_holdout(settings):
    """More rows are held out by default, none for 0; test_run_data.py looks closer."""
    counts = {}
    for share in (None, 0.0, 0.5):
        data = open_data(settings(eval_tasks=None, holdout=share))
        counts[share] = (len(data.rows), [Path(task).name for task in data.eval_tasks])
    assert counts == {None: (27, ["held-out"]), 0.0: (40, []), 0.5: (27, ["held-out"])}  # a third at most


def test_a_run_with_eval_tasks_eval_steps_save_steps_output(settings, small_task, capsys):
    s = settings()
    flags = ["--steps", "4", "--eval-tasks", str(small_task), "--eval-steps", "2", "--save-steps", "3", "--warmup", "0"]
    done = command(*run_flags(s, *flags, "--require-improvement"))
    assert done.returncode == 4, done.stderr  # the untrained model is as good
    run = Path(s.output)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["type"] == "eval"] == [0, 2, 4]
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["final", "step-000003", "step-000004"]
    results = json.loads((run / "results.json").read_text())
    assert (
        set(results["before"])
        == set(results["after"])
        == {"ndcg_at_10", "mrr_at_10", "recall_at_100", "precision_at_1"}
    )
    for word in ("nDCG@10", "95 %", str(run / "final"), "curves.png", "metrics.jsonl", "\nuse  "):
        assert word in done.stdout
    assert train.main(run_flags(s, *flags)) == 2
    message = capsys.readouterr().err
    assert "--resume" in message and "--overwrite" in message


@pytest.mark.slow
def test_skip_eval_init_and_early_stopping(settings, small_task):
    s = settings()
    flags = ["--steps", "9", "--eval-tasks", str(small_task), "--eval-steps", "1", "--skip-eval-init"]
    done = command(*run_flags(s, *flags, "--early-stopping", "2", "--learning-rate", "1e-12"))
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (Path(s.output) / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["type"] == "eval"] == [1, 2, 3]  # no 0; two without gain end the run
    assert json.loads((Path(s.output) / "results.json").read_text())["before"] is None
    assert (Path(s.output) / "final").is_dir()


@pytest.mark.slow
def test_a_run_that_stops_before_its_first_evaluation(settings, small_task):
    """Regression: it was saved, and then ended with a traceback, as it had no results to tell. Nor does it import what
    only evaluations need."""
    s = settings(eval_tasks=[str(small_task)], skip_eval_init=True)
    write_yaml(s, Path(s.output).parent / "settings.yaml")
    code = (
        "import sys, train\n"
        f"code = train.main(['--config', {str(Path(s.output).parent / 'settings.yaml')!r}, '--stop-after', '1'])\n"
        "print(code, [name for name in ('mteb', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["0 []"], done.stdout + done.stderr
    results = json.loads((Path(s.output) / "results.json").read_text())
    assert results["before"] is None and results["after"] is None


@pytest.mark.slow
def test_stop_after_and_resume_and_overwrite_and_dry_run(settings):
    s = settings()
    flags = ["--eval-tasks", "--steps", "5", "--save-steps", "2"]
    done = command(*run_flags(s, *flags, "--dry-run"))
    assert done.returncode == 0 and "tokens/s" in done.stdout and not Path(s.output).exists()
    done = command(*run_flags(s, *flags, "--stop-after", "3"))
    assert done.returncode == 0 and "--resume" in done.stdout, done.stderr
    assert last_step(Path(s.output)).name == "step-000003" and not (Path(s.output) / "final").exists()
    refused = command("--resume", "--output", s.output, "--temperature", "0.5")
    assert refused.returncode == 2 and "--temperature was 0.05" in refused.stderr
    done = command("--resume", "--output", s.output)
    assert done.returncode == 0 and (Path(s.output) / "final").is_dir(), done.stderr
    done = command(*run_flags(s, *flags, "--overwrite", "--steps", "1"))
    assert done.returncode == 0 and not (Path(s.output) / "step-000002").exists(), done.stderr


def test_profile_shows_phases_and_writes_nothing(settings, capsys):
    s = settings(profile=2, gradient_accumulation_steps=2)  # what goes through at once has forward and backward in one
    times = train.train(s)
    shown = capsys.readouterr().out
    phases = ["data", "forward", "loss", "backward", "optimizer"]
    sides = ["forward, queries", "forward, documents"]
    assert all(f" {name} " in shown for name in [*sides, *phases[2:], "other", "step"])
    assert sum(times[name] for name in sides) == pytest.approx(times["forward"])
    assert 0 < sum(times[name] for name in phases) <= times["step"] and times["tokens"] > 0
    assert ("evaluation" in times) == bool(s.eval_tasks) and not Path(s.output).exists()
    done = command(*run_flags(s, "--profile", "1"))
    assert done.returncode == 0 and "backward" in done.stdout, done.stderr


@pytest.mark.slow
def test_wandb_and_its_project(settings, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    s = settings()
    done = command(*run_flags(s, "--eval-tasks", "--steps", "1", "--wandb", "--wandb-project", "mine"))
    assert done.returncode == 0, done.stderr
    logged = list((Path(s.output) / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logged) == 1 and b"mine" in logged[0].read_bytes()


def test_config_file_flags_win_and_unknown_keys_are_refused(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("steps: 7\nlearning-rate: 1e-3\nlora_keys: [q_proj]\n")
    made, given = from_flags("", argv=["--config", str(file), "--steps", "9"])
    assert (made.steps, made.learning_rate, made.lora_keys) == (9, 1e-3, ["q_proj"])
    assert given == {"steps": 9, "learning_rate": 1e-3, "lora_keys": ["q_proj"]}
    for text, message in (
        ("# a comment\n\nstepz: 7", "settings.yaml:3: unknown key 'stepz'; did you mean steps[?]$"),
        ("seed: 1\nsteps: many", "settings.yaml:2: steps: 'many' is not of type int"),
        ("loss: inf_nce", "settings.yaml:1: loss: 'inf_nce' is not one of info_nce, .*; did you mean info_nce[?]$"),
        ("seed: 1\nsteps: [", "settings.yaml:[23]: not valid YAML"),
        (f"task: {'x' * 5000}", "^.{100,400}$"),
        ("- 1", "not a list of"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            from_flags("", argv=["--config", str(file)])
    with pytest.raises(UserError, match="No such file"):
        from_flags("", argv=["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("name", ["model", "data", "eval-tasks", "output", "columns", "config", "lora-keys"])
def test_a_name_is_not_empty(name):
    """Regression: `--output ""` counted as not given, so that a misspelt shell variable passed without a word."""
    for text in ("", " "):
        with pytest.raises(UserError, match=f"^--{name}: must not be empty$"):
            from_flags("", argv=[f"--{name}", text])
    assert from_flags("", argv=["--query-prompt", ""])[0].query_prompt == ""


def test_settings_survive_yaml(tmp_path):
    made = Settings(lora_keys=["a"], pooling="cls", bidirectional=True, matryoshka_dims=[4], learning_rate=1e-5)
    write_yaml(made, tmp_path / "config.yaml")
    assert Settings(**read_yaml(tmp_path / "config.yaml")) == made.with_absolute_paths()
    made = Settings(sources=[{"data": "a.jsonl", "weight": 2.0, "loss": "kl"}, {"data": ["b.jsonl", "c.jsonl"]}])
    write_yaml(made, tmp_path / "config.yaml")  # with `data`, which are the sources', it would be refused
    assert Settings(**read_yaml(tmp_path / "config.yaml")) == made


def test_accept_changed_data(tmp_path):
    """For resumed runs, and not saved; what it does, test_contents.py shows."""
    with pytest.raises(UserError, match="--accept-changed-data: is for --resume"):
        Settings(accept_changed_data=True)
    write_yaml(Settings(accept_changed_data=True, resume=True), tmp_path / "config.yaml")
    assert "accept_changed_data: false" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_the_configs_that_come_along_are_settings(file):
    assert Settings(**read_yaml(file)).loss in LOSSES


def test_keep(settings, tmp_path):
    """Older steps go once a newer one is complete; best and final stay."""
    train.train(settings(steps=5, save_steps=1, keep=2))
    folders = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert folders == ["final", "step-000004", "step-000005"]
    train.train(settings(steps=5, save_steps=2, overwrite=True))
    assert len(list((tmp_path / "run").glob("step-*"))) == 3
    with pytest.raises(UserError, match="--keep -1"):
        settings(keep=-1)


def test_rank_timeout(settings, monkeypatch):
    """It reaches the watch over the other ranks, of which test_distributed.py shows the effect."""
    told = []
    monkeypatch.setattr(train.distributed, "start", told.append)
    assert train.main(["--data", "nothing.jsonl", "--rank-timeout", "7"]) == 2 and told == [7]
    with pytest.raises(UserError, match="--rank-timeout -1"):
        settings(rank_timeout=-1)


def test_two_runs_into_one_folder_are_refused(settings, tmp_path):
    """While one trains, another is told so, whatever it was asked to do; afterwards the folder is free again."""
    from mlx_retrieval.utils import locks

    with (
        locks.only_one(tmp_path / "run" / ".lock", "held"),
        pytest.raises(UserError, match="another process is training there"),
    ):
        train.train(settings(overwrite=True))
    assert not (tmp_path / "run" / "final").exists()
    train.train(settings())
    assert (tmp_path / "run" / "final").is_dir()


def test_batches_and_source_temperature(settings, data, tmp_path):
    """A batch of one source, or of all; and as many batches of a small source as of a large one."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"query": f"q {i}", "document": f"d {i}"}) + "\n" for i in range(10)))

    def kinds(**changes) -> list[set[str]]:
        run = training_run.prepare(settings(**changes))
        rows = run.trainer.batches.rows
        numbers = (run.trainer.batches.row_numbers(k) for k in range(8))
        return [{Path(rows.where(i).partition(":")[0]).name for i in batch} for batch in numbers]

    mixture = [f"{data}:1", f"{other}:1"]
    assert all(len(kind) == 1 for kind in kinds(data=mixture))
    assert all(len(kind) == 2 for kind in kinds(data=mixture, batches="mixed"))
    by_size = kinds(data=[str(data), str(other)], source_temperature=1.0)
    assert sum("other.jsonl" in kind for kind in by_size) in (1, 2)  # a fifth of 8
    with pytest.raises(UserError, match=r"--source-temperature 0.01: must be 0.1 or more"):
        settings(source_temperature=0.01)


def test_similar_rows(settings, tmp_path):
    """Two questions about each thing, far apart in the file, are in one batch."""
    file = tmp_path / "things.jsonl"
    rows = [{"query": f"{q} thing{i}", "document": f"{q} {i}"} for q in ("what is", "who makes") for i in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = settings(data=[str(file)], similar_rows=2, holdout=0.0, eval_tasks=[], batch_size=4)
    batches = training_run.prepare(chosen).trainer.batches
    assert all(len({i % 16 for i in batches.row_numbers(k)}) == 2 for k in range(8))
    with pytest.raises(UserError, match=r"--similar-rows 0: must be above 0"):
        settings(similar_rows=0)


def test_no_setting_without_a_test():
    text = Path(__file__).read_text()
    named = {f.name for f in dataclasses.fields(Settings) if f.name in text or flag(f.name) in text}
    assert named == {f.name for f in dataclasses.fields(Settings)}


def test_help_is_quick_and_says_units():
    done = command("--help")
    assert done.returncode == 0
    for word in ("tokens", "steps", "-1 = all", "0 = only"):
        assert word in " ".join(done.stdout.split())
    slow = {"torch.nn", "mteb", "wandb.sdk", "transformers", "mlx_lm"}
    script = f"import sys, train; assert not {slow} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_the_default_learning_rate_goes_by_the_model_s_size(settings):
    assert training_run.prepare(settings()).settings.learning_rate == 4e-3
    large = settings()
    resolve_defaults(large, parameters=600_000_000)
    assert large.learning_rate == 2e-4
    given = settings(learning_rate=1e-5)
    assert resolve_defaults(given, parameters=1) == {"loss", "temperature"} and given.learning_rate == 1e-5
    for parameters, rate in ((1_000_000, 2e-3), (22_000_000, 2e-5)):
        full = settings(train_type="full")
        resolve_defaults(full, parameters)
        assert full.learning_rate == rate
