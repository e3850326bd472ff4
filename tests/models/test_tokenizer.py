"""Texts to token ids: prompts, truncation, special tokens, pooled span; any text whatsoever.

python -m pytest tests/models/test_tokenizer.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors

from mlx_retrieval.models.batching import Texts
from mlx_retrieval.models.tokenizer import TextTokenizer, load_tokenizer, named_token, returns_types
from mlx_retrieval.utils.errors import UserError

PAD, EOS, BOS, UNK, QUERY, DOCUMENT, BOLD = range(7)  # of the toy tokenizer
GEMMA_PROMPTS = {"query": "<unused0>", "document": "<unused1>"}
ORDINARY = (
    "What are the symptoms of a kidney stone?",
    "naïve café — déjà vu; ÅNGSTRÖM, straße",
    "腎臓結石の治療法 и почечный камень",
    "emoji 🧪🫠 and a\ttab,\nline breaks\r\n and   spaces ",
    "x",
    "",
    "   ",
    "<b>bold</b> <br/> [1] [see below] <unknown>",
    "long " * 400,
    "Pneumonoultramicroscopicsilicovolcanoconiosis" * 30,
)


def gemma(folder: Path, limit: int = 32, **changes) -> TextTokenizer:
    """As decoders are used: prompts are reserved tokens, `<eos>` closes, pooling is over prompt and text."""
    given = {"append_eos": True, "pool_special": False, **changes}
    return TextTokenizer(folder, given.pop("prompts", GEMMA_PROMPTS), {"query": limit, "document": limit}, **given)


def bert(folder: Path, query: int = 16, document: int = 256, **changes) -> TextTokenizer:
    return TextTokenizer(folder, changes.pop("prompts", {}), {"query": query, "document": document}, **changes)


def rows(texts: Texts) -> list[list[int]]:
    return [texts.ids[a:b].tolist() for a, b in zip(texts.offsets[:-1], texts.offsets[1:], strict=True)]


def spans(texts: Texts) -> list[tuple[int, int]]:
    return list(zip(texts.start.tolist(), texts.end.tolist(), strict=True))


# --- ids ---


@pytest.mark.parametrize(("name", "limit"), [("document", 256), ("query", 16)])
def test_ids_equal_transformers(minilm, name, limit):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(str(minilm))
    expected = reference(list(ORDINARY), truncation=True, max_length=limit)["input_ids"]
    found = bert(minilm)(ORDINARY, name)
    assert rows(found) == expected
    assert max(found.lengths) == limit  # one text at least was cut
    assert spans(found) == [(0, len(ids)) for ids in expected]


def test_text_prompt_is_tokenised_with_the_text(minilm):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(str(minilm))
    tokenizer = bert(minilm, prompts={"query": "query: ", "document": "passage: "})
    for name, prompt, limit in (("query", "query: ", 16), ("document", "passage: ", 256)):
        expected = reference([prompt + text for text in ORDINARY], truncation=True, max_length=limit)["input_ids"]
        assert rows(tokenizer(ORDINARY, name)) == expected
    expected = reference(list(ORDINARY), truncation=True, max_length=256)["input_ids"]
    assert rows(tokenizer(ORDINARY)) == expected  # no name, no prompt


def test_gemma_frame(toy_tokenizer_folder):
    """`<bos><unused0>text<eos>`, with the tokenizer's own ids for the text."""
    plain = Tokenizer.from_file(str(toy_tokenizer_folder / "tokenizer.json"))
    tokenizer = gemma(toy_tokenizer_folder, 10_000)
    for name, prompt in (("query", QUERY), ("document", DOCUMENT)):
        expected = [[BOS, prompt, *plain.encode(text, add_special_tokens=False).ids, EOS] for text in ORDINARY]
        assert rows(tokenizer(ORDINARY, name)) == expected
    assert tokenizer.pad_id == PAD


