"""Conversations: bad rows, templates and masks, cutting, and batches that drop nothing.

python -m pytest tests/training/test_chat_data.py
"""

import gzip
import itertools
import json
import shutil
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from chat_templates import EXPECTED, TALK, TEMPLATES, THOUGHTFUL

from mlx_retrieval.dataset.row_formats import RowError
from mlx_retrieval.training.chat.data import GRID, POOL, WIDTHS, ChatBatches, Conversations, is_chat, padded_widths
from mlx_retrieval.training.chat.messages import Dialogue, dialogue_of
from mlx_retrieval.training.chat.template import TEMPLATE_FILE, ChatTokenizer
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "gemma-3-tiny-mlx"
WORDS = "what is a kidney stone how treated hard piece of material the cat sat on mat"


def folder_with(template: str | None, folder: Path) -> Path:
    """A folder with the tiny model's tokenizer and config, and another chat template; None = none."""
    folder.mkdir()
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(TINY / name, folder)
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, ChatTokenizer]:
    """A tokenizer with each template; "none" has none."""
    folder = tmp_path_factory.mktemp("chat-tokenizers")
    made = {name: ChatTokenizer(folder_with(text, folder / name)) for name, text in TEMPLATES.items()}
    return made | {"gemma": ChatTokenizer(TINY), "none": ChatTokenizer(folder_with(None, folder / "none"))}


@pytest.fixture(scope="session")
def tiny(tokenizers) -> ChatTokenizer:
    return tokenizers["gemma"]


def talk(length: int, seed: int = 0) -> dict:
    """A row whose answer has so many words."""
    rng = np.random.default_rng(seed)
    question, answer = (" ".join(rng.choice(WORDS.split(), n)) for n in (3, length))
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def read(tiny, write_rows):
    """`read(rows)`: the Conversations of some rows."""

    def make(rows, limit: int = 2048, tokenizer: ChatTokenizer = tiny, **flags) -> Conversations:
        return Conversations([write_rows(rows)], tokenizer, limit, **flags)

    return make


# --- templates and masks --------------------------------------------------------------------------------------------


def said(tokenizer: ChatTokenizer, messages: list[dict], mask_prompt: bool = True) -> list[str]:
    """The runs of tokens that are trained on, as text."""
    dialogue = dialogue_of({"messages": messages})
    (ids, mask), *_ = tokenizer.tokens([tokenizer.render(dialogue, mask_prompt)])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int))).reshape(-1, 2)
    return [tokenizer.tokenizer.decode(ids[a:b]) for a, b in edges]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_mask_covers_the_assistant_s_turns_and_nothing_else(tokenizers, name):
    tokenizer = tokenizers[name]
    assert [text.strip(" ") for text in said(tokenizer, TALK)] == [text.strip(" ") for text in EXPECTED[name]]
    rendered = tokenizer.render(Dialogue(TALK), mask_prompt=True)
    assert rendered.complete == (name != "shortened")
    assert [rendered.text[a:b] for a, b in rendered.spans] == EXPECTED[name]


@pytest.mark.parametrize("name", [*EXPECTED, "none"])
def test_tokens_are_those_of_the_template(tokenizers, name):
    """Also of conversations that end with a question, or hold what no token spells, or half a surrogate pair."""
    odd = [{"role": "user", "content": "hi 🙂 \ud83d"}, {"role": "assistant", "content": "<end_of_turn> é\n\n"}]
    for messages in (TALK, TALK[:3], TALK[:2], odd):
        whole = [message | {"content": message["content"].replace("\ud83d", "\ufffd")} for message in messages]
        expected = tokenizers[name].wrapper.apply_chat_template(whole)
        for masked in (False, name != "shortened"):
            (ids, mask), *_ = tokenizers[name].tokens([tokenizers[name].render(Dialogue(messages), masked)])
            assert ids.tolist() == expected and ids.dtype == np.int32 and mask.any()


