"""Vectors of other models in a run: a teacher's, to learn (--loss distill_vectors), and a guide's (--guide).

python -m pytest tests/training/test_other_vectors.py
"""

import dataclasses
import json
from pathlib import Path

from mlx_retrieval.backend import mx, nn

import numpy as np
import pytest
from mlx.utils import tree_flatten

import train
from mlx_retrieval.dataset.text_keys import vector_key
from mlx_retrieval.inference import embedder, text_vectors
from mlx_retrieval.models import maxsim
from mlx_retrieval.training import distributed, other_vectors, reporting, run
from mlx_retrieval.training.checkpoint import last_step
from mlx_retrieval.training.config import Settings
from mlx_retrieval.utils.errors import UserError

ROWS = [{"query": f"query {i}", "document": f"document {i} " + "word " * (i % 5)} for i in range(24)]


def write_teacher(file: Path, dimensions: int, rows=ROWS) -> str:
    keys = [vector_key(row[side], side) for row in rows for side in ("query", "document")]
    vectors = np.random.default_rng(0).normal(size=(len(keys), dimensions)).astype(np.float32)
    text_vectors.write(file, keys, vectors, {"model": "random"})
    return str(file)


@pytest.fixture
def settings(small, write_rows, tmp_path):
    """Settings of a run with a teacher of `dimensions`, or a guide in its place, changed by keyword."""

    def make(dimensions: int = 32, guided: bool = False, **changes) -> Settings:
        file = write_teacher(tmp_path / f"{dimensions}.safetensors", dimensions)
        values = {"model": small, "data": [str(write_rows(ROWS, "rows.jsonl"))], "batch_size": 8, "steps": 3}
        values |= {"eval_tasks": [], "lora_rank": 2, "output": str(tmp_path / "run"), "save_steps": 0}
        values |= {"guide": file} if guided else {"teacher_vectors": file, "loss": "distill_vectors"}
        return Settings(**values | changes)

    return make


def flat(grads: dict) -> np.ndarray:
    return np.concatenate([np.array(value).ravel() for _, value in sorted(tree_flatten(grads))])


@pytest.mark.parametrize("changes", [
    {}, pytest.param({"distill_metric": "mse"}, marks=pytest.mark.slow),
    pytest.param({"dimensions": 48, "teacher_projection": True}, marks=pytest.mark.slow),
    {"dimensions": 48, "teacher_projection": True, "loss": "info_nce", "distill_weight": 0.5},
], ids=str)  # fmt: skip
def test_loss_and_gradient_are_the_same_for_1_4_and_16_micro_batches(settings, changes):
    """That of the projection as well, which no micro-batch has a share of."""
    trainer = run.prepare(settings(**changes)).trainer
    cache, batch, results = trainer.grad_cache, trainer.batches.batch(0), []
    for parts in (1, 4, 16):
        cache.accumulation = parts
        result = cache(batch, seed=0)
        assert result.micro_batches >= parts and ("projection" in result.grads) == ("teacher_projection" in changes)
        results.append((result.loss.item(), flat(result.grads)))
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert np.linalg.norm(grads - results[0][1]) / np.linalg.norm(results[0][1]) < 1e-5


