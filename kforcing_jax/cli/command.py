"""What the entry points share: flags, and errors as one line with a non-zero exit."""

import atexit
import contextlib
import difflib
import logging as python_logging
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from kforcing_jax.cli.config_file import read_config, split_overrides
from kforcing_jax.cli.terminal import show_progress
from kforcing_jax.config import Config
from kforcing_jax.errors import ConfigError, UserError

# Flags whose empty value says something.
_MAY_BE_EMPTY = ("prompt",)

_overrides: dict[str, str] = {}


def run(main: Callable[[Sequence[str]], None]):
    """Runs an entry point: a UserError ends it with one line on stderr and status 2."""

    def guarded(argv):
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; every option is a flag, see --help")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.FATAL)  # orbax reports every file, and every error with its traceback
        show_progress()
        try:
            main(argv)
        except UserError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            print("error: interrupted; the same command goes on where it stopped", file=sys.stderr, flush=True)
            sys.stdout.flush()
            # Not sys.exit: a compilation in another thread would crash while the interpreter ends.
            os._exit(2)
        except OSError as error:
            _fail(f"{error.filename or type(error).__name__}: {error.strerror or error}")
        except RuntimeError as error:
            if not str(error).startswith("Unable to initialize backend"):
                raise
            _fail(" ".join(str(error).split()))

    with _said_in_one_line(), _own_flags(main):
        app.run(guarded, flags_parser=_parse_flags)


def config_from_flag(flag: flags.FlagHolder) -> Config:
    """The validated configuration of `--config` and `--config.FIELD`."""
    if flag.value is None:
        raise ConfigError("--config is missing, for example --config=configs/tiny.py")
    return read_config(flag.value, _overrides)


def refuse_flags(names: Sequence[str], reason: str):
    """Raises ConfigError when one of these flags was given, because it would be ignored."""
    given = [name for name in names if flags.FLAGS[name].present]
    if given:
        raise ConfigError(f"--{given[0]} has no effect {reason}; leave it out")


def _parse_flags(argv):
    global _overrides
    others, _overrides = split_overrides(argv)
    if _overrides and "config" not in flags.FLAGS:
        _fail(f"unknown flag --config.{next(iter(_overrides))}; see --help")
    try:
        rest = flags.FLAGS(others)
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=1)
        hint = f"; did you mean --{near[0]}?" if near else "; see --help"
        _fail(f"unknown flag --{error.flagname}{hint}")
    except flags.Error as error:
        _fail(" ".join(str(error).split()))
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if flag.present and flag.value in ("", []) and name not in _MAY_BE_EMPTY:
            _fail(f"--{name} is missing: its value is empty")
    return rest


@contextlib.contextmanager
def _said_in_one_line():
    """Nothing beside our own lines, and those on any terminal: libraries print tracebacks of what we have reported."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")
    hook = sys.unraisablehook
    _mute()
    atexit.register(_mute)  # threads may speak until then
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _mute():
    sys.unraisablehook = lambda unraisable: None
    python_logging.getLogger("asyncio").disabled = True


@contextlib.contextmanager
def _own_flags(main):
    """Afterwards flags are as before, so that a command can run again in the same interpreter."""
    try:
        yield
    finally:
        module = sys.modules.get(main.__module__)
        if main.__module__ == "__main__":  # it is executed anew, and defines them again
            for flag in list(flags.FLAGS.flags_by_module_id_dict().get(id(module), [])):
                delattr(flags.FLAGS, flag.name)
        flags.FLAGS.unparse_flags()


def _fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