@pytest.mark.parametrize("name", ["gemma", "chatml", "llama3", "thinking"])
def test_of_one_turn_the_mask_is_mlx_lm_s(tokenizers, name):
    from mlx_lm.tuner.datasets import ChatDataset

    tokenizer = tokenizers[name]
    expected, offset = ChatDataset([], tokenizer.wrapper, mask_prompt=True).process({"messages": TALK[:2]})
    (ids, mask), *_ = tokenizer.tokens([tokenizer.render(Dialogue(TALK[:2]), mask_prompt=True)])
    assert ids.tolist() == expected and mask.tolist() == [i >= offset for i in range(len(ids))]


ASK, HARD, AGAIN, SAT = TALK[0], {"role": "assistant", "content": "a hard piece"}, TALK[2], TALK[3]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
RESULT = {"role": "tool", "content": "", "tool_call_id": "c1"}
THOUGHT = "<think>\nthe cat\n</think>\n\na hard piece<|im_end|>\n"
EMPTY = "<think>\n\n</think>\n\n"
TOLD_HARD, TOLD_SAT = "a hard piece<|im_end|>\n", "the cat sat<|im_end|>\n"
CALLED = "<tool_call>look</tool_call><|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        # Regression: refused, as the prompt closes an empty thought.
        (THOUGHTFUL, [THOUGHT]),
        ([ASK, HARD | {"reasoning_content": "the cat"}], [THOUGHT]),
        # Without a thought, the prompt's own is not trained on.
        ([ASK, HARD, AGAIN, SAT], [TOLD_HARD, TOLD_SAT]),
        # An earlier thought is left out by the template.
        ([*THOUGHTFUL, AGAIN, SAT], [TOLD_HARD, TOLD_SAT]),
        ([ASK, HARD, SAT], [TOLD_HARD, TOLD_SAT]),
        ([ASK, SAT, *THOUGHTFUL[1:]], [TOLD_SAT, THOUGHT]),
        ([*THOUGHTFUL, SAT], [THOUGHT, TOLD_SAT]),
    ],
)
def test_thoughts_where_no_token_marks_them(tokenizers, messages, expected):
    assert said(tokenizers["switchable"], messages) == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([ASK, HARD, AGAIN, SAT], [TOLD_HARD, EMPTY + TOLD_SAT]),
        # Regression: of turns in a row, the last one lost its empty thought.
        ([ASK, HARD, SAT], [TOLD_HARD, EMPTY + TOLD_SAT]),
        ([ASK, HARD, SAT, SAT], [TOLD_HARD, TOLD_SAT, EMPTY + TOLD_SAT]),
        (THOUGHTFUL, [THOUGHT]),
        ([ASK, CALL, RESULT, SAT], [CALLED, EMPTY + TOLD_SAT]),
        ([ASK, CALL, RESULT, RESULT, CALL, RESULT, SAT], [CALLED, CALLED, EMPTY + TOLD_SAT]),
    ],
)
def test_thoughts_where_tokens_mark_them(tokenizers, monkeypatch, messages, expected):
    """As Qwen 3's own tokenizer has them: then the prompt for an answer opens no thought."""
    tokenizer = tokenizers["switchable"]
    monkeypatch.setattr(type(tokenizer.wrapper), "has_thinking", True)
    assert said(tokenizer, messages) == expected


# --- OpenAI's format ------------------------------------------------------------------------------------------------


