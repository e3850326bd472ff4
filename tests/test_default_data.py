"""The texts and the model of a fresh checkout: formats, separation, and that the script reproduces them.

python -m pytest tests/test_default_data.py
"""

import collections
import json
import sys
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "gemma-3-tiny-mlx"
DATA_FILES = ("train-data.jsonl", "eval-data/corpus.jsonl", "eval-data/queries.jsonl", "eval-data/qrels/test.tsv")
sys.path.insert(0, str(ROOT / "tools"))

import make_data  # noqa: E402  (tools/ has to be on the path first)


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train_rows() -> list[dict]:
    return rows_of("train-data.jsonl")


@pytest.fixture(scope="module")
def evaluation() -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Documents and queries by id, and the scores of a query's documents."""
    lines = (ROOT / "eval-data/qrels/test.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "query-id\tcorpus-id\tscore"
    qrels = collections.defaultdict(dict)
    for query, document, score in (line.split("\t") for line in lines[1:]):
        qrels[query][document] = int(score)
    corpus, queries = rows_of("eval-data/corpus.jsonl"), rows_of("eval-data/queries.jsonl")
    assert all(row.keys() == {"_id", "title", "text"} for row in corpus)
    assert all(row.keys() == {"_id", "text"} for row in queries)
    return {row["_id"]: row["text"] for row in corpus}, {row["_id"]: row["text"] for row in queries}, qrels


def test_training_rows_have_the_documented_form_and_size(train_rows):
    assert len(train_rows) >= 2000
    assert len({row["document"] for row in train_rows}) >= 500
    assert (ROOT / "train-data.jsonl").stat().st_size <= 2_000_000
    for row in train_rows:
        assert row.keys() == {"query", "document", "rank"} and row["rank"] in (1, 2)
        assert row["query"].strip() == row["query"] != "" and row["document"].strip() == row["document"] != ""
    assert np.mean([row["rank"] == 1 for row in train_rows]) > 0.7
    pairs = [(row["query"], row["document"]) for row in train_rows]
    assert len(set(pairs)) == len(pairs)


def test_evaluation_is_consistent(evaluation):
    corpus, queries, qrels = evaluation
    assert len(corpus) == len(set(corpus.values())) == 2 * make_data.EVAL_TOPICS + make_data.DISTRACTORS
    assert len(queries) == len(set(queries.values())) == make_data.EVAL_QUERIES
    assert qrels.keys() == queries.keys()
    assert all(scores.keys() <= corpus.keys() and sorted(scores.values()) == [1, 2] for scores in qrels.values())


def test_no_text_is_in_both_training_and_evaluation(train_rows, evaluation):
    corpus, queries, _ = evaluation
    trained = {" ".join(row[key].lower().split()) for row in train_rows for key in ("query", "document")}
    tested = {" ".join(text.lower().split()) for text in (*corpus.values(), *queries.values())}
    assert not trained & tested


def test_evaluated_topics_are_new_but_their_parts_are_known():
    topics = make_data.load_topics()
    known, held_out = make_data.split_topics(topics, make_data.random.Random(make_data.SEED))
    assert not set(known) & set(held_out) and len(known) + len(held_out) == len(topics)
    things, faults = {thing for thing, _ in known}, {fault for _, fault in known}
    assert all(thing in things and fault in faults for thing, fault in held_out)


def test_every_concept_has_three_wordings_in_each_register():
    for thing, fault in make_data.load_topics():
        assert min(map(len, (thing.lay, thing.tech, fault.lay, fault.tech, fault.fix))) >= 3


def test_documents_and_queries_keep_to_their_length(train_rows, evaluation):
    corpus, queries, _ = evaluation
    documents = [len(text.split()) for text in (*corpus.values(), *(row["document"] for row in train_rows))]
    asked = [len(text.split()) for text in (*queries.values(), *(row["query"] for row in train_rows))]
    assert min(documents) >= 18 and max(documents) <= 65 and 25 <= np.mean(documents) <= 60
    assert min(asked) >= 3 and max(asked) <= 20 and 5 <= np.mean(asked) <= 12


def test_the_script_makes_the_same_data_byte_for_byte(tmp_path):
    make_data.make_data(tmp_path)
    for name in DATA_FILES:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_another_seed_makes_other_data(tmp_path):
    make_data.make_data(tmp_path, seed=1)
    assert (tmp_path / "train-data.jsonl").read_bytes() != (ROOT / "train-data.jsonl").read_bytes()


@pytest.mark.slow
def test_the_script_makes_the_same_tokenizer_byte_for_byte(tmp_path):
    import make_model

    known, _ = make_data.split_topics(make_data.load_topics(), make_data.random.Random(make_data.SEED))
    make_model.make_tokenizer(known, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes(), name


def test_pretraining_is_deterministic():
    """Two short runs from one seed give the same losses and the same weights."""
    import make_model
    from mlx.utils import tree_flatten

    config = {**make_model.CONFIG, "vocab_size": 300}
    rows = np.random.default_rng(0).integers(0, 300, (64, 33)).astype(np.int32)
    runs = []
    for _ in range(2):
        model = make_model.new_model(config, seed=3)
        losses = make_model.train_language_model(model, rows, steps=4, batch_size=8)
        runs.append((losses, dict(tree_flatten(model.parameters()))))
    assert runs[0][0] == runs[1][0]
    assert all(mx.array_equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_the_model_folder_is_small_and_complete():
    sizes = {file.name: file.stat().st_size for file in MODEL.iterdir()}
    assert sizes.keys() == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(sizes.values()) <= 8_000_000
    weights = mx.load(str(MODEL / "model.safetensors"))
    assert {value.dtype for value in weights.values()} == {mx.bfloat16}
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == weights["model.embed_tokens.weight"].shape[0]
    assert set(config["layer_types"]) == {"sliding_attention", "full_attention"}
    assert len(config["layer_types"]) == config["num_hidden_layers"]


def test_the_tokenizer_adds_bos_alone_and_knows_every_character():
    import make_model
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    plain, wrapped = Tokenizer.from_file(str(MODEL / "tokenizer.json")), AutoTokenizer.from_pretrained(str(MODEL))
    assert [plain.token_to_id(name) for name in make_model.SPECIAL] == list(range(len(make_model.SPECIAL)))
    for text in ("my fridge is warm", "<unused0>two  blanks and 12\u00b0 \u4e2d\u6587 \U0001f600\n", "a", ""):
        ids = plain.encode(text).ids
        assert ids == wrapped(text)["input_ids"]
        assert ids[0] == make_model.BOS and make_model.EOS not in ids and make_model.UNK not in ids
        assert plain.decode(ids, skip_special_tokens=False) == "<bos>" + text
    assert (wrapped.bos_token, wrapped.eos_token, wrapped.pad_token) == ("<bos>", "<eos>", "<pad>")
    chat = wrapped.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n"


def test_mlx_and_transformers_give_the_same_hidden_states():
    """Bug guarded against: mlx-lm ignores `rope_parameters` and `layer_types` and would fall back to its defaults."""
    import make_model

    assert make_model.check(MODEL) <= 1e-4
