"""Sources with settings of their own: prompts, lengths and losses, in training alone.

python -m pytest tests/training/test_mixtures.py
"""

import json

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from mlx.utils import tree_flatten
from simulated_ranks import on_ranks

import loss
import train
from data_loader import make_batch
from mlx_retrieval import backend
from mlx_retrieval.training import reporting, source_settings
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.flags import from_flags
from mlx_retrieval.training.headline import mixture_lines
from mlx_retrieval.training.mixtures import parts_of, usage_lines
from mlx_retrieval.training.rerank_batches import GroupMaker
from mlx_retrieval.training.settings_file import read_yaml, write_yaml
from mlx_retrieval.utils.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few shapes, as each is compiled, and no pictures."""
    monkeypatch.setattr(backend, "LENGTH_GRID", 64)
    monkeypatch.setattr(reporting, "draw_curves", lambda *_: None)


@pytest.fixture
def files(write_rows) -> tuple[str, str]:
    """Pairs, and rows that a teacher has scored; the first query is in both."""
    pairs = [{"query": f"query {i}", "document": f"document {i} " + "word " * (i % 7)} for i in range(24)]
    scored = [{"query": f"query {30 * (i > 0) + i}", "document": f"text {i} " + "long " * (i % 9)} for i in range(16)]
    scored = [row | {"negatives": [f"other {i}"], "scores": [2.0, i / 8]} for i, row in enumerate(scored)]
    return str(write_rows(pairs, "pairs.jsonl")), str(write_rows(scored, "scored.jsonl"))


@pytest.fixture
def settings(tmp_path, small):
    """Settings of a small run on sources, changed by keyword."""

    def make(*sources, **changes) -> Settings:
        defaults = {"model": small, "batch_size": 4, "steps": 2, "eval_tasks": [], "lora_rank": 2, "save_steps": 0}
        if sources:
            defaults["sources"] = list(sources)
        return Settings(**defaults | {"output": str(tmp_path / "run")} | changes)

    return make


OF_PAIRS = {"query_prompt": "question: ", "max_length": 9}
RERANK = {"task": "rerank", "reranker_type": "cross-encoder"}
OF_SCORED = {"loss": "kl_distill", "temperature": 0.2, "teacher_temperature": 2.0, "document_prompt": "passage: "}


@pytest.mark.parametrize("task, accumulation", [
    ("embed", 4), ("late", 3), pytest.param("embed", 0, marks=pytest.mark.slow)
])  # fmt: skip
def test_a_batch_is_learnt_as_in_a_run_on_its_source_alone(settings, files, task, accumulation):
    """Loss and gradient, of batches of both sources, are those of a run with these settings and this source only."""
    more = {"task": task, "gradient_accumulation_steps": accumulation}
    sources = [{"data": name} | own for name, own in zip(files, (OF_PAIRS, OF_SCORED), strict=True)]
    mixed = training_run.prepare(settings(*sources, **more)).trainer
    seen = set()
    for k in mixed.batches.sample_numbers(1):
        batch = mixed.batches.batch(k)
        seen.add(batch.source)
        own = {key: value for key, value in sources[batch.source].items() if key != "data"}
        alone = training_run.prepare(settings(data=[files[batch.source]], **own, **more)).trainer
        examples = [mixed.batches.rows[int(i)] for i in batch.rows]
        expected = alone.grad_cache(make_batch(examples, batch.rows, alone.batches.tokenizer), 1)
        result = mixed.grad_cache(batch, 1)
        assert result.loss.item() == expected.loss.item() != 0
        pairs = zip(tree_flatten(result.grads), tree_flatten(expected.grads), strict=True)
        assert all(mx.array_equal(one, other).item() for (_, one), (_, other) in pairs)
        assert any(mx.abs(one).max().item() > 0 for _, one in tree_flatten(result.grads))
    assert seen == {0, 1}


@pytest.mark.slow
def test_ranks_learn_from_sources_as_one_process(settings, files):
    """What two ranks check before the first step, and loss and gradient of a batch of each source."""
    sources = [{"data": name} | own for name, own in zip(files, (OF_PAIRS, OF_SCORED), strict=True)]
    trainer = training_run.prepare(settings(*sources)).trainer
    on_ranks(2, trainer.check_ranks)
    for k in trainer.batches.sample_numbers(1):
        batch = trainer.batches.batch(k)
        alone, norm = trainer.compute_grads(batch, 1)
        for result, its_norm in on_ranks(2, lambda batch=batch: trainer.compute_grads(batch, 1)):
            assert result.loss.item() == pytest.approx(alone.loss.item(), rel=1e-5) != 0
            assert its_norm.item() == pytest.approx(norm.item(), rel=1e-5) != 0
            pairs = zip(tree_flatten(result.grads), tree_flatten(alone.grads), strict=True)
            assert all(mx.allclose(one, other, rtol=1e-4, atol=1e-6).item() for (_, one), (_, other) in pairs)


def test_prompts_and_lengths_differ_within_mixed_batches(settings, files):
    """A text under two prompts is two texts, and an answer to the one query is an answer to the other as well."""
    texts = {"query_prompt": "ask: ", "document_prompt": "passage: ", "max_length": 12}
    sources = [{"data": files[0]} | OF_PAIRS, {"data": files[1]} | texts]
    batches = training_run.prepare(settings(*sources, batches="mixed", batch_size=40)).trainer.batches
    batch, tokenizers = batches.batch(0), batches.tokenizers
    assert batch.source == -1 and batch.queries == len({(i % 2, batches.rows[i].query) for i in batch.rows.tolist()})
    asked = {}
    for place, number in enumerate(batch.rows.tolist()):
        example, tokenizer = batches.rows[number], tokenizers[number % 2]
        for name, text, index in (
            ("query", example.query, batch.query[place]),
            ("document", example.positive, batch.queries + batch.document[place]),
        ):
            assert batch.texts.part(index, index + 1).ids.tolist() == tokenizer([text], name).ids.tolist()
        if example.query == "query 0":
            asked[number % 2] = batch.query[place], batch.document[place]
    (one, its), (other, others) = asked[0], asked[1]
    assert one != other and batch.relevant[[one, one, other, other], [its, others, its, others]].all()


def test_a_negative_is_one_under_every_prompt(settings, files):
    """Of a query under two prompts, the negatives of one row are hard negatives of both."""
    sources = [{"data": files[1]} | OF_PAIRS, {"data": files[1]}]
    batch = training_run.prepare(settings(*sources, batches="mixed", batch_size=32)).trainer.batches.batch(0)
    assert batch.queries == 32 and set(batch.hard_negatives.sum(axis=1)) == {2}


def test_late_sources_of_unequal_sizes(settings, files, write_rows):
    """A batch of the small one has one query only, and its own memory is estimated."""
    one = write_rows([{"query": "the only query", "document": "its text", "negatives": ["another text"]}], "one.jsonl")
    trainer = training_run.prepare(settings({"data": files[0]}, {"data": str(one)}, task="late")).trainer
    queries = [trainer.batches.batch(k).queries for k in trainer.batches.sample_numbers(2)]
    assert min(queries) == 1 < max(queries)


def test_a_new_run_has_no_cursor_to_go_on_from(settings, files):
    """Ranks take it over from the first one all the same."""
    batches = training_run.prepare(settings({"data": files[0]}, {"data": files[1]})).trainer.batches
    batches.restore({}, 0)
    assert batches.batch(0).rows.tolist() == batches.row_numbers(0)


def test_small_weights_count(settings, files):
    sources = [{"data": name, "weight": weight} for name, weight in zip(files, (3e-7, 9e-7), strict=True)]
    rows = training_run.prepare(settings(*sources, batches="mixed")).trainer.batches.rows
    assert rows.counts.tolist() == [1, 3]


def test_a_short_name_of_a_loss_is_the_loss(settings, files):
    (source,) = settings({"data": files[1], "loss": "kl"}).sources
    assert source["loss"] == "kl_distill"


def test_a_source_of_a_single_row_has_nothing_to_learn(settings, files, write_rows):
    one = str(write_rows([{"query": "the only query", "document": "its text"}], "one.jsonl"))
    with pytest.raises(UserError, match="one.jsonl: a single row: rows without negatives"):
        training_run.prepare(settings({"data": files[0]}, {"data": one}))
    training_run.prepare(settings({"data": files[0]}, {"data": one}, batches="mixed"))


SAMPLING = [
    (({"weight": 2.0}, {"weight": 1.0}), {}),
    (({}, {}), {}),  # by size
    (({}, {}), {"source_temperature": 2.0}),
    (({}, {}), {"similar_rows": 2}),
]


@pytest.mark.parametrize(("weights", "changes"), SAMPLING, ids=str)
def test_a_resumed_run_draws_the_rows_that_the_whole_one_would(settings, files, tmp_path, weights, changes):
    """From the settings that it has saved and the cursor of its last step, over several epochs of each source."""
    made = settings(*({"data": name} | own for name, own in zip(files, weights, strict=True)), **changes)
    whole = training_run.prepare(made).trainer.batches
    expected = [whole.batch(k).rows.tolist() for k in range(20)]
    write_yaml(made, tmp_path / "config.yaml")
    again = training_run.prepare(from_flags("", argv=["--config", str(tmp_path / "config.yaml")])[0]).trainer.batches
    again.restore(json.loads(json.dumps(whole.cursor(7))), 7)
    assert [again.batch(k).rows.tolist() for k in range(7, 20)] == expected[7:]
    assert {i % 2 for rows in expected for i in rows} == {0, 1} and len({*map(tuple, expected)}) == 20


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "changes"), SAMPLING, ids=str)
def test_a_resumed_run_is_the_same_bit_for_bit(settings, files, tmp_path, capsys, weights, changes):
    """In the middle, from the settings that the run has saved; and so is a new run of these settings."""
    own = zip(files, weights, (OF_PAIRS, OF_SCORED), strict=True)
    sources = [{"data": name} | weight | of_source for name, weight, of_source in own]
    for name, stop in (("whole", 0), ("cut", 3)):
        train.train(settings(*sources, **changes, steps=5, stop_after=stop, output=str(tmp_path / name)))
    train.train(train.resumed_settings({"output": str(tmp_path / "cut"), "resume": True}))
    again = from_flags("", argv=["--config", str(tmp_path / "cut" / "config.yaml"), "--output", str(tmp_path / "new")])[
        0
    ]
    train.train(again)
    weights = [(tmp_path / name / "final" / "adapters.safetensors").read_bytes() for name in ("whole", "cut", "new")]
    assert weights[0] == weights[1] == weights[2]
    saved = json.loads((tmp_path / "cut" / "final" / "retrieval_config.json").read_text())
    assert "question" not in saved["query_prompt"] and saved["max_length"] > 9


@pytest.mark.parametrize("sources, changes, message", [
    ([{}, {}], {"loss": "kl_distill"}, "source .*pairs.jsonl: loss kl_distill: every row needs scores"),
    ([{"loss": "kl_distill"}, {}], {}, "source .*pairs.jsonl: loss kl_distill: every row needs scores"),
    ([{}, {"loss": "kl_distill"}], {"batches": "mixed"}, "--batches mixed: a batch of all .* they differ in loss"),
    ([{"loss": "xtr"}, {}], {}, "source .*pairs.jsonl: loss xtr compares tokens"),
    ([{"temperature": -1}, {}], {}, "source .*pairs.jsonl: temperature -1: must be above 0"),
    ([{"max_length": 10**6}, {}], {}, "source .*pairs.jsonl: max_length: the model has"),
    ([{"max_length": 2}, {}], {}, "source .*pairs.jsonl: max_length 2 leaves no room"),
    ([{"spread_weight": 1.0}, {}], {"task": "late"}, "source .*pairs.jsonl: spread_weight is for task embed"),
    ([{"lossy": "kl"}, {}], {}, "source .*pairs.jsonl: unknown key 'lossy'; did you mean loss?"),
    ([{"weight": 0}, {}], {}, "source .*pairs.jsonl: weight 0: must be above 0"),
    ([{"weight": 1}, {}], {"source_temperature": 2.0}, "--source-temperature 2: the weights of the sources"),
    ([{}], {"source_temperature": 2.0}, "--source-temperature 2: there is one source to draw from"),
    ([{}, {}], {"batch_size": 1}, "--batch-size 1: rows without negatives"),
    ([{}, {}], {"data": ["other.jsonl"]}, "--data: beside sources"),
    ([{}, {}], {"task": "chat"}, "sources: for --task embed, late and rerank"),
    ([{}, {}], {"guard": ["eval-data", "eval-data"]}, "^--guard .*: names a task twice"),
    ([{"temperature": -1}, {}], {"holdout": 0.9, "eval_tasks": None}, "^--holdout 0.9: must be a share"),
    ([{}, {"max_length": 9}], {"max_length": 2}, "^--max-length 2 leaves no room"),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(settings, files, sources, changes, message):
    named = [{"data": name} | own for name, own in zip(files, sources, strict=False)]
    with pytest.raises(UserError, match=message) as error:
        training_run.prepare(settings(*named, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("sources:\n- data: a.jsonl\n  temprature: 1", "run.yaml:3: unknown key 'temprature' of a source; did you mean"),
    ("sources:\n- data: a.jsonl\n  steps: 1", "run.yaml:3: unknown key 'steps' of a source"),
    ("sources:\n- data: a.jsonl\n  loss: kld", "run.yaml:3: loss: 'kld' is not one of"),
    ("sources:\n- data: a.jsonl\n  weight: many", "run.yaml:3: weight: 'many' is not a number"),
    ("seed: 1\nsources:\n- weight: 1", "run.yaml:3: a source without a key `data`"),
    ("seed: 1\nsources: a.jsonl", "run.yaml:2: sources: not a list of mappings"),
    ("sources:\n- data: a.jsonl\ndata: [b.jsonl]", "run.yaml:3: data beside sources"),
    ("sources:\n- data: a.jsonl:2", "sources: data: a.jsonl:2: write the weight as a key"),
    ("seed: 1\nsources: []", "run.yaml:2: sources: not a list of mappings"),
    ("seed: 1\nsources:", "run.yaml:2: sources: not a list of mappings"),
    ("sources:\n- data: a.jsonl\nsources:\n- data: b.jsonl", "run.yaml:3: sources is there twice"),
    ("sources:\n- data: a.jsonl\n  loss: xtr\n  loss: bce", "run.yaml:4: loss is there twice"),
    ("steps: 1\nsteps: 2", "run.yaml:2: steps is there twice"),
    ("z: &z {data: [b.jsonl]}\nsources: [{data: a.jsonl}]\n<<: *z", "run.yaml:1: data beside sources"),
    ("x: &x {sources: [{}]}\n<<: *x", "run.yaml:1: a source without a key `data`"),
], ids=str)  # fmt: skip
def test_a_file_with_wrong_sources_is_refused(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        from_flags("", argv=["--config", str(tmp_path / "run.yaml")])


def test_flags_do_not_name_other_data(tmp_path):
    (tmp_path / "run.yaml").write_text("sources:\n- {data: a.jsonl, max-length: 7, directions: query-document}")
    assert read_yaml(tmp_path / "run.yaml")["sources"] == [
        {"data": "a.jsonl", "max_length": 7, "directions": ["query-document"]}
    ]
    with pytest.raises(UserError, match="--data: the sources in --config"):
        from_flags("", argv=["--config", str(tmp_path / "run.yaml"), "--data", "b.jsonl"])


def test_each_source_has_a_line(settings, files, capsys):
    """And one of each is measured, so that the longest texts are."""
    made = settings({"data": files[0]} | OF_PAIRS, {"data": files[1]} | OF_SCORED)
    run = training_run.prepare(made)
    rows = run.trainer.batches.rows
    parts = parts_of(made, run.retrieval, run.base, rows, 512)
    first, second = (text for _, text in mixture_lines(rows, parts))
    assert first.startswith("60.0% of the batches") and first.endswith(
        '24 rows: query prompt "question: ", max length 9'
    )
    assert second.endswith('document prompt "passage: ", loss kl_distill, temperature 0.2, teacher temperature 2')
    assert dict(run.headline)["loss"].endswith("(defaults); sources with settings of their own have these")
    assert usage_lines(parts, run.retrieval)[0] in run.headline
    longest = [int(run.trainer.batches.batch(k).texts.lengths.max()) for k in run.trainer.batches.sample_numbers(1)]
    assert len(longest) == 2 and longest[0] <= 9 < longest[1]


def test_what_one_source_would_not_use_is_for_the_others(settings, files):
    """Regression: a setting of the run that only some sources use; one that none uses is refused."""
    shared = {"beta": 2.0, "margin": 0.3, "hardness_of": "all"}
    own = ({"loss": "hard_negative_info_nce"}, {"margin_weight": 0.5}, {"hardness": 2.0})
    made = settings(*({"data": files[0]} | each for each in own), **shared)
    alone = [source_settings.settings_of(made, source) for source in made.sources]
    assert [(s.beta, s.margin, s.hardness_of) for s in alone] == [
        (2.0, 0.2, "hard"),
        (1.0, 0.3, "hard"),
        (1.0, 0.2, "all"),
    ]
    with pytest.raises(UserError, match="beta 2.0: is for .*loss hard_negative_info_nce"):
        settings({"data": files[0]} | own[1], {"data": files[1]} | own[2], **shared)
    with pytest.raises(UserError, match="^source .*: beta 2.0: is for"):
        settings({"data": files[0], "beta": 2.0}, {"data": files[1]})


def test_random_negatives_of_a_source_are_those_of_its_loss(settings, files, write_rows):
    """Regression: a source with info_nce had those of all others drawn from positives and negatives alike."""
    texts = [{"query": f"q {i}", "document": f"d {i}", "negatives": [f"n {i}"]} for i in range(8)]
    labelled = [{"query": f"q {i}", "document": f"d {i}", "label": i % 2} for i in range(8)]
    sources = [{"data": str(write_rows(texts, "one.jsonl")), "loss": "info_nce"}]
    sources += [{"data": str(write_rows(texts, "two.jsonl")), "loss": "ranknet"}]
    sources += [{"data": str(write_rows(labelled, "labels.jsonl")), "loss": "bce"}]
    scores = [{"query": f"q {i}", "documents": ["a", "b"], "scores": [2, -3]} for i in range(8)]
    sources += [{"data": str(write_rows(scores, "scores.jsonl")), "loss": "margin_mse"}]
    run = training_run.prepare(settings(*sources, **RERANK, random_negatives=2))
    shown = [text for name, text in run.headline if name == "example"]
    assert ["2 random negatives" in text for text in shown] == [True, True, False, False]  # not scored by a teacher
    batches, found = run.trainer.batches, {}
    for k in batches.sample_numbers(3):
        batch = batches.batch(k)
        examples = [batches.rows[int(i)] for i in batch.rows]
        part = batches.rows.sources[batch.source]
        maker = GroupMaker(part, 0 if batch.source == 3 else 2, from_all=batch.source == 0)
        expected = maker(examples, batch.rows.tolist(), batches.tokenizer)
        np.testing.assert_array_equal(batch.texts.ids, expected.texts.ids)
        np.testing.assert_array_equal(batch.labels, expected.labels)
        found[batch.source] = batch.text.shape[1]
    assert found == {0: 4, 1: 4, 2: 1, 3: 2}


def test_each_source_of_a_reranker_has_its_loss(settings, files):
    """A batch is learnt by its source's loss, and a source that lacks what its loss needs is named."""
    sources = [{"data": name, "loss": loss} for loss in ("ranknet", "margin_mse") for name in files[1:]]
    trainer = training_run.prepare(settings(*sources, **RERANK)).trainer
    losses = {trainer.grad_cache.objective.of(trainer.batches.batch(k)).settings.loss for k in range(2)}
    assert losses == {"ranknet", "margin_mse"}
    wrong = settings({"data": files[0]}, *sources, **RERANK)
    with pytest.raises(UserError, match="^source .*pairs.jsonl: .*neither labels nor negatives"):
        training_run.prepare(wrong)
    with pytest.raises(UserError, match="--batches mixed: .* they differ in loss"):
        training_run.prepare(settings(*sources, **RERANK, batches="mixed"))