def test_a_message_of_weight_0_is_context(tokenizers, read):
    """Regression: it was trained on. With the prompt masked or not, only its own tokens differ."""
    talk = [ASK, HARD | {"weight": 0}, AGAIN, SAT | {"weight": 1}]
    assert said(tokenizers["chatml"], talk) == [TOLD_SAT]
    assert said(tokenizers["chatml"], [ASK, HARD, AGAIN, SAT | {"weight": 0}]) == [TOLD_HARD]
    before = "<|im_start|>user\nwhat is a kidney stone<|im_end|>\n<|im_start|>assistant\n"
    after = "<|im_start|>user\nand the mat?<|im_end|>\n<|im_start|>assistant\nthe cat sat<|im_end|>\n"
    assert said(tokenizers["chatml"], talk, mask_prompt=False) == [before, after]
    plain, weighted = (read([{"messages": rows}], tokenizer=tokenizers["chatml"]) for rows in (TALK, talk))
    assert plain.trained[0].all() and not weighted.trained[0].all()
    null = read([{"messages": [ASK, HARD | {"weight": None}, AGAIN, SAT]}], tokenizer=tokenizers["chatml"])
    assert null.trained[0].all()
    with pytest.raises(UserError, match=":1: message 2: the chat template does not let this turn of weight 0 be found"):
        read([{"messages": talk}], tokenizer=tokenizers["counted"])
    # An earlier turn that cannot be located does not matter if it is context.
    rows = read([{"messages": talk}], tokenizer=tokenizers["shortened"], mask_prompt=True)
    assert rows.last_only == 0 and rows.trained[0].sum() > 0


def test_content_may_be_a_list_of_parts(read):
    parts = [{"type": "text", "text": "what is a "}, {"type": "text", "text": "kidney stone"}]
    rows = read([{"messages": [{"role": "user", "content": parts}, HARD]}, {"messages": [ASK, HARD]}])
    assert rows.ids[0].tolist() == rows.ids[1].tolist()


def test_a_developer_is_the_system_where_the_template_has_none(tokenizers):
    brief = [{"role": "developer", "content": "be brief"}, ASK, HARD]
    tokenizer = tokenizers["chatml"]
    assert tokenizer.render(Dialogue(brief)).text.startswith("<|im_start|>system\nbe brief<|im_end|>\n")
    known = "{# of a developer #}" + TEMPLATES["chatml"]
    before, tokenizer.tokenizer.chat_template = tokenizer.tokenizer.chat_template, known
    try:
        assert tokenizer.render(Dialogue(brief)).text.startswith("<|im_start|>developer\nbe brief<|im_end|>\n")
    finally:
        tokenizer.tokenizer.chat_template = before


def test_a_tool_may_return_nothing(tokenizers):
    row = {"messages": [ASK, CALL, RESULT, SAT], "tools": [{"type": "function", "function": {"name": "look"}}]}
    text = tokenizers["switchable"].render(dialogue_of(row)).text
    assert "<|im_start|>tool\n<tool_response></tool_response><|im_end|>\n" in text
    assert said(tokenizers["switchable"], row["messages"]) == [CALLED, TOLD_SAT]


def test_keys_that_nothing_reads_are_counted(read, tokenizers):
    """Names of ids and origins, and values that say nothing, are not; a template may read more keys of messages."""
    more = {"id": 7, "source": "a.txt", "difficulty": "hard", "audio": None, "annotations": []}
    thought = HARD | {"reasoning_content": "the cat", "refusal": None}
    row = {"messages": [ASK | {"name": "Ann"}, thought], "tools": [{"name": "look"}], **more}
    rows = read([row, row, {"messages": [ASK, HARD], "mood": "x"}], tokenizer=tokenizers["chatml"])
    assert rows.ignored == {"difficulty": 2, "mood": 1, "reasoning_content of messages": 2, "tools": 2}
    assert "reasoning_content of messages" not in read([row], tokenizer=tokenizers["switchable"]).ignored
    assert read([{"text": "the cat", "messages": None, "prompt": "what"}]).ignored == {"prompt": 1}
    assert not read([{"messages": [ASK, HARD], "weight": 1, "train": True}]).ignored


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, HARD], "label": 0},
        {"messages": [ASK, HARD], "score_chosen": 0.2},
        {"messages": [ASK, HARD], "rejected": [ASK, SAT]},
        {"messages": [ASK, HARD], "weight": 0},
        {"prompt": "a", "completion": "b", "label": False},
        {"text": "the cat", "reward": -1.5},
        {"messages": [ASK, HARD], "wrong_answers": ["the cat"]},
        {"messages": [ASK, HARD | {"is_correct": False}]},
        {"messages": [ASK, HARD | {"train": False}]},
        {"messages": [ASK, HARD | {"loss_mask": 0}]},
    ],
    ids=str,
)
def test_keys_that_would_change_what_is_learnt_are_refused(read, row):
    """Regression: they were ignored, and a bad answer was learnt like a good one."""
    with pytest.raises(UserError, match=r"train\.jsonl:1: \w+ cannot be used in a conversation: .*\"weight\": 0"):
        read([row])
    with pytest.raises(UserError, match="no usable row"):
        read([row], skip_bad=True)


