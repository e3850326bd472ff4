"""Find Lean's declarations and their doc comments by regular expressions: a comment `/-- -/`, then the declaration.

A declaration ends before a blank line if the next line starts at the left margin, or before the next declaration there.
Names follow the nesting of `namespace`, `section` and `mutual`.

    from mlx_retrieval.dataset.source_code.lean import definitions
    names = [definition.name for definition in definitions(text)]
"""

import re
from collections.abc import Iterator

from mlx_retrieval.dataset.source_code.docstrings import strip_markers
from mlx_retrieval.dataset.source_code.languages import Definition

_MODIFIERS = r"(?:(?:private|protected|noncomputable|partial|unsafe|scoped|local|nonrec)\s+)*"
_KEYWORDS = (
    r"(?:theorem|lemma|def|abbrev|structure|class(?:\s+inductive)?|inductive|instance|opaque|axiom|macro|syntax|elab)\b"
)
_DECLARATION = re.compile(
    r"^(?P<doc>/--(?:(?!-/).)*-/\s*)?"
    rf"(?P<head>(?:@\[[^\]]*\]\s*)*{_MODIFIERS}{_KEYWORDS}(?:[ \t]+(?P<name>[^\s:({{\[]+))?)",
    re.MULTILINE | re.DOTALL,
)
_SCOPE = re.compile(r"^(?P<kind>namespace|section|mutual|end)\b[ \t]*(?P<name>[\w.']*)", re.MULTILINE)
_END = re.compile(rf"\n[ \t]*\n(?=\S)|\n(?=/-|(?:end|namespace|section|mutual)\b|@\[|{_MODIFIERS}{_KEYWORDS})")


def definitions(text: str) -> Iterator[Definition]:
    """Yield all declarations at the left margin, documented or not, in the order of the file."""
    scopes, open_scopes = list(_SCOPE.finditer(text))[::-1], []
    for match in _DECLARATION.finditer(text):
        while scopes and scopes[-1].start() < match.start():
            scope = scopes.pop()
            if scope["kind"] != "end":
                open_scopes.append(scope)
            elif open_scopes:
                open_scopes.pop()
        start, stop = match.start("head"), _END.search(text, match.end())
        code = text[start : stop.start() if stop else len(text)].rstrip()
        names = [scope["name"] for scope in open_scopes if scope["kind"] == "namespace"]
        body = re.split(r":=|\bwhere\b|\n\s*\|", code, maxsplit=1)
        yield Definition(
            name=".".join([*names, match["name"] or "instance"]),
            line=text.count("\n", 0, start) + 1,
            doc=strip_markers(match["doc"]) if match["doc"] else "",
            code=code,
            body=body[1] if len(body) > 1 else "",
            is_broken=False,
            is_test=False,
        )
