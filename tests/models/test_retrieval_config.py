"""What a model says of itself: pooling, prompts, lengths; and what is saved beside the weights.

python -m pytest tests/models/test_retrieval_config.py
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from mlx_retrieval.models.heads import ACTIVATIONS, POOLING
from mlx_retrieval.models.loading import base_model_config
from mlx_retrieval.models.retrieval_config import FILE, RetrievalConfig
from mlx_retrieval.utils.errors import UserError

BERT, DECODER = {"model_type": "bert"}, {"model_type": "gemma3_text"}
TYPES = ("Transformer", "Pooling", "Normalize")
# Module names of version 2 to 5 of sentence-transformers, and of version 6.
OLD = [f"sentence_transformers.models.{name}" for name in TYPES]
NEW = [
    "sentence_transformers.base.modules.transformer.Transformer",
    "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "sentence_transformers.base.modules.normalize.Normalize",
]
FLAGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


@pytest.fixture
def write_model(tmp_path):
    """Writes the files in which a sentence-transformers model describes itself; returns the folder."""

    def write(types=OLD, pooling=None, path="1_Pooling", **files) -> Path:
        modules = [
            {"idx": i, "name": str(i), "path": path if kind.endswith("Pooling") else "", "type": kind}
            for i, kind in enumerate(types)
        ]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        (tmp_path / path).mkdir(exist_ok=True)
        if pooling is not None:
            (tmp_path / path / "config.json").write_text(json.dumps(pooling))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def flags(*on: str) -> dict:
    """A pooling config as versions 2 to 5 write it."""
    return {"word_embedding_dimension": 8} | {f"pooling_mode_{name}": name in on for name in FLAGS}


# --- sentence-transformers' files ---


def test_minilm_is_believed(minilm):
    config = base_model_config(minilm, BERT)
    assert config == RetrievalConfig(pooling="mean", max_length=256, query_max_length=256)
    assert config.pool_special and config.pool_prompt and not config.append_eos
    tokenizer = config.tokenizer(minilm)
    assert tokenizer(["stone " * 400], "query").lengths[0] == 256
    assert config.head().pooling == "mean"


@pytest.mark.parametrize(
    ("flag", "named", "mode"),
    [
        ("mean_tokens", "mean", "mean"),
        ("cls_token", "cls", "cls"),
        ("lasttoken", "lasttoken", "last"),
        ("max_tokens", "max", "max"),
        ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens", "mean"),  # the same direction
    ],
)
def test_both_layouts_of_pooling(write_model, flag, named, mode):
    old = base_model_config(write_model(OLD, flags(flag)), BERT)
    new = base_model_config(write_model(NEW, {"embedding_dimension": 8, "pooling_mode": named}), BERT)
    listed = base_model_config(write_model(NEW, {"embedding_dimension": 8, "pooling_mode": [named]}), BERT)
    assert old.pooling == new.pooling == listed.pooling == mode
    assert old.pool_prompt and new.pool_prompt


def test_pooling_without_a_flag_is_the_mean(write_model):
    assert base_model_config(write_model(OLD, flags()), BERT).pooling == "mean"


@pytest.mark.parametrize(
    ("pooling", "told"),
    [
        (flags("weightedmean_tokens"), "weightedmean_tokens"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
        (flags("cls_token", "mean_tokens"), "cls and mean"),
        ({"pooling_mode": ["mean", "max"]}, "mean and max"),
    ],
)
def test_other_pooling_is_refused(write_model, pooling, told):
    """Not taken for the mean: the vectors would be others than the model's."""
    with pytest.raises(UserError, match=f"pooling by {told} is not supported; known: mean, cls, last, max"):
        base_model_config(write_model(OLD, pooling), BERT)


def test_prompt_left_out_of_pooling(write_model):
    folder = write_model(OLD, flags("mean_tokens") | {"include_prompt": False})
    assert not base_model_config(folder, BERT).pool_prompt