def test_scores_are_counted_and_keys_ignored(read):
    row = {"messages": [ASK, HARD | {"score": 0.1}], "score": 7, "label_names": ["a"], "quality_score": 0.2}
    assert read([row]).ignored == {"score of messages": 1, "score": 1, "label_names": 1, "quality_score": 1}
    row["label"] = 0
    assert read([row], ignore_keys=["label", "score"]).ignored == {"label_names": 1, "quality_score": 1}


def test_a_byte_order_mark_is_dropped(write_rows, tiny):
    plain = {"messages": TALK}
    file = write_rows([b"\xef\xbb\xbf" + json.dumps(plain).encode(), plain])
    rows = Conversations([file], tiny, 2048)
    assert is_chat([str(file)]) and rows.ids[0].tolist() == rows.ids[1].tolist()


def test_null_is_absent(read):
    """As Parquet and the datasets library write rows whose other rows have a key."""
    nothing = {"name": None, "tool_calls": None, "weight": None, "refusal": None}
    full = {"messages": [ASK | nothing, HARD | nothing], "tools": None, "text": None, "prompt": None}
    plain = read([{"messages": [ASK, HARD]}])
    assert read([full]).ids[0].tolist() == plain.ids[0].tolist()
    assert dialogue_of(full) == dialogue_of({"messages": [ASK, HARD]})
    assert read([{"messages": None, "text": "the cat"}]).ids[0].tolist() == read([{"text": "the cat"}]).ids[0].tolist()


def test_a_mask_that_cannot_be_found_is_an_error_of_its_row(tokenizers, read):
    with pytest.raises(UserError, match=r"train.jsonl:1: --mask-prompt: the chat template does not let"):
        read([{"messages": TALK}], tokenizer=tokenizers["counted"], mask_prompt=True)
    rows = read([{"messages": TALK}, {"messages": TALK[:2]}], tokenizer=tokenizers["shortened"], mask_prompt=True)
    assert rows.last_only == 1


def test_a_system_message_and_tools_go_into_the_template(tokenizers, read):
    template = "{% for t in tools or [] %}{{ t.name }}|{% endfor %}" + TEMPLATES["chatml"]
    tokenizer = tokenizers["chatml"]
    system = {"role": "system", "content": "be brief"}
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    text = tokenizer.render(Dialogue([system, *TALK])).text
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n") and len(said(tokenizer, [system, *TALK])) == 2
    before, tokenizer.tokenizer.chat_template = tokenizer.tokenizer.chat_template, template
    try:
        assert tokenizer.render(Dialogue(TALK, [{"name": "look"}])).text.startswith("look|<|im_start|>")
    finally:
        tokenizer.tokenizer.chat_template = before
    with pytest.raises(UserError, match="ChatML has no form for tool calls"):
        read([{"messages": [TALK[0], calls]}], tokenizer=tokenizers["none"])


