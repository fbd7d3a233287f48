"""Records what libtpu makes of some of the programs in `tests/hlo_programs.py`; see the README beside this file."""

import pathlib
import re

import hlo_programs

HERE = pathlib.Path(__file__).parent


def shortened(text: str) -> str:
    """The computations, without the compiler's notes but for those that `hlo.py` reads."""
    text = text[re.search(r"^(%|ENTRY)", text, re.MULTILINE).start() :]
    return "".join(map(_shortened_line, text.splitlines(keepends=True)))


def _shortened_line(line: str) -> str:
    start, notes, _ = line.partition(", backend_config=")
    if notes:
        asynchronous = "async_collective_fusion_config" in line
        line = start + (', backend_config={"async_collective_fusion_config":{}}' if asynchronous else "") + "\n"
    line = re.sub(r" stack_frame_id=\d+", "", line)
    return line if "pallas_call" in line else re.sub(r", (metadata|frontend_attributes)=\{[^}]*\}", "", line)


def main():
    mesh = hlo_programs.tpu_mesh()
    texts = {name: hlo_programs.compiled(name, mesh) for name in ("batched_gradient", "nested", "conditional")}
    for name in ("all_reduce", "permute", "sharded_chain", "pallas"):
        texts[name] = getattr(hlo_programs, f"{name}_text")(mesh)
    for name, text in texts.items():
        (HERE / f"{name}.txt").write_text(shortened(text))


if __name__ == "__main__":
    main()
