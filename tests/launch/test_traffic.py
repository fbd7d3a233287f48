"""What a pass moves, counted in HLO that can be added up by hand; and how long that takes at best."""

import pytest
import traffic
from decode_on_tpu import CHIPS, seconds_of_a_pass

ROW = 128 * 4  # bytes of 128 f32 numbers

# Pads 100 columns to 128; reads one of two weights from the chip; takes a slice; writes eight rows of a cache in place,
# three times; and takes the branch that copies less.
PROGRAM = """HloModule jit_run

%slice_of (p.0: f32[64,128], p.1: f32[8,128]) -> f32[8,128] {
  %p.0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %p.1 = f32[8,128]{1,0:T(8,128)S(1)} parameter(1)
  %slice.1 = f32[8,128]{1,0:T(8,128)} slice(%p.0), slice={[0:8], [0:128]}
  ROOT %add.1 = f32[8,128]{1,0:T(8,128)S(1)} add(%slice.1, %p.1)
}

%cheap (c.0: f32[16,128]) -> f32[16,128] {
  %c.0 = f32[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %copy.2 = f32[16,128]{1,0:T(8,128)S(1)} copy(%c.0)
}

%dear (d.0: f32[16,128]) -> f32[16,128] {
  %d.0 = f32[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %copy.3 = f32[16,128]{1,0:T(8,128)} copy(%d.0)
}

%three (t.0: (s32[], f32[64,128], f32[8,128])) -> pred[] {
  %t.0 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)S(1)} get-tuple-element(%t.0), index=0
  %constant.3 = s32[]{:T(128)} constant(3)
  ROOT %less.1 = pred[]{:T(512)} compare(%i.1, %constant.3), direction=LT
}

%writes (w.0: (s32[], f32[64,128], f32[8,128])) -> (s32[], f32[64,128], f32[8,128]) {
  %w.0 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i.2 = s32[]{:T(128)S(1)} get-tuple-element(%w.0), index=0
  %cache.2 = f32[64,128]{1,0:T(8,128)} get-tuple-element(%w.0), index=1
  %new.2 = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%w.0), index=2
  %put.2 = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%cache.2, %new.2, %i.2, %i.2)
  ROOT %tuple.2 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%i.2, %put.2, %new.2)
}

%pass (b.0: (f32[4,100], f32[64,128], f32[8,128])) -> (f32[4,100], f32[64,128], f32[8,128]) {
  %b.0 = (f32[4,100]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  %narrow.1 = f32[4,100]{1,0:T(8,128)} get-tuple-element(%b.0), index=0
  %cache.1 = f32[64,128]{1,0:T(8,128)} get-tuple-element(%b.0), index=1
  %new.1 = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%b.0), index=2
  %copy-start.1 = (f32[4,100]{1,0:T(8,128)S(1)}, f32[4,100]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%narrow.1)
  %copy-done.1 = f32[4,100]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %fusion.1 = f32[8,128]{1,0:T(8,128)S(1)} fusion(%cache.1, %new.1), kind=kLoop, calls=%slice_of
  %zero.1 = s32[]{:T(128)} constant(0)
  %tuple.1 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%zero.1, %cache.1, %new.1)
  %while.2 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) while(%tuple.1), condition=%three, body=%writes
  %which.1 = pred[]{:T(512)S(1)} custom-call(), custom_call_target="Which"
  %logits.1 = f32[16,128]{1,0:T(8,128)} bitcast(%cache.1)
  %cond.1 = f32[16,128]{1,0:T(8,128)S(1)} conditional(%which.1, %logits.1, %logits.1), branch_computations={%dear, %cheap}, metadata={op_name="jit(run)/while/body/pick"}
  ROOT %tuple.3 = (f32[4,100]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%narrow.1, %cache.1, %fusion.1)
}

%unfinished (u.0: (f32[4,100], f32[64,128], f32[8,128])) -> pred[] {
  %u.0 = (f32[4,100]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  ROOT %true.1 = pred[]{:T(512)} constant(true)
}

ENTRY %main (a.0: f32[4,100], a.1: f32[64,128], a.2: f32[8,128]) -> (f32[4,100], f32[64,128], f32[8,128]) {
  %a.0 = f32[4,100]{1,0:T(8,128)} parameter(0)
  %a.1 = f32[64,128]{1,0:T(8,128)} parameter(1)
  %a.2 = f32[8,128]{1,0:T(8,128)} parameter(2)
  %copy.9 = f32[8,128]{1,0:T(8,128)S(1)} copy(%a.2)
  %tuple.9 = (f32[4,100]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%a.0, %a.1, %copy.9)
  ROOT %while.1 = (f32[4,100]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) while(%tuple.9), condition=%unfinished, body=%pass
}
"""  # noqa: E501


def test_bytes_of_a_pass_are_those_that_leave_or_reach_the_memory():
    moved = {each.instruction: each.bytes for each in traffic.of_a_pass(PROGRAM)}
    assert moved == {
        "copy-start.1": 8 * ROW,  # 4 rows of 100 are a whole tile
        "fusion.1": 8 * ROW,  # the slice; the rest lies on the chip
        "put.2": 3 * 8 * ROW,  # what is new, three times
        "copy.2": 16 * ROW,  # read, into the chip
    }
    assert traffic.total(traffic.of_a_pass(PROGRAM)) == 56 * ROW


def test_alike_instructions_are_told_together_by_their_names_in_jax():
    moved = [
        traffic.Moved(5, "fusion.1", "f32[8]", "jit(run)/while/body/pick"),
        traffic.Moved(3, "fusion.2", "f32[8]", "jit(run)/while/body/pick"),
        traffic.Moved(7, "copy.1", "f32[8]", ""),
    ]
    assert traffic.summed(moved) == [(8, 2, "pick", "f32[8]"), (7, 1, "", "f32[8]")]


def test_a_text_without_a_loop_is_refused():
    with pytest.raises(ValueError, match="no loop in its ENTRY"):
        traffic.of_a_pass("ENTRY %main (a: f32[8]) -> f32[8] {\n  ROOT %a = f32[8]{0} parameter(0)\n}\n")


@pytest.mark.parametrize(
    "kind, moved, flops, seconds, bound",
    [
        ("TPU v5 lite", 819e6, 19.7e9, 1e-3, "memory"),  # 0.1 ms of products
        ("TPU v5 lite", 819e6, 394e9, 2e-3, "arithmetic"),
        ("TPU v6 lite", 820e6, 91.8e9, 0.5e-3, "memory"),
        ("TPU v6 lite", 820e6, 1836e9, 2e-3, "arithmetic"),
    ],
)
def test_a_pass_lasts_as_long_as_its_bytes_or_its_products(kind, moved, flops, seconds, bound):
    assert seconds_of_a_pass(moved, flops, CHIPS[kind]) == (pytest.approx(seconds), bound)