def test_chatml_stands_in_and_ends_where_generation_stops(tokenizers, tmp_path):
    """Its turns end with a token that `mlx_lm.generate` stops at, and the saved file makes mlx-lm use the same."""
    from mlx_lm.utils import load_tokenizer

    tokenizer = tokenizers["none"]
    assert not tokenizer.own_template and tokenizers["gemma"].own_template and not tokenizers["gemma"].template
    text = tokenizer.render(Dialogue(TALK[:2])).text
    assert text == "<bos><|im_start|>user\nwhat is a kidney stone<eos>\n<|im_start|>assistant\n a hard piece <eos>\n"
    assert said(tokenizer, TALK[:2]) == [" a hard piece <eos>\n"]
    folder = folder_with(None, tmp_path / "model")
    (folder / TEMPLATE_FILE).write_text(tokenizer.template)
    again = load_tokenizer(folder)
    rendered = tokenizer.render(Dialogue(TALK)).text
    assert again.has_chat_template and again.apply_chat_template(TALK, tokenize=False) == rendered
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["added_tokens"].append(settings["added_tokens"][0] | {"id": 3072, "content": "<|im_end|>"})
    (folder / TEMPLATE_FILE).unlink()
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 3072]}))
    assert ChatTokenizer(folder).render(Dialogue(TALK[:2])).text.endswith(" a hard piece <|im_end|>\n")


def test_a_text_gets_the_tokenizer_s_own_special_tokens_and_an_end(read, tiny):
    rows = read([{"text": "the cat sat"}, {"text": "the cat sat<eos>"}])
    assert rows.ids[0].tolist() == rows.ids[1].tolist() == tiny.tokenizer("the cat sat")["input_ids"] + [1]
    assert rows.ids[0][0] == tiny.tokenizer.bos_token_id and rows.trained[0].all()
    with pytest.raises(UserError, match=":1: --mask-prompt is for conversations"):
        read([{"text": "the cat sat"}], mask_prompt=True)


def test_no_conversation_begins_with_two_tokens_of_the_beginning(read, tiny, tokenizers):
    """Regression: the tokenizer put its own before a text that was rendered with one."""
    plain = read([{"text": "the cat sat"}]).ids[0].tolist()
    assert plain[0] == 2 and read([{"text": "<bos>the cat sat"}]).ids[0].tolist() == plain
    rendered = tiny.render(Dialogue(TALK[:2])).text
    assert rendered.startswith("<bos><start_of_turn>user")
    one = read([{"text": rendered}]).ids[0].tolist()
    assert one[:2] == [2, tiny.tokenizer.convert_tokens_to_ids("<start_of_turn>")] and one.count(2) == 1
    for name in ("gemma", "llama3", "mistral", "opened", "none"):  # these templates begin with it
        for row in ({"messages": TALK[:2]}, {"prompt": "what", "completion": "a cat"}):
            assert read([row], tokenizer=tokenizers[name]).ids[0].tolist()[:3].count(2) == 1
    bare = tokenizers["chatml"]
    before, bare.tokenizer.chat_template = bare.tokenizer.chat_template, "{{ bos_token + messages[0].content }}"
    try:
        rows = read([{"prompt": "<bos>what", "completion": "a"}, {"prompt": "what", "completion": "a"}], tokenizer=bare)
        assert rows.ids[0].tolist() == rows.ids[1].tolist()
    finally:
        bare.tokenizer.chat_template = before


# --- rows -----------------------------------------------------------------------------------------------------------


def test_formats_agree(read):
    question, answer = (message["content"] for message in TALK[:2])
    one = read([{"messages": TALK[:2]}], mask_prompt=True)
    other = read([{"prompt": question, "completion": answer}], mask_prompt=True)
    assert one.ids[0].tolist() == other.ids[0].tolist() and one.trained[0].tolist() == other.trained[0].tolist()