def test_types_and_order(toy_tokenizer_folder):
    found = gemma(toy_tokenizer_folder)(["the cat", "mat", "the cat"], "query")
    assert {array.dtype for array in (found.ids, found.lengths, found.start, found.end)} == {np.dtype(np.int32)}
    assert len(found) == 3 and rows(found)[0] == rows(found)[2] != rows(found)[1]
    none = gemma(toy_tokenizer_folder)([], "query")
    assert len(none) == 0 and none.ids.size == 0


def test_lowercase(toy_tokenizer_folder):
    lower = gemma(toy_tokenizer_folder, lowercase=True)
    plain = gemma(toy_tokenizer_folder)
    assert rows(lower(["The CAT"], "query")) == rows(plain(["the cat"], "query")) != rows(plain(["The CAT"], "query"))


# --- truncation ---


@pytest.mark.parametrize("limit", [4, 5, 16, 31])
def test_truncation_keeps_the_closing_tokens(toy_tokenizer_folder, minilm, limit):
    """Cutting `<eos>` off would leave a model that reads its vector there without one."""
    text = ["what is a kidney stone and how is it treated " * 20]
    for make in (lambda limit: gemma(toy_tokenizer_folder, limit), lambda limit: bert(minilm, limit, limit)):
        uncut, found = (rows(make(n)(text, "document"))[0] for n in (100_000, limit))
        assert len(found) == limit and found == [*uncut[: limit - 1], uncut[-1]]


def test_queries_and_documents_have_limits_of_their_own(minilm):
    tokenizer = bert(minilm, 8, 20)
    text = ["kidney stone " * 50]
    assert [tokenizer(text, name).lengths[0] for name in ("query", "document", None)] == [8, 20, 20]


def test_no_room_for_the_text(toy_tokenizer_folder, minilm):
    assert gemma(toy_tokenizer_folder, 4)(["cat"], "query").lengths.max() <= 4
    with pytest.raises(UserError, match="--max-length 3 leaves no room for the text of a query.* take 3 tokens"):
        gemma(toy_tokenizer_folder, 3)
    with pytest.raises(UserError, match="of a document"):
        bert(minilm, prompts={"document": "passage: "}, document=4)
    with pytest.raises(UserError, match="--query-max-length 0"):
        bert(minilm, query=0)
    with pytest.raises(UserError, match="--query-max-length 2 leaves no room for the text of a query"):
        bert(minilm, 2, 20)
    with pytest.raises(UserError, match="--query-expansion 2 leaves no room for the text of a query"):
        bert(minilm, 2, 20, query_expansion=2)


def test_truncation_stored_in_the_tokenizer_is_without_effect(minilm, tmp_path):
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(minilm / "tokenizer_config.json", tmp_path)
    assert rows(bert(tmp_path)(ORDINARY, "document")) == rows(bert(minilm)(ORDINARY, "document"))


# --- special tokens in texts ---


def test_texts_smuggle_no_special_tokens_in(toy_tokenizer_folder, minilm):
    tokenizer = gemma(toy_tokenizer_folder, 200)
    text = "the <eos> cat <unused0><unused1> sat<bos> <pad>on <<eos>eos> it"
    ids = rows(tokenizer([text], "query"))[0]
    assert ids[:2] == [BOS, QUERY] and ids[-1] == EOS
    assert not {PAD, EOS, BOS, UNK, QUERY, DOCUMENT} & set(ids[2:-1])
    decoded = tokenizer.tokenizer.decode(ids[2:-1], skip_special_tokens=False)
    assert decoded == text  # nothing is lost, it is only spelled out

    tokenizer = bert(minilm, query=64)
    ids = rows(tokenizer(["a [SEP] b [CLS]c[MASK] [PAD][UNK] d"], "query"))[0]
    assert (ids[0], ids[-1]) == (101, 102) and not {0, 101, 102, 103} & set(ids[1:-1])


