"""Imports of the package point one way, as CONTRIBUTING.md draws them."""

import ast

import pytest
from commands import REPOSITORY

PACKAGE = REPOSITORY / "kforcing_jax"
# From top to bottom; commands, which nothing imports, are above all of them.
ORDER = (
    *("cli", "serving", "evaluation", "training", "interop", "decoding", "workdir", "data", "models"),
    *("noise", "sharding", "config", "architecture", "registry", "installed", "errors"),
)
# Rules of fields need the tables of names, which import nothing.
EXCEPTIONS = {("config", "kforcing_jax.data.choices")}


def imported(source):
    """Modules of the package that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "kforcing_jax":
            yield from (f"kforcing_jax.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kforcing_jax."):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("kforcing_jax."))


def upwards(department, source):
    """What a source of a department imports from above it, or from a command."""
    allowed = ORDER[ORDER.index(department) :]
    return [
        module
        for module in imported(source)
        if module.split(".")[1] not in (*allowed, "__version__") and (department, module) not in EXCEPTIONS
    ]


@pytest.mark.parametrize("department", ORDER)
def test_a_department_imports_from_those_below_it(department):
    file = PACKAGE / f"{department}.py"
    sources = [file] if file.exists() else sorted((PACKAGE / department).rglob("*.py"))
    assert sources
    for path in sources:
        assert not upwards(department, path.read_text(encoding="utf-8")), path.name


@pytest.mark.parametrize(
    ("department", "line", "wrong"),
    [
        ("models", "from kforcing_jax.training.losses import Mean", ["kforcing_jax.training.losses"]),
        ("data", "from kforcing_jax import cli", ["kforcing_jax.cli"]),
        ("decoding", "import kforcing_jax.serve", ["kforcing_jax.serve"]),
        ("training", "from kforcing_jax.models import CausalLM", []),
    ],
)
def test_an_import_from_above_is_noticed(department, line, wrong):
    assert upwards(department, line) == wrong


def test_every_department_has_its_place():
    commands = {
        path.stem for path in PACKAGE.glob("*.py") if "app.run" in (text := path.read_text()) or "cli.run(" in text
    }
    there = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert there - commands - {"__init__", "__main__"} == set(ORDER)
