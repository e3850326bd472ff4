"""Turn docstrings and comments into text that reads like a query: no markers, no parameter lists.

The rule: keep the paragraphs before the first section, as many as fit into 600 characters, and the first one in any
case. A section is a list of parameters, results or errors (`:param x:`, `Args:`, `@param`, `\\param`, NumPy's
`Parameters`, Swift's `- Parameter x:`), an example (`>>>`, a fence of backquotes), a Markdown heading or a directive.

    from mlx_retrieval.dataset.source_code.docstrings import summary
    print(summary("Add two numbers.\\n\\nArgs:\\n  a: one"))
"""

import inspect
import re

from mlx_retrieval.utils.text import writable

MAX_CHARACTERS = 600
MIN_WORDS = 3

_NAMES = (
    "args|arguments|parameters?|params|other parameters|keyword (?:args|arguments)|kwargs|returns?|return values?"
    "|yields?|raises?|throws|exceptions|errors|attributes|methods|examples?|usage|notes?|see also|references|warnings?"
    "|warns|complexity|precondition|postcondition|version|authors?|since|deprecated"
)
SECTION = re.compile(
    rf"(?:{_NAMES}|todo)\s*:+(?:\s|$)|(?-i:(?=[A-Z]))(?:{_NAMES})\s*$"  # Args:  Returns: the sum  Parameters
    r"|:(?:param|parameter|arg|argument|key|keyword|type|return|returns|rtype|raise|raises|except|exception|var|ivar"
    r"|cvar|vartype|yield|yields|meta|deprecated)\b[^:]*:"
    r"|[@\\](?!(?:link|code|c|p|a|b|e|em|ref)\b)[a-z]+\b"  # javadoc, doxygen, jsdoc, headerdoc
    rf"|[-*+]\s+(?:{_NAMES})\b[^:]*:"  # Swift
    r"|#{1,6}\s|>>>|```|~~~|\.\.\s+[\w-]+::|<pre\b",
    re.IGNORECASE,
)
HEADINGS = re.compile(r"^\s*[@\\](?:brief|short|abstract|discussion|summary|description|desc|overview|details?)\b[ :]*")
RULER = re.compile(r"^[-=*#~_+/.]{3,}\s*|\s*[-=*#~_+/]{3,}$")
BLOCK_TAG = re.compile(r"</?(?:p|br|ul|ol|dl|dd|dt|li|div|table|tr|h[1-6]|blockquote)\b[^<>]*>", re.IGNORECASE)
INLINE_TAG = re.compile(r"</?(?:a|b|i|u|em|strong|code|tt|kbd|var|span|sup|sub|font)\b[^<>]*>", re.IGNORECASE)
INLINE_MARKUP = (
    (re.compile(r"\{@\w+\s+([^{}]*)\}"), r"\1"),  # {@link Shape}
    (re.compile(r":(?:[a-z]+:)?[a-z]+:`~?([^`]*)`"), r"\1"),  # :func:`f`
    (re.compile(r"\[`([^`\]]*)`\](?:\([^)]*\))?"), r"\1"),  # [`Vec`](link)
    (re.compile(r"`+([^`]*)`+"), r"\1"),
    (re.compile(r"[@\\](?:c|p|a|b|e|em|ref)\s+(?=\S)"), ""),  # \c name
)
NO_PROSE = re.compile(
    r"(?:todo|fixme|xxx|hack|noqa|nolint|pylint|mypy|type:|pragma|eslint|prettier|tslint|ts-|@ts-|jshint|clang-format"
    r"|swiftlint|mark:|region\b|endregion\b|sourcery|-\*-|vim:|#!)",
    re.IGNORECASE,
)
LICENCE = re.compile(
    r"(?:copyright|\(c\)|©)\W*(?:\(c\)\W*)?(?:19|20)\d\d|spdx-license|all rights reserved|licensed (?:under|to)"
    r"|permission is hereby granted",
    re.IGNORECASE,
)
# A Chinese or Japanese character counts as a word, as these languages put no spaces.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+")


def strip_markers(comment: str) -> str:
    """Return a comment's text without `/** */`, `///`, `//!`, `//`, `#`, `--`, `/-- -/` and its lines' asterisks."""
    comment = comment.strip()
    if block := re.fullmatch(r"/(?:\*+!?<?|-[-!]?)(.*?)(?:\*+|-)/", comment, re.DOTALL):
        lines = block[1].split("\n")
        starred = comment.startswith("/*")
        return "\n".join([lines[0], *(re.sub(r"^\s*\*+(?!\w)", "", line) if starred else line for line in lines[1:])])
    return "\n".join(re.sub(r"^\s*(?://+!?<?|#+|--+)", "", line) for line in comment.split("\n"))


def summary(text: str) -> str:
    """Return the paragraphs before the first section, each on one line; "" if there is none."""
    text = BLOCK_TAG.sub(lambda tag: "\n\n" if tag[0][1:2] != "/" else "\n", text)
    paragraphs: list[list[str]] = [[]]
    for line in inspect.cleandoc(text).split("\n"):
        line = HEADINGS.sub("", line).strip()
        if SECTION.match(line):
            break
        if not (line := RULER.sub("", line)):
            paragraphs.append([])
        else:
            paragraphs[-1].append(line)
    lines: list[str] = []
    for paragraph in paragraphs:
        joined = INLINE_TAG.sub("", " ".join(paragraph))
        for pattern, replacement in INLINE_MARKUP:
            joined = pattern.sub(replacement, joined)
        if joined := re.sub(r"\s+", " ", joined).strip():
            if lines and sum(map(len, lines)) + len(joined) > MAX_CHARACTERS:
                break
            lines.append(joined)
    return writable("\n".join(lines))  # an escape in a docstring can spell half a surrogate pair


def objection(text: str, query: str) -> str:
    """Return the reason why a docstring with the summary `query` is not a query; "" if it is one."""
    if NO_PROSE.match(text.lstrip()) or LICENCE.search(text):
        return "docstring no prose"
    if len(WORD.findall(query)) < MIN_WORDS:
        return "docstring too short"
    signs = [character for character in query if not character.isspace()]
    letters = sum(character.isalpha() for character in signs)
    return "docstring no prose" if letters < len(signs) / 2 or re.search(r"[;{]$", query) else ""