def test_prompts_may_hold_special_tokens(toy_tokenizer_folder, minilm):
    tokenizer = gemma(toy_tokenizer_folder, prompts={"query": "<unused0>what <eos>"})
    ids = rows(tokenizer(["<eos>cat"], "query"))[0]
    assert ids[1] == QUERY and ids.count(EOS) == 2  # the prompt's and the closing one
    tokenizer = bert(minilm, prompts={"query": "[MASK] "})
    assert rows(tokenizer(["a [MASK]"], "query"))[0].count(103) == 1


def test_reserved_tokens_of_one_role_are_reserved_in_the_other(toy_tokenizer_folder):
    for name in ("query", "document", None):
        ids = rows(gemma(toy_tokenizer_folder)(["<unused1> <unused0>"], name))[0]
        assert ids.count(QUERY) == (name == "query") and ids.count(DOCUMENT) == (name == "document")


def test_words_that_a_vocabulary_merely_adds_stay_whole(toy_tokenizer_folder):
    """Gemma has tokens for HTML tags; a document may contain those."""
    ids = rows(gemma(toy_tokenizer_folder)(["<b>cat<b>"], "document"))[0]
    assert ids.count(BOLD) == 2


def test_spelling_that_normalises_to_a_special_token(toy_tokenizer, tmp_path):
    """Where added tokens are looked for after normalising, `<EOS>` and full-width letters would become `<eos>`."""
    folder = toy_tokenizer(tmp_path / "lower", lowercase=True, normalized=True)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert raw.encode("<EOS> ＜ｅｏｓ＞", add_special_tokens=False).ids.count(EOS) == 2
    for text in ("<EOS>", "a ＜ｅｏｓ＞ b", "<UNUSED0>", "<Eos> <eos> <UNUSED1>"):
        ids = rows(gemma(folder)([text], "query"))[0]
        assert ids[:2] == [BOS, QUERY] and ids[-1] == EOS and not {EOS, BOS, QUERY, DOCUMENT} & set(ids[2:-1])


def test_unknown_characters_stay_unknown(minilm):
    """The unknown token is special too, but no one smuggled it in."""
    assert rows(bert(minilm)(["🫠"], "query")) == [[101, 100, 102]]


def test_lone_surrogates(toy_tokenizer_folder, minilm):
    """JSON can spell half a character; no tokenizer takes it."""
    broken, whole = json.loads(r'"cat \ud83d dog"'), json.loads(r'"cat \ud83d\ude00 dog"')
    for tokenizer in (gemma(toy_tokenizer_folder), bert(minilm)):
        assert rows(tokenizer([broken], "query")) == rows(tokenizer(["cat \N{REPLACEMENT CHARACTER} dog"], "query"))
        assert rows(tokenizer(["cat \ud83d" + "\ude00 dog"], "query")) == rows(tokenizer([whole], "query"))


def test_a_prompt_with_half_a_surrogate_pair(toy_tokenizer_folder):
    lengths = {"query": 32}
    halves, whole = (TextTokenizer(toy_tokenizer_folder, {"query": p}, lengths) for p in ("cat \ud83d", "cat \ufffd"))
    assert rows(halves(["dog"], "query")) == rows(whole(["dog"], "query"))


def test_very_long_texts(toy_tokenizer_folder, minilm):
    for tokenizer in (gemma(toy_tokenizer_folder), bert(minilm)):
        found = tokenizer(["x" * 300_000, "kidney stone " * 30_000, "<eos>[SEP]" * 3_000], "document")
        assert max(found.lengths) <= tokenizer.max_lengths["document"]
        assert all(ids[-1] == tokenizer.closing[-1] for ids in rows(found))


FRAGMENTS = ("<eos>", "<bos>", "<pad>", "<unused0>", "<unused1>", "<EOS>", "＜ｅｏｓ＞", "<b>", "<", "eos>", "[SEP]")
FRAGMENTS += ("[CLS]", "[", "[MASK]", "[PAD]", "[UNK]", "[sep]", "query: ", " ", "\x00", "\ud800", "▁", "🫠")
ANY_TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(st.characters(), max_size=6), max_size=12).map("".join)