@pytest.mark.parametrize("parts", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_float16_scales_the_gradient_of_the_model_and_not_that_of_the_projection(settings, as_metal, parts):
    grads = {}
    for dtype in ("float32", "float16"):
        trainer = run.prepare(settings(48, teacher_projection=True, dtype=dtype)).trainer
        trainer.grad_cache.accumulation = parts
        grads[dtype] = np.array(trainer.grad_cache(trainer.batches.batch(0), seed=0).grads["projection"]["weight"])
    np.testing.assert_allclose(grads["float16"], grads["float32"], atol=2e-3 * np.abs(grads["float32"]).max())


def test_every_text_of_a_batch_meets_its_own_vector(settings):
    """A student whose vectors are the teacher's has no loss: the teacher is the model itself."""
    made = settings()
    model, file = embedder.load(made.model), Path(made.teacher_vectors)
    texts = [(row[side], side) for row in ROWS for side in ("query", "document")]
    vectors = np.stack([model.encode(text, side) for text, side in texts])
    text_vectors.write(file, [vector_key(*text) for text in texts], vectors, {"model": "itself"})
    trainer = run.prepare(made).trainer
    assert trainer.grad_cache.loss(trainer.batches.batch(0)) == pytest.approx(0, abs=1e-6)
    text_vectors.write(file, [vector_key(*text) for text in texts], vectors[::-1], {"model": "itself"})
    other = run.prepare(made).trainer
    assert other.grad_cache.loss(other.batches.batch(0)) > 0.01


@pytest.mark.slow
def test_training_comes_nearer_to_the_teacher_and_resumes_exactly(settings, tmp_path, monkeypatch):
    """The projection is trained and continues; it is no part of what the saved model is loaded from."""
    monkeypatch.setattr(reporting, "draw_curves", lambda *_: None)
    folders = {name: str(tmp_path / name) for name in ("whole", "broken")}
    same = {"dimensions": 48, "teacher_projection": True, "steps": 6, "learning_rate": 0.01}
    train.train(settings(**same, output=folders["whole"]))
    train.train(settings(**same, output=folders["broken"], stop_after=3))
    stopped = mx.load(str(last_step(Path(folders["broken"])) / "projection.safetensors"))
    train.train(train.resumed_settings({"output": folders["broken"], "resume": True}))
    whole, broken = (Path(folder) / "final" for folder in folders.values())
    for name in ("adapters.safetensors", "projection.safetensors", "optimizer.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert not mx.array_equal(stopped["weight"], mx.load(str(whole / "projection.safetensors"))["weight"])
    records = [json.loads(line) for line in (Path(folders["whole"]) / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["type"] == "train"]
    assert losses[-1] < 0.97 * losses[0]
    (whole / "projection.safetensors").unlink()
    assert embedder.load(whole).encode("query 1").shape == (32,)


@pytest.mark.slow
def test_changed_vectors_are_noticed_when_a_run_goes_on(settings, tmp_path):
    train.train(settings(stop_after=1))
    write_teacher(tmp_path / "32.safetensors", 32, [*ROWS, {"query": "one", "document": "more"}])
    with pytest.raises(UserError, match="teacher's vectors: .*32.safetensors"):
        train.train(train.resumed_settings({"output": str(tmp_path / "run"), "resume": True}))


def test_ranks_compare_their_files_of_vectors(settings, tmp_path, monkeypatch):
    compared = {}
    monkeypatch.setattr(distributed, "check_equal", lambda place, values, **_: compared.update({place: values}))
    digests = []
    for rows in (ROWS, ROWS[::-1]):
        made = settings()
        write_teacher(Path(made.teacher_vectors), 32, rows)
        run.prepare(made).trainer.check_ranks()
        digests.append(compared["the data"]["teacher's vectors"])
    assert len({*digests}) == 2


def test_another_width_without_a_projection_ends_the_command_in_a_line(settings, tmp_path, capsys):
    made = settings(48)
    given = {"model": made.model, "data": made.data[0], "teacher-vectors": made.teacher_vectors, "loss": made.loss}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert train.main([*flags, "--steps", "1", "--eval-tasks", "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: --teacher-vectors ") and error.count("\n") == 1
    assert "have 48 dimensions and the model's 32; --teacher-projection" in error and not (tmp_path / "run").exists()


def test_another_width_without_a_projection_is_refused(settings):
    with pytest.raises(
        UserError, match="the teacher's vectors have 48 dimensions and the model's 32; --teacher-projec"
    ):
        run.prepare(settings(48))


@pytest.mark.parametrize(("side", "count"), [("query", "1 text"), ("document", "2 texts")])
def test_texts_without_a_vector_are_counted_and_the_first_is_named_by_its_place(settings, side, count):
    made = settings()
    rows = [dict(row) for row in ROWS]
    for number in range(int(count[0])):
        rows[16 + number][side] = "other text"
    write_teacher(Path(made.teacher_vectors), 32, rows)
    place = rf"no vector of {count}, the first being the {side} in .*rows.jsonl:17"
    command = rf"python mine.py score --vectors --model random --data .*rows.jsonl --output {made.teacher_vectors}"
    with pytest.raises(UserError, match=f"{place}; {command}"):
        run.prepare(made)


@pytest.mark.parametrize(("name", "flags"), [
    ("no.safetensors", "--model MODEL --data .*rows.jsonl --output no.safetensors"),
    ("org/model", "--model org/model --data .*rows.jsonl --output vectors.safetensors"),
])  # fmt: skip
def test_a_file_that_is_not_there_is_named_with_the_command_that_writes_it(settings, name, flags):
    """A model's name in its place is the one whose vectors are meant."""
    command = f"python mine.py score --vectors {flags} writes one"
    with pytest.raises(UserError, match=f"--teacher-vectors {name}: no such file; {command}"):
        other_vectors.open_vectors(settings(teacher_vectors=name), [], 32)


def test_validation_rows_need_vectors_as_well(settings, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, row in (("train", ROWS), ("valid", [{"query": "new", "document": "newer"}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in row))
    with pytest.raises(UserError, match="no vector of 2 texts, the first being the query in .*valid.jsonl:1;"):
        run.prepare(settings(data=[str(folder)]))


@pytest.mark.parametrize(("changes", "message"), [
    ({"teacher_vectors": None}, "--loss distill_vectors: needs --teacher-vectors, which mine.py score"),
    ({"loss": "info_nce"}, "--teacher-vectors .*: needs --loss distill_vectors, or --distill-weight beside another"),
    ({"loss": None, "teacher_vectors": None, "distill_weight": 1.0}, "--distill-weight 1.0: needs --teacher-vectors"),
    ({"loss": None, "teacher_vectors": None, "teacher_projection": True}, "--teacher-projection: needs --teacher-vec"),
    ({"matryoshka_dims": [8]}, "--matryoshka-dims 8: trains by scores"),
    ({"margin_weight": 0.1}, "--margin-weight 0.1: trains by scores"),
    ({"temperature": 0.1}, "--temperature 0.1: has no effect with distill_vectors, which takes cosines as they are"),
])  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(settings, changes, message):
    with pytest.raises(UserError, match=message):
        settings(**changes)


def test_only_vectors_of_texts_have_a_teacher_s(settings):
    with pytest.raises(UserError, match="--teacher-vectors is for --task embed, and this is late"):
        run.prepare(settings(task="late"))


def test_the_projection_is_a_linear_layer_beside_the_model(settings):
    projected, plain = run.prepare(settings(48, teacher_projection=True)), run.prepare(settings())
    projection = projected.trainer.model.projection
    assert isinstance(projection, nn.Linear) and projection.bias.shape == (48,)
    lines, others = dict(projected.headline), dict(plain.headline)
    assert lines["model"] == others["model"] and lines["trained"] == _more(others["trained"], 48 * 33)
    assert lines["teacher"].endswith(
        "48 vectors of 48 dimensions by random, through a projection that is trained with the model"
    )


def _more(line: str, count: int) -> str:
    number, _, rest = line.partition(" ")
    return f"{int(number.replace(',', '')) + count:,} {rest} and the projection"


# --- sources with settings of their own ---


@pytest.fixture
def sources(settings, write_rows):
    """Settings of a run on two sources; the teacher knows the texts of the first alone."""
    other = str(write_rows([{"query": f"other {i}", "document": f"text {i}"} for i in range(16)], "other.jsonl"))

    def make(first: dict, second: dict, dimensions: int = 32, **changes) -> Settings:
        rows = settings().data[0]
        given = [{"data": rows} | first, {"data": other} | second]
        return settings(dimensions, **{"loss": None, "sources": given, "data": [rows, other]} | changes)

    return make


def test_a_source_learns_vectors_and_another_does_not(settings, sources):
    """Its batches have the loss of a run on it alone; the other's texts need no vectors."""
    trainer = run.prepare(sources({"loss": "distill_vectors"}, {})).trainer
    batches = [trainer.batches.batch(k) for k in trainer.batches.sample_numbers(1)]
    loss = {batch.source: trainer.grad_cache.loss(batch) for batch in batches}
    alone = run.prepare(settings()).trainer
    assert loss[0] == alone.grad_cache.loss(next(batch for batch in batches if batch.source == 0))
    plain = run.prepare(settings(loss=None, teacher_vectors=None)).trainer
    assert loss[1] == plain.grad_cache.loss(next(batch for batch in batches if batch.source == 1))


@pytest.mark.parametrize("own", [{"loss": "distill_vectors"}, {"distill_weight": 1.0}], ids=str)
def test_a_source_of_a_single_row_learns_vectors(sources, write_rows, own):
    """Regression: it was refused as one without anything to compare, which a teacher's vector does not need."""
    made = sources(own, {})
    write_rows(ROWS[:1], "rows.jsonl")
    trainer = run.prepare(made).trainer
    batch = next(b for b in map(trainer.batches.batch, trainer.batches.sample_numbers(1)) if b.source == 0)
    assert len(batch.texts) == 2 and np.abs(flat(trainer.grad_cache(batch, 1).grads)).max() > 1e-6


def test_batches_of_one_row_learn_vectors(settings):
    trainer = run.prepare(settings(batch_size=1)).trainer
    assert np.abs(flat(trainer.grad_cache(trainer.batches.batch(0), 1).grads)).max() > 1e-6


def test_dimensions_to_train_are_for_the_sources_that_compare(sources):
    """Regression: adapt.py, which holds texts by their vectors, refused `matryoshka_dims` in its --config."""
    made = sources({"loss": "distill_vectors"}, {}, matryoshka_dims=[8])
    first, second = run.prepare(made).trainer.grad_cache.objective.objectives
    assert (first.settings.matryoshka_dims, second.settings.matryoshka_dims) == ([], [8])
    with pytest.raises(UserError, match="^--matryoshka-dims 8: trains by scores, and --loss distill_vectors has none"):
        sources({"loss": "distill_vectors"}, {"loss": "distill_vectors"}, matryoshka_dims=[8])
    with pytest.raises(UserError, match="^source .*rows.jsonl: margin_weight 0.1: trains by scores"):
        sources({"loss": "distill_vectors", "margin_weight": 0.1}, {})


def test_a_source_learns_vectors_alone_and_another_beside_its_loss(sources, tmp_path):
    """The weight of the whole run is no second one of a source that learns vectors alone."""
    made = sources({"loss": "distill_vectors"}, {}, 48, distill_weight=0.5, teacher_projection=True)
    with pytest.raises(UserError, match="no vector of 32 texts, the first being the query in .*other.jsonl:1;"):
        run.prepare(made)
    write_teacher(
        Path(made.teacher_vectors), 48, [*ROWS, *({"query": f"other {i}", "document": f"text {i}"} for i in range(16))]
    )
    trainer = run.prepare(made).trainer
    first, second = (trainer.grad_cache.objective.objectives[i].settings for i in (0, 1))
    assert (first.loss, first.vectors_weight, first.distill_weight) == ("distill_vectors", 1, 0)
    assert (second.loss, second.vectors_weight) == ("info_nce", 0.5)
    heavy = dataclasses.replace(made, sources=[made.sources[0] | {"distill_weight": 20.0}, made.sources[1]])
    weighted = run.prepare(heavy).trainer
    batch = next(b for b in map(weighted.batches.batch, weighted.batches.sample_numbers(1)) if b.source == 0)
    once, often = (t.grad_cache.loss(batch) for t in (trainer, weighted))
    assert often == pytest.approx(20 * once, rel=1e-5)
    for k in trainer.batches.sample_numbers(1):
        grads = trainer.grad_cache(trainer.batches.batch(k), 1).grads
        assert mx.abs(grads["projection"]["weight"]).max().item() > 0


def test_a_source_without_vectors_has_no_projection_to_train(sources):
    """Its gradient is 0, and not missing, so that a step is one of the same optimizer."""
    trainer = run.prepare(sources({"distill_weight": 1.0}, {}, 48, teacher_projection=True)).trainer
    sums = {}
    for batch in map(trainer.batches.batch, trainer.batches.sample_numbers(1)):
        sums[batch.source] = mx.abs(trainer.grad_cache(batch, 1).grads["projection"]["weight"]).sum().item()
    assert sums[0] > 0 == sums[1]


def test_vectors_that_no_source_learns_are_refused(sources):
    with pytest.raises(UserError, match="--teacher-vectors .*: needs --loss distill_vectors, or --distill-weight"):
        sources({}, {"loss": "nt_xent"})


@pytest.mark.parametrize(
    "loss", ["angle", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cosent", "cosine_mse"))]
)
def test_scored_pairs_with_a_teacher_s_vectors_beside(settings, write_rows, loss):
    rows = write_rows([row | {"score": i / 24} for i, row in enumerate(ROWS)], "scored.jsonl")
    losses = []
    for weight in (0.0, 2.0):
        more = {"distill_weight": weight} if weight else {"teacher_vectors": None}
        trainer = run.prepare(settings(data=[str(rows)], loss=loss, holdout=0, **more)).trainer
        losses.append(trainer.grad_cache.loss(trainer.batches.batch(0)))
    made = settings()
    teacher, batch = text_vectors.TextVectors(Path(made.teacher_vectors)), trainer.batches.batch(0)
    own = trainer.grad_cache(batch, 0).representations
    cosines = (own * mx.array(teacher.of(batch.keys))).sum(axis=1) / mx.linalg.norm(
        mx.array(teacher.of(batch.keys)), axis=1
    )
    assert losses[1] == pytest.approx(losses[0] + 2 * (1 - cosines.mean().item()), rel=1e-4)


# --- a guide ---


@pytest.mark.parametrize("task", ["embed", "late"])
def test_a_guide_masks_the_negatives_of_a_batch(settings, tmp_path, task):
    """The loss is that of the scores without the documents that the guide finds nearer than the positive."""
    trainer = run.prepare(settings(guided=True, task=task)).trainer
    cache, batch = trainer.grad_cache, trainer.batches.batch(0)
    representations = cache(batch, 0).representations
    guide = text_vectors.TextVectors(tmp_path / "32.safetensors").of(batch.keys)
    guide /= np.linalg.norm(guide, axis=1, keepdims=True)
    similarities = guide[batch.query] @ guide[batch.queries :].T
    kept = similarities <= similarities[np.arange(8), batch.document][:, None] + 1e-6
    assert kept.sum() < kept.size
    queries, documents = representations[: batch.queries], representations[batch.queries :]
    scores = queries @ documents.T if task == "embed" else maxsim.reduce(
        maxsim.token_max(queries, documents)[0], maxsim.counted(queries), "mean"
    )  # fmt: skip
    logits = np.where(kept, np.array(scores)[batch.query] / 0.05, -np.inf)
    expected = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(8), batch.document]
    assert cache.loss(batch) == pytest.approx(expected.mean(), rel=1e-4)


def test_texts_that_a_guide_does_not_know_are_counted(settings):
    made = settings(guided=True)
    write_teacher(Path(made.guide), 32, ROWS[:-2])
    with pytest.raises(UserError, match=r"--guide .*: no vector of 4 texts, .*rows.jsonl:23; python mine.py score --v"):
        run.prepare(made)


def test_a_guide_is_for_the_sources_with_info_nce(sources):
    """The others have no loss that it could act on; if all are such, it is refused."""
    made = sources({}, {"loss": "nt_xent"}, guided=True, guide_margin=0.1)
    first, second = run.prepare(made).trainer.grad_cache.objective.objectives
    assert first.settings.guide == made.guide and (second.settings.guide, second.settings.guide_margin) == (None, 0)
    with pytest.raises(UserError, match="--guide .*: is for info_nce, which no source has"):
        sources({"loss": "nt_xent"}, {"loss": "nt_xent"}, guided=True)


@pytest.mark.slow
def test_a_run_with_a_guide_resumes_exactly_and_notices_another_one(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "draw_curves", lambda *_: None)
    folders = {name: str(tmp_path / name) for name in ("whole", "broken")}
    train.train(settings(guided=True, output=folders["whole"]))
    train.train(settings(guided=True, output=folders["broken"], stop_after=1))
    train.train(train.resumed_settings({"output": folders["broken"], "resume": True}))
    whole, broken = (Path(folder) / "final" / "adapters.safetensors" for folder in folders.values())
    assert whole.read_bytes() == broken.read_bytes()
    write_teacher(tmp_path / "32.safetensors", 32, ROWS[::-1])
    with pytest.raises(UserError, match="guide's vectors: .*32.safetensors"):
        train.train(train.resumed_settings({"output": folders["broken"], "resume": True, "steps": 5}))
