"""What is public is documented and annotated: read from the source, nothing is imported."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "kforcing_jax"
# What flax calls: the class says what it is made of.
HOOKS = ("setup",)
# Raised where a subclass has something to say, which says it.
ABSTRACT = "NotImplementedError"


class Definition(NamedTuple):
    """A public class, function or method, and the class that a method is of."""

    place: str
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    owner: ast.ClassDef | None

    @property
    def documented(self) -> str:
        """Its docstring; what `__init__` does may be said of its class."""
        own = ast.get_docstring(self.node) or ""
        return own if is_public(self.node.name) or self.owner is None else f"{own} {ast.get_docstring(self.owner)}"


def is_public(name: str) -> bool:
    return not name.startswith("_")


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if all(is_public(part) or part in ("__init__.py", "__main__.py") for part in Path(name).parts):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def definitions(names=()) -> Iterator[Definition]:
    """All that are public, and those with one of these names."""

    def of(body, place, owner):
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if (is_public(node.name) and node.name not in HOOKS) or node.name in names:
                yield Definition(f"{place}:{node.lineno} {node.name}", node, owner)
            if isinstance(node, ast.ClassDef) and is_public(node.name):
                yield from of(node.body, place, node)

    for name, module in modules():
        yield from of(module.body, name, None)


def raised(function: ast.AST) -> Iterator[str]:
    """The classes of errors that a function raises itself, and does not catch by their names."""
    if isinstance(function, ast.Try):
        caught = {name for handler in function.handlers if handler.type for name in _names(handler.type)}
        yield from (name for part in function.body for name in raised(ast.Module([part], [])) if name not in caught)
        function = ast.Module([*function.handlers, *function.orelse, *function.finalbody], [])
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func)
            if name[0].isupper():  # no function that makes one
                yield name
        yield from raised(node)


def _names(expression: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}


def unannotated(definition: Definition) -> list[str]:
    function = definition.node
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [each for each in (arguments.vararg, arguments.kwarg) if each]
    is_static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in function.decorator_list)
    if definition.owner and not is_static:
        named = [each for each in named if each is not (arguments.posonlyargs + arguments.args)[0]]
    missing = [each.arg for each in named if each.annotation is None]
    return missing + ([] if function.returns else ["what it returns"])


def functions(names=()) -> Iterator[Definition]:
    return (each for each in definitions(names) if not isinstance(each.node, ast.ClassDef))


def test_every_module_says_what_it_is():
    assert [name for name, module in modules() if not ast.get_docstring(module)] == []


def test_all_that_is_public_has_a_docstring():
    assert [each.place for each in definitions() if not ast.get_docstring(each.node)] == []


def test_docstrings_name_the_errors_that_are_raised():
    unsaid = [
        f"{each.place}: {error}"
        for each in functions(("__init__",))
        for error in sorted({*raised(each.node)} - {ABSTRACT})
        if error not in each.documented
    ]
    assert unsaid == []


def test_all_that_is_public_is_annotated():
    found = {each.place: unannotated(each) for each in functions()}
    assert {place: missing for place, missing in found.items() if missing} == {}


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("def f(a: int, *rest, b=1) -> int: ...", ["b", "rest"]),
        ("def f(a: int): ...", ["what it returns"]),
        ("def f(a: int) -> int: ...", []),
    ],
)
def test_what_is_not_annotated_is_found(source, missing):
    assert unannotated(Definition("f", ast.parse(source).body[0], None)) == missing


def test_errors_of_inner_functions_and_those_that_are_caught_do_not_count():
    source = """
def f():
    try:
        raise DataError("")
        raise ValueError("")
    except (ValueError, OSError):
        raise ConfigError("") from None
    def g():
        raise RunError("")
"""
    assert list(raised(ast.parse(source).body[0])) == ["DataError", "ConfigError"]
