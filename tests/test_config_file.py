"""Configurations that are files of one's own."""

import pytest

from kforcing_jax.cli.config_file import read_config
from kforcing_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config():\n    pass\n", "get_config gives NoneType; it should return what default_config"),
        ("def get_config():\n    return 3\n", "get_config gives int"),
        ("config = 3\n", "the file has no function get_config"),
        ("def get_config():\n    return nothing\n", "cannot be read: NameError: name 'nothing' is not defined"),
        ("def get_config(:\n", "cannot be read: SyntaxError"),
    ],
)
def test_a_file_that_gives_no_configuration_is_named_with_the_reason(text, says, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"--config={path}:? {says}"):
        read_config(str(path), {})