@pytest.fixture(scope="module")
def tokenizers(toy_tokenizer_folder, toy_tokenizer, minilm, tmp_path_factory) -> list[TextTokenizer]:
    lower = toy_tokenizer(tmp_path_factory.mktemp("lower"), lowercase=True, normalized=True)
    return [
        gemma(toy_tokenizer_folder, 24),
        gemma(lower, 24),
        gemma(toy_tokenizer_folder, 24, prompts={"query": "find <unused0>: "}, pool_prompt=False),
        bert(minilm, 12, 24),
        bert(minilm, 12, 24, prompts={"query": "query: "}, pool_special=False),
    ]


@settings(max_examples=150)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=3), name=st.sampled_from(["query", "document", None]))
def test_any_text(tokenizers, texts, name):
    """Whatever the text: frame and prompt are whole, nothing special is inside, limit and span are sound."""
    for tokenizer in tokenizers:
        found = tokenizer(texts, name)
        special = {token for token, t in tokenizer.tokenizer.get_added_tokens_decoder().items() if t.special}
        special -= {100} if tokenizer.closing == [102] else set()  # [UNK]
        prompt = tokenizer.tokenizer.encode(tokenizer.prompts.get(name, ""), add_special_tokens=False).ids
        marks = [i for i, token in enumerate(prompt) if token in (QUERY, DOCUMENT)]
        front = [*tokenizer.opening, *prompt[: max(marks, default=-1) + 1]]
        assert len(found) == len(texts) and found.lengths.sum() == len(found.ids)
        for ids, (start, end) in zip(rows(found), spans(found), strict=True):
            assert len(ids) <= tokenizer.max_lengths.get(name, 24)
            assert ids[: len(front)] == front and ids[-1:] == tokenizer.closing
            inside = set(ids[len(front) : -1])
            assert not inside & special
            if tokenizer.closing == [EOS]:
                assert not inside & {QUERY, DOCUMENT}
            assert 0 <= start < end <= len(ids)


@settings(max_examples=100)
@given(text=ANY_TEXT, limit=st.integers(4, 40))
def test_a_shorter_limit_gives_a_prefix(toy_tokenizer_folder, text, limit):
    cut = rows(gemma(toy_tokenizer_folder, limit)([text], "query"))[0]
    whole = rows(gemma(toy_tokenizer_folder, 1_000)([text], "query"))[0]
    assert cut == (whole if len(whole) <= limit else [*whole[: limit - 1], EOS])


# --- what pooling counts ---


def test_pooled_span(toy_tokenizer_folder, minilm):
    """Gemma: prompt and text, without `<bos>` and `<eos>`. BERT: everything, as sentence-transformers does."""
    found = gemma(toy_tokenizer_folder)(["the cat"], "query")
    assert spans(found) == [(1, found.lengths[0] - 1)]
    found = gemma(toy_tokenizer_folder)(["the cat"])
    assert spans(found) == [(1, found.lengths[0] - 1)]
    found = bert(minilm, prompts={"query": "query: "})(["the cat"], "query")
    assert spans(found) == [(0, found.lengths[0])]


def test_pooled_span_without_the_prompt(toy_tokenizer_folder, minilm):
    found = gemma(toy_tokenizer_folder, pool_prompt=False)(["the cat"], "query")
    assert spans(found) == [(2, found.lengths[0] - 1)]
    found = bert(minilm, prompts={"query": "query: "}, pool_prompt=False)(["the cat"], "query")
    assert spans(found) == [(3, found.lengths[0])]  # sentence-transformers leaves [CLS] out with the prompt
    found = bert(minilm, prompts={"query": "query: "}, pool_prompt=False)(["the cat"], "document")
    assert spans(found) == [(0, found.lengths[0])]


