import itertools
import operator
import pathlib

import hlo
import hlo_programs
import jax
import pytest
from hlo_programs import KNOWN, B, D, F, L, T
from jax import lax

DATA = pathlib.Path(__file__).parent / "data"
DEVICES = 8


def recorded(name):
    return hlo.analyse((DATA / f"{name}.txt").read_text())


def entry(*lines, parameters="%p = f32[8,128]{1,0} parameter(0)"):
    return "\n".join(["ENTRY %main (p: f32[8,128]) -> f32[] {", *(f"  {line}" for line in (parameters, *lines)), "}"])


@pytest.mark.parametrize("name", KNOWN)
def test_flops_of_cpu_programs_are_those_of_the_arithmetic(name):
    assert hlo.analyse(hlo_programs.compiled(name)).flops == KNOWN[name].flops


@pytest.mark.parametrize("name", ["batched_gradient", "conditional", "nested"])
def test_flops_of_recorded_tpu_programs_are_those_of_the_arithmetic(name):
    program = recorded(name)
    assert (program.flops, program.unknown_trip_counts) == (KNOWN[name].flops, ())


@pytest.mark.parametrize(
    "arguments",
    [
        {"window_strides": (1, 1), "padding": "VALID"},
        {"window_strides": (2, 3), "padding": ((1, 2), (0, 3))},
        {"window_strides": (1, 1), "padding": ((-1, 2), (3, 3)), "rhs_dilation": (2, 1)},
        {"window_strides": (2, 1), "padding": ((2, 2), (1, 0)), "lhs_dilation": (3, 2)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2, "kernel_features": 3},
        {"window_strides": (1, 1), "padding": "SAME", "batch_group_count": 2},
    ],
)
def test_convolutions_count_as_xla_counts_them(arguments):
    arguments = dict(arguments)
    kernel_shape = (4, arguments.pop("kernel_features", 6), 3, 2)  # OIHW
    inputs, kernel = hlo_programs.struct((2, 6, 11, 13)), hlo_programs.struct(kernel_shape)
    executable = jax.jit(lambda x, w: lax.conv_general_dilated(x, w, **arguments)).lower(inputs, kernel).compile()
    assert hlo.analyse(executable.as_text()).flops == executable.cost_analysis()["flops"]


def test_useful_pairs_are_those_found_one_by_one(rng):
    for _ in range(300):
        inputs, outputs, *sizes = (int(n) for n in rng.integers(1, 8, 7))
        window = hlo.Window(sizes[0], sizes[1], sizes[2] - 3, sizes[3], sizes[4])
        elements = {i * window.lhs_dilate for i in range(inputs)}
        met = [
            o * window.stride + k * window.rhs_dilate - window.pad_low in elements
            for o in range(outputs)
            for k in range(window.size)
        ]
        assert hlo.useful_pairs(inputs, outputs, window) == sum(met), (inputs, outputs, window)


def test_a_loop_that_depends_on_data_counts_once_and_is_named():
    program = hlo.analyse(hlo_programs.compiled("unknown_trips"))
    assert len(program.unknown_trip_counts) == 1 and program.unknown_trip_counts[0].startswith("while")


@pytest.mark.parametrize("name", ["scan", "nested", "remat_gradient"])
def test_trip_counts_read_from_conditions_are_those_that_xla_notes(name):
    text = hlo_programs.compiled(name)
    assert "known_trip_count" in text
    assert hlo.analyse(text.replace("known_trip_count", "")) == hlo.analyse(text)


