"""The messages of a row in OpenAI's format, checked, as chat templates read them.

    dialogue = dialogue_of({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ...]})
    dialogue.messages[0]  # {"role": "user", "content": "Hi"}

A key that is null is absent. Content may be a list of parts, all of them text.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from mlx_retrieval.dataset.json_lines import RowError
from mlx_retrieval.dataset.roles import snake_case
from mlx_retrieval.dataset.row_formats import without
from mlx_retrieval.dataset.unread_keys import held_by, is_origin

ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = {"messages": ("messages", "tools"), "prompt": ("prompt", "completion", "tools"), "text": ("text",)}
MESSAGE_KEYS = ("role", "content", "weight", "tool_call_id")  # the last one only links a tool's result with its call
# Keys by which other toolkits choose what is trained on.
CHOICE = re.compile(
    r"weight|loss(?:_(?:mask|weight))?|mask(?:ed)?|train(?:able|ing|_detail)?|(?:chosen|rejected|(?:non_)?preferred)(?:_.*)?"
    r"|.*_(?:chosen|rejected)"
)
TEXT_PARTS = ("text", "input_text", "output_text")  # types of content parts


@dataclass(frozen=True)
class Dialogue:
    """A conversation to train on."""

    messages: list[dict]  # each with a role, and content that is a text; None only beside tool_calls
    tools: list | None = None
    context: frozenset[int] = frozenset()  # numbers of the assistant's messages that are read but not trained on


def text_of(value: object, name: str) -> str:
    """Return a text that is not blank. RowError if it is something else."""
    if not isinstance(value, str):
        raise RowError(f"{name} is not a text")
    if not value.strip():
        raise RowError(f"{name} is empty")
    return value


def dialogue_of(row: dict) -> Dialogue:
    """Return the conversation of a row with messages, or with prompt and completion. RowError if it is none."""
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise RowError("tools is not a list")
    messages = row.get("messages")
    if messages is None:
        contents = {"user": text_of(row["prompt"], "prompt"), "assistant": text_of(row["completion"], "completion")}
        return Dialogue([{"role": role, "content": content} for role, content in contents.items()], tools)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowError("messages is not a list of objects with role and content")
    checked = [_checked(message, number) for number, message in enumerate(messages, start=1)]
    context = {i for i, message in enumerate(checked) if message.pop("weight", 1) == 0}
    turns = {i for i, message in enumerate(checked) if message["role"] == "assistant"}
    if not turns - context:
        reason = "every assistant message has weight 0" if turns else "no assistant message"
        raise RowError(f"{reason}: nothing to learn")
    return Dialogue(checked, tools, frozenset(context))


def without_keys(row: dict, keys: Collection[str]) -> dict:
    """Return a row without some keys, its messages as well."""
    row = without(row, keys)
    if keys and isinstance(messages := row.get("messages"), list):
        row["messages"] = [without(message, keys) if isinstance(message, dict) else message for message in messages]
    return row


def unread_keys(row: dict, kind: str, reads: Callable[[str], bool]) -> set[str]:
    """Return the keys of a row and its messages that nothing reads, but for those that look like ids or origins.

    Args:
        kind: one of KEYS.
        reads: whether the chat template may read a key of a message.

    Raises RowError if one holds a label, a bad answer or a choice of what is trained on. Scores are counted.
    """
    keys = {key: value for key, value in row.items() if key not in KEYS[kind]}
    unread = {key for key in keys if _counts(key, keys[key])}
    if row.get("tools") and not reads("tools"):
        unread.add("tools")
    for message in row["messages"] if kind == "messages" else ():
        names = [key for key in message if key not in MESSAGE_KEYS and not reads(key)]
        unread |= {f"{key} of messages" for key in names if _counts(key, message[key])}
    return unread


def _counts(key: str, value: Any) -> bool:
    """Return whether a key that is not read has a value that someone may rely on. RowError if it is one of learning."""
    name = snake_case(key)
    if value is None or value in ("", [], {}) or (is_origin(name) and not held_by(name, value)):
        return False
    if held_by(name, value) in ("label", "negatives") or (CHOICE.fullmatch(name) and value != 1):
        raise RowError(
            f"{key} cannot be used in a conversation: keep the rows to learn from and leave the key unread "
            f'(--ignore-keys {key}); "weight": 0 makes an assistant message context only'
        )
    return not CHOICE.fullmatch(name)


def _checked(message: dict, number: int) -> dict:
    """Return a message without keys that are null, its content as a text."""
    message = {key: value for key, value in message.items() if value is not None}
    if (role := message.get("role")) not in ROLES:
        raise RowError(f"message {number}: role {repr(role)[:30]} is none of {', '.join(ROLES)}")
    name = f"message {number} ({role})"
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{name}: weight {repr(weight)[:30]} is neither 0 nor 1")
    if role != "assistant" and "weight" in message:
        raise RowError(f"{name}: weight is for messages of the assistant")
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    elif "content" not in message:  # calls may come without words; templates ask whether content is none
        return message | {"content": None}
    content = _joined(message.get("content"), f"{name}: content")
    if role != "tool" and "tool_calls" not in message:  # a tool may return nothing
        text_of(content, f"{name}: content")
    return message | {"content": content}


def _joined(content: Any, name: str) -> str:
    """Return content as one text: it is a text, or a list of parts that are."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise RowError(f"{name} is not a text or a list of parts")
    for number, part in enumerate(content, start=1):
        if (kind := part.get("type")) not in TEXT_PARTS:
            raise RowError(f"{name}: part {number} is of type {kind}, and only text can be read")
        if not isinstance(part.get("text"), str):
            raise RowError(f"{name}: part {number} has no text")
    return "".join(part["text"] for part in content)