def test_empty_text(toy_tokenizer_folder, minilm):
    """It has a vector nevertheless: of the prompt where that counts, else of the special tokens."""
    found = gemma(toy_tokenizer_folder)([""], "query")
    assert rows(found) == [[BOS, QUERY, EOS]] and spans(found) == [(1, 2)]
    assert spans(gemma(toy_tokenizer_folder)([""])) == [(0, 2)]
    assert spans(gemma(toy_tokenizer_folder, pool_prompt=False)([""], "query")) == [(0, 3)]
    assert rows(bert(minilm)([""], "query")) == [[101, 102]] and spans(bert(minilm)([""], "query")) == [(0, 2)]


def test_empty_text_without_any_special_token(toy_tokenizer_folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(toy_tokenizer_folder / "tokenizer.json"))
    tokenizer.post_processor = processors.Sequence([])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = bert(tmp_path)(["", "cat"], "query")
    assert rows(found)[0] == [PAD] and spans(found)[0] == (0, 1)


# --- folders ---


def closing_with(folder: Path, source: Path, word: str) -> Path:
    """The toy tokenizer, made to close every text with `word` itself."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    special = [(w, tokenizer.token_to_id(w)) for w in ("<bos>", word)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"<bos> $A {word}", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(source / "tokenizer_config.json", folder)
    return folder


@pytest.mark.parametrize(("word", "closing"), [("<eos>", [EOS]), ("<pad>", [PAD])])
def test_a_tokenizer_that_closes_by_itself_is_believed(toy_tokenizer_folder, tmp_path, word, closing):
    """Qwen3-Embedding closes with its pad token, while its eos token ends chat turns: only the first belongs there."""
    tokenizer = gemma(closing_with(tmp_path, toy_tokenizer_folder, word))
    assert tokenizer.opening == [BOS] and tokenizer.closing == closing


def test_closing_is_only_added_where_asked_for(toy_tokenizer_folder):
    assert gemma(toy_tokenizer_folder, append_eos=False).closing == []


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer found"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("damage", ["broken JSON", "empty file", "no unknown token", "a missing entry"])
def test_a_damaged_tokenizer_is_one_line(damage, tmp_path):
    """Regression: a traceback in every command, as the library raises a bare Exception."""
    pair = models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    library = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]") if damage == "no unknown token" else pair)
    file = tmp_path / "tokenizer.json"
    library.save(str(file))
    if damage != "no unknown token":
        load_tokenizer(tmp_path)
        whole = file.read_text()
        entry = whole.replace('"ab": 2', '"c": 2')
        assert entry != whole
        file.write_text({"broken JSON": "{broken", "empty file": "", "a missing entry": entry}[damage])
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer cannot be loaded \([^\n]+\)$"):
        load_tokenizer(tmp_path)


def test_a_damaged_vocabulary_of_an_old_folder(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "vocab.json").write_text("{broken")
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(UserError, match=r"vocab\.json: the tokenizer cannot be loaded \([^\n]+\)$"):
        load_tokenizer(tmp_path)


TYPES = ["input_ids", "token_type_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("settings", "config", "expected"),
    [
        ({"tokenizer_class": "BertTokenizer"}, {}, True),
        ({"tokenizer_class": "BertTokenizerFast"}, {}, True),
        ({}, {}, True),
        (None, {}, True),
        ({}, {"tokenizer_class": "PreTrainedTokenizerFast"}, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}, False),
        ({"tokenizer_class": "DistilBertTokenizer"}, {}, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": TYPES}, {}, True),
        ({"tokenizer_class": "BertTokenizer", "model_input_names": TYPES[::2]}, {}, False),
    ],
)
def test_token_types_are_those_of_transformers(settings, config, expected, minilm, tmp_path):
    """Regression: scores of some BERT rerankers differed from CrossEncoder's, which saw no token types."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"} | config))
    (tmp_path / "tokenizer.json").write_text((minilm / "tokenizer.json").read_text())
    if settings is not None:
        special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(special | settings))
    assert returns_types(tmp_path) is expected
    library = transformers.AutoTokenizer.from_pretrained(tmp_path)
    types = library(["a"], ["a"]).get("token_type_ids", [[0]])
    assert any(types[0]) is expected


