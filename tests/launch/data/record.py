"""Records what libtpu makes of the programs in `tests/hlo_programs.py`; here, libtpu 0.0.52 (jax 0.10.2), 2026-11-23.

JAX_PLATFORMS=cpu PYTHONPATH=tests python tests/launch/data/record.py
"""

import pathlib
import re

import hlo_programs

HERE = pathlib.Path(__file__).parent


def shortened(text: str) -> str:
    """The computations, without the compiler's notes but for those that `counting.py` reads."""
    text = text[re.search(r"^(%|ENTRY)", text, re.MULTILINE).start() :]
    return "".join(map(_shortened_line, text.splitlines(keepends=True)))


def _shortened_line(line: str) -> str:
    start, notes, _ = line.partition(", backend_config=")
    if notes:
        asynchronous = "async_collective_fusion_config" in line
        line = start + (', backend_config={"async_collective_fusion_config":{}}' if asynchronous else "") + "\n"
    return re.sub(r", (metadata|frontend_attributes)=\{[^}]*\}| stack_frame_id=\d+", "", line)


if __name__ == "__main__":
    mesh = hlo_programs.tpu_mesh()
    for name in ("all_reduce", "permute", "sharded_chain"):
        (HERE / f"{name}.txt").write_text(shortened(getattr(hlo_programs, f"{name}_text")(mesh)))
