"""What one run of a program does: multiply-adds of its jaxpr, collectives of the HLO that XLA made of it.

XLA's own `cost_analysis` counts the body of a loop once and skips custom calls. Here every count is multiplied by the
trip counts of the loops around it.
"""

import collections
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.extend
from jax.lax import Precision

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


def flops(
    jaxpr,
    kernel: Callable[[str, list[tuple[int, ...]]], int] = lambda name, shapes: 0,
    passes: Callable[[jax.extend.core.JaxprEqn], int] = lambda product: 1,
) -> int:
    """Two per multiply-add of all products, over all devices, with what a backward pass computes again.

    `kernel` gives those of a Pallas kernel by its name and the shapes of its operands, and `passes` how often the
    hardware computes a product. Of a conditional the dearest branch counts, and a loop whose length depends on data
    counts once.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        shapes = [variable.aval.shape for variable in equation.invars]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(shapes[0][axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * depth * passes(equation)
        elif name == "pallas_call":
            total += kernel(params["name"], shapes)
        else:
            inner = [flops(each, kernel, passes) for each in _inner(params)]
            total += _times(name, params) * (max(inner) if name == "cond" else sum(inner))
    return total


def _inner(params) -> Iterator:
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else [value]:
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


def _times(name, params) -> int:
    return params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1


def bfloat16_passes(product) -> int:
    """How often a TPU multiplies to compute a `dot_general`: f32 numbers become sums of bfloat16 ones.

    "highest" computes six of the nine products of three parts each, "high" three of the four of two; by default the
    first part is all that counts.
    """
    if not all(operand.aval.dtype == "float32" for operand in product.invars):
        return 1
    precision = product.params["precision"] or (Precision.DEFAULT,)
    return max({Precision.HIGHEST: 6, Precision.HIGH: 3}.get(each, 1) for each in precision)


class Collective(NamedTuple):
    """All runs of one kind: how many, and the bytes of their results on one device; the largest of these arrays."""

    count: int
    bytes: int
    largest: str


class Program(NamedTuple):
    """`unknown_loops` are the `while` instructions whose length is not known; they count once."""

    collectives: dict[str, Collective]
    unknown_loops: tuple[str, ...]


class _Instruction(NamedTuple):
    """One line of HLO: `name = shape opcode(operands), attributes`; `rest` is what follows the opcode."""

    is_root: str
    name: str
    shape: str
    opcode: str
    rest: str


# The one attribute that XLA prints on several lines.
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n[^\n]*\n\}")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
# No shape holds a space, a word and a parenthesis in this order, so the first of those is the opcode.
_INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)(\(.*)", re.MULTILINE)
_CALLED = re.compile(r"(?:calls|to_apply|body|\w+_computations?)=\{?((?:%[\w.-]+(?:, )?)+)")


def analyse(text: str) -> Program:
    """Counts the collectives of `jax.jit(f).lower(...).compile().as_text()`, per device.

    Raises:
      ValueError: the text has no ENTRY computation.
    """
    found = list(_COMPUTATION.finditer(_KERNEL_METADATA.sub("", text)))
    entry = next((each[2] for each in found if each[1]), None)
    if entry is None:
        raise ValueError("the text has no ENTRY computation: it should be the output of compiled.as_text()")
    bodies = {each[2]: [_Instruction(*fields) for fields in _INSTRUCTION.findall(each[3])] for each in found}
    unknown = []

    @functools.cache
    def runs(name: str) -> collections.Counter:
        """Runs of each (kind, arrays of the result) in one run of a computation."""
        total = collections.Counter()
        for instruction in bodies[name]:
            total.update(_own(name, bodies[name], instruction))
            if instruction.opcode.endswith(("-done", "-update")):
                continue
            called = [each for names in _CALLED.findall(instruction.rest) for each in re.findall(r"[\w.-]+", names)]
            # Of a conditional an upper bound, in which no branch goes unseen.
            together = operator.or_ if instruction.opcode == "conditional" else operator.add
            trips = _trip_count(instruction, bodies) if instruction.opcode == "while" else 1
            unknown.extend([instruction.name] if trips is None else [])
            inner = functools.reduce(together, map(runs, called), collections.Counter())
            total.update({key: count * (1 if trips is None else trips) for key, count in inner.items()})
        return total

    counted = runs(entry)
    kinds = sorted({kind for kind, _ in counted})
    return Program({kind: _collective(counted, kind) for kind in kinds}, tuple(unknown))


def _trip_count(loop: _Instruction, bodies) -> int | None:
    """As XLA:CPU notes it; on a TPU the scans of JAX are left as counters from 0 that stay below a constant."""
    noted = re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest)
    if noted:
        return int(noted[1])
    condition = bodies[re.search(r"condition=%?([\w.-]+)", loop.rest)[1]]
    bounds = [int(re.search(r"-?\d+", each.rest)[0]) for each in condition if each.opcode == "constant"]
    counts = any(each.is_root and each.opcode == "compare" and "direction=LT" in each.rest for each in condition)
    return bounds[0] if counts and len(bounds) == 1 else None


def _own(computation: str, body: list[_Instruction], instruction: _Instruction) -> list[tuple[str, tuple[str, ...]]]:
    """The collective that an instruction is, with the arrays of its result."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return []
    # XLA:TPU repeats an asynchronous collective in each fusion that runs beside it and in the one that ends it.
    if "async_collective_fusion_config" in instruction.rest:
        starts = (each.rest for each in body if '"AsyncCollectiveStart"' in each.rest)
        if not any(instruction.name in re.findall(r"%([\w.-]+)", rest) for rest in starts):
            return []
    # XLA:TPU writes a reduce-scatter as a fusion of this name: an all-reduce and the slice that is kept of it.
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind, instruction = "reduce-scatter", next(each for each in body if each.is_root)
    arrays = re.findall(r"[a-z]\w*\[[^\]]*\]", instruction.shape)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, context...)
        operands = instruction.rest[: instruction.rest.index(")")].count("%")
        arrays = arrays[operands : 2 * operands]
    return [(kind, tuple(arrays))]


def _collective(counted, kind) -> Collective:
    own = {arrays: runs for (each, arrays), runs in counted.items() if each == kind}
    size = sum(runs * array_bytes(array) for arrays, runs in own.items() for array in arrays)
    return Collective(sum(own.values()), size, max((a for arrays in own for a in arrays), key=array_bytes))


def array_bytes(array: str) -> int:
    """Bytes of an array such as "bf16[8,128]", without the padding of its layout."""
    kind, _, sizes = array.partition("[")
    width = re.search(r"\d+", kind)
    return math.prod(map(int, re.findall(r"\d+", sizes))) * (int(width[0]) if width else 8) // 8