def test_pooling_folder_of_another_name(write_model):
    assert base_model_config(write_model(OLD, flags("cls_token"), path="pool"), BERT).pooling == "cls"


@pytest.mark.parametrize("names", [("query", "document"), ("query", "passage")])
def test_prompts(write_model, names):
    prompts = dict(zip(names, ("search: ", "text: "), strict=True)) | {"clustering": "cluster: "}
    folder = write_model(OLD, flags("mean_tokens"), config_sentence_transformers={"prompts": prompts})
    config = base_model_config(folder, BERT)
    assert (config.query_prompt, config.document_prompt) == ("search: ", "text: ")


@pytest.mark.parametrize("said", [{}, {"prompts": {}}, {"prompts": None}])
def test_no_prompts(write_model, said):
    config = base_model_config(write_model(OLD, flags("mean_tokens"), config_sentence_transformers=said), BERT)
    assert (config.query_prompt, config.document_prompt) == ("", "")


@pytest.mark.parametrize(
    ("sentence", "tokenizer", "limit"),
    [
        ({"max_seq_length": 128, "do_lower_case": False}, {"model_max_length": 512}, 128),
        ({"max_seq_length": None}, {"model_max_length": 384}, 384),
        ({"transformer_task": "feature-extraction"}, {"model_max_length": 96}, 96),  # version 6 writes it there
        ({}, {"model_max_length": 1000000000000000019884624838656}, 512),
        ({}, {}, 512),
    ],
)
def test_longest_text(write_model, sentence, tokenizer, limit):
    folder = write_model(NEW, {"pooling_mode": "mean"}, sentence_bert_config=sentence, tokenizer_config=tokenizer)
    config = base_model_config(folder, BERT)
    assert config.max_length == config.query_max_length == limit


def test_lowercase(write_model):
    folder = write_model(OLD, flags("mean_tokens"), sentence_bert_config={"do_lower_case": True})
    assert base_model_config(folder, BERT).lowercase


@pytest.mark.parametrize("kind", ["WordEmbeddings", "CLIPModel"])
def test_unknown_modules_are_refused(write_model, kind):
    with pytest.raises(UserError, match=rf"modules\.json names {kind}; known: Transformer, Pooling, Dense, Normalize"):
        base_model_config(write_model([*OLD, f"sentence_transformers.models.{kind}"], flags("mean_tokens")), BERT)


@pytest.mark.parametrize(
    "kinds",
    [
        ("Transformer", "Pooling", "Normalize", "Dense"),
        ("Transformer", "Dense", "Pooling"),
        ("Pooling", "Transformer"),
        ("Transformer", "Pooling", "Pooling"),
        ("Pooling",),
    ],
)
def test_modules_in_another_order_are_refused(write_model, kinds):
    with pytest.raises(UserError, match=f"has the modules {', '.join(kinds)}"):
        base_model_config(write_model([f"sentence_transformers.models.{kind}" for kind in kinds]), BERT)


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"type": "Transformer"}]', '[{"type": 1, "path": ""}]', "7"])
def test_broken_lists_of_modules_are_refused(tmp_path, content):
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(UserError, match=r"modules\.json"):
        base_model_config(tmp_path, BERT)


DENSE = {"in_features": 8, "out_features": 4, "bias": False}
DENSE |= {"activation_function": "torch.nn.modules.linear.Identity"}


