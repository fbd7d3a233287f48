"""Compiles the programs of a config for a TPU slice that is not there: do they fit, and what do they cost?

python launch/compile_for_tpu.py --config=configs/owt.py --topology=v5e:2x4
python launch/compile_for_tpu.py --config=configs/lm1b.py --topology=v5e:1x1 --decode

Needs libtpu (pip install -e ".[tpu]") and no TPU; of a `stages.ar.checkpoint` a folder with its config.json is enough.
Every stage is compiled in each of its precisions, as `kforcing_jax.main` would run it on that slice; with --decode the
decoding of the AR model and of the largest window. The exit status is 1 when one of them does not fit.

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
import json
import math
import sys

import counting
import decode_on_tpu
import jax
import jax.numpy as jnp
import tpu_compiler
from absl import flags

from kforcing_jax import cli
from kforcing_jax.config import BackboneConfig, Config
from kforcing_jax.data.choices import PACKINGS
from kforcing_jax.data.model_tokenizers import has_model
from kforcing_jax.data.models import located
from kforcing_jax.data.packing import Batch
from kforcing_jax.errors import ConfigError
from kforcing_jax.interop.teachers import with_teacher
from kforcing_jax.models import init_params, splash
from kforcing_jax.noise import CdfOrder
from kforcing_jax.sharding import (
    abstract_on,
    batch_sharding,
    check_divisible,
    make_mesh,
    parameter_shardings,
    replicated,
)
from kforcing_jax.training.flops import step_flops
from kforcing_jax.training.recipes import Vocabulary, predecessors, stage_model, stage_objective, trained_part
from kforcing_jax.training.stage import Phase, abstract_state, compiled_step, precision_phases

_CONFIG = flags.DEFINE_string("config", None, "A file of configs/; fields by --config.model.remat=blocks.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "The slice: v5e:2x4, v5p:2x2x1, v6e:4x4, ...")
_STAGES = flags.DEFINE_list("stage", None, "Only this stage, or these: ar,k4.")
flags.DEFINE_alias("stages", "stage")
_LARGEST_BATCH = flags.DEFINE_bool(
    "largest_batch", False, "Find the most rows that each device can work on at a time; compiles several times."
)
_DECODE = flags.DEFINE_bool("decode", False, "Compile decoding instead: AR, the largest window; if gated, exact.")
_BATCH = flags.DEFINE_list("batch", "1,4,16,64,128,256", "With --decode: requests at a time.")
_CONTEXT = flags.DEFINE_list("context", "128,1024", "With --decode: tokens of every text.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "With --decode: of the blocks and caches.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object, on one line, instead of a table.")

_SIZES = ("num_layers", "d_model", "num_heads")
_GIB = 2**30
_TERA = 1e12


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
    model_flops: float  # of the arithmetic
    flops: float  # as traced: with what is computed again, and masked pairs
    collectives: dict  # by kind, as `counting.Collective`


def main(_):
    config = _with_sizes(cli.config_from_flag(_CONFIG))
    devices = tpu_compiler.devices_of(_TOPOLOGY.value)
    mesh = make_mesh(config.mesh, devices)
    check_divisible(config, mesh)
    limit = tpu_compiler.hbm_limit(devices[0])
    _say(f"{_TOPOLOGY.value}: {len(devices)} x {devices[0].device_kind}, {limit / _GIB:.2f} GiB each")
    # The compiler works on one core for one program.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        result, fits = (_decode if _DECODE.value else _train)(config, mesh, limit, pool)
    if _JSON.value:
        print(json.dumps({"topology": _TOPOLOGY.value, "device": devices[0].device_kind} | result))
    sys.exit(0 if fits else 1)


def _with_sizes(config: Config) -> Config:
    """With those of its teacher, whose weights need not be here. Raises ConfigError where nothing says them."""
    path, found, default = config.stages["ar"].checkpoint, with_teacher(config), BackboneConfig()
    is_said = any(getattr(found.model, name) != getattr(default, name) for name in _SIZES)
    if path and not is_said and not located(path).exists():
        raise ConfigError(
            f"stages.ar.checkpoint = {path!r} is not here, and model.num_layers, d_model, num_heads do not say its "
            "sizes; a folder with its config.json alone is enough"
        )
    return found


def _train(config, mesh, limit, pool) -> tuple[dict, bool]:
    """What there is to say of training, and whether all of it fits."""
    names, stages = _stage_names(config), {}
    _say(_HEADER)
    futures = {name: _reports(config, name, mesh, limit, pool) for name in names}
    for name in names:
        reports = [future.result() for future in futures[name]]
        _say("\n".join(_row(name, report) for report in reports))
        stages[name] = _summary(reports)
    for name in names if _LARGEST_BATCH.value else []:
        stages[name]["largest_rows_at_a_time"] = largest = _largest_rows(config, name, mesh, limit, pool)
        _say(f"{name}: at most {largest} rows per device at a time")
    return {"stages": stages}, all(stage["fits"] for stage in stages.values())


def _decode(config, mesh, limit, pool) -> tuple[dict, bool]:
    """What there is to say of decoding, and whether all of it fits."""
    models = decode_on_tpu.models_of(config, _vocabulary(config), _DTYPE.value)
    decode_on_tpu.chip_of(mesh.devices.flat[0])
    shapes = [(context, batch) for context in _sizes(_CONTEXT) for batch in _sizes(_BATCH)]
    _say(decode_on_tpu.HEADER)

    def submit(mode, context, batch):
        return pool.submit(decode_on_tpu.report, models[mode], mode, batch, context, mesh, limit, _compiled_once)

    futures = {shape: [submit(mode, *shape) for mode in models] for shape in shapes}
    reports = []
    for shape in shapes:
        row = [future.result() for future in futures[shape]]
        _say("\n".join(decode_on_tpu.row(report, row[0]) for report in row))
        reports += row
    return {"decode": list(map(dataclasses.asdict, reports))}, all(report.fits for report in reports)


def _sizes(flag) -> list[int]:
    for text in flag.value:
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"--{flag.name}={text} should be whole numbers above 0, such as {flag.default}")
    return list(map(int, flag.value))


def _say(text: str):
    if not _JSON.value:
        print(text, flush=True)


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
    arguments, traced = _trace(config, name, phase, mesh)
    compiled = {"collectives": {}} | _compiled_once(traced.lower(), arguments, _collectives)
    batch = stage.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    used = compiled["argument_bytes"] + compiled["temporary_bytes"]
    return Report(
        dtype=phase.dtype,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(_abstract_params(config, name, mesh))),
        batch_per_device=batch,
        rows_at_a_time=batch // stage.accumulation,
        fits=compiled.pop("compiles") and used <= limit,
        hbm_limit=limit,
        hbm_bytes=used,
        model_flops=step_flops(config, name, config.data.vocab_size) / mesh.size,
        flops=counting.flops(traced.jaxpr, _kernel_flops) / mesh.size,
        **compiled,
    )


def _trace(config, name, phase, mesh):
    """(bytes of a step's arguments on each device, the traced step of a stage)"""
    stage, vocabulary = config.stages[name], _vocabulary(config)
    teacher, _ = predecessors(config, name)
    trained = trained_part(stage_model(config, name, vocabulary), _abstract_params(config, name, mesh))
    state = abstract_state(trained, stage, mesh)
    teacher_params = _abstract_params(config, teacher, mesh) if teacher else {}
    rows = jax.ShapeDtypeStruct((stage.batch_size, config.data.seq_len), jnp.int32, sharding=batch_sharding(mesh))
    batch = Batch(rows, rows if PACKINGS[config.data.packing].segmented else None)
    key = abstract_on(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    step = compiled_step(stage, functools.partial(stage_objective, config, name, vocabulary), phase, state)
    arguments = (state, teacher_params, batch, key)
    with jax.set_mesh(mesh):
        return sum(map(_bytes_on_a_device, jax.tree.leaves(arguments))), step.trace(*arguments)


def _vocabulary(config):
    """The largest vocabulary that the config allows; mask and EOS have the last ids, that of a model no mask."""
    size = config.data.markov_states + 1 if config.data.source == "markov" else config.data.vocab_size
    order = CdfOrder.shuffled(size, config.seed) if config.model.cdf_order == "shuffled" else None
    mask_id = None if has_model(config.data.tokenizer) else size - 1
    return Vocabulary(size, mask_id, None if config.data.source == "markov" else size - 2, order)


def _abstract_params(config, name, mesh):
    model = stage_model(config, name, _vocabulary(config))
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return abstract_on(shapes, parameter_shardings(shapes, mesh))


def _bytes_on_a_device(x):
    itemsize = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
    return math.prod(x.sharding.shard_shape(x.shape)) * itemsize


def _kernel_flops(name: str, shapes) -> int:
    """FLOPs of an attention kernel: its first two operands with four axes are the queries and the keys."""
    arrays = [shape for shape in shapes if len(shape) == 4]
    return splash.kernel_flops(name, arrays[0], arrays[1][2]) if len(arrays) > 1 else 0


def _compiled_once(lowered, arguments, analyse):
    return tpu_compiler.compiled_once(lowered, arguments, analyse, _TOPOLOGY.value)


def _collectives(text: str) -> dict:
    return {"collectives": {kind: each._asdict() for kind, each in counting.analyse(text).collectives.items()}}


def _largest_rows(config, name, mesh, limit, pool) -> int:
    """The most rows at a time with which every precision of a stage fits, to one in sixteen.

    Up to eight times the rows of the config: a small model would never fill a chip.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    most = 8 * config.stages[name].batch_size // shards

    def fits(rows):
        stage = dataclasses.replace(config.stages[name], batch_size=rows * shards, accumulation=1)
        changed = dataclasses.replace(config, stages={**config.stages, name: stage})
        return all(future.result().fits for future in _reports(changed, name, mesh, limit, pool))

    fitting, failing, rows = 0, most + 1, min(4, most)
    while failing - fitting > max(1, fitting // 16):
        fitting, failing = (rows, failing) if fits(rows) else (fitting, rows)
        rows = min(2 * rows, most) if failing > most else (fitting + failing) // 2
    return fitting


_HEADER = (
    f"{'stage':<12} {'dtype':<9} {'parameters':>11} {'rows':>5} {'at once':>7} {'arguments':>9} {'temporary':>9} "
    f"{'total GiB':>9} {'fits':>5} {'model TF':>9} {'traced TF':>9}  collectives"
)


def _row(name: str, report: Report) -> str:
    gib = [f"{each / _GIB:>9.2f}" for each in (report.argument_bytes, report.temporary_bytes, report.hbm_bytes)]
    flops = [f"{each / _TERA:>9.3g}" for each in (report.model_flops, report.flops)]
    collectives = ", ".join(
        f"{each['count']} {kind} {each['bytes'] / _GIB:.2f} GiB" for kind, each in report.collectives.items()
    )
    fits = "yes" if report.fits else "NO"
    return (
        f"{name:<12} {report.dtype:<9} {report.parameters:>11,} {report.batch_per_device:>5} "
        f"{report.rows_at_a_time:>7} {' '.join(gib)} {fits:>5} {' '.join(flops)}  {collectives or '-'}"
    )


def _summary(reports: list[Report]) -> dict:
    """A stage fits when all of its precisions do; its figures are those of the one that takes most memory."""
    largest = max(reports, key=lambda report: report.hbm_bytes)
    return dataclasses.asdict(largest) | {
        "fits": all(report.fits for report in reports),
        "phases": [dataclasses.asdict(report) for report in reports],
    }


if __name__ == "__main__":
    cli.run(main)