def test_a_source_has_the_default_temperature_of_its_own_loss(settings, files, write_rows, tmp_path):
    """Regression: it had that of the run's loss, another one for rerankers. One that the run is given is for all."""
    rows = str(write_rows([{"query": f"q {i}", "positive": f"d {i}", "negatives": [f"n {i}"]} for i in range(8)]))
    kinds = ({"loss": "info_nce"}, {"loss": "list_bce"}, {})

    def temperatures(**changes) -> list[float]:
        run = training_run.prepare(settings(*({"data": rows} | own for own in kinds), **RERANK, **changes))
        write_yaml(run.settings, tmp_path / "config.yaml")
        again, _ = from_flags("", argv=["--config", str(tmp_path / "config.yaml")])
        objectives = [each.trainer.grad_cache.objective.objectives for each in (run, training_run.prepare(again))]
        first, second = ([own.settings.temperature for own in each] for each in objectives)
        assert first == second  # from the settings that it saves
        return first

    alone = [training_run.prepare(settings(data=[rows], **own, **RERANK)).settings.temperature for own in kinds]
    assert temperatures() == alone == [0.1, 1.0, 1.0]
    assert temperatures(loss="info_nce") == [0.1, 1.0, 0.1]
    assert temperatures(temperature=0.3) == [0.3] * 3


