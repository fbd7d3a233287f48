"""What one run of a compiled XLA program does: multiply-adds, collectives and custom calls, read from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once and skips custom calls. Here every count is multiplied by the
trip counts of the loops around it. The text is that of `jax.jit(f).lower(...).compile().as_text()`; all counts are per
device and per run of the ENTRY computation.
"""

import dataclasses
import functools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All runs of one kind of collective.

    `bytes` are those of the results on one device. `shapes` holds every distinct result shape, such as
    "bf16[64,1024]", the largest first.
    """

    count: int
    bytes: int
    shapes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CustomCall:
    """All runs of custom calls that agree in everything but their place in the program.

    `name` is the JAX operation (`op_name` of the metadata), `kernel` the `name` given to
    `pallas_call`. A kernel without one shows as its enclosing scope or "", and other targets have "".
    """

    target: str
    name: str
    kernel: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    count: int


@dataclasses.dataclass(frozen=True)
class Program:
    """Counts of one run on one device.

    Attributes:
      flops: two per multiply-add of the dots and convolutions. Multiplications with padding and with the holes of a
        dilation are left out, so a batched matrix product counts the same whether XLA keeps it as a dot or turns it
        into a convolution. Custom calls count nothing, nor does the product of a vector and a matrix where XLA turns
        it into a multiplication and a sum.
      collectives: by kind, one of `COLLECTIVES`; an asynchronous one counts once.
      custom_calls: in no particular order.
      unknown_trip_counts: names of the `while` instructions counted as if they ran once.
    """

    flops: int
    collectives: Mapping[str, Collective]
    custom_calls: tuple[CustomCall, ...]
    unknown_trip_counts: tuple[str, ...]


def analyse(text: str) -> Program:
    """Counts what one run of a compiled program does.

    Of a conditional each number is the largest among its branches: an upper bound, in which no branch goes unseen.

    Raises:
      ValueError: the text has no ENTRY computation.
    """
    module = parse(text)
    counts = +_Counting(module).of(module.entry)  # without the loops that run zero times
    return Program(
        flops=counts[_FLOPS],
        collectives={kind: _collective(counts, kind) for kind in COLLECTIVES if ("collective", kind) in counts},
        custom_calls=tuple(CustomCall(*key[1:], count=n) for key, n in counts.items() if key[0] == "custom call"),
        unknown_trip_counts=tuple(key[1] for key in counts if key[0] == "unknown trip count"),
    )


def _collective(counts: Counter, kind: str) -> Collective:
    results = {key[2]: n for key, n in counts.items() if key[:2] == ("result", kind)}
    shapes = sorted(results, key=lambda shape: (-array_bytes(shape), shape))
    total = sum(n * array_bytes(shape) for shape, n in results.items())
    return Collective(counts["collective", kind], total, tuple(shapes))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `name = shape opcode(arguments), attributes`."""

    name: str
    shape: str
    opcode: str
    rest: str  # from the opening parenthesis on; most lines are never looked into any further

    @functools.cached_property
    def arguments(self) -> str:
        """The text between the parentheses."""
        return self.rest[1 : _closing(self.rest)]

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    def attribute(self, key: str) -> str:
        """The text of `key=...`, without braces; "" where it is not given."""
        found = re.search(rf", {key}=(?:\{{([^}}]*)\}}|([^,\s]*))", self.rest[len(self.arguments) :])
        return (found[1] or found[2] or "") if found else ""

    def integers(self, key: str) -> list[int]:
        return [int(digits) for digits in re.findall(r"\d+", self.attribute(key))]

    def computations(self, key: str) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.attribute(key))


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name; `root` is the one whose value is returned."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def started_collectives(self) -> set[str]:
        """Names of the collectives that XLA:TPU starts here and leaves running beside other work."""
        starts = [each for each in self.instructions.values() if '"AsyncCollectiveStart"' in each.rest]
        return {name for start in starts for name in start.operands}


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str


