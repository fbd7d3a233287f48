"""What one pass of a compiled loop moves between a TPU's memory and the chip, read off its HLO.

XLA's own `cost_analysis` also counts arrays that lie on the chip, every prefetch three times, what comes before the
loop, and both branches of a conditional. Here an array counts when its layout does not say `S(1)` (on the chip), with
the padding of its tiles, once for every instruction that reads or writes it. Of arrays that are sliced or gathered
from, or updated in place, only that part counts.
"""

import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(.*)$", re.MULTILINE)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota")
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand replaces a part of the first


class Moved(NamedTuple):
    """Bytes that one instruction moves in one pass: its result, and the name that JAX gave it."""

    bytes: int
    instruction: str
    result: str
    source: str


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    arguments: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)

    @property
    def source(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def named(self, attribute: str) -> list[str]:
        found = re.search(rf"{attribute}=(?:\{{(.*?)\}}|(%?[\w.-]+))", self.rest)
        return re.findall(r"[\w.-]+", found[1] or found[2]) if found else []


def of_a_pass(text: str) -> list[Moved]:
    """Largest first, of the body of the first loop of ENTRY in `compiled.as_text()`.

    Of a conditional the branch that moves least counts. Raises ValueError when there is no such loop.
    """
    program, entry = {}, None
    for is_entry, name, body in _COMPUTATION.findall(text):
        program[name] = [_parsed(*fields) for fields in _INSTRUCTION.findall(body)]
        entry = name if is_entry else entry
    loop = next((each for each in program.get(entry, []) if each.opcode == "while"), None)
    if loop is None:
        raise ValueError("the text has no loop in its ENTRY computation: it should be the output of compiled.as_text()")
    return sorted(_moved(program, loop.named("body")[0]), reverse=True)


def _parsed(root, name, shape, opcode, arguments, rest):
    return _Instruction(name, shape, opcode, arguments, root + rest)


def _moved(program, name) -> list[Moved]:
    """By the instructions of a computation, and of those that it runs."""
    shapes, found = {each.name: each.shape for each in program[name]}, []
    for each in program[name]:
        if each.opcode == "while":
            times = _trips(program[each.named("condition")[0]])
            inner = _moved(program, each.named("body")[0])
            found += [moved._replace(bytes=times * moved.bytes) for moved in inner]
        elif each.opcode == "conditional":
            branches = [_moved(program, branch) for branch in each.named("branch_computations")]
            found += min(branches, key=total)
        else:
            found.append(Moved(_bytes_of(program, each, shapes), each.name, each.shape, each.source))
    return [moved for moved in found if moved.bytes]


def total(moved: list[Moved]) -> int:
    return sum(each.bytes for each in moved)


def summed(moved: list[Moved]) -> list[tuple[int, int, str, str]]:
    """(bytes, instructions, name that JAX gave, result) of alike instructions together, largest first."""
    groups = {}
    for each in moved:
        groups.setdefault((each.source.rpartition("/while/body/")[2], each.result), []).append(each.bytes)
    return sorted(((sum(sizes), len(sizes), *key) for key, sizes in groups.items()), reverse=True)


def _trips(condition) -> int:
    """Of a loop that counts from 0 to a constant, as those of JAX do on a TPU; others count once."""
    bounds = [int(each.arguments) for each in condition if each.opcode == "constant" and each.arguments.isdigit()]
    return bounds[0] if len(bounds) == 1 else 1


def _bytes_of(program, instruction, shapes) -> int:
    opcode, operands = instruction.opcode, [shapes.get(name, "") for name in instruction.operands]
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or "ConcatBitcast" in instruction.rest:
        return 0
    if opcode.endswith("-start"):
        arrays = _ARRAY.findall(instruction.shape)
        result = arrays[1] if instruction.shape.startswith("((") else arrays[0]
        return _in_memory([result]) + min(_in_memory(_ARRAY.findall(operands[0])), _padded(result))
    if opcode == "fusion":
        return _of_a_fusion(program[instruction.named("calls")[0]], operands, instruction.shape)
    return _of_one(opcode, operands, instruction.shape)


def _of_one(opcode, operands, result) -> int:
    sizes = [_in_memory(_ARRAY.findall(each)) for each in operands]
    if opcode in _SLICES:
        sizes[0] = min(sizes[0], _whole(result))
    if opcode in _UPDATES:
        return sum(sizes[1:]) + min(_in_memory(_ARRAY.findall(result)), _whole(operands[_UPDATES[opcode]]))
    return sum(sizes) + _in_memory(_ARRAY.findall(result))


def _of_a_fusion(inner, operands, result) -> int:
    by_name = {each.name: each for each in inner}
    read = sum(_read_of(inner, index, shape) for index, shape in enumerate(operands))
    root, arrays = next(each for each in inner if each.rest.startswith("ROOT")), _ARRAY.findall(result)
    roots = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(roots) != len(arrays):  # a collective, beside which something is computed
        return read + _in_memory(arrays)
    written = 0
    for each, array in zip(roots, arrays, strict=True):
        each = _behind_bitcasts(each, by_name)
        size = _in_memory([array])
        if each.opcode in _UPDATES:
            size = min(size, _whole(by_name[each.operands[_UPDATES[each.opcode]]].shape))
        written += size
    return read + written


def _read_of(inner, index, shape) -> int:
    """What a fusion reads of an operand: all of it, unless all that it does is take slices of it or update a part."""
    whole = _in_memory(_ARRAY.findall(shape))
    if not whole:
        return 0
    names = {each.name for each in inner if each.opcode == "parameter" and int(each.arguments) == index}
    size = 0
    for each in inner:
        if not names & set(each.operands):
            continue
        if each.opcode == "bitcast":
            names.add(each.name)
        elif each.opcode in _SLICES and each.operands[0] in names:
            size += _whole(each.shape)
        elif not (each.opcode in _UPDATES and each.operands[0] in names):
            return whole
    return min(size, whole)


def _behind_bitcasts(instruction, by_name):
    while instruction.opcode == "bitcast":
        instruction = by_name[instruction.operands[0]]
    return instruction


def _whole(shape: str) -> int:
    return sum(map(_padded, _ARRAY.findall(shape)))


def _in_memory(arrays) -> int:
    """Bytes of those arrays that do not lie on the chip."""
    return sum(_padded(array) for array in arrays if "S(" not in array[3])


def _padded(array) -> int:
    """Bytes of an array, with the padding of its two minor axes to whole tiles."""
    kind, sizes, order, tiling = array
    sizes = [int(each) for each in re.findall(r"\d+", sizes)]
    minor = [int(each) for each in re.findall(r"\d+", order)]
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    for axis, unit in zip(minor, reversed([int(each) for each in tile[1].split(",")] if tile else []), strict=False):
        sizes[axis] += -sizes[axis] % unit
    width = re.search(r"\d+", kind)
    return math.prod(sizes) * (int(width[0]) if width else 8) // 8
