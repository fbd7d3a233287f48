"""Runs side by side: how far they are, which settings differ, what they measured and whether it may be compared."""

import collections
import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kforcing_jax.config import Config
from kforcing_jax.errors import ConfigError, RunError
from kforcing_jax.evaluation.history import read_history
from kforcing_jax.evaluation.tables import drawn_at, in_order, is_number, stages_of
from kforcing_jax.training.records import stage_progress
from kforcing_jax.workdir import Workdir

# Figures that are held against the first run's, where both have intervals.
HELD = ("block_agreement", "sample_nll", "sample_entropy")
_UNDER_TEACHER = ("sample_nll", "sample_entropy")
# What the samples of an evaluation are like.
_OF_SAMPLES = ("rows", "samples", "prompt_length", "new_tokens")
_TEACHER, _VOCABULARY, _DATA = "AR teacher", "vocabulary", "data"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as far as it has come, by a name that tells it from the others.

    `summary` and `history` are what summary.json and metrics.jsonl hold, {} where there is nothing yet; `stages` the
    figures of stages as `stages_of`; `digests` those of the AR teacher's weights, of vocabulary and data, as far as
    they are known.
    """

    name: str
    path: Path
    config: Config
    summary: dict
    history: dict[str, list[dict]]
    digests: dict[str, str]

    @property
    def stages(self) -> dict[str, dict]:
        """The figures of stages, as `stages_of`."""
        return stages_of(self.summary)

    def step(self, stage: str) -> int | None:
        """The last step that is known of a stage; None before there is one."""
        records = self.history.get(stage)
        said = [records[-1]["step"] if records else None, self.stages.get(stage, {}).get("steps")]
        steps = [int(step) for step in said if step is not None and is_number(step)]
        return max(steps, default=None)


class Remark(NamedTuple):
    """What a reader has to know before the figures; a warning where they would mislead."""

    text: str
    is_warning: bool


def open_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs of two directories or more, in their order.

    Raises:
      ConfigError: fewer than two, or one of them twice.
      RunError: no run directory, or a damaged file in it; names it.
    """
    if len(paths) < 2:
        given = f"only {paths[0]}" if paths else "none"
        raise ConfigError(f"a comparison takes two run directories or more, such as runs/a runs/b; given: {given}")
    seen: dict[Path, str | Path] = {}
    for path in paths:
        resolved = Path(path).expanduser().resolve()
        if resolved in seen:
            raise ConfigError(f"{path} is the same run directory as {seen[resolved]}; give each run once")
        seen[resolved] = path
    workdirs = [Workdir.open(path) for path in paths]
    names = distinct_names([workdir.path for workdir in workdirs])
    return [_open(name, workdir) for name, workdir in zip(names, workdirs, strict=True)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many of its parents as tell it from the others of that name."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    depths = [1] * len(paths)
    while True:
        names = ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        counts = collections.Counter(names)
        if len(counts) == len(names):
            return names
        depths = [depth + (counts[name] > 1) for name, depth in zip(names, depths, strict=True)]


def differing_settings(runs: Sequence[Run]) -> dict[str, list]:
    """The fields, by their names in flags, that two runs have with different values: one per run, None without it.

    A run has no fields of a stage that it does not have; `stages_of_some` tells of those.
    """
    trees = [_fields(dataclasses.asdict(run.config)) for run in runs]
    values = {name: [tree.get(name) for tree in trees] for name in dict.fromkeys(itertools.chain(*trees))}
    return {name: row for name, row in values.items() if len({value for value in row if value is not None}) > 1}


def stages_of_some(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Stages that not all runs have in their configurations: the names of those that do."""
    names = in_order({name: [run.name for run in runs if name in run.config.stages] for name in _configured(runs)})
    return {stage: having for stage, having in names.items() if len(having) < len(runs)}


def figures(runs: Sequence[Run]) -> dict[str, dict[str, dict]]:
    """What was measured: by stage and by run, of those that have figures of it."""
    found: dict[str, dict[str, dict]] = collections.defaultdict(dict)
    for run in runs:
        for stage, measured in run.stages.items():
            found[stage][run.name] = measured
    return in_order(found)


def verdicts(runs: Sequence[Run], stage: str) -> dict[str, dict[str, str]]:
    """Where 95 % intervals lie beside those of the first run that has some, by run and figure: above, below, overlaps.

    Only of figures that may be compared: what the AR teacher says of samples, where both have the same one; nothing
    where vocabularies are known to differ.
    """
    found: dict[str, dict[str, str]] = {}
    for key in HELD:
        having = [run for run in runs if run.stages.get(stage, {}).get(f"{key}_interval")]
        for other in having[1:]:
            if _comparable(having[0], other, key):
                interval, first = (run.stages[stage][f"{key}_interval"] for run in (other, having[0]))
                found.setdefault(other.name, {})[key] = _beside(interval, first)
    return found


def remarks(runs: Sequence[Run]) -> list[Remark]:
    """Warnings first: what may not be compared, what is not known, which runs have not ended."""
    found = itertools.chain(
        _about_teachers(runs),
        _about_inputs(runs),
        _about_losses(runs),
        _about_evaluation(runs),
        map(_about_progress, runs),
    )
    return sorted(filter(None, found), key=lambda remark: not remark.is_warning)


def progress(run: Run) -> dict[str, str]:
    """How far each stage of a run is, in order: its steps, done of all where it has not ended; "-" before it begins."""
    stages = in_order({name: stage.last_step for name, stage in run.config.stages.items()})
    return {name: _progress(run.step(name), last) for name, last in stages.items()}


def as_json(runs: Sequence[Run]) -> dict:
    """Everything that the page and the tables show but the curves, as plain values."""
    return {
        "runs": [
            {"name": run.name, "path": str(run.path), "steps": {name: run.step(name) for name in run.config.stages}}
            | {"digests": run.digests}
            | {key: run.summary.get(key) for key in ("device", "date", "revision", "command", "tau", "top_p")}
            for run in runs
        ],
        "settings": {
            name: {run.name: value for run, value in zip(runs, row, strict=True)}
            for name, row in differing_settings(runs).items()
        },
        "stages_of_some": stages_of_some(runs),
        "remarks": [remark._asdict() for remark in remarks(runs)],
        "figures": figures(runs),
        "beside_first": {stage: verdicts(runs, stage) for stage in figures(runs)},
    }


def _open(name, workdir):
    summary = _read_summary(workdir.summary_path)
    digests = _digests(workdir, summary)
    return Run(name, workdir.path, workdir.config, summary, read_history(workdir.metrics_path), digests)


def _read_summary(path):
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict) or not isinstance(summary.get("stages"), dict):
            raise ValueError("it has no stages")
        if not all(isinstance(stage, dict) for stage in summary["stages"].values()):
            raise ValueError("its stages are no objects")
        return summary
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); kforcing_jax.evaluate writes it anew") from None


def _digests(workdir, summary):
    """By what they are of. A summary's AR teacher is the one that its figures come from."""
    said = {stage: stage_progress(workdir, stage) for stage in workdir.config.stages}
    origins = [progress.get("made_from") or {} for progress in said.values()]
    found = {name: next(filter(None, (o.get(name) for o in origins)), None) for name in (_VOCABULARY, _DATA)}
    measured = ((summary.get("stages") or {}).get("ar") or {}).get("weights")
    found[_TEACHER] = measured or said.get("ar", {}).get("weights")
    return {name: digest for name, digest in found.items() if digest}


def _fields(tree, path=""):
    """The values of nested mappings by their names in flags: a stage with a dash is a key with an underscore there."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        name: value
        for key, child in tree.items()
        for name, value in _fields(child, f"{path}.{key.replace('-', '_')}".strip(".")).items()
    }


def _configured(runs):
    return dict.fromkeys(name for run in runs for name in run.config.stages)


def _comparable(first, other, key):
    if _differ(first, other, _VOCABULARY):
        return False
    return key not in _UNDER_TEACHER or first.digests.get(_TEACHER) == other.digests.get(_TEACHER) is not None


def _differ(first, other, name):
    """Whether two runs are known to have different ones."""
    return name in first.digests and name in other.digests and first.digests[name] != other.digests[name]


def _beside(interval, first):
    if interval[0] > first[1]:
        return "above"
    return "below" if interval[1] < first[0] else "overlaps"


def _about_teachers(runs):
    if _kinds(runs, _TEACHER) > 1:
        yield Remark(
            f"The AR teachers differ ({_named(runs, _TEACHER)}). NLL and entropy are what each run's own teacher says "
            "of samples, so they are not comparable between these runs; agreement is with each run's own teacher.",
            True,
        )
    elif all(_TEACHER in run.digests for run in runs):
        digest = runs[0].digests[_TEACHER]
        yield Remark(
            f"All runs have the same AR teacher (weights {digest[:8]}), so NLL and entropy are comparable.", False
        )
    if unknown := [run.name for run in runs if _TEACHER not in run.digests]:
        yield Remark(
            f"It is not known whether {', '.join(unknown)} will have the AR teacher of the others: it is not trained.",
            False,
        )


def _about_inputs(runs):
    if _kinds(runs, _VOCABULARY) > 1:
        yield Remark(
            f"The vocabularies differ ({_named(runs, _VOCABULARY)}): losses, NLL and agreement are per token, and "
            "tokens are not the same here. None of them is comparable.",
            True,
        )
    elif _kinds(runs, _DATA) > 1:
        yield Remark(
            f"The data differs ({_named(runs, _DATA)}): losses, agreement and prompts are of different texts.", True
        )


def _about_losses(runs):
    kinds = [name for name in differing_settings(runs) if name.rpartition(".")[2] in ("loss", "objective")]
    if kinds:
        yield Remark(f"Losses of different kinds are not comparable ({', '.join(kinds)} differ); agreement is.", True)


def _about_evaluation(runs):
    measured = [run for run in runs if any("sample_nll" in stage for stage in run.stages.values())]
    drawn = {run.name: drawn_at(run.summary) for run in measured}
    if len(set(drawn.values())) > 1:
        told = "; ".join(f"{name} at {how}" for name, how in drawn.items())
        yield Remark(f"Samples were drawn differently ({told}): their figures are not comparable.", True)
    fields = [f for f in _OF_SAMPLES if len({getattr(run.config.evaluation, f) for run in measured}) > 1]
    if fields:
        names = ", ".join(f"evaluation.{field}" for field in fields)
        yield Remark(f"The evaluations are not of the same size: {names} differ, and so do their figures.", True)
    if len({run.summary.get("device") for run in measured}) > 1:
        yield Remark("The evaluations ran on different devices: times and tokens per second are not comparable.", True)


def _about_progress(run):
    unfinished = [name for name in run.config.stages if "validation_loss" not in run.stages.get(name, {})]
    states = [f"{stage} at step {text}" for stage, text in progress(run).items() if stage in unfinished and text != "-"]
    absent = [stage for stage, text in progress(run).items() if stage in unfinished and text == "-"]
    states += [f"{', '.join(absent)} not begun"] if absent else []
    if not unfinished and not all("sample_nll" in stage for stage in run.stages.values()):
        states = ["not evaluated"]
    return Remark(f"{run.name} has not ended: {'; '.join(states)}.", False) if states else None


def _progress(step, last):
    if step is None:
        return "-"
    return f"{step:,}" if step >= last else f"{step:,} of {last:,}"


def _kinds(runs, name):
    return len({run.digests[name] for run in runs if name in run.digests})


def _named(runs, name):
    """Whose digest is which: a, b: 1234abcd; c: 5678abcd."""
    having = collections.defaultdict(list)
    for run in runs:
        if name in run.digests:
            having[run.digests[name][:8]].append(run.name)
    return "; ".join(f"{', '.join(names)}: {digest}" for digest, names in having.items())