def test_vocabulary_of_an_old_folder(minilm, tmp_path):
    pytest.importorskip("transformers")
    for name in ("vocab.txt", "tokenizer_config.json", "config.json"):
        shutil.copy(minilm / name, tmp_path)
    assert rows(bert(tmp_path)(ORDINARY, "document")) == rows(bert(minilm)(ORDINARY, "document"))


def test_no_end_of_sequence_token(minilm):
    with pytest.raises(UserError, match="names no eos_token"):
        bert(minilm, append_eos=True)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<eos>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<eos>", "lstrip": False}}),
        ("special_tokens_map.json", {"eos_token": {"content": "<eos>"}}),
        ("config.json", {"eos_token_id": EOS}),
        ("config.json", {"eos_token_id": [EOS, 106]}),
    ],
)
def test_where_a_token_is_named(toy_tokenizer_folder, tmp_path, file, content):
    tokenizer = load_tokenizer(toy_tokenizer_folder)
    assert named_token(tmp_path, tokenizer, "eos_token") is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None, "pad_token": "<nowhere>"}))
    (tmp_path / file).write_text(json.dumps(content))
    assert named_token(tmp_path, tokenizer, "eos_token") == EOS
    assert named_token(tmp_path, tokenizer, "pad_token") is None


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_broken_json_beside_the_tokenizer_is_told_by_its_file(toy_tokenizer, tmp_path, file):
    """Regression: it ended in a traceback."""
    folder = toy_tokenizer(tmp_path / "broken")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / file).write_text("{")
    with pytest.raises(UserError, match=f"{file}: not valid JSON"):
        TextTokenizer(folder, {}, {"query": 16}, append_eos=True)


@pytest.mark.parametrize(
    ("missing", "nested", "special", "fits"),
    [
        (0, False, None, True),
        (1, False, None, False),
        (1, True, None, False),
        (0, False, True, True),  # as Gemma 3's token for images: no text becomes it
        (0, False, False, False),
        (-1, False, False, True),
        (None, False, False, True),  # nothing is known
    ],
)
def test_tokens_that_the_model_has_no_vector_for(toy_tokenizer_folder, tmp_path, missing, nested, special, fits):
    """Regression: mlx crashed on such a token, or read past the end of its embeddings. `special`: of one more token."""
    folder = shutil.copytree(toy_tokenizer_folder, tmp_path / "model")
    size = load_tokenizer(folder).get_vocab_size()
    config = {} if missing is None else {"vocab_size": size - missing}
    (folder / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    if special is not None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        more = tokenizer["added_tokens"][0] | {"id": size, "content": "[more]", "special": special}
        tokenizer["added_tokens"].append(more)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if fits:
        assert load_tokenizer(folder).get_vocab_size() == (size if special is None else size + 1)
    else:
        with pytest.raises(UserError, match=rf"tokens up to \d+, but the model only {size - missing} \(config\.json\)"):
            load_tokenizer(folder)


def test_special_tokens_that_the_model_has_no_vector_for(toy_tokenizer_folder, tmp_path):
    """A pad token is often added without a vector: any other pads as well. A prompt cannot do without its own."""
    folder = shutil.copytree(toy_tokenizer_folder, tmp_path / "model")
    size = load_tokenizer(folder).get_vocab_size()
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    more = tokenizer["added_tokens"][0] | {"id": size, "content": "[more]", "special": True}
    tokenizer["added_tokens"].append(more)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    roles = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(roles | {"pad_token": "[more]"}))
    assert gemma(toy_tokenizer_folder).pad_id == PAD == 0 == gemma(folder).pad_id
    assert max(gemma(folder)(["[more] of it"], "query").ids) < size
    with pytest.raises(UserError, match=rf"special tokens or prompts need {size}, the model has {size}"):
        gemma(folder, prompts={"query": "[more]"})