def counting_loop(start, stop, step, direction):
    """A loop as XLA leaves one behind: the start copied, the bound in the state, the comparison inside a fusion."""
    return f"""
%body (state: (s32[], s32[])) -> (s32[], s32[]) {{
  %state = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stop = s32[] get-tuple-element(%state), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  ROOT %new = (s32[], s32[]) tuple(%next, %stop)
}}

%fused (i.2: s32[], stop.2: s32[]) -> pred[] {{
  %i.2 = s32[] parameter(0)
  %stop.2 = s32[] parameter(1)
  ROOT %compare = pred[] compare(%i.2, %stop.2), direction={direction}
}}

%condition (state.1: (s32[], s32[])) -> pred[] {{
  %state.1 = (s32[], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %stop.1 = s32[] get-tuple-element(%state.1), index=1
  ROOT %wrapped = pred[] fusion(%i.1, %stop.1), kind=kLoop, calls=%fused
}}

ENTRY %main () -> (s32[], s32[]) {{
  %start = s32[]{{:T(128)}} constant({start})
  %copy = s32[]{{:T(128)}} copy(%start)
  %limit = s32[] constant({stop})
  %init = (s32[], s32[]) tuple(%copy, %limit)
  ROOT %while = (s32[], s32[]) while(%init), condition=%condition, body=%body
}}
"""


def steps_taken(start, stop, step, holds):
    """None for more than 100."""
    return next((trips for trips in range(100) if not holds(start + trips * step, stop)), None)


@pytest.mark.parametrize("direction", ["LT", "LE", "GT", "GE", "NE"])
def test_trip_counts_of_counters_are_those_of_running_them(direction):
    for start, stop, step in itertools.product((-3, 0, 7), (-2, 7, 12), (-4, -1, 1, 3)):
        module = hlo.parse(counting_loop(start, stop, step, direction))
        found = hlo.trip_count(module, module.computations["main"], module.computations["main"].root)
        expected = steps_taken(start, stop, step, getattr(operator, direction.lower()))
        assert found == expected, (start, stop, step)


def test_a_recorded_all_reduce_counts_the_bytes_of_the_gradient():
    program = recorded("all_reduce")
    assert program.collectives == {"all-reduce": hlo.Collective(1, 4 * D * F, (f"f32[{D},{F}]",))}
    assert program.flops == 2 * 2 * T // DEVICES * D * F


