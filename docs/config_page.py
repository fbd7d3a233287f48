"""The page of all configuration fields, written from `kforcing_jax/config.py` when the site is built.

Names, defaults and comments are read from the source; what a field may be is asked of the configuration itself, by
giving it a value that it should refuse.
"""

import ast
import dataclasses
import inspect
import io
import json
import math
import tokenize
import typing
from collections.abc import Iterator

from kforcing_jax import config as fields
from kforcing_jax.config import Config, ConfigError, StageConfig

_HEAD = """\
# Configuration

Every field, its default, and what it may be, from `kforcing_jax/config.py`. A file of `configs/` starts from
`default_config()` and `default_stage()` and changes what it needs; any field can be changed on the command line:

    python -m kforcing_jax.main --config=configs/tiny.py --workdir=runs/wide --config.model.d_model=192

A wrong field is named before anything runs, with its value and what would be right. Rules that join several fields are
not in these tables; the error says them.
"""

# Values that a rule is likely to refuse, by type.
_PROBES = {int: (-10, 2**40), float: (-1.0, 2.0, math.inf), str: ("?",)}


class Field(typing.NamedTuple):
    """One field as the page shows it."""

    path: str
    default: str
    comment: str
    rule: str


def page() -> str:
    """The page, in Markdown."""
    groups = {"": Config} | groups_of(Config) | {"stages.X": StageConfig}
    return _HEAD + "".join(_section(name, cls) for name, cls in groups.items())


def groups_of(cls: type) -> dict[str, type]:
    """The groups of fields of a configuration, and the groups in these, by name."""
    found: dict[str, type] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= {name: kind} | {f"{name}.{inner}": group for inner, group in groups_of(kind).items()}
    return found


def fields_of(cls: type, group: str) -> Iterator[Field]:
    """The fields of one group, but for those that are groups themselves."""
    types, comments = typing.get_type_hints(cls), comments_of(cls)
    for field in dataclasses.fields(cls):
        if field.name in groups_of(cls) or field.default is dataclasses.MISSING:
            continue
        path = f"{group}.{field.name}".lstrip(".")
        rule = rule_of(path.replace("stages.X", "stages.k2"), types[field.name])
        default = json.dumps(field.default) if isinstance(field.default, str) else repr(field.default)
        yield Field(path, default, comments[field.name], rule)


def comments_of(cls: type) -> dict[str, str]:
    """Of every field of a dataclass, the comments right above it and at the end of its lines, as one text.

    Those of a class that it is made from stand for fields about which it says nothing itself.
    """
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if dataclasses.is_dataclass(each):
            found |= {name: text for name, text in _own_comments(each).items() if text or name not in found}
    return found


def _own_comments(cls):
    source = inspect.getsource(cls)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            found[node.target.id] = " ".join(_about(node, comments, source.splitlines()))
    return found


def _about(node, comments, lines):
    first = node.lineno
    while lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return [comments[line] for line in range(first, node.end_lineno + 1) if line in comments]


def rule_of(path: str, kind: type) -> str:
    """What a configuration says when the field has a value that it refuses; "" when it takes all that were tried."""
    if len(typing.get_args(kind)) == 2:  # a tuple of any length
        probes = [(value,) for value in _PROBES[typing.get_args(kind)[0]]]
    else:
        probes = _PROBES.get(kind, ())
    for value in probes:
        try:
            fields.parse(_with(path, value))
        except ConfigError as error:
            # Of all that a value makes wrong, what is said of the field itself comes first.
            start, message = f"{path} = ", str(error).split(f"; {path.rpartition('.')[0]}.")[0]
            if message.startswith(start) and (rule := _as_rule(message.removeprefix(start))):
                return rule
    return ""


def _with(path, value) -> dict:
    """A configuration that is right but for one field."""
    config: dict = {"stages": {"ar": {}, "k1": {"window": 1}, "k2": {"window": 2}}}
    *groups, name = path.split(".")
    node = config
    for group in groups:
        node = node.setdefault(group, {})
    node[name] = value
    return config


def _as_rule(refusal):
    """From "-10 should be at least 1": "at least 1"; "" of what is no rule for this field alone."""
    _, found, rule = refusal.partition(" should be " if " should be " in refusal else " is not ")
    return rule.replace(", nor ", ", or ") if found else ""


def _adds_to(comment, rule):
    """Whether a rule says more than the comment, which may name all choices."""
    choices = rule.removeprefix("one of ").split(";")[0].split(", or ")[0].split(", ")
    return bool(rule) and not (rule.startswith("one of ") and all(choice in comment for choice in choices))


def _section(name, cls):
    head = f"\n## {name or 'The run'}\n\n{inspect.cleandoc(cls.__doc__)}\n\n"
    rows = [f"| `{name}` | default | |" if name else "| field | default | |", "| --- | --- | --- |"]
    for field in fields_of(cls, name):
        anchor = f'<span id="{field.path}"></span>'
        rule = f"*{_cell(field.rule)}*" if _adds_to(field.comment, field.rule) else ""
        meaning = "<br>".join(part for part in (_cell(field.comment), rule) if part)
        rows.append(f"| {anchor}`{field.path.split('.')[-1]}` | `{_cell(field.default)}` | {meaning} |")
    return head + "\n".join(rows) + "\n"


def _cell(text):
    return text.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")
