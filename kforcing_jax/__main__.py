"""Lists the commands. Each is installed as a program, and is a module for `python -m` where that is handier.

python -m kforcing_jax
"""

import ast
import functools
import runpy
import sys
from pathlib import Path

from kforcing_jax import __version__
from kforcing_jax.installed import CONFIGS, config_names

# The module of each program.
COMMANDS = {
    "kforcing-train": "main",
    "kforcing-prepare": "prepare",
    "kforcing-generate": "generate",
    "kforcing-evaluate": "evaluate",
    "kforcing-compare": "compare",
    "kforcing-serve": "serve",
    "kforcing-export": "export",
}


def _run(program: str):
    """As `python -m` would: the module is `__main__`, so that its flags and its docstring are the program's."""
    runpy.run_module(f"kforcing_jax.{COMMANDS[program]}", run_name="__main__", alter_sys=True)


# The entry points of pyproject.toml.
train, prepare, generate, evaluate, compare, serve, export = (functools.partial(_run, program) for program in COMMANDS)


def listing() -> str:
    """A line for every command, and where to go on."""
    width = max(map(len, COMMANDS))
    lines = [f"  {program:<{width}}  {_summary(module)}" for program, module in COMMANDS.items()]
    return "\n".join(
        [
            f"kforcing_jax {__version__}",
            "",
            *lines,
            "",
            "Also as modules (python -m kforcing_jax.main is kforcing-train); --help lists the flags of each.",
            f"Configs for --config: {', '.join(config_names())}; they are files in {CONFIGS.resolve()}",
        ]
    )


def _summary(module: str) -> str:
    """The first line of a command's docstring, which is read: to import it would take its libraries."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main(argv: list[str]) -> int:
    """Prints the list, or says that there is nothing else to be had here."""
    wrong = [argument for argument in argv if argument not in ("--help", "-h")]
    if wrong:
        print(f"error: unexpected argument {wrong[0]!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    print(listing())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
