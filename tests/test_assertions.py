"""Every test asserts: one that can fail by an exception alone says only that nothing was raised."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

TESTS = Path(__file__).parent
ASSERTING = {"raises", "warns", "fail", "assert_close", "assert_allclose", "assert_array_equal"}
# A rank's failure is an exception here: that alone is no assertion.
NO_ASSERTION = ("harness",)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions of a module, and methods of its classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from (part for part in node.body if isinstance(part, ast.FunctionDef))


def asserts(function: ast.FunctionDef) -> bool:
    return any(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ASSERTING)
        for node in ast.walk(function)
    )


def called(function: ast.FunctionDef, modules: Iterable[str]) -> set[str]:
    """Names that a function mentions, those of other test modules' attributes among them."""
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return names | {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).rpartition(".")[2] in modules
    }


def silent_tests(trees: Mapping[str, ast.Module]) -> list[str]:
    """Tests in which nothing asserts, neither they nor functions of the tests that they call, given trees by path."""
    stems = {path: Path(path).stem for path in trees}
    known = {path: list(functions(tree)) for path, tree in trees.items() if not stems[path].startswith(NO_ASSERTION)}
    mentions = {id(each): called(each, stems.values()) for own in known.values() for each in own}
    asserting = {each.name for own in known.values() for each in own if asserts(each)}
    grown = True
    while grown:
        more = {each.name for own in known.values() for each in own if mentions[id(each)] & asserting}
        grown = not more <= asserting
        asserting |= more
    return [
        f"{path}:{each.lineno} {each.name}"
        for path, own in known.items()
        for each in own
        if each.name.startswith("test_") and not asserts(each) and not mentions[id(each)] & asserting
    ]


def test_silent_tests_are_found() -> None:
    source = """
def same(a, b): assert a == b
def compare(x): same(x, 1)
def build(x): return x
def test_by_itself(): assert build(1)
def test_by_a_helper(): compare(build(1))
def test_by_pytest():
    with pytest.raises(ValueError): build(1)
def test_silent(): build(1)
"""
    other = "def test_elsewhere(): first.compare(2)\ndef test_silent_too(): print(object.compare)"
    trees = {"tests/first.py": ast.parse(source), "tests/second.py": ast.parse(other)}
    assert silent_tests(trees) == ["tests/first.py:9 test_silent", "tests/second.py:2 test_silent_too"]


def test_every_test_asserts() -> None:
    files = {file.relative_to(TESTS.parent).as_posix(): file for file in sorted(TESTS.rglob("*.py"))}
    assert silent_tests({path: ast.parse(file.read_text()) for path, file in files.items()}) == []