USER = {"role": "user", "content": "hi"}
PART = r"message 1 \(user\): content: part 1 is of type image_url, and only text can be read"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": []}, "no assistant message"),
        ({"messages": [USER, {"role": "bot", "content": "ho"}]}, "message 2: role 'bot' is none of system, dev"),
        ({"messages": [USER, {"content": "ho"}]}, "message 2: role None is none of"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, r"message 2 \(assistant\): content is empty"),
        ({"messages": [USER, {"role": "assistant"}]}, "content is not a text"),
        ({"messages": [USER, {"role": "assistant", "content": ["a"]}]}, "content is not a text or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, *TALK[1:]]}, PART),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]}, "content: part 1 has no text"),
        ({"messages": [USER, {"role": "assistant", "content": []}]}, r"message 2 \(assistant\): content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": "a", "weight": 0.5}]}, "weight 0.5 is neither 0 nor 1"),
        (
            {"messages": [USER, {"role": "assistant", "content": "a", "weight": 0}]},
            "every assistant message has weight 0",
        ),
        ({"messages": [USER | {"weight": 0}, *TALK[1:]]}, "weight is for messages of the assistant"),
        ({"messages": [USER, {"role": "tool"}, TALK[1]]}, r"message 2 \(tool\): content is not a text"),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "no form for tool_calls"),
        ({"messages": "hi"}, "messages is not a list of objects"),
        ({"messages": ["hi"]}, "messages is not a list of objects"),
        ({"messages": TALK, "tools": "look"}, "tools is not a list"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": 3, "completion": "b"}, "prompt is not a text"),
        ({"text": ""}, "text is empty"),
        ({"query": "a", "document": "b"}, "keys document, query fit no conversation"),
        (["a"], "not a JSON object"),
        (b"{", "broken JSON"),
        (b"\xff", "not UTF-8"),
    ],
    ids=str,
)
def test_a_bad_row_is_told_by_file_and_line_or_left_out(read, row, message):
    good = (
        {"messages": TALK}
        if "messages" in str(row) or not isinstance(row, dict)
        else {"prompt": "a", "completion": "b"}
    )
    good = {"text": "the cat"} if isinstance(row, dict) and "text" in row else good
    with pytest.raises(UserError, match=rf"train.jsonl:3: .*{message}"):
        read([good, b"", row, good])
    rows = read([good, row, good], skip_bad=True)
    assert len(rows) == 2 and rows.where(1).endswith("train.jsonl:3") and len(rows.skipped) == 1


def test_a_template_that_refuses_the_roles_is_told_with_its_reason(read, tokenizers):
    rows = [{"messages": TALK}, {"messages": [{"role": "system", "content": "be brief"}, *TALK]}]
    with pytest.raises(UserError, match=r":2: the chat template refuses this .*\(system, .*roles must alter"):
        read(rows, tokenizer=tokenizers["mistral"])
    assert len(read(rows, tokenizer=tokenizers["mistral"], skip_bad=True)) == 1


def test_formats_do_not_mix_and_no_row_is_an_error(read):
    with pytest.raises(UserError, match=":2: has the format text, but the rows before have messages"):
        read([{"messages": TALK}, {"text": "the cat"}])
    with pytest.raises(UserError, match=r"train.jsonl: no usable row"):
        read([])
    with pytest.raises(UserError, match=r"no usable row"):
        read([{"messages": []}], skip_bad=True)


