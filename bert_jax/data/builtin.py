"""The built-in corpus: prose of the documentation that Python and our dependencies carry."""

import ast
import glob
import hashlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator

_LIBRARIES = (
    "absl", "etils", "flax", "grain", "jax", "keras", "numpy", "optax", "orbax", "scipy", "tensorflow",
    "tensorflow_datasets", "tyro",
)  # fmt: skip
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def builtin_texts() -> Iterator[str]:
    """Prose of each help topic and of each module of the standard library and our dependencies; no paragraph twice."""
    seen: set[bytes] = set()
    for docstrings in _documents():
        paragraphs = [paragraph for docstring in docstrings for paragraph in _prose(docstring)]
        yield "\n\n".join(paragraph for paragraph in paragraphs if _is_new(paragraph, seen))


def _documents() -> Iterator[list[str]]:
    """Texts of each help topic, docstrings of each module."""
    standard = sysconfig.get_paths()["stdlib"]
    for path in glob.glob(os.path.join(standard, "pydoc_data", "topics.py")):
        constants = (node.value for node in ast.walk(_parse(path)) if isinstance(node, ast.Constant))
        # the module is one dictionary of name and text; names have no blank line
        yield from ([text] for text in constants if isinstance(text, str) and "\n\n" in text)
    specs = filter(None, map(importlib.util.find_spec, _LIBRARIES))  # finds a package without importing it
    folders = [standard, *(folder for spec in specs for folder in spec.submodule_search_locations or ())]
    for folder in folders:
        yield from (list(_docstrings(_parse(path))) for path in _module_files(folder))


def _module_files(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        modules = sorted(file for file in files if file.endswith(".py") and not file.endswith("_test.py"))
        yield from (os.path.join(parent, file) for file in modules)


def _parse(path: str) -> ast.Module:
    """Syntax tree of a module, empty if it cannot be parsed (templates, test data)."""
    with open(path, "rb") as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        try:
            return ast.parse(stream.read())
        except (SyntaxError, ValueError, RecursionError):
            return ast.Module([], [])


def _docstrings(node: ast.AST) -> Iterator[str]:
    if docstring := ast.get_docstring(node):
        yield docstring
    for child in node.body:
        if isinstance(child, _DOCUMENTED):
            yield from _docstrings(child)


def _prose(docstring: str) -> list[str]:
    """Paragraphs that are sentences, each on one line: no code, tables, headings or lists of parameters."""
    plain = re.sub(r":[\w:]+:`~?([^`<]*)[^`]*`|``?([^`]*)``?_?", r"\1\2", docstring)  # :class:`Name` and ``name``
    return [" ".join(text.split()) for text in re.split(r"\n\s*\n", plain) if _is_prose(text.strip())]


def _is_prose(text: str) -> bool:
    """Whether a paragraph looks like sentences; found by trial on the standard library."""
    letters = sum(map(str.isalpha, text)) + sum(map(str.isspace, text))
    return (
        text[:1].isupper()
        and text.endswith((".", "!", "?"))
        and len(text.split()) >= 5
        and letters >= 0.88 * len(text)  # prose has 0.93 to 0.98, code 0.6 to 0.85
        and ">>>" not in text
        and not re.match(r"[\w ]+:\n|.+\n[-=~^]{3}", text)  # "Args:" with its list, an underlined heading
    )


def _is_new(paragraph: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(paragraph.encode("utf-8", "replace"), digest_size=8).digest()
    is_new = digest not in seen
    seen.add(digest)
    return is_new
