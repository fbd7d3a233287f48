"""Fields of somebody else's description of a model, read one by one: what is wrong with all of them is said at once."""

from collections.abc import Iterable, Mapping
from typing import Any

from kforcing_jax.interop.torch_zip import CheckpointFormatError

_REQUIRED: Any = object()
_LARGEST = 2**1023  # whole numbers of JSON have no end, others have
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "an object",
    list: "a list",
}


class Fields:
    """Named values, as JSON or GGUF has them. `problems` collects what is wrong; `refuse` raises it.

    What is read is known; of the rest, `refuse_unknown` names what may say something.
    """

    def __init__(self, values: Mapping[str, Any], problems: list[str] | None = None, prefix: str = ""):
        self.values = values
        self.problems: list[str] = [] if problems is None else problems
        self._prefix = prefix
        self._read: set[str] = set()

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value of a field, of that type. `default` where it is missing or null; without one that is a problem."""
        self._read.add(name)
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                self.problem(name, "is missing")
            return _nothing(kind) if default is _REQUIRED else default
        if kind is float and type(value) is int and abs(value) < _LARGEST:
            value = float(value)
        if type(value) is not kind:
            self.problem(name, f"= {value!r:.60} should be {_WORDS[kind]}")
            return _nothing(kind) if default is _REQUIRED else default
        return value

    def take_size(self, name: str, default: Any = _REQUIRED) -> int:
        """The same of a number that is at least 1; no 0 stands for "as usual" in what others write."""
        value, said = self.take(name, int, default), self.values.get(name)
        if type(said) is int and said < 1:
            self.problem(name, f"= {said} should be at least 1")
        return value

    def take_length(self, name: str, default: Any = _REQUIRED) -> int:
        """The same of a number that is at least 0, which says that there is none."""
        value = self.take(name, int, default)
        if value < 0:
            self.problem(name, f"= {value} should be at least 0")
            return 0
        return value

    def has(self, name: str) -> bool:
        """Whether the field says anything."""
        return self.values.get(name) is not None

    def problem(self, name: str, what: str) -> None:
        """Notes what is wrong with a field."""
        self.problems.append(f"{self._prefix}{name} {what}")

    def refuse_unknown(self, ignored: Iterable[str] = (), neutral: Mapping[str, Any] | None = None) -> None:
        """Notes every field that was not read and says something: it may change what the model computes.

        `ignored` fields never do. Others say nothing where they are empty, false or zero, or `neutral` has their value.
        """
        neutral = neutral or {}
        for name, value in self.values.items():
            if name in self._read or name in ignored or name.startswith("_") or not value:
                continue
            if name not in neutral or value != neutral[name]:
                self.problem(name, f"= {value!r:.60} is not known here")

    def refuse(self) -> None:
        """Raises CheckpointFormatError with all problems in one line, if there are any."""
        if self.problems:
            raise CheckpointFormatError("; ".join(self.problems))


def _nothing(kind):
    return 1 if kind in (int, float) else kind()