@pytest.mark.parametrize("batches", ["homogeneous", "mixed"])
def test_a_validation_loss_is_that_of_the_run(settings, files, write_rows, tmp_path, batches):
    """Its rows are of no source, so they need not have what a source's loss needs.

    Regression: mixed batches gave it the loss of the first source, 0 of rows that no teacher has scored.
    """
    write_rows([{"query": f"v {i}", "document": f"w {i}"} for i in range(8)], "valid.jsonl")
    write_rows([json.loads(line) for line in open(files[1])], "train.jsonl")
    trainer = training_run.prepare(settings({"data": str(tmp_path)} | OF_SCORED, batches=batches)).trainer
    batch = trainer.validation.batch(0)
    assert batch.source == -1 and trainer.validation_objective.settings.loss == "info_nce"
    expected = trainer.grad_cache.loss(batch, trainer.validation_objective)
    plain = training_run.prepare(settings(data=[str(tmp_path)])).trainer
    assert expected == plain.grad_cache.loss(plain.validation.batch(0)) > 0
    assert trainer.evaluate(0)["validation_loss"] > 0


def test_validation_rows_that_no_teacher_has_scored_give_no_loss_to_learn_scores(settings, files, write_rows, tmp_path):
    """Regression: their loss was 0 at every step, so that no step was the best one."""
    write_rows([{"query": f"v {i}", "document": f"w {i}"} for i in range(8)], "valid.jsonl")
    write_rows([json.loads(line) for line in open(files[1])], "train.jsonl")
    run = training_run.prepare(settings(data=[str(tmp_path)], loss="kl_distill"))
    assert run.trainer.validation is None
    reason = "valid.jsonl gives no loss: kl_distill learns a teacher's scores, and not every row has them"
    assert dict(run.headline)["validation"].endswith(reason)