def test_tokens_that_the_model_has_no_vector_for(tmp_path, read):
    """Regression: mlx crashed on them. Gemma 3 has one for images beyond its vocabulary, which a text may spell."""
    folder = folder_with(TEMPLATES["chatml"], tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    more = tokenizer["added_tokens"][0] | {"id": size, "content": "<image>", "special": True}
    tokenizer["added_tokens"].append(more)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = [talk(3), {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a mat"}]}]
    with pytest.raises(UserError, match=r"train\.jsonl:2: the model has no vector for the token <image> \(--skip-bad"):
        read(rows, tokenizer=ChatTokenizer(folder))
    kept = read(rows, tokenizer=ChatTokenizer(folder), skip_bad=True)
    assert len(kept) == 1 and len(kept.skipped) == 1 and kept.ids[0].max() < size


def test_gzip_and_what_is_recognised(tmp_path, tiny):
    def recognised(*rows) -> bool:
        file = tmp_path / "rows.jsonl.gz"
        with gzip.open(file, "wb") as handle:
            handle.write(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
        return is_chat([str(file)])

    assert recognised(b"", {"messages": TALK}) and recognised({"prompt": "a", "completion": "b"})
    assert recognised({"text": "a"}) and not recognised({"text": "a", "query": "b"})
    assert not recognised({"query": "a", "document": "b"}) and not recognised(b"{") and not recognised()
    assert not recognised({"prompt": "a"})
    recognised({"messages": TALK})
    assert len(Conversations([tmp_path / "rows.jsonl.gz"], tiny, 2048)) == 1
    (tmp_path / "rows.jsonl.gz").write_bytes(b"no gzip")
    assert not is_chat([str(tmp_path / "rows.jsonl.gz")])


def test_a_byte_order_mark_is_dropped_and_arrays_are_read(tmp_path, tiny, read):
    expected = read([talk(2), talk(3)])
    contents = ("\ufeff" + "\n".join(json.dumps(talk(n)) for n in (2, 3)), json.dumps([talk(2), talk(3)], indent=1))
    for content in contents:
        (tmp_path / "marked.json").write_text(content, encoding="utf-8")
        assert is_chat([str(tmp_path / "marked.json")])
        again = Conversations([tmp_path / "marked.json"], tiny, 2048)
        assert [ids.tolist() for ids in again.ids] == [ids.tolist() for ids in expected.ids]


def test_long_conversations_are_cut_and_counted(read):
    rows = read([talk(2), talk(90), talk(300)], limit=50)
    assert rows.truncated == 2 and rows.lengths.max() == 50 and rows.longest > 300 and rows.empty == 0
    whole = read([talk(90)])
    assert rows.ids[1].tolist() == whole.ids[0][:50].tolist()


def test_where_nothing_of_the_answer_is_left_the_row_is_left_out(read):
    long = {"prompt": "kidney " * 100, "completion": "stone"}
    rows = read([{"prompt": "a", "completion": "b"}, long], limit=40, mask_prompt=True)
    assert len(rows) == 1 and rows.empty == 1 and rows.truncated == 1
    assert len(read([long], limit=40)) == 1  # the prompt is learned
    with pytest.raises(UserError, match="no usable row: nothing to train on is within --max-length 40"):
        read([long], limit=40, mask_prompt=True)


# --- batches --------------------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_row_once_and_its_last_batch_may_be_smaller(read):
    rows = read([talk(1 + i % 29, seed=i) for i in range(43)])
    batches = ChatBatches(rows, 4, seed=3)
    assert batches.per_epoch == 11
    for epoch in (0, 1):
        numbers = [batches.numbers(epoch * 11 + k) for k in range(11)]
        assert sorted(np.concatenate(numbers).tolist()) == list(range(43))
        assert sorted(map(len, numbers)) == [3] + [4] * 10
    assert [b.tolist() for b in batches.epoch(0)] != [b.tolist() for b in batches.epoch(1)]
    again = ChatBatches(rows, 4, seed=3)
    assert again.numbers(17).tolist() == batches.numbers(17).tolist()  # from k alone
    assert ChatBatches(rows, 4, seed=4).numbers(17).tolist() != batches.numbers(17).tolist()


def test_batches_are_sorted_by_length_and_so_hardly_padded(read):
    """mlx-lm means to, but sorts by the number of a row's keys."""
    rows = read([talk(1 + (i * 37) % 200, seed=i) for i in range(128)])
    batches = ChatBatches(rows, 8)
    counts = [batches.counts(batches.numbers(k)) for k in range(batches.per_epoch)]
    padding = 1 - sum(c.tokens for c in counts) / sum(c.padded for c in counts)
    assert padding < 0.1
    order = np.random.default_rng(0).permutation(128).reshape(-1, 8)
    shuffled = [batches.counts(part) for part in order]
    assert 1 - sum(c.tokens for c in shuffled) / sum(c.padded for c in shuffled) > 4 * padding
    ends = [rows.lengths[batches.numbers(k)].max() for k in range(batches.per_epoch)]
    assert ends != sorted(ends)  # yet they do not come in the order of their lengths
    assert POOL * 8 > 128


@pytest.mark.parametrize("longest", [0, 1, 17, 500, 2_047, 4_095, 16_383, 131_071, 1 << 20])
def test_shapes_are_bounded_however_long_conversations_are(longest):
    """Regression: from --max-length 16,000 on, a run could meet more shapes than Metal has resources for."""
    widths = padded_widths(longest)
    assert widths == sorted(set(widths)) and widths[-1] == max(longest, 1) and len(widths) <= WIDTHS
    assert all(width % GRID == 0 for width in widths[:-1])
    if longest <= GRID * WIDTHS:
        assert len(widths) == max(1, -(-longest // GRID))  # as fine as it can be
    assert all(b - a <= max(GRID, a / 8) for a, b in itertools.pairwise(widths))


def test_long_conversations_are_padded_to_these_widths(read):
    rows = read([talk(n, seed=n) for n in range(3, 200, 7)], limit=20_000)
    batches = ChatBatches(rows, 1)
    assert set(batches.widths(np.arange(len(rows)))) <= set(padded_widths(19_999))


def test_what_a_batch_holds(read):
    rows = read([talk(n, seed=n) for n in (3, 40, 9)], mask_prompt=True)
    batches = ChatBatches(rows, 3, pad_id=7)
    (part,) = batches.make(np.array([0, 2, 1]))
    counts = batches.counts(np.array([0, 2, 1]))
    width = part.counted.shape[1]
    assert width % GRID == 0 and width >= rows.lengths.max() - 1 and part.ids.shape == (3, width + 1)
    assert counts.trained == part.counted.sum().item() == part.share.item() == sum(s[1:].sum() for s in rows.trained)
    assert counts.tokens == rows.lengths.sum() and counts.padded == 3 * width
    for row, i in enumerate((0, 2, 1)):
        n = rows.lengths[i]
        assert part.ids[row, :n].tolist() == rows.ids[i].tolist() and set(part.ids[row, n:].tolist()) == {7}
        assert part.counted[row].tolist() == rows.trained[i][1:].tolist() + [False] * (width + 1 - n)


def test_parts_are_those_of_the_batch_and_empty_ones_weigh_nothing(read):
    rows = read([talk(n, seed=n) for n in (3, 40, 9, 70, 5)])
    batches = ChatBatches(rows, 5, parts=3)
    parts = batches.make(batches.numbers(0))
    assert [p.ids.shape[0] for p in parts] == [2, 2, 1]
    assert sum(p.counted.sum().item() for p in parts) == pytest.approx(3 * parts[0].share.item(), rel=1e-6)
    few = batches.make(np.array([1]))
    assert [p.counted.sum().item() for p in few[1:]] == [0, 0] and few[1].ids.shape == (1, 2)
    assert mx.array_equal(few[0].ids, ChatBatches(rows, 1).make(np.array([1]))[0].ids)
    widest = [part.ids.shape[1] - 1 for part in ChatBatches(rows, 1).make(batches.longest()[-1:])]
    assert batches.widths(batches.longest()).tolist()[-1:] == widest


def test_more_than_there_are_is_all_there_are(read):
    batches = ChatBatches(read([talk(5), talk(9)]), 4)
    assert batches.size == 2 and batches.per_epoch == 1 and len(batches.numbers(0)) == 2


def test_the_mark_knows_conversations_and_masks(read):
    one, two = [talk(5, 1)], [talk(5, 2)]
    assert read(one).checksum == read(one).checksum != read(two).checksum != read(two, mask_prompt=True).checksum


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        ChatTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")  # nor is a damaged one
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        ChatTokenizer(tmp_path)


def test_refusals_are_row_errors(tokenizers):
    with pytest.raises(RowError, match="refuses"):
        tokenizers["mistral"].render(Dialogue(TALK[1:]))