def write_dense(write_model, **changes) -> Path:
    folder = write_model(OLD[:2], flags("mean_tokens"))
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(
        json.dumps([*modules, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}])
    )
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text(json.dumps(DENSE | changes))
    return folder


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_layers(write_model, activation):
    folder = write_dense(write_model, activation_function=f"torch.nn.modules.activation.{activation}")
    layer = {"path": "2_Dense", "in_features": 8, "out_features": 4, "bias": False, "activation": activation}
    config = base_model_config(folder, BERT)
    assert config.dense == [layer]
    head = config.head()
    assert head.dense[0].linear.weight.shape == (4, 8) and "bias" not in head.dense[0].linear


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"activation_function": "torch.nn.modules.activation.Softsign"}, "activation Softsign is not supported"),
        ({"module_input_name": "token_embeddings"}, "only a layer on the pooled vector"),
        ({"module_output_name": "other"}, "only a layer on the pooled vector"),
        ({"use_residual": True}, "without residual"),
        ({"in_features": None}, "no in_features or out_features"),
    ],
)
def test_other_dense_layers_are_refused(write_model, changes, told):
    with pytest.raises(UserError, match=told):
        base_model_config(write_dense(write_model, **changes), BERT)


def test_prompts_of_tasks(write_model):
    """As EmbeddingGemma has them: kept by name, and the tokenizer knows them."""
    prompts = {"query": "q: ", "document": "d: ", "Clustering": "task: clustering | query: "}
    config = base_model_config(
        write_model(OLD, flags("mean_tokens"), config_sentence_transformers={"prompts": prompts}), BERT
    )
    assert config.prompts == prompts and config.task_prompts == {"Clustering": "task: clustering | query: "}


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [({"any": "p: "}, ("p: ", "p: ")), ({"any": "p: ", "query": "q: "}, ("q: ", "p: ")), ({}, ("", ""))],
)
def test_the_default_prompt_stands_in(write_model, prompts, expected):
    """sentence-transformers puts it before every text that has no prompt of its own."""
    settings = {"prompts": prompts, "default_prompt_name": "any"}
    config = base_model_config(write_model(OLD, flags("mean_tokens"), config_sentence_transformers=settings), BERT)
    assert (config.query_prompt, config.document_prompt) == expected


def test_broken_file_is_named(write_model):
    folder = write_model(OLD, flags("mean_tokens"))
    (folder / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        base_model_config(folder, BERT)


def test_what_sentence_transformers_itself_writes(minilm, tmp_path):
    """Of the installed version; its own files are the reference."""
    library = pytest.importorskip("sentence_transformers")
    prompts = {"query": "query: ", "document": "passage: "}
    model = library.SentenceTransformer(str(minilm), device="cpu", prompts=prompts)
    model.max_seq_length = 100
    model.save(str(tmp_path / "saved"), create_model_card=False)
    config = base_model_config(tmp_path / "saved", BERT)
    assert config == RetrievalConfig(
        max_length=100, query_max_length=100, query_prompt="query: ", document_prompt="passage: "
    )
    texts = ["Kidney stones, and how they are treated.", "stone " * 300]
    tokenizer = config.tokenizer(tmp_path / "saved")
    for name in ("query", "document"):
        features = model.preprocess([prompts[name] + text for text in texts])
        kept = zip(features["input_ids"], features["attention_mask"], strict=True)
        expected = [ids[mask == 1].tolist() for ids, mask in kept]
        found = tokenizer(texts, name)
        assert found.lengths.tolist() == [len(ids) for ids in expected]
        assert found.ids.tolist() == [token for ids in expected for token in ids]


# --- models that say nothing ---


def test_encoders(minilm, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, tmp_path)
    assert base_model_config(tmp_path, BERT) == RetrievalConfig()
    assert base_model_config(tmp_path, {"model_type": "xlm-roberta"}).pooling == "mean"


def test_decoders(toy_tokenizer_folder):
    """Gemma: its reserved tokens are the prompts, `<eos>` closes, the mean is over prompt and text."""
    config = base_model_config(toy_tokenizer_folder, DECODER)
    assert (config.query_prompt, config.document_prompt) == ("<unused0>", "<unused1>")
    assert config.pooling == "mean" and config.append_eos and not config.pool_special and config.pool_prompt
    texts = config.tokenizer(toy_tokenizer_folder)(["cat"], "query")
    assert texts.ids[:2].tolist() == [2, 4] and texts.ids[-1] == 1
    assert (texts.start[0], texts.end[0]) == (1, texts.lengths[0] - 1)


def test_decoders_without_reserved_tokens(toy_tokenizer_folder, tmp_path):
    settings = json.loads((toy_tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings["added_tokens"] = [token for token in settings["added_tokens"] if "unused" not in token["content"]]
    for i in (0, 1):
        settings["model"]["vocab"][f"other{i}"] = settings["model"]["vocab"].pop(f"<unused{i}>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    shutil.copy(toy_tokenizer_folder / "tokenizer_config.json", tmp_path)
    config = base_model_config(tmp_path, DECODER)
    assert (config.query_prompt, config.document_prompt) == ("", "") and config.append_eos


# --- written and read back ---


def test_round_trip(tmp_path):
    config = RetrievalConfig(
        base_model="some/model",
        base_fingerprint={"layers": "abc"},
        pooling="last",
        pool_special=False,
        append_eos=True,
        bidirectional=True,
        query_prompt="<unused0>ü 腎\n",
        max_length=77,
        task_prompts={"sts": "same? "},
        dense=[{"path": "2_Dense", "in_features": 8, "out_features": 4, "bias": True, "activation": "Tanh"}],
        dimensions=384,
        matryoshka_dims=[64, 128],
    )
    config.write(tmp_path)
    assert RetrievalConfig.read(tmp_path) == config
    saved = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert set(saved) == {field.name for field in dataclasses.fields(RetrievalConfig)}


def test_keys_that_are_missing_have_their_defaults(tmp_path):
    """A folder that an older version wrote."""
    (tmp_path / FILE).write_text('{"pooling": "cls"}')
    assert RetrievalConfig.read(tmp_path) == RetrievalConfig(pooling="cls")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, f"no {FILE}"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"pooling": "cls", "poolin": 1, "colour": 2}', "unknown keys colour, poolin"),
    ],
)
def test_unreadable_config_is_refused(tmp_path, content, told):
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match=told):
        RetrievalConfig.read(tmp_path)