@pytest.mark.parametrize("plain", [False, True])
def test_a_batch_has_no_more_rows_than_there_are(settings, files, plain):
    """Batches of one source also where all rows are fewer than --batch-size; lines say that rows repeat."""
    sources = [] if plain else [{"data": files[0]}, {"data": files[1], **OF_SCORED}]
    more = {"data": [f"{name}:1" for name in files]} if plain else {}
    run = training_run.prepare(settings(*sources, **more, batch_size=99))
    for k in range(4):
        assert len(np.unique(run.trainer.batches.batch(k).rows % 2)) == 1
    warnings = [text for name, text in run.headline if name == "warning"]
    assert [file for file in files if any(text.startswith(f"{file}: ") for text in warnings)] == list(files)
    assert any("or --batches mixed avoids that" in text for text in warnings) == plain  # else they differ in loss
    assert "--batch-size 99 is more than 40 rows: a batch holds 40, of one source" in warnings


def test_scored_pairs_are_a_source_beside_others(settings, files, write_rows):
    """Their own batches alone are learnt by their scores."""
    pairs = [{"text1": f"one {i}", "text2": f"other {i}", "score": i % 5 / 4} for i in range(12)]
    scored = {"data": str(write_rows(pairs, "sts.jsonl")), "loss": "cosent"}
    trainer = training_run.prepare(settings({"data": files[0]}, scored)).trainer
    losses = set()
    for k in trainer.batches.sample_numbers(1):
        batch = trainer.batches.batch(k)
        result = trainer.grad_cache(batch, seed=1)
        losses.add(name := trainer.grad_cache.objective.of(batch).settings.loss)
        if name == "cosent":
            sides = (result.representations[mx.array(i)] for i in (batch.query, batch.queries + batch.document))
            expected = loss.scored_pairs(*sides, mx.array(batch.scores[:, 0])).item()
            assert result.loss.item() == pytest.approx(expected, rel=1e-6) != 0
    assert losses == {"info_nce", "cosent"}


@pytest.mark.parametrize("changes, message", [
    ({"batches": "mixed"}, "rows with a label do not mix with others; --batches homogeneous"),
    (RERANK | {"random_negatives": 2}, "source .*sts.jsonl: loss cosent compares vectors"),
    ({"rounds": 1}, "--rounds: .*sts.jsonl has rows of the kind 'label'"),
    ({"task": "late"}, "source .*sts.jsonl: loss cosent compares one vector a text"),
    ({"margin_weight": 0.1}, "source .*sts.jsonl: margin_weight 0.1: does not go with cosent"),
])  # fmt: skip
def test_where_scored_pairs_are_no_source(settings, files, write_rows, changes, message):
    scored = {"data": str(write_rows([{"text1": "a", "text2": "b", "score": 0.5}] * 9, "sts.jsonl")), "loss": "cosent"}
    with pytest.raises(UserError, match=message):
        training_run.train(settings({"data": files[0]}, scored, **changes))
