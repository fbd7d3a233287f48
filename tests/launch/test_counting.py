"""FLOPs of traced programs are those of the arithmetic, collectives of compiled ones are those of their results."""

import pathlib

import counting
import hlo_programs
import jax
import jax.numpy as jnp
import pytest
from counting import Collective
from hlo_programs import D, F, L, T, chain
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from kforcing_jax.config import MeshConfig
from kforcing_jax.sharding import make_mesh

DATA = pathlib.Path(__file__).parent / "data"
DEVICES = 8
B, H, S, C = 4, 12, 96, 32
PRODUCT = 2 * T * D * D


def scores(q_BxTxHxC, k_BxSxHxC):
    return jnp.einsum("bthc,bshc->bhts", q_BxTxHxC, k_BxSxHxC)


def remat_chain(x_TxD, w_LxDxD):
    @jax.checkpoint
    def two_products(x_TxD, w_DxD):
        return jnp.tanh(jnp.tanh(x_TxD @ w_DxD) @ w_DxD), None

    return jax.lax.scan(two_products, x_TxD, w_LxDxD)[0].sum()


def nested_chain(x_BxTxD, w_LxDxD):
    def rows(x_BxTxD, w_DxD):
        return jax.lax.map(lambda x_TxD: jnp.tanh(x_TxD @ w_DxD), x_BxTxD), None

    return jax.lax.scan(rows, x_BxTxD, w_LxDxD)[0]


def either(flag, x_TxD, w_DxD):
    return jax.lax.cond(flag > 0, lambda x: x @ w_DxD, lambda x: (x @ w_DxD) @ w_DxD, x_TxD)


def until_large(x_TxD, w_DxD):
    return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ w_DxD, x_TxD)


def on_a_mesh(x_TxD, w_DxD):
    spec = PartitionSpec("data")
    mesh = make_mesh(MeshConfig(data=8))
    return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)(x_TxD, w_DxD)


# Function, shapes of its arguments, FLOPs.
KNOWN = {
    "product": (jnp.matmul, ((T, D), (D, F)), 2 * T * D * F),
    "batched": (jax.jit(scores), ((B, T, H, C), (B, S, H, C)), 2 * B * H * T * S * C),
    # Per layer: forward, and a product for each of the two gradients.
    "gradient of a scan": (jax.grad(lambda x, w: chain(x, w).sum(), (0, 1)), ((T, D), (L, D, D)), 3 * L * PRODUCT),
    "computed again": (jax.grad(remat_chain, (0, 1)), ((T, D), (L, D, D)), 2 * 4 * L * PRODUCT),
    "nested": (nested_chain, ((B, T, D), (L, D, D)), B * L * PRODUCT),
    "dearest branch": (either, ((), (T, D), (D, D)), 2 * PRODUCT),
    "unknown length": (until_large, ((T, D), (D, D)), PRODUCT),
    "all devices": (on_a_mesh, ((T, D), (D, D)), PRODUCT),
}


@pytest.mark.parametrize("name", KNOWN)
def test_flops_are_those_of_the_arithmetic(name):
    function, shapes, expected = KNOWN[name]
    jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes))
    assert counting.flops(jaxpr.jaxpr) == expected


@pytest.mark.parametrize(
    "dtype, precision, passes",
    [("float32", "highest", 6), ("float32", "high", 3), ("float32", None, 1), ("bfloat16", "highest", 1)],
)
def test_a_tpu_multiplies_f32_numbers_several_times(dtype, precision, passes):
    x_TxD, w_DxD = jax.ShapeDtypeStruct((T, D), dtype), jax.ShapeDtypeStruct((D, D), dtype)
    product = jax.jit(lambda x, w: jnp.dot(x, w, precision=precision))
    counted = counting.flops(product.trace(x_TxD, w_DxD).jaxpr, passes=counting.bfloat16_passes)
    assert counted == passes * PRODUCT


def test_a_kernel_is_asked_for_by_name_and_shapes_as_often_as_it_runs():
    def kernel(x_ref, y_ref, out_ref):
        out_ref[...] = x_ref[...] * y_ref[...]

    times = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((D, D), jnp.float32), name="times_kernel")
    jaxpr = jax.make_jaxpr(lambda x_BxDxD, y: jax.lax.map(lambda x: times(x, y), x_BxDxD))
    known = {("times_kernel", ((D, D), (D, D))): 7}
    arguments = jnp.zeros((B, D, D)), jnp.zeros((D, D))
    assert counting.flops(jaxpr(*arguments).jaxpr, lambda name, shapes: known[name, tuple(shapes)]) == B * 7


def recorded(name):
    return counting.analyse((DATA / f"{name}.txt").read_text()).collectives


