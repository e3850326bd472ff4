"""Find the functions and classes of a source file and their docstrings, by tree-sitter.

from mlx_retrieval.dataset.source_code.definitions import definitions
from mlx_retrieval.dataset.source_code.languages import LANGUAGES
for definition in definitions(b'def half(x):\n    "Divide by two."\n    return x / 2\n', LANGUAGES["python"]):
    print(definition.name, definition.doc, definition.code)
"""

import ast
import functools
import importlib
import itertools
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_retrieval.dataset.source_code import lean
from mlx_retrieval.dataset.source_code.docstrings import strip_markers
from mlx_retrieval.dataset.source_code.languages import Definition, Language

if TYPE_CHECKING:
    from tree_sitter import Node

# Nodes that hold one definition or a group of them; the comment of a group belongs to none of its members.
_GROUPS = ("type_declaration", "lexical_declaration", "variable_declaration")
_COMMENTS = ("comment", "line_comment", "block_comment", "multiline_comment")


@functools.cache
def grammar(language: Language):
    """Return the parser and the query of a language."""
    import tree_sitter

    grammar = tree_sitter.Language(
        getattr(importlib.import_module(language.package.replace("-", "_")), language.function)()
    )
    return tree_sitter.Parser(grammar), tree_sitter.Query(grammar, language.query)


def definitions(source: bytes, language: Language) -> list[Definition]:
    """Return all functions and classes of a file (UTF-8, line ends `\\n`), documented or not, in their order."""
    if language.name == "lean":
        return list(lean.definitions(source.decode()))
    from tree_sitter import QueryCursor

    parser, query = grammar(language)
    captures = QueryCursor(query).captures(parser.parse(source).root_node)
    scopes = set(captures.get("scope", ()))
    nodes = sorted({*captures.get("definition", ()), *scopes}, key=lambda node: (node.start_byte, -node.end_byte))
    places = [_Place(node, source, language, node in scopes) for node in nodes]
    inside: list[_Place] = []
    results = []
    for i, place in enumerate(places):
        while inside and inside[-1].node.end_byte <= place.node.start_byte:
            inside.pop()
        name = ".".join([*(around.name for around in inside if around.name != "?"), place.name])
        place.is_test |= bool(inside) and inside[-1].is_test
        inside.append(place)
        if place.is_scope:
            continue
        within = itertools.takewhile(lambda other, end=place.end: other.start < end, itertools.islice(places, i, None))
        edits = sorted(other.edit for other in within if other.edit)
        code = _dedent(_cut(source, _line_start(source, place.start), place.end, edits))
        body = place.body and _cut(source, _line_start(source, place.body.start_byte), place.body.end_byte, edits)
        results.append(Definition(name, place.line, place.doc, code, body or "", place.outer.has_error, place.is_test))
    return results


class _Place:
    """The place of a definition, its documentation, and the bytes of the docstring to remove (`edit`)."""

    def __init__(self, node: "Node", source: bytes, language: Language, is_scope: bool):
        self.node, self.is_scope, self.name = node, is_scope, name_of(node, source)
        self.outer = node
        while (around := self.outer.parent) is not None and around.type in language.wrappers:
            if around.type in _GROUPS and around.named_child_count > 1:
                break
            self.outer = around
        self.start, self.end = self.outer.start_byte, self.outer.end_byte
        if source[self.end : self.end + 1] == b";":
            self.end += 1
        holder = next((value for key in ("value", "right") if (value := node.child_by_field_name(key))), node)
        self.body = holder.child_by_field_name("body") or _child(holder, ("compound_statement", "declaration_list"))
        self.doc, self.edit, self.line = "", None, self.outer.start_point.row + 1
        comments, attributes = self._before(source, language)
        self.is_test = language.name == "rust" and (
            self.name in ("test", "tests") or any(re.match(r"#\[(?:\w+::)*test\b", a) for a in attributes)
        )
        if is_scope:
            return
        if language.name == "python":
            self._docstring(source)
        if not self.doc and comments:
            texts = [_text(comment, source).rstrip() for comment in comments]  # Rust's hold their line's end
            self.doc = strip_markers("\n".join(texts))
            self.edit = _widen(source, comments[0].start_byte, comments[-1].start_byte + len(texts[-1].encode()))

    def _before(self, source: bytes, language: Language) -> tuple[list["Node"], list[str]]:
        """Return the comments directly above, and the attributes between, which become part of the definition."""
        comments: list[Node] = []
        attributes: list[str] = []
        edge, node = self.outer.start_point.row, self.outer.prev_sibling
        while node is not None:
            last = node.end_point.row - (node.end_point.column == 0)  # Rust's line comments hold their line's end
            if edge - last > 1 or not (node.type in _COMMENTS or node.type in language.between):
                break
            before, text = node.prev_sibling, _text(node, source)
            if node.type in language.between:
                if not comments:
                    self.start, self.line = node.start_byte, node.start_point.row + 1
                attributes.append(text)
            elif (
                before is not None
                and before.end_point.row == node.start_point.row
                and before.end_point.column > 0
                and node.start_point.row < edge
            ):
                break  # it belongs to the code before it on its line
            elif (comments and text.startswith("/*")) or (language.name == "rust" and text.startswith(("//!", "/*!"))):
                break
            else:
                comments.insert(0, node)
                if text.startswith("/*"):
                    break
            edge, node = node.start_point.row, before
        return comments, attributes

    def _docstring(self, source: bytes) -> None:
        """Take Python's docstring: the string that is the first statement."""
        statements = [child for child in self.body.named_children if child.type != "comment"] if self.body else []
        first = statements[0] if statements else None
        if first is None or first.type != "expression_statement" or first.named_child_count != 1:
            return
        if first.named_children[0].type not in ("string", "concatenated_string"):
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes
                value = ast.literal_eval(f"({_text(first, source)})")
        except (ValueError, SyntaxError):  # an f-string, or Python 2
            return
        if isinstance(value, str) and value.strip():
            self.doc = value
            start, end = first.start_byte, first.end_byte
            if len(statements) == 1:
                self.edit = (start, end, b"...")
            else:
                start, end, new = _widen(source, start, end)
                if source[start - 1 : start] == b"\n":  # remove blank lines between header and docstring as well
                    start = self.node.start_byte + len(source[self.node.start_byte : start].rstrip()) + 1
                self.edit = (start, end, new)


