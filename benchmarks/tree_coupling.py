"""An experiment: one uniform per level of a binary tree over the vocabulary, in place of one uniform on a line.

    python benchmarks/tree_coupling.py --workdir=runs/news --output=tree_coupling.json

A token is found by descending a tree whose leaves are the tokens in the run's order on [0, 1): at every level a uniform
of its own decides between the two halves. The noise of a token stays one number; the uniforms of the levels are a fixed
hash of it. Samples of the teacher have the same law; the map that a student learns is another one. The students of a
finished run (line) are compared with students of the same AR teacher, recipe and number of steps (tree): agreement,
teacher's NLL and entropy side by side. What came out: docs/results.md.

`--scale=0.5` trains both kinds at half the steps, where there is no time for the whole.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags
from students import Experiment, line, say, write_json

from kforcing_jax.config import predecessors
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.models.backbone import Backbone
from kforcing_jax.models.layers import NoiseEncoder, fourier_features

_WORKDIR = flags.DEFINE_string("workdir", None, "A finished run.", required=True)
_STAGES = flags.DEFINE_list("stages", ["k1", "k2", "k4"], "Students, each taught by the one before.")
_SCALE = flags.DEFINE_float("scale", 1.0, "Of the run's steps.", lower_bound=0.0)
_OUTPUT = flags.DEFINE_string("output", None, "Where the figures go, as JSON; they are printed in any case.")

# Cycles per unit of a level's uniform; a quarter of one is monotonic on [0, 1).
_CYCLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def level_uniforms(u_x: jax.Array, levels: int) -> jax.Array:
    """(x, levels): uniforms on the 2^-24 grid, a fixed hash (the finaliser of MurmurHash3) of a uniform's bits."""
    bits_x1 = (u_x * 2.0**24).astype(jnp.uint32)[..., None]
    bits_xL = bits_x1 * jnp.uint32(0x9E3779B1) + jnp.arange(1, levels + 1, dtype=jnp.uint32) * jnp.uint32(0x85EBCA77)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits_xL = (bits_xL ^ (bits_xL >> shift)) * jnp.uint32(factor)
    return ((bits_xL ^ (bits_xL >> 16)) >> 8).astype(jnp.float32) * 2.0**-24


def tree_column(probabilities_xV: jax.Array, u_x: jax.Array) -> jax.Array:
    """The leaf that is found by descending; one of probability zero never is."""
    levels = math.ceil(math.log2(probabilities_xV.shape[-1]))
    pad = [(0, 0)] * u_x.ndim + [(0, 2**levels - probabilities_xV.shape[-1])]
    masses = [jnp.pad(probabilities_xV, pad)]
    while masses[-1].shape[-1] > 1:
        halves = masses[-1].reshape(*u_x.shape, -1, 2)
        masses.append(halves.sum(-1))
    u_xL = level_uniforms(u_x, levels)
    node_x = jnp.zeros(u_x.shape, jnp.int32)
    for level, mass_xM in enumerate(reversed(masses[:-1])):
        left_x, right_x = (jnp.take_along_axis(mass_xM, (2 * node_x + i)[..., None], -1)[..., 0] for i in (0, 1))
        goes_right_x = (u_xL[..., level] * (left_x + right_x) >= left_x) & (right_x > 0)
        node_x = 2 * node_x + goes_right_x
    return node_x


class TreeCausalLM(CausalLM):
    """An AR teacher that draws by descending the tree."""

    def pick(self, ordered_xV, u_x, tau_x):
        probabilities_xV = jax.nn.softmax(self.tempered(ordered_xV, tau_x), axis=-1)
        return self.cfg.token_at(tree_column(probabilities_xV, jnp.broadcast_to(u_x, ordered_xV.shape[:-1])))


class TreeNoiseEncoder(NoiseEncoder):
    """Embeds the uniforms of all levels, and a temperature."""

    levels: int = 0

    def __call__(self, u_x, tau_x):
        return self.of_noise(u_x, self.of_tau(tau_x))

    def of_tau(self, tau_x):
        return fourier_features(tau_x, self.d_model)

    def of_noise(self, u_x, of_tau_xD):
        angles_xLxF = 2 * jnp.pi * level_uniforms(u_x, self.levels)[..., None] * jnp.array(_CYCLES)
        features_xF = jnp.concatenate([jnp.cos(angles_xLxF), jnp.sin(angles_xLxF)], -1).reshape(*u_x.shape, -1)
        of_tau_xD = jnp.broadcast_to(of_tau_xD, (*u_x.shape, self.d_model))
        return self._mix(self.project(jnp.concatenate([features_xF, of_tau_xD], -1)))


class TreePushForwardLM(PushForwardLM):
    """A student of the tree's map."""

    def setup(self):
        self.backbone = Backbone(self.cfg)
        levels = math.ceil(math.log2(self.cfg.vocab_size))
        self.noise_encoder = TreeNoiseEncoder(self.cfg.d_model, self.cfg.precision, levels=levels)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A coupling: its models."""

    teacher: type[nn.Module]
    student: type[nn.Module]


ARMS = {"line": Arm(CausalLM, PushForwardLM), "tree": Arm(TreeCausalLM, TreePushForwardLM)}


def trained(experiment: Experiment, arm: Arm) -> dict:
    """Figures of students that are trained here."""
    teacher, student = (kind(experiment.ar.cfg) for kind in (arm.teacher, arm.student))
    found, params = {}, {"ar": experiment.ar_params}
    for name in _STAGES.value:
        parent, origin = predecessors(experiment.config, name)
        taught_by = (teacher if parent == "ar" else student), params[parent]
        steps = max(round(experiment.config.stages[name].steps * _SCALE.value), 1)
        params[name] = experiment.train(name, student, taught_by, params[origin], steps=steps)
        found[name] = experiment.figures(name, student, params[name], teacher)
        say(name, line(found[name]))
    return found


def of_run(experiment: Experiment) -> dict:
    """Figures of the run's own students."""
    return {name: experiment.figures(name, *experiment.stage(name)) for name in _STAGES.value}


def main(_):
    with Experiment.opened(_WORKDIR.value) as experiment:
        results = {"tree": trained(experiment, ARMS["tree"])}
        results["line"] = of_run(experiment) if _SCALE.value == 1 else trained(experiment, ARMS["line"])
    for arm in ARMS:
        for name in _STAGES.value:
            say(f"{arm:<5} {name:<3}", line(results[arm][name]))
    write_json(_OUTPUT.value, experiment, {"scale": _SCALE.value} | results)


if __name__ == "__main__":
    app.run(main)