def entry(*lines):
    lines = ("%p = f32[8,128]{1,0} parameter(0)", *lines)
    return "\n".join(["ENTRY %main (p: f32[8,128]) -> f32[] {", *(f"  {line}" for line in lines), "}"])


WIDTH = 8 * D
EXPECTED = {
    "all_reduce": {"all-reduce": Collective(1, 4 * D * F, f"f32[{D},{F}]")},
    "permute": {"collective-permute": Collective(1, 4 * T // DEVICES * D, f"f32[{T // DEVICES},{D}]")},
    # XLA:TPU hides the gathers of one loop behind its products, and writes each scatter as a fused all-reduce.
    "sharded_chain": {
        "all-gather": Collective(2 * L, 2 * L * 2 * WIDTH**2, f"bf16[1,{WIDTH},{WIDTH}]"),
        "reduce-scatter": Collective(L, L * 4 * WIDTH**2 // DEVICES, f"f32[{WIDTH // DEVICES},{WIDTH}]"),
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_collectives_of_recorded_tpu_programs_are_those_of_the_arithmetic(name):
    assert recorded(name) == EXPECTED[name]


def test_the_result_of_a_start_follows_its_operands_but_for_all_reduce():
    program = counting.analyse(
        entry(
            "%g = ((f32[8,128]{1,0:T(8,128)}, u8[4]), (f32[64,128]{1,0:T(8,128)S(1)}, u8[32])) "
            "all-gather-start(%p, %q)",
            "%h = (f32[64,128], u8[32]) all-gather-done(%g)",
            "%r = (f32[8,128]{1,0}, bf16[3]{0}) all-reduce-start(%p, %p), to_apply=%add",
            "ROOT %d = (f32[8,128]{1,0}, bf16[3]{0}) all-reduce-done(%r)",
        )
        + "\n\n%add (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n"
    )
    assert program.collectives == {
        "all-gather": Collective(1, 4 * 64 * 128 + 32, "f32[64,128]"),
        "all-reduce": Collective(1, 4 * 8 * 128 + 2 * 3, "f32[8,128]"),
    }


WRAPPED = """
%wrapped (q: f32[8,128]) -> f32[1,128] {
  %q = f32[8,128]{1,0} parameter(0)
  ROOT %scatter = f32[1,128]{1,0} reduce-scatter(%q), dimensions={0}
}
"""


def test_a_collective_inside_an_asynchronous_call_counts_once():
    start = "%s = ((f32[8,128]{1,0}), f32[1,128]{1,0}, u32[]) async-start(%p), calls=%wrapped"
    done = "ROOT %d = f32[1,128]{1,0} async-done(%s), calls=%wrapped"
    program = counting.analyse(WRAPPED + entry(start, done))
    assert program.collectives == {"reduce-scatter": Collective(1, 4 * 128, "f32[1,128]")}


@pytest.mark.parametrize(
    ("loop", "condition", "runs", "unknown"),
    [
        ("", "ROOT %lt = pred[] compare(%i, %n), direction=LT", 5, ()),
        ("", "ROOT %lt = pred[] compare(%i, %n), direction=NE", 1, ("loop",)),
        (', backend_config={"known_trip_count":{"n":"7"}}', "ROOT %x = pred[] custom-call(%i)", 7, ()),
    ],
)
def test_a_loop_of_unknown_length_counts_once_and_is_named(loop, condition, runs, unknown):
    computation = f"""
%condition (i: s32[]) -> pred[] {{
  %i = s32[] parameter(0)
  %n = s32[]{{:T(128)}} constant(5)
  {condition}
}}
"""
    line = f"ROOT %loop = f32[8,128] while(%p), condition=%condition, body=%wrapped{loop}"
    program = counting.analyse(WRAPPED + computation + entry(line))
    assert program.collectives["reduce-scatter"].count == runs and program.unknown_loops == unknown


def test_bytes_of_arrays():
    sizes = {"pred[3]": 3, "bf16[8,128]": 2048, "s4[6]": 3, "f8e4m3fn[5]": 5, "c64[2]": 16, "f32[]": 4}
    assert {array: counting.array_bytes(array) for array in sizes} == sizes


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        counting.analyse("module @jit_f {\n}\n")


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", EXPECTED)
def test_collectives_of_tpu_programs_are_those_recorded(name):
    pytest.importorskip("libtpu")
    program = counting.analyse(getattr(hlo_programs, f"{name}_text")(hlo_programs.tpu_mesh()))
    assert program.unknown_loops == ()
    counts = {kind: each.count for kind, each in EXPECTED[name].items()}
    assert {kind: each.count for kind, each in program.collectives.items()} == counts