def _text(node: "Node", source: bytes) -> str:
    return source[node.start_byte : node.end_byte].decode("utf-8", "replace")


def _child(node: "Node", types: Sequence[str]) -> "Node | None":
    return next((child for child in node.named_children if child.type in types), None)


def name_of(node: "Node", source: bytes) -> str:
    """Return the name of a definition; C++'s `A::b` and Go's methods include the name of their class."""
    if node.type == "method_definition" and node.child_by_field_name("name") is None:  # Objective-C: area:of:
        words = [child for child in node.children if child.type in ("identifier", "method_parameter")]
        return "".join(_text(word, source) if word.type == "identifier" else ":" for word in words)
    fields = ("type", "name") if node.type == "impl_item" else ("name", "declarator", "left", "property")
    field = next((child for key in fields if (child := node.child_by_field_name(key))), None)
    if field is None:
        typedef = node.parent.child_by_field_name("declarator") if node.parent else None
        field = typedef or _child(node, ("identifier", "type_identifier"))
    if field is None:
        return {"init_declaration": "init"}.get(node.type, "?")
    text = re.sub(r"^[\s*&(]+", "", _text(field, source))
    before = "" if "operator" not in text else text
    while before != text:  # type arguments, from the innermost out
        before, text = text, re.sub(r"<[^<>]*>", "", text)
    name = re.sub(r"\s+", " ", text.partition("(")[0]).strip().replace("::", ".") or "?"
    if receiver := node.child_by_field_name("receiver"):
        owner = re.search(r"(\w+)\s*(?:\[.*\])?\s*\)$", _text(receiver, source), re.DOTALL)
        return f"{owner[1]}.{name}" if owner else name
    return name


# --- cutting bytes out of a file ---


def _line_start(source: bytes, at: int) -> int:
    """Return the start of the line if only blanks precede `at` on it, else `at`."""
    start = source.rfind(b"\n", 0, at) + 1
    return start if not source[start:at].strip() else at


def _widen(source: bytes, start: int, end: int) -> tuple[int, int, bytes]:
    """Widen the bytes to cut so that a docstring or comment leaves neither an empty line nor a lone semicolon."""
    if rest := re.compile(rb"[ \t]*;[ \t]*(?=\S)|[ \t]+(?=\S)").match(source, end):
        return start, rest.end(), b""  # the rest of the line takes its place
    first = _line_start(source, start)
    if first == start and start and source[start - 1 : start] != b"\n":  # code precedes it on the line
        return start, end, b""
    return first, re.compile(rb"(?:[ \t]*(?:\n|\Z))*").match(source, end).end(), b""


def _cut(source: bytes, start: int, end: int, edits: Sequence[tuple[int, int, bytes]]) -> str:
    """Return source[start:end] with those edits applied that reach into it."""
    parts, at = [], start
    for first, last, new in edits:
        if last > at and first < end:
            parts += [source[at : max(first, at)], new]
            at = min(last, end)
    return b"".join([*parts, source[at:end]]).decode("utf-8", "replace")


def _dedent(code: str) -> str:
    """Remove the first line's indentation from all lines that have it; lines of long strings may lack it."""
    indent = code[: len(code) - len(code.lstrip(" \t"))]
    lines = [line.removeprefix(indent) if line.strip() else "" for line in code.rstrip().split("\n")]
    return "\n".join(lines)
