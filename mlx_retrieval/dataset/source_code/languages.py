"""The table of programming languages: for each, its file names and its grammar's names of functions and classes.

Grammars are tree-sitter's, each in a wheel of its own, imported only when a file of the language is read. Lean has no
such wheel and is read by regular expressions.

    from mlx_retrieval.dataset.source_code.languages import language_of
    print(language_of("main.rs").package)
"""

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from mlx_retrieval.utils.errors import UserError


class Definition(NamedTuple):
    """A function or class of a source file."""

    name: str  # qualified, such as Shape.area
    line: int  # counted from 1, decorators included
    doc: str  # the docstring's or comment's text, without markers; "" = none
    code: str  # without docstrings, its own and those of definitions inside it, dedented
    body: str  # the same, of the body alone; "" if the definition has none
    is_broken: bool  # a syntax error inside
    is_test: bool  # Rust's #[test], and everything in a module called tests


@dataclass(frozen=True)
class Language:
    """A language's row in the table.

    query: tree-sitter's query; `@definition` captures definitions, `@scope` only adds its name to those inside.
    wrappers: nodes around a definition that belong to it (decorators, `export`, `template <...>`).
    between: nodes between comment and definition that belong to the definition (Rust's attributes).
    """

    name: str
    package: str
    suffixes: tuple[str, ...]
    query: str = ""
    wrappers: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    comments: tuple[str, ...] = ("//", "/*", "* ", "*/")
    function: str = "language"


_JAVASCRIPT = """
    [(function_declaration) (generator_function_declaration) (class_declaration) (method_definition)] @definition
    (variable_declarator value: [(arrow_function) (function_expression)]) @definition
    (assignment_expression right: [(arrow_function) (function_expression)]) @definition
"""
_TYPESCRIPT = f"""{_JAVASCRIPT}
    [(abstract_class_declaration) (interface_declaration)] @definition
    (public_field_definition value: [(arrow_function) (function_expression)]) @definition
    (internal_module) @scope
"""
_SCRIPT_WRAPPERS = ("export_statement", "lexical_declaration", "variable_declaration", "expression_statement")
_C = """
    (function_definition) @definition
    [(struct_specifier body: (_)) (union_specifier body: (_)) (enum_specifier body: (_))] @definition
"""
_C_WRAPPERS = ("type_definition", "declaration", "field_declaration", "template_declaration")

_TABLE = (
    Language(
        "python",
        "tree-sitter-python",
        (".py", ".pyw"),
        "[(function_definition) (class_definition)] @definition",
        ("decorated_definition",),
        comments=("#",),
    ),
    Language(
        "rust",
        "tree-sitter-rust",
        (".rs",),
        "[(function_item) (struct_item) (enum_item) (union_item) (trait_item) (macro_definition)] @definition "
        "[(impl_item) (mod_item)] @scope",
        between=("attribute_item",),
    ),
    Language(
        "java",
        "tree-sitter-java",
        (".java",),
        "[(method_declaration body: (_)) (constructor_declaration) (class_declaration) (interface_declaration) "
        "(enum_declaration) (record_declaration) (annotation_type_declaration)] @definition",
    ),
    Language(
        "typescript",
        "tree-sitter-typescript",
        (".tsx",),
        _TYPESCRIPT,
        _SCRIPT_WRAPPERS,
        ("decorator",),
        function="language_tsx",
    ),
    Language(
        "typescript",
        "tree-sitter-typescript",
        (".ts", ".mts", ".cts"),
        _TYPESCRIPT,
        _SCRIPT_WRAPPERS,
        ("decorator",),
        function="language_typescript",
    ),
    Language(
        "javascript",
        "tree-sitter-javascript",
        (".js", ".mjs", ".cjs", ".jsx"),
        f"{_JAVASCRIPT} (field_definition value: [(arrow_function) (function_expression)]) @definition",
        _SCRIPT_WRAPPERS,
        ("decorator",),
    ),
    Language(
        "swift",
        "tree-sitter-swift",
        (".swift",),
        "[(function_declaration) (init_declaration) (class_declaration) (protocol_declaration)] @definition",
    ),
    Language("c", "tree-sitter-c", (".c", ".h"), _C, _C_WRAPPERS),
    Language(
        "cpp",
        "tree-sitter-cpp",
        (".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx"),
        f"{_C} (class_specifier body: (_)) @definition (namespace_definition) @scope",
        _C_WRAPPERS,
    ),
    Language(
        "objc",
        "tree-sitter-objc",
        (".m", ".mm"),
        f"{_C} [(class_interface) (class_implementation) (protocol_declaration) (method_definition)] @definition",
        (*_C_WRAPPERS, "implementation_definition"),
    ),
    Language(
        "go",
        "tree-sitter-go",
        (".go",),
        "[(function_declaration) (method_declaration) (type_spec type: [(struct_type) (interface_type)])] @definition",
        ("type_declaration",),
    ),
    Language("lean", "", (".lean",), comments=("--",)),
)
LANGUAGES = {language.name: language for language in _TABLE}  # of TypeScript's two grammars, the one without JSX
BY_SUFFIX = {suffix: language for language in _TABLE for suffix in language.suffixes}


def language_of(name: str, head: bytes = b"") -> Language | None:
    """Return the language of a file by its suffix; a `.h` is C, C++ or Objective-C by its first bytes (`head`)."""
    language = BY_SUFFIX.get("." + name.rpartition(".")[2].lower())
    if language is not None and name.lower().endswith(".h"):
        if re.search(rb"^\s*@(?:interface|protocol|class|import)\b|^\s*#import\b", head, re.MULTILINE):
            return LANGUAGES["objc"]
        if re.search(
            rb"^\s*(?:class\s+\w|namespace\b|template\s*<|using\s+\w|(?:public|private):)", head, re.MULTILINE
        ):
            return LANGUAGES["cpp"]
    return language


def check_grammars(languages: Iterable[Language]) -> None:
    """UserError naming all grammars that are needed and not installed."""
    needed = {language.package for language in languages if language.package}
    packages = sorted(needed | {"tree-sitter"} if needed else needed)
    if missing := [package for package in packages if importlib.util.find_spec(package.replace("-", "_")) is None]:
        have = {language.name for language in languages if language.package not in missing}
        rest = f" (or mine the others alone: --languages {' '.join(sorted(have))})" if have else ""
        raise UserError(f"grammars are missing: pip install {' '.join(missing)}{rest}")
