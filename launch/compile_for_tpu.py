"""Compiles the training steps of a config for a TPU slice that is not there: do they fit, and what do they cost?

python launch/compile_for_tpu.py --config=configs/owt.py --topology=v5e:2x4

Needs libtpu (pip install -e ".[tpu]") and no TPU. Every stage is compiled in each of its precisions, as
`kforcing_jax.main` would run it on that slice. The exit status is 1 when one of them does not fit.

What was compiled once is not compiled again: results are kept in the user's cache folder, by the program's text.
"""

import os

# Before jax is imported: TPUs are compiled for, not looked for.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import hlo
import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies

from kforcing_jax import cli
from kforcing_jax.config import Config
from kforcing_jax.data.packing import Batch
from kforcing_jax.data.places import cache_folder
from kforcing_jax.errors import ConfigError
from kforcing_jax.models import init_params, splash
from kforcing_jax.sharding import (
    abstract_on,
    batch_sharding,
    check_divisible,
    make_mesh,
    parameter_shardings,
    replicated,
)
from kforcing_jax.training.flops import step_flops
from kforcing_jax.training.recipes import Vocabulary, predecessors, stage_model, stage_objective
from kforcing_jax.training.stage import Phase, abstract_state, compiled_step, precision_phases

_CONFIG = flags.DEFINE_string("config", None, "A file of configs/; fields by --config.model.remat=blocks.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "The slice: v5e:2x4, v5p:2x2x1, v6e:4x4, ...")
_STAGES = flags.DEFINE_list("stage", None, "Only this stage, or these: ar,k4.")
flags.DEFINE_alias("stages", "stage")
_LARGEST_BATCH = flags.DEFINE_bool(
    "largest_batch", False, "Find the most rows that each device can work on at a time; compiles several times."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object, on one line, instead of a table.")

_GIB = 2**30
_TERA = 1e12
# Larger than any chip's memory, so that the compiler says how large that is.
_TOO_LARGE = 2**40


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of one stage in one precision. Bytes and FLOPs are per device, FLOPs also per step."""

    dtype: str
    parameters: int
    batch_per_device: int  # rows of a step
    rows_at_a_time: int
    fits: bool
    hbm_limit: int
    hbm_bytes: int
    argument_bytes: int
    temporary_bytes: int
    model_flops: float
    flops: float | None  # as compiled; None where nothing was
    attention_flops: float | None  # the part of them in attention kernels
    collectives: dict
    largest_gather: str | None  # the shape of the largest result of an all-gather


def main(_):
    config = cli.config_from_flag(_CONFIG)
    devices = _devices(_TOPOLOGY.value)
    mesh = make_mesh(config.mesh, devices)
    check_divisible(config, mesh)
    limit = _hbm_limit(devices[0])
    names = _stage_names(config)
    if not _JSON.value:
        print(f"{_TOPOLOGY.value}: {len(devices)} x {devices[0].device_kind}, {limit / _GIB:.2f} GiB each", flush=True)
        print(_HEADER, flush=True)
    stages = {}
    # The compiler works on one core for one program.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = {name: _reports(config, name, mesh, limit, pool) for name in names}
        for name in names:
            stages[name] = _summary([future.result() for future in reports[name]])
            if not _JSON.value:
                for report in reports[name]:
                    print(_row(name, report.result()), flush=True)
        if _LARGEST_BATCH.value:
            for name in names:
                stages[name]["largest_rows_at_a_time"] = largest = _largest_rows(config, name, mesh, limit, pool)
                if not _JSON.value:
                    print(f"{name}: at most {largest} rows per device at a time", flush=True)
    if _JSON.value:
        print(json.dumps({"topology": _TOPOLOGY.value, "device": devices[0].device_kind, "stages": stages}))
    sys.exit(0 if all(stage["fits"] for stage in stages.values()) else 1)


def _devices(topology: str) -> list:
    """The devices of a slice. Raises ConfigError when it is unknown or libtpu is missing."""
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the plugin raises whatever its C++ status maps to
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--topology={topology} cannot be compiled for ({reason}); it should be like v5e:2x4, v5p:2x2x1 or "
            'v6e:4x4, and libtpu installed: pip install -e ".[tpu]"'
        ) from None


def _hbm_limit(device) -> int:
    """Bytes of memory that a program may use on a device: what the compiler says when it runs out of them."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((_TOO_LARGE,), jnp.int8, sharding=sharding)
    try:
        jax.jit(lambda x: jnp.cumsum(x) + x[::-1]).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        return _needed_and_available(error)[1]
    raise ConfigError(f"--topology={_TOPOLOGY.value}: the compiler does not say how much memory a device has")


def _needed_and_available(error) -> tuple[int, int]:
    """(bytes of temporaries, bytes there are) from the compiler's message. Raises the error if it is about neither."""
    found = re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", str(error))
    if not found:
        raise error
    unit = {letter: 2 ** (10 * (i + 1)) for i, letter in enumerate("KMGT")}
    return tuple(int(float(found[i]) * unit[found[i + 1]]) for i in (1, 3))


def _stage_names(config: Config) -> list[str]:
    names = ["ar", *config.students]
    for name in _STAGES.value or []:
        if name not in names:
            raise ConfigError(f"--stage={name} is not a stage of this config; there are {', '.join(names)}")
    return _STAGES.value or names


def _reports(config: Config, name: str, mesh, limit: int, pool) -> list:
    """The reports, as futures, of every precision of a stage."""
    phases = precision_phases(config.stages[name])
    return [pool.submit(_report, config, name, phase, mesh, limit) for phase in phases]


def _report(config: Config, name: str, phase: Phase, mesh, limit: int) -> Report:
    stage = config.stages[name]
    lowered, arguments = _lower(config, name, phase, mesh)
    compiled = _cached(lowered, functools.partial(_compile, lowered, arguments))
    total = compiled["argument_bytes"] + compiled["temporary_bytes"]
    batch = stage.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    return Report(
        dtype=phase.dtype,
        parameters=_num_parameters(config, name),
        batch_per_device=batch,
        rows_at_a_time=batch // stage.accumulation,
        fits=compiled["compiles"] and total <= limit,
        hbm_limit=limit,
        hbm_bytes=total,
        model_flops=step_flops(config, name, config.data.vocab_size) / mesh.size,
        **{key: value for key, value in compiled.items() if key != "compiles"},
    )


def _lower(config, name, phase, mesh):
    """(the lowered step of a stage, bytes of its arguments on each device)"""
    stage, vocabulary = config.stages[name], _vocabulary(config)
    teacher, _ = predecessors(config, name)
    state = abstract_state(_abstract_params(config, name, mesh), stage, mesh)
    teacher_params = _abstract_params(config, teacher, mesh) if teacher else {}
    rows = jax.ShapeDtypeStruct((stage.batch_size, config.data.seq_len), jnp.int32, sharding=batch_sharding(mesh))
    batch = Batch(rows, None if config.data.packing == "wrapped" else rows)
    key = abstract_on(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    step = compiled_step(stage, functools.partial(stage_objective, config, name, vocabulary), phase, state)
    arguments = (state, teacher_params, batch, key)
    with jax.set_mesh(mesh):
        return step.lower(*arguments), sum(map(_bytes_on_a_device, jax.tree.leaves(arguments)))


def _vocabulary(config):
    """The largest vocabulary that the config allows; mask and EOS have the last ids."""
    size = config.data.markov_states + 1 if config.data.source == "markov" else config.data.vocab_size
    return Vocabulary(size, size - 1, None if config.data.source == "markov" else size - 2)


def _abstract_params(config, name, mesh):
    model = stage_model(config, name, _vocabulary(config))
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return abstract_on(shapes, parameter_shardings(shapes, mesh))


def _num_parameters(config, name):
    model = stage_model(config, name, _vocabulary(config))
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _bytes_on_a_device(x):
    size = 1
    for length in x.sharding.shard_shape(x.shape):
        size *= length
    return size * (8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize)


def _compile(lowered, arguments: int) -> dict:
    """What `Report` holds of a compiled program; of one that does not fit, its arguments without their padding."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, _ = _needed_and_available(error)
        nothing = dict.fromkeys(("flops", "attention_flops", "largest_gather"))
        return {"compiles": False, "argument_bytes": arguments, "temporary_bytes": needed, "collectives": {}} | nothing
    memory, program = compiled.memory_analysis(), hlo.analyse(compiled.as_text())
    attention = sum(call.count * _kernel_flops(call) for call in program.custom_calls)
    # Outputs that are not donated arguments are the metrics.
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    gathers = program.collectives.get("all-gather")
    return {
        "compiles": True,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes + max(outputs, 0),
        "flops": program.flops + attention,
        "attention_flops": attention,
        "collectives": {k: {"count": c.count, "bytes": c.bytes} for k, c in program.collectives.items()},
        "largest_gather": gathers.shapes[0] if gathers else None,
    }


def _kernel_flops(call) -> int:
    """FLOPs of one call: the first two operands with four axes are the queries and the keys."""
    shapes = [shape for shape in map(hlo.dimensions, call.operands) if len(shape) == 4]
    return splash.kernel_flops(call.kernel, tuple(shapes[0]), shapes[1][2]) if len(shapes) > 1 else 0


def _cached(lowered, compute) -> dict:
    """`compute()`, or what it gave before for the same program, compiler and scripts."""
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "kforcing-jax")]
    ours = [Path(file).read_text() for file in (__file__, hlo.__file__)]
    text = "\n".join([_TOPOLOGY.value, *versions, *ours, lowered.as_text()])
    path = cache_folder("compile_for_tpu") / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    if path.exists():
        return json.loads(path.read_text())
    result = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(result))
    temporary.replace(path)
    return result


def _largest_rows(config, name, mesh, limit, pool) -> int:
    """The most rows at a time with which every precision of a stage fits, to one in sixteen.

    Up to eight times the rows of the config: a small model would never fill a chip.
    Memory grows nearly linearly with the rows, so each guess is where the line through the last two ends.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    most = 8 * config.stages[name].batch_size // shards

    def memory(rows):
        stage = dataclasses.replace(config.stages[name], batch_size=rows * shards, accumulation=1)
        changed = dataclasses.replace(config, stages={**config.stages, name: stage})
        reports = [future.result() for future in _reports(changed, name, mesh, limit, pool)]
        return max(report.hbm_bytes for report in reports), all(report.fits for report in reports)

    fitting, failing, points = 0, None, []
    rows = min(4, most)
    while fitting < most and (failing is None or failing - fitting > max(1, fitting // 16)):
        used, fits = memory(rows)
        points.append((rows, used))
        fitting, failing = (rows, failing) if fits else (fitting, rows)
        rows = min(_next_guess(points, fitting, failing, limit), most)
    return fitting


def _next_guess(points, fitting, failing, limit) -> int:
    guess = 2 * points[-1][0]
    if len(points) > 1:
        (a, used_a), (b, used_b) = points[-2:]
        per_row = (used_b - used_a) / (b - a)
        guess = int(b + (limit - used_b) / per_row) if per_row > 0 else guess
    highest = 16 * max(fitting, 1) if failing is None else failing - 1
    return min(max(guess, fitting + 1), max(highest, fitting + 1))


_HEADER = (
    f"{'stage':<12} {'dtype':<9} {'parameters':>11} {'rows':>5} {'at once':>7} {'arguments':>9} {'temporary':>9} "
    f"{'total GiB':>9} {'fits':>5} {'model TF':>9} {'compiled':>9} {'attention':>9}  collectives"
)


def _row(name: str, report: Report) -> str:
    gib = [f"{b / _GIB:>9.2f}" for b in (report.argument_bytes, report.temporary_bytes, report.hbm_bytes)]
    flops = [f"{'-' if f is None else f'{f / _TERA:.3g}':>9}" for f in _flops(report)]
    collectives = ", ".join(
        f"{c['count']} {kind} {c['bytes'] / _GIB:.2f} GiB" for kind, c in sorted(report.collectives.items())
    )
    fits = "yes" if report.fits else "NO"
    return (
        f"{name:<12} {report.dtype:<9} {report.parameters:>11,} {report.batch_per_device:>5} "
        f"{report.rows_at_a_time:>7} {' '.join(gib)} {fits:>5} {' '.join(flops)}  {collectives or '-'}"
    )


def _flops(report):
    return report.model_flops, report.flops, report.attention_flops


def _summary(reports: list[Report]) -> dict:
    """A stage fits when all of its precisions do; its figures are those of the one that takes most memory."""
    largest = max(reports, key=lambda report: report.hbm_bytes)
    return dataclasses.asdict(largest) | {
        "fits": all(report.fits for report in reports),
        "phases": [dataclasses.asdict(report) for report in reports],
    }


if __name__ == "__main__":
    cli.run(main)
