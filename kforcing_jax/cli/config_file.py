"""A configuration from `--config=FILE` or `--config=FILE:VARIANT` and from `--config.FIELD=VALUE`.

The file is Python and has a function `get_config`, which is given the variant, if there is one. FILE can also be the
name of a configuration that is installed with the package, such as `tiny`.
"""

import runpy
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

import ml_collections

from kforcing_jax.cli.stage_flags import change_stages
from kforcing_jax.config import Config, check_own_modules, parse, unknown_field
from kforcing_jax.data.places import expanded
from kforcing_jax.errors import ConfigError, UserError
from kforcing_jax.installed import CONFIGS, config_names

_OVERRIDE = "--config."


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(the other arguments, values by field)."""
    others, overrides, rest = [], {}, iter(argv)
    for arg in rest:
        name, equals, value = arg.partition("=")
        if name.removeprefix("-").startswith(_OVERRIDE[1:]):
            overrides[name.lstrip("-").removeprefix("config.")] = value if equals else next(rest, "")
        else:
            others.append(arg)
    return others, overrides


def read_config(name: str, overrides: Mapping[str, str]) -> Config:
    """The validated configuration. Raises ConfigError."""
    path, variant = _split(name)
    try:
        names = runpy.run_path(str(path))
        if "get_config" not in names:
            raise ConfigError(f"--config={name}: the file has no function get_config")
        config = names["get_config"](*variant)
    except UserError:
        raise
    except Exception as error:  # such files are code: anything can be raised
        reason = " ".join(str(error).split()) or "it fails"
        raise ConfigError(f"--config={name} cannot be read: {type(error).__name__}: {reason}") from None
    plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    if not isinstance(plain, dict):
        raise ConfigError(
            f"--config={name}: get_config gives {type(plain).__name__}; it should return what default_config() made"
        )
    if isinstance(plain.get("stages"), dict):
        overrides = change_stages(plain["stages"], overrides)
    for field, text in overrides.items():
        _override(plain, field, text)
    parsed = parse(plain)
    check_own_modules(parsed)
    return parsed


def _split(name) -> tuple[Path, list[str]]:
    """(file, [variant] or []), of a file that is there or an installed one. A colon may be part of a file's name."""
    parts = name.split(":")
    for count in range(len(parts), 0, -1):
        path = expanded(":".join(parts[:count]))
        if path.is_file():
            return path, [":".join(parts[count:])] if count < len(parts) else []
    installed, *variant = name.split(":", maxsplit=1)
    if installed in config_names():
        return CONFIGS / f"{installed}.py", variant
    raise ConfigError(f"--config={_not_there(':'.join(parts[:-1]) or name)}")


def _not_there(file) -> str:
    """An installed file of the same name is offered, not taken: it may not be the one that was meant."""
    name, names = Path(file).name.removesuffix(".py"), config_names()
    hint = f"the installed one is --config={name}" if name in names else f"installed are {', '.join(names)}"
    return f"{file}: no such file; {hint}"


def _override(config, field, text):
    names, node = field.split("."), config
    for depth, name in enumerate(names, start=1):
        if not isinstance(node, MutableMapping) or name not in node:
            raise unknown_field(".".join(names[:depth]), node if isinstance(node, MutableMapping) else [])
        group, node = node, node[name]
    group[name] = _value(text, node)


def _value(text: str, before):
    """What the text stands for; one of a wrong type is noticed by `parse`."""
    if isinstance(before, str):
        return text
    if isinstance(before, bool):
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
