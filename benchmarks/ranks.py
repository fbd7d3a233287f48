"""What the rank of a gated student's deltas buys: k = 1, 2, 4 at several ranks, next to ordinary students.

    python benchmarks/ranks.py --workdir=runs/tiny --scale=0.5 --output=ranks.json

All students have the run's AR teacher, its recipes (shortened by --scale), its data and its noise; each k starts from
the one before. Targets of k = 2 and 4 come from the student before (`previous`) or from the AR teacher (`ar`); with
`mixed` the first half of a window from the AR teacher, the second from the student before, which goes on from it.
`windows` is how many windows a step hangs off every position.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from students import Experiment, line, say, write_json

from kforcing_jax.config import FULL_RANK
from kforcing_jax.models import PushForwardLM
from kforcing_jax.models.keys import Causal, Known
from kforcing_jax.models.lm import consecutive, text_positions
from kforcing_jax.training.objectives import Objective, distillation
from kforcing_jax.training.rollout import rollout

_WORKDIR = flags.DEFINE_string("workdir", None, "A finished run.", required=True)
_SCALE = flags.DEFINE_float("scale", 1.0, "Of the run's steps.", lower_bound=0.0)
_RANKS = flags.DEFINE_list("ranks", ["0", "8", "32", str(FULL_RANK)], "Of deltas; 0 is an ordinary student, -1 full.")
_TARGETS = flags.DEFINE_list("targets", ["previous", "ar"], "Of k = 2 and 4: previous, ar, mixed.")
_WINDOWS = flags.DEFINE_integer("windows", 1, "After every position, of gated students.", lower_bound=1)
_RATE = flags.DEFINE_float("rate", 1.0, "Learning rates, as a multiple of the run's.", lower_bound=0.0)
_OUTPUT = flags.DEFINE_string("output", None, "Where the figures go, as JSON; they are printed in any case.")

_STUDENTS = ("k1", "k2", "k4")


def mixed_targets(
    student, params, tokens_BxN, noise_BxNxK, tau_B, chunk, segments_BxN=None, top_p=1.0, text=None
) -> jax.Array:
    """As `rollout` of a gated student of half the window, whose first half is drawn by the AR teacher in it."""
    teacher = student.text_model
    first_BxNxC = rollout(teacher, params, tokens_BxN, noise_BxNxK[..., :chunk], tau_B, 1, segments_BxN, top_p, text)
    positions = consecutive(text_positions(tokens_BxN.shape, segments_BxN) + 1, noise_BxNxK.shape[2])
    keys = jax.tree.map(lambda kv: kv[:, :, :, 0], text.keys)
    prefix, later = Known(keys, Causal(segments_BxN)), noise_BxNxK[..., chunk:]
    variables = {"params": params}
    result: Any = student.apply(variables, first_BxNxC, later, tau_B, positions, prefix, method="extend")
    drawn: Any = student.apply(variables, student.drawable(result), later, tau_B[:, None, None], method="draw")
    return jnp.concatenate([first_BxNxC, drawn], axis=2)


def mixed(student, teacher, stage, eos_id) -> Objective:
    """`distillation` with `mixed_targets`."""
    return distillation(student, teacher, stage, eos_id, targets=mixed_targets)


def students_of(experiment: Experiment, rank: int, targets: str, first: dict) -> dict:
    """Weights and figures of the students by name; those in `first` are there already."""
    found = dict(first)
    student = PushForwardLM(dataclasses.replace(experiment.ar.cfg, adapter_rank=rank))
    ar, before = (experiment.ar, experiment.ar_params), (experiment.ar, experiment.ar_params)
    for name in _STUDENTS:
        if name not in found:
            settings = experiment.config.stages[name]
            changes: dict = {"learning_rate": settings.learning_rate * _RATE.value}
            changes |= {"windows": _WINDOWS.value if rank else 1}
            if targets == "mixed" and name != "k1":
                changes["objective"] = mixed
            teacher = ar if targets == "ar" else before
            start, steps = time.monotonic(), round(settings.steps * _SCALE.value)
            params = experiment.train(name, student, teacher, before[1], steps=steps, **changes)
            seconds = time.monotonic() - start
            figures = experiment.figures(name, student, params)
            found[name] = params, figures | {"steps": steps, "seconds": round(seconds, 1)}
        say(f"rank {rank}, {targets}, {name}: {line(found[name][1])}, {found[name][1]['seconds']:.0f} s")
        before = student, found[name][0]
    return found


def main(_):
    results: dict = {"scale": _SCALE.value, "windows": _WINDOWS.value, "rate": _RATE.value, "students": []}
    with Experiment.opened(_WORKDIR.value) as experiment:
        for rank in map(int, _RANKS.value):
            first: dict = {}
            for targets in _TARGETS.value:
                found = students_of(experiment, rank, targets, first)
                first = {"k1": found["k1"]}  # its targets are the AR teacher's in any case
                for name in _STUDENTS:
                    row = {"rank": rank, "targets": targets, "stage": name} | found[name][1]
                    results["students"].append(row)
                write_json(_OUTPUT.value, experiment, results)


if __name__ == "__main__":
    app.run(main)
