"""Names of tables, and one's own in their place."""

import importlib.util
import sys

import pytest

from kforcing_jax import registry
from kforcing_jax.errors import ConfigError
from kforcing_jax.registry import Table, check_module, imported, is_own

# What a tracker needs, an extra.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's, importable from the current folder."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda name, text: (tmp_path / f"{name}.py").write_text(text)
    for name in list(sys.modules):
        if name.startswith("own_"):
            del sys.modules[name]


@pytest.mark.parametrize("table", [v for v in vars(registry).values() if isinstance(v, Table)], ids=lambda t: t._kind)
def test_every_entry_of_every_table_is_there(table):
    assert len(table)
    for name in table:
        if table is registry.TRACKERS and importlib.util.find_spec(PACKAGES[name]) is None:
            with pytest.raises(ConfigError, match=rf"needs the package {PACKAGES[name]}; pip install"):
                table.find(name)
        else:
            assert callable(table.find(name))


def test_what_goes_wrong_while_a_module_is_imported_is_told_from_what_it_lacks(own_module):
    own_module("own_typo", "import math\nmath.sinn(0)")
    with pytest.raises(ConfigError, match="cannot be imported as a loss: AttributeError: module 'math' has no attr"):
        imported("own_typo:focal", "a loss")


def test_a_module_that_is_not_there_is_looked_for_where_it_should_be():
    with pytest.raises(
        ConfigError, match=r"'own_gone:focal': there is no module own_gone; own_gone\.py should be in the"
    ):
        check_module("stages.k1.loss", "own_gone:focal")


def test_a_name_of_ones_own_is_found_without_an_entry(own_module):
    own_module("own_losses", "def focal():\n    return 3\n")
    table = Table("a loss", {})
    table.check("stages.k1.loss", "own_losses:focal")
    assert table.find("own_losses:focal")() == 3


def test_checking_a_name_imports_nothing(own_module):
    own_module("own_broken", "raise RuntimeError('not now')")
    Table("a loss", {}).check("stages.k1.loss", "own_broken:focal")
    check_module("stages.k1.loss", "own_broken:focal")
    with pytest.raises(ConfigError, match="'own_broken:focal' cannot be imported as a loss: RuntimeError: not now"):
        Table("a loss", {}).find("own_broken:focal")


def test_what_a_module_lacks_is_named(own_module):
    own_module("own_empty", "")
    with pytest.raises(ConfigError, match="'own_empty:focal' is not a loss: module own_empty has no focal"):
        imported("own_empty:focal", "a loss")


@pytest.mark.parametrize("name", ["focal", "losses:", ":focal", "my losses:focal", "a.:b", "a:b.c"])
def test_what_is_no_module_and_attribute_is_a_name(name):
    assert not is_own(name)
