"""Stages that flags add, remove or give another teacher, before their fields are set.

--config.stages.k8.window=8      a stage that is not there, as the largest student below it
--config.stages.k4.teacher=ar    k4 becomes k4-from-ar
--config.stages.k4=none          no such stage
"""

import logging
from collections.abc import Mapping
from typing import Any

from kforcing_jax.config import stage_name, unknown_field
from kforcing_jax.errors import ConfigError

_LOG = logging.getLogger("kforcing_jax")
# What belongs to one stage alone.
_OWN = {"checkpoint": "", "init_from": ""}
_SUFFIX = "_from_ar"


def change_stages(stages: dict[str, Any], overrides: Mapping[str, str]) -> dict[str, str]:
    """Changes which stages there are; returns the overrides that are left, by the keys that stages have afterwards.

    Raises:
      ConfigError: a stage that is not there is removed or given a field, or one that is there would be there twice.
    """
    removed = [field for field, text in overrides.items() if _depth(field) == 1 and text.lower() == "none"]
    fields = {field: text for field, text in overrides.items() if _depth(field) > 1}
    for field in removed:
        there = _found(stages, field.partition(".")[2])
        if there is None:
            raise unknown_field(field, stages)
        del stages[there]
    new = [(key, text) for key, text in _values(fields, "window").items() if _found(stages, key) is None]
    for key, text in sorted(new, key=lambda stage: (len(stage[1]), stage[1])):  # of ascending windows
        _add(stages, key, text)
    _check_removed_alone(removed, fields, stages)
    teachers = {key: text for key, text in _values(fields, "teacher").items() if text in ("previous", "ar")}
    keys = {stage_name(k): _with_teacher(stages, _key(stages, f"stages.{k}"), text) for k, text in teachers.items()}
    rest = {field: text for field, text in overrides.items() if field not in removed and field not in fields}
    for field, text in fields.items():
        _, key, name = field.split(".", 2)
        rest[f"stages.{keys.get(stage_name(key)) or _key(stages, f'stages.{key}')}.{name}"] = text
    return rest


def _check_removed_alone(removed, fields, stages):
    for field in fields:
        key = field.split(".")[1]
        if stage_name(key) in (stage_name(stage.partition(".")[2]) for stage in removed) and not _found(stages, key):
            raise ConfigError(f"{field} has no effect: stages.{key} = none leaves that stage out; give one of the two")


def _depth(field) -> int:
    """1 for a stage, 2 or more for a field of one."""
    return field.count(".") if field.startswith("stages.") else 0


def _values(fields, name) -> dict[str, str]:
    """By the keys of stages: what is given for a field of theirs."""
    split = {field: field.split(".", 2) for field in fields}
    return {split[field][1]: text for field, text in fields.items() if split[field][2] == name}


def _found(stages, key) -> str | None:
    """The key of a stage, which may be written with dashes or underscores."""
    return next((there for there in stages if stage_name(there) == stage_name(key)), None)


def _key(stages, field) -> str:
    key = field.partition(".")[2]
    there = _found(stages, key)
    if there is None:
        window = key.removeprefix("k").partition("_")[0].partition("-")[0]
        new = f"; a new stage needs its window: --config.{field}.window={window}" if window.isdecimal() else ""
        raise ConfigError(f"{unknown_field(field, stages)}{new}")
    return there


def _add(stages, key, text):
    if not text.isdecimal():
        raise ConfigError(f"stages.{key}.window = {text!r} should be a whole number")
    window, key = int(text), key.replace("-", "_")
    below = [there for there in stages if stages[there].get("window", 0) < window]
    base = max(below, key=lambda there: stages[there].get("window", 0), default=None)
    if base is None:
        raise unknown_field(f"stages.{key}", stages)
    fields = {**stages[base], **_OWN, "window": window, "teacher": "ar" if key.endswith(_SUFFIX) else "previous"}
    if not stages[base].get("window", 0):
        fields["objective"] = ""  # not that of a teacher
    stages[key] = fields
    _LOG.info(f"stage {stage_name(key)} is new: window = {window}, all else as {stage_name(base)} unless given")


def _with_teacher(stages, key, teacher) -> str:
    """The key of a stage with this teacher, which its name says."""
    stages[key]["teacher"] = teacher
    named = key.removesuffix(_SUFFIX) + (_SUFFIX if teacher == "ar" else "")
    if stage_name(named) == stage_name(key) or not stages[key].get("window", 0):
        return key
    if _found(stages, named):
        raise ConfigError(f"stages.{key}.teacher = {teacher!r} makes it {stage_name(named)}, which is there already")
    stages[named] = stages.pop(key)
    _LOG.info(
        f"stage {stage_name(key)} is {stage_name(named)}, for its teacher is {teacher!r}; to have both, leave this out "
        f"and give --config.stages.{named}.window={stages[named]['window']}"
    )
    return named