# The one attribute that XLA prints on several lines.
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n[^\n]*\n\}")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
# No shape holds a space, a word and a parenthesis in this order, so the first of those is the opcode.
_INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)(\(.*)", re.MULTILINE)


def parse(text: str) -> Module:
    """Splits HLO text into computations and instructions, in time linear in its length.

    Raises:
      ValueError: the text has no ENTRY computation.
    """
    found = list(_COMPUTATION.finditer(_KERNEL_METADATA.sub("kernel_metadata={}", text)))
    entries = [each[2] for each in found if each[1]]
    if not entries:
        raise ValueError("the text has no ENTRY computation: it should be the output of compiled.as_text()")
    return Module({each[2]: _computation(each[2], each[3]) for each in found}, entries[0])


def _computation(name: str, body: str) -> Computation:
    instructions, root = {}, None
    for is_root, *fields in _INSTRUCTION.findall(body):
        instruction = instructions[fields[0]] = Instruction(*fields)
        root = instruction if is_root else root
    return Computation(name, instructions, root)


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the one at the start."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    return len(text)


def arrays(shape: str) -> list[str]:
    """The arrays of a shape or tuple, in order, without layouts: ["f32[8,128]", "u32[]"]."""
    return re.findall(r"[a-z]\w*\[[^\]]*\]", shape)


def dimensions(array: str) -> list[int]:
    return [int(size) for size in re.findall(r"\d+", array[array.index("[") :])]


def array_bytes(array: str) -> int:
    """Bytes of an array such as "bf16[8,128]", without the padding of its layout."""
    kind = array[: array.index("[")]
    width = re.search(r"\d+", kind)
    bits = int(width[0]) if width else 8 * (kind == "pred")
    return math.prod(dimensions(array)) * bits // 8


def _tuple_elements(shape: str) -> list[str]:
    """The shapes directly inside a tuple shape."""
    elements, depth, start = [], 0, 1
    for found in re.finditer(r"[()\[\]{},]", shape):
        depth += {"(": 1, "[": 1, "{": 1, ",": 0}.get(found[0], -1)
        if (found[0] == "," and depth == 1) or not depth:
            elements.append(shape[start : found.start()])
            start = found.end()
    return elements


_FLOPS = ("flops",)


class _Counting:
    """Counts per run of each computation, those of the computations it calls included.

    A count is keyed by what is counted: _FLOPS, ("collective", kind), ("result", kind, shape),
    ("custom call", target, ...) or ("unknown trip count", name).
    """

    def __init__(self, module: Module):
        self._module = module
        self._done: dict[str, Counter] = {}

    def of(self, name: str) -> Counter:
        if name not in self._done:
            computation, total = self._module.computations[name], Counter()
            for instruction in computation.instructions.values():
                total.update(_own(computation, instruction))
                total.update(self._called(computation, instruction))
            self._done[name] = total
        return self._done[name]

    def _called(self, computation: Computation, instruction: Instruction) -> Counter:
        opcode = instruction.opcode
        if opcode == "while":
            return self._loop(computation, instruction)
        if opcode == "conditional":
            return functools.reduce(operator.or_, map(self.of, _branches(instruction)))
        callees = [] if opcode.endswith(("-done", "-update")) else _callees(instruction)
        return sum(map(self.of, callees), Counter())

    def _loop(self, computation: Computation, loop: Instruction) -> Counter:
        trips = trip_count(self._module, computation, loop)
        runs = 1 if trips is None else trips
        condition, body = (self.of(loop.computations(key)[0]) for key in ("condition", "body"))
        total = Counter({key: n * runs for key, n in body.items()})
        total.update({key: n * (runs + 1) for key, n in condition.items()})
        if trips is None:
            total["unknown trip count", loop.name] += 1
        return total


def _branches(conditional: Instruction) -> list[str]:
    keys = ("branch_computations", "true_computation", "false_computation")
    return [name for key in keys for name in conditional.computations(key)]


def _callees(instruction: Instruction) -> list[str]:
    if instruction.opcode == "call":
        return instruction.computations("to_apply")
    return instruction.computations("calls") if "calls=" in instruction.rest else []


def _own(computation: Computation, instruction: Instruction) -> Mapping:
    """Counts of one instruction, without the computations that it calls."""
    opcode = instruction.opcode
    if opcode == "dot":
        return {_FLOPS: dot_flops(computation, instruction)}
    if opcode == "convolution":
        return {_FLOPS: convolution_flops(computation, instruction)}
    if opcode in ("custom-call", "custom-call-start"):
        return {_custom_call(computation, instruction): 1}
    if opcode.removesuffix("-start") in COLLECTIVES:
        return _collective_counts(computation, instruction)
    return {}


def _custom_call(computation: Computation, call: Instruction) -> tuple:
    target = call.attribute("custom_call_target").strip('"')
    found = re.search(r'op_name="([^"]*)"', call.rest)
    name = found[1] if found else ""
    kernel = _kernel(name) if target == "tpu_custom_call" else ""
    operands = [array for each in call.operands for array in arrays(computation.instructions[each].shape)]
    return ("custom call", target, name, kernel, tuple(operands), tuple(arrays(_result(call))))


def _kernel(op_name: str) -> str:
    """ "jit(step)/transpose(jvp(flash))/pallas_call" is the kernel flash."""
    found = re.search(r"([\w.-]+)\)*/pallas_call", op_name)
    return found[1] if found else ""


def _collective_counts(computation: Computation, instruction: Instruction) -> Mapping:
    # XLA:TPU repeats an asynchronous collective in each fusion that runs beside it and in the one that ends it.
    if "async_collective_fusion_config" in instruction.rest and instruction.name not in computation.started_collectives:
        return {}
    kind, result = instruction.opcode.removesuffix("-start"), _result(instruction)
    # XLA:TPU writes a reduce-scatter as a fusion of this name: an all-reduce and the slice that is kept of it.
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind, result = "reduce-scatter", computation.root.shape
    return Counter([("collective", kind), *(("result", kind, array) for array in arrays(result))])


def _result(instruction: Instruction) -> str:
    """Shape of the result; that of the eventual one where the instruction only starts the work.

    A start returns (operands, results, context...), but for `all-reduce-start`, which returns its results.
    """
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        return _tuple_elements(instruction.shape)[1]
    return instruction.shape


def _operand_sizes(computation: Computation, instruction: Instruction) -> list[list[int]]:
    return [dimensions(computation.instructions[name].shape.split("{")[0]) for name in instruction.operands]


def _result_sizes(instruction: Instruction) -> list[int]:
    return dimensions(arrays(instruction.shape)[0])


def dot_flops(computation: Computation, dot: Instruction) -> int:
    left = _operand_sizes(computation, dot)[0]
    contracted = math.prod(left[axis] for axis in dot.integers("lhs_contracting_dims"))
    return 2 * math.prod(_result_sizes(dot)) * contracted


@dataclasses.dataclass(frozen=True)
class Window:
    """One spatial dimension of a convolution; the padding may be negative."""

    size: int
    stride: int = 1
    pad_low: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1


def convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """Multiply-adds that meet an element of the input, times two.

    XLA:TPU writes the batch axis of a matrix product as a spatial one whose window, stride and dilation let each
    output meet its own input only, among holes and padding.
    """
    labels = re.split("_|->", convolution.attribute("dim_labels"))
    sizes = [*_operand_sizes(computation, convolution)[:2], _result_sizes(convolution)]
    inputs, kernel, outputs = (dict(zip(names, each, strict=True)) for names, each in zip(labels, sizes, strict=True))
    pairs = [
        useful_pairs(inputs[str(axis)], outputs[str(axis)], window)
        for axis, window in enumerate(_windows(convolution.attribute("window"), len(labels[0]) - 2))
    ]
    return 2 * outputs["b"] * outputs["f"] * kernel["i"] * math.prod(pairs)


def _windows(text: str, rank: int) -> list[Window]:
    """Parses `size=3x1 stride=2x1 pad=0_1x0_0 lhs_dilate=1x4`."""
    fields = {key: values.split("x") for key, values in re.findall(r"(\w+)=(\S+)", text)}
    fields["pad_low"] = [pad.split("_")[0] for pad in fields.pop("pad", ["0_0"] * rank)]
    known = [field.name for field in dataclasses.fields(Window) if field.name in fields]
    return [Window(**{key: int(fields[key][axis]) for key in known}) for axis in range(rank)]


@functools.cache
def useful_pairs(inputs: int, outputs: int, window: Window) -> int:
    """Pairs (output, position in the window) that meet an element of the input, along one dimension.

    Output o and position k meet at o * stride + k * rhs_dilate - pad_low of the dilated input, whose elements lie
    lhs_dilate apart. A reversed window has the same pairs in another order.
    """
    offsets = (k * window.rhs_dilate - window.pad_low for k in range(window.size))
    return sum(_hits(offset, inputs, outputs, window) for offset in offsets)


def _hits(offset: int, inputs: int, outputs: int, window: Window) -> int:
    """How many o in [0, outputs) have o * stride + offset = i * lhs_dilate for an i in [0, inputs)."""
    stride, dilate = window.stride, window.lhs_dilate
    common = math.gcd(stride, dilate)
    if offset % common:
        return 0
    period = dilate // common
    first = -(offset // common) * pow(stride // common, -1, period) % period
    low = max(0, -(offset // stride))
    high = min(outputs - 1, ((inputs - 1) * dilate - offset) // stride)
    return max(0, (high - first) // period - (low - 1 - first) // period)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None where that depends on data.

    XLA:CPU notes the count. XLA:TPU does not: there the loop must compare a counter that starts, steps and stops at
    constants.
    """
    noted = re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest)
    if noted:
        return int(noted[1])
    condition, body = (module.computations[loop.computations(key)[0]] for key in ("condition", "body"))
    states = [_Values(module, computation, [])(loop.operands[0])]
    for _ in range(2):
        states.append(_Values(module, body, [states[-1]])(body.root.name))
    gaps = [_gap(module, condition, [state]) for state in states]
    if None in gaps or gaps[2][1] - gaps[1][1] != gaps[1][1] - gaps[0][1]:
        return None
    (direction, start), (_, after_one), _ = gaps
    return _steps(direction, start, after_one - start)


def _steps(direction: str, gap: int, step: int) -> int | None:
    """Steps for which `gap <direction> 0` holds while the gap grows by `step`."""
    if direction in ("GT", "GE") or (direction == "NE" and gap > 0):
        gap, step = -gap, -step
    gap -= direction in ("LE", "GE")
    if direction == "EQ" or (direction == "NE" and step and gap % step):
        return None
    if gap >= 0:
        return 0
    return -(gap // step) if step > 0 else None


def _gap(module: Module, computation: Computation, arguments: list) -> tuple[str, int] | None:
    """(direction, left - right) of the comparison that a computation returns."""
    values, root = _Values(module, computation, arguments), computation.root
    operands = [values(name) for name in root.operands]
    if callees := _callees(root):
        return _gap(module, module.computations[callees[0]], operands)
    if root.opcode != "compare" or None in operands:
        return None
    return root.attribute("direction"), operands[0] - operands[1]


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": max,
    "minimum": min,
}
_IDENTITY = ("bitcast", "convert", "copy", "copy-done", "copy-start", "optimization-barrier", "reshape")


class _Values:
    """Values of a computation's integer scalars, and of tuples that hold them; None for anything not known."""

    def __init__(self, module: Module, computation: Computation, arguments: list):
        self._module, self._computation, self._arguments = module, computation, arguments
        self._known: dict = {}

    def __call__(self, name: str):
        if name not in self._known:
            self._known[name] = self._evaluate(self._computation.instructions[name])
        return self._known[name]

    def _evaluate(self, instruction: Instruction):
        opcode = instruction.opcode
        if opcode == "parameter":
            number = int(instruction.arguments)
            return self._arguments[number] if number < len(self._arguments) else None
        if opcode == "tuple":
            return [self(name) for name in instruction.operands]
        if opcode == "get-tuple-element":
            elements = self(instruction.operands[0])
            return None if elements is None else elements[instruction.integers("index")[0]]
        if opcode == "copy-start" or re.match(r"[su]\d+\[\]", instruction.shape):
            return self._scalar(instruction)
        return None

    def _scalar(self, instruction: Instruction) -> int | None:
        if instruction.opcode == "constant":
            return int(instruction.arguments)
        if instruction.opcode not in (*_IDENTITY, *_ARITHMETIC, "call", "fusion"):
            return None
        operands = [self(name) for name in instruction.operands]
        if callees := _callees(instruction):
            callee = self._module.computations[callees[0]]
            return _Values(self._module, callee, operands)(callee.root.name)
        if None in operands or instruction.opcode in _IDENTITY:
            return operands[0]
        return _ARITHMETIC[instruction.opcode](*operands)
