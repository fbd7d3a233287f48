"""Commands as a user types them, run in this process: a new Python with jax takes seconds."""

import contextlib
import io
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

REPOSITORY = Path(__file__).parents[1]

app.define_help_flags()  # otherwise done once a process, by the first command


class Result(NamedTuple):
    status: int
    out: str
    err: str


def run_command(module: str, *given, cwd: str | Path = REPOSITORY) -> Result:
    """`python -m kforcing_jax.<module> <given>`, in this process.

    The module is executed anew as `__main__`, on flags that hold nothing of other commands, and so are those of
    `kforcing_jax.cli`; everything else is the modules that tests see, and can patch. An exception that is no UserError
    comes out as it is, not as a traceback on stderr.
    """
    out, err = _stream(), _stream()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _flags_of_a_new_process(),
        _same_logging_afterwards(),
    ):
        sys.argv = [module, *map(str, given)]
        try:
            runpy.run_module(f"kforcing_jax.{module}", run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            status = end.code or 0
    return Result(status, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def start_command(module: str, *given, cwd: str | Path = REPOSITORY, **settings) -> Result:
    """`run_command` in a process of its own; `settings` are variables of its environment."""
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"} | settings
    command = [sys.executable, "-m", f"kforcing_jax.{module}", *map(str, given)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    return Result(done.returncode, done.stdout, done.stderr)


def refused(result: Result, *says: str):
    """One line on stderr that says it, and status 2."""
    assert result.status == 2, result.err
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for words in says:
        assert words in lines[0]


def _stream():
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


@contextlib.contextmanager
def _flags_of_a_new_process():
    """Without the flags of this package, and without the modules that define them; afterwards both are back.

    Flags of libraries stay, also of those that a command is the first to import.
    """
    tables = {name: _copied(table) for name, table in flags.FLAGS.__dict__.items()}
    modules = {name: sys.modules[name] for name in list(sys.modules) if _defines_flags(name)}
    argv, path = sys.argv, list(sys.path)
    _forget(modules)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
        _forget(name for name in list(sys.modules) if _defines_flags(name))
        for name, table in tables.items():
            flags.FLAGS.__dict__[name] = flags.FLAGS.__dict__[name] | table if isinstance(table, dict) else table
        sys.modules.update(modules)
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, module)


def _forget(modules: Iterable[str]):
    for name in modules:
        del sys.modules[name]
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if "kforcing_jax" in module:  # those of `__main__` are under the name of its file
            for flag in list(defined):
                delattr(flags.FLAGS, flag.name)
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


def _defines_flags(module: str) -> bool:
    return module.startswith("kforcing_jax.cli") or (
        module.startswith("kforcing_jax.") and module in flags.FLAGS.flags_by_module_dict()
    )


def _copied(table):
    """The tables of FlagValues are dictionaries, some of them of lists."""
    if not isinstance(table, dict):
        return table
    return {name: list(entry) if isinstance(entry, list) else entry for name, entry in table.items()}


@contextlib.contextmanager
def _same_logging_afterwards():
    log = logging.getLogger("kforcing_jax")
    handlers, level, propagate = log.handlers, log.level, log.propagate
    try:
        yield
    finally:
        log.handlers, log.level, log.propagate = handlers, level, propagate