def test_flags_win():
    said = RetrievalConfig(
        pooling="cls", query_prompt="q: ", document_prompt="d: ", max_length=256, query_max_length=64
    )
    assert said.override() == said and said.override(pooling=None, max_length=None) == said
    changed = said.override(pooling="last", query_prompt="")
    assert (changed.pooling, changed.query_prompt, changed.document_prompt) == ("last", "", "d: ")
    assert said.pooling == "cls"  # a copy
    # A length holds for both, unless queries are told theirs.
    assert (said.override(max_length=100).max_length, said.override(max_length=100).query_max_length) == (100, 100)
    both = said.override(max_length=100, query_max_length=20)
    assert (both.max_length, both.query_max_length) == (100, 20)
    assert said.override(query_max_length=20).max_length == 256


def test_queries_are_truncated_at_the_length_that_they_are_filled_up_to():
    """Regression: --max-length alone also set that of a ColBERT model's queries, which PyLate cannot express."""
    colbert = RetrievalConfig(task="late", max_length=300, query_max_length=32, query_expansion=32)

    def lengths(**flags) -> tuple[int, int]:
        config = colbert.override(**flags)
        return config.query_max_length, config.query_expansion

    assert lengths(max_length=180) == lengths(query_expansion=None, max_length=180) == (32, 32)
    assert lengths(query_expansion=24) == lengths(query_expansion=24, max_length=180) == (24, 24)
    assert lengths(query_expansion=0) == (32, 0) and lengths(query_expansion=0, max_length=180) == (180, 0)
    assert lengths(query_max_length=20, max_length=180) == (20, 32)


def test_every_pooling_is_taken_and_others_are_refused():
    assert [RetrievalConfig().override(pooling=mode).pooling for mode in POOLING] == list(POOLING)
    with pytest.raises(UserError, match="pooling 'middle' is unknown; known: mean, cls, last, max"):
        RetrievalConfig().override(pooling="middle")