def test_a_recorded_asynchronous_permute_counts_once():
    shape = f"f32[{T // DEVICES},{D}]"
    assert recorded("permute").collectives == {"collective-permute": hlo.Collective(1, 4 * T // DEVICES * D, (shape,))}


def test_recorded_sharded_layers_gather_twice_and_scatter_once_each():
    """XLA:TPU hides the gathers of one loop behind its products, and writes each scatter as a fused all-reduce."""
    width, program = 8 * D, recorded("sharded_chain")
    assert program.collectives == {
        "all-gather": hlo.Collective(2 * L, 2 * L * 2 * width**2, (f"bf16[1,{width},{width}]",)),
        "reduce-scatter": hlo.Collective(L, L * 4 * width**2 // DEVICES, (f"f32[{width // DEVICES},{width}]",)),
    }
    assert program.flops == 3 * L * 2 * T // DEVICES * width**2


def test_the_result_of_a_start_is_its_second_element_but_for_all_reduce():
    program = hlo.analyse(
        entry(
            "%g = ((f32[8,128]{1,0:T(8,128)}, u8[4]), (f32[64,128]{1,0:T(8,128)S(1)}, u8[32])) all-gather-start(%p)",
            "%h = (f32[64,128], u8[32]) all-gather-done(%g)",
            "%r = (f32[8,128]{1,0}, bf16[3]{0}) all-reduce-start(%p, %p), to_apply=%add",
            "ROOT %d = (f32[8,128]{1,0}, bf16[3]{0}) all-reduce-done(%r)",
        )
    )
    assert program.collectives == {
        "all-gather": hlo.Collective(1, 4 * 64 * 128 + 32, ("f32[64,128]", "u8[32]")),
        "all-reduce": hlo.Collective(1, 4 * 8 * 128 + 2 * 3, ("f32[8,128]", "bf16[3]")),
    }


def test_a_collective_inside_an_asynchronous_call_counts_once():
    wrapped = """
%wrapped (q: f32[8,128]) -> f32[1,128] {
  %q = f32[8,128]{1,0} parameter(0)
  ROOT %scatter = f32[1,128]{1,0} reduce-scatter(%q), dimensions={0}, to_apply=%add
}
"""
    start = "%s = ((f32[8,128]{1,0}), f32[1,128]{1,0}, u32[]) async-start(%p), calls=%wrapped"
    done = "ROOT %d = f32[1,128]{1,0} async-done(%s), calls=%wrapped"
    assert hlo.analyse(wrapped + entry(start, done)).collectives == {
        "reduce-scatter": hlo.Collective(1, 4 * 128, ("f32[1,128]",))
    }


@pytest.mark.parametrize(
    "array, size",
    [("pred[3]", 3), ("bf16[8,128]", 2048), ("s4[6]", 3), ("f8e4m3fn[5]", 5), ("c64[2]", 16), ("f32[]", 4)],
)
def test_bytes_of_arrays(array, size):
    assert hlo.array_bytes(array) == size


def test_a_recorded_pallas_kernel_is_named_and_counted_with_its_loop():
    calls = [call for call in recorded("pallas").custom_calls if call.target == "tpu_custom_call"]
    name = "jit(<lambda>)/while/body/closed_call/times_kernel/pallas_call"
    square = f"f32[{D},{D}]"
    assert calls == [hlo.CustomCall("tpu_custom_call", name, "times_kernel", (square, square), (square,), B)]


@pytest.mark.parametrize(
    "scope, kernel",
    [("jit(f)/attn/flash", "flash"), ("jit(f)/transpose(jvp(flash))", "flash"), ("jit(f)/vmap()", "")],
)
def test_the_kernel_is_found_under_transformations(scope, kernel):
    metadata = f'metadata={{op_name="{scope}/pallas_call"}}'
    text = entry(f'ROOT %c = f32[] custom-call(%p), custom_call_target="tpu_custom_call", {metadata}')
    assert [call.kernel for call in hlo.analyse(text).custom_calls] == [kernel]


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.analyse("module @jit_f {\n}\n")


@pytest.fixture(scope="module")
def tpu_mesh():
    pytest.importorskip("libtpu")
    return hlo_programs.tpu_mesh()


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", KNOWN)
def test_flops_of_tpu_programs_are_those_of_the_arithmetic(name, tpu_mesh):
    program = hlo.analyse(hlo_programs.compiled(name, tpu_mesh))
    assert program.flops == KNOWN[name].flops
    assert bool(program.unknown_trip_counts) == (name == "unknown_trips")


@pytest.mark.tpu_aot
def test_collectives_of_tpu_programs_have_the_bytes_of_their_results(tpu_mesh):
    reduced = hlo.analyse(hlo_programs.all_reduce_text(tpu_mesh)).collectives["all-reduce"]
    assert (reduced.count, reduced.bytes) == (1, 4 * D * F)
    gathered = hlo.analyse(hlo_programs.all_gather_text(tpu_mesh)).collectives["all-gather"]
    assert (gathered.count, gathered.bytes) == (1, 4 * T * D)
    passed_on = hlo.analyse(hlo_programs.permute_text(tpu_mesh)).collectives["collective-permute"]
    assert (passed_on.count, passed_on.bytes) == (1, 4 * T // DEVICES * D)


@pytest.mark.tpu_aot
def test_sharded_layers_on_tpu_are_gathered_and_scattered(tpu_mesh):
    program = hlo.analyse(hlo_programs.sharded_chain_text(tpu_mesh))
    assert program.flops == recorded("sharded_chain").flops
    assert program.collectives["all-gather"].count == 2 * L
    assert program.collectives["reduce-scatter"].count == L


@pytest.mark.tpu_aot
def test_a_pallas_kernel_on_tpu_is_named_and_counted_with_its_loop(tpu_mesh):
    calls = hlo.analyse(hlo_programs.pallas_text(tpu_mesh)).custom_calls
    assert [(call.kernel, call.count) for call in calls if call.target == "tpu_custom_call"] == [("times_kernel", B)]
