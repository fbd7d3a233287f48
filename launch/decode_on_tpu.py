"""The programs of decoding, compiled for a TPU that is not there: memory, and what a pass can take at best.

A roofline: a pass lasts as long as its bytes at the memory's bandwidth, or its FLOPs at the chip's peak, whichever is
longer. The bytes are those of the compiled program (`traffic`), not those that it should move; what chips send each
other is left out.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import counting
import jax
import traffic

from kforcing_jax.config import Config
from kforcing_jax.decoding.costs import pass_cost
from kforcing_jax.decoding.engine import programs_for
from kforcing_jax.decoding.passes import Models
from kforcing_jax.decoding.programs import Programs
from kforcing_jax.errors import ConfigError
from kforcing_jax.training.recipes import Vocabulary, stage_model


class Chip(NamedTuple):
    """What Google publishes: bytes per second of its memory, bfloat16 FLOPs per second."""

    bandwidth: float
    peak: float


# By `device_kind`. https://cloud.google.com/tpu/docs/v5e, /v5p and /v6e.
CHIPS = {
    "TPU v5 lite": Chip(819e9, 197e12),
    "TPU v5": Chip(2765e9, 459e12),
    "TPU v6 lite": Chip(1640e9, 918e12),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """One program at one batch and context. Bytes and FLOPs are per device, of one pass but for the memory's."""

    mode: str
    context: int
    batch: int
    k: int  # tokens of a pass, in mode exact at most; 1 is the AR model
    live: int  # slots of a cache that are attended over
    fits: bool
    hbm_limit: int
    argument_bytes: int
    temporary_bytes: int
    cache_bytes: int
    moved_bytes: int
    needed_bytes: float  # weights, and keys and values of the context
    flops: float  # of the hardware: f32 products several times
    seconds: float
    bound: str  # what the pass waits for, "memory" or "arithmetic"
    tokens_per_second: float
    largest: list  # what moves most: [bytes, times, name that JAX gave, result]


def seconds_of_a_pass(moved_bytes: float, flops: float, chip: Chip) -> tuple[float, str]:
    """At best, and what bounds it."""
    memory, arithmetic = moved_bytes / chip.bandwidth, flops / chip.peak
    return max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic"


def models_of(config: Config, vocabulary: Vocabulary, dtype: str) -> dict[str, Models]:
    """By mode, those of AR decoding and of the largest window; of a gated student exact decoding in one pass, too."""

    def model(name):
        whole = stage_model(config, name, vocabulary)
        return type(whole)(dataclasses.replace(whole.cfg, dtype=dtype))

    found = {"ar": Models(None, model("ar"), 1)}
    if config.students:
        largest = max(config.students, key=lambda name: config.stages[name].window)
        found["student"] = student = Models(model(largest), None, config.stages[largest].window)
        if student.is_shared and student.k > 1:
            found["exact"] = dataclasses.replace(student, exact_windows=student.k)
    return found


def chip_of(device) -> Chip:
    """Raises ConfigError for a chip whose bandwidth and peak are not known here."""
    if device.device_kind not in CHIPS:
        raise ConfigError(f"the bandwidth of a {device.device_kind} is not known; of {', '.join(CHIPS)} it is")
    return CHIPS[device.device_kind]


def report(models: Models, mode: str, batch: int, context: int, mesh, limit: int, compiled_once: Callable) -> Report:
    """`compiled_once(lowered, bytes of its arguments, analyse)` compiles, or remembers."""
    programs = programs_for(models, batch, context, mesh)
    live, chip = programs.live_for(context), chip_of(mesh.devices.flat[0])
    traced = programs.trace("run", mode, live)
    arguments = programs.state_bytes + sum(map(_bytes_on_a_device, jax.tree.leaves(programs.weights)))
    compiled = compiled_once(traced.lower(), arguments, analyse)
    moved = compiled.get("moved_bytes", math.nan)
    flops = counting.flops(traced.jaxpr, passes=counting.bfloat16_passes) / mesh.size
    seconds, bound = seconds_of_a_pass(moved, flops, chip)
    return Report(
        mode=mode,
        context=context,
        batch=batch,
        k=models.k,
        live=live,
        fits=compiled["compiles"] and compiled["argument_bytes"] + compiled["temporary_bytes"] <= limit,
        hbm_limit=limit,
        argument_bytes=compiled["argument_bytes"],
        temporary_bytes=compiled["temporary_bytes"],
        cache_bytes=sum(map(_bytes_on_a_device, jax.tree.leaves(programs.state.caches))),
        moved_bytes=moved,
        needed_bytes=_needed(programs, mode, context),
        flops=flops,
        seconds=seconds,
        bound=bound,
        tokens_per_second=batch * models.k / seconds,
        largest=compiled.get("largest", []),
    )


def analyse(text: str) -> dict:
    """What a pass of a compiled program moves, and what most of it is."""
    moved = traffic.of_a_pass(text)
    return {"moved_bytes": traffic.total(moved), "largest": traffic.summed(moved)[:20]}


def _needed(programs: Programs, mode: str, context: int) -> float:
    """Weights as they are split, and the cache of the rows and heads of a device."""
    shape, batch = programs.mesh.shape, programs.slots
    with programs.on_mesh():
        weights = pass_cost(programs.models, mode, batch, 0).bytes
        cache = pass_cost(programs.models, mode, batch, context).bytes - weights
    return weights / (shape["fsdp"] * shape["tensor"]) + cache / programs.mesh.size


def _bytes_on_a_device(x) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


HEADER = (
    f"{'mode':>7} {'context':>7} {'batch':>5} {'k':>2} {'arguments':>9} {'temporary':>9} {'/ cache':>7} {'fits':>4} "
    f"{'moved MB':>9} {'/ needed':>8} {'GFLOPs':>8} {'ms':>7} {'bound by':>10} {'tokens/s':>9} {'over AR':>7}"
)


def row(report: Report, ar: Report) -> str:
    memory = f"{report.argument_bytes / 2**30:>9.2f} {report.temporary_bytes / 2**30:>9.3f}"
    return (
        f"{report.mode:>7} {report.context:>7} {report.batch:>5} {report.k:>2} {memory} "
        f"{report.temporary_bytes / report.cache_bytes:>7.2f} {'yes' if report.fits else 'NO':>4} "
        f"{report.moved_bytes / 1e6:>9,.0f} {report.moved_bytes / report.needed_bytes:>8.2f} "
        f"{report.flops / 1e9:>8.1f} "
        f"{report.seconds * 1e3:>7.3f} {report.bound:>10} {report.tokens_per_second:>9,.0f} "
        f"{report.tokens_per_second / ar.tokens_per_second:>7.2f}"
    )
