"""What the entry points share: flags, and errors as one line with a non-zero exit."""

import contextlib
import difflib
import logging as python_logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from kforcing_jax.cli.config_file import read_config, split_overrides
from kforcing_jax.cli.terminal import show_progress
from kforcing_jax.config import Config
from kforcing_jax.data.places import cache_folder
from kforcing_jax.errors import ConfigError, DataError, UserError

# Between several processes that stop together.
_SECONDS_FOR_OTHERS = 2.0
# Flags whose empty value says something.
_MAY_BE_EMPTY = ("prompt",)

_overrides: dict[str, str] = {}


def run(main: Callable[[Sequence[str]], None], positional: bool = False) -> None:
    """Runs an entry point: a UserError ends it with one line on stderr and status 2.

    Where it takes `positional` arguments, those that are no flags, `main` finds them in argv[1:]. Otherwise they are
    refused.
    """

    def guarded(argv):
        if len(argv) > 1 and not positional:
            _fail(f"unexpected argument {argv[1]!r}; every option is a flag, see --help")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.FATAL)  # orbax reports every file, and every error with its traceback
        show_progress()
        try:
            main(argv)
        except UserError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            _let_others_end()
            _fail("interrupted; the same command goes on where it stopped")
        except OSError as error:
            _fail(f"{error.filename or type(error).__name__}: {error.strerror or error}")
        except RuntimeError as error:
            if not str(error).startswith("Unable to initialize backend"):
                raise
            _fail(" ".join(str(error).split()))

    _speak_on_any_terminal()
    _keep_what_is_compiled()
    _see_the_current_folder()
    try:
        app.run(guarded, flags_parser=_parse_flags)
    finally:
        if not _is_own_process():
            _forget_flags(main)


def config_from_flag(flag: flags.FlagHolder) -> Config:
    """The validated configuration of `--config` and `--config.FIELD`. Raises ConfigError for what cannot run."""
    if flag.value is None:
        raise ConfigError("--config is missing, for example --config=configs/tiny.py")
    return read_config(flag.value, _overrides)


def refuse_flags(names: Sequence[str], reason: str) -> None:
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
    except SystemExit:  # help was asked for and shown, which absl ends as a failure
        sys.exit(0)
    except flags.Error as error:
        _fail(" ".join(str(error).split()))
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if flag.present and flag.value in ("", []) and name not in _MAY_BE_EMPTY:
            _fail(f"--{name} is missing: its value is empty")
    return rest


def _speak_on_any_terminal():
    """What cannot be shown is escaped, and libraries say nothing of their own about errors that we report."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")
    python_logging.getLogger("asyncio").disabled = True
    if _is_own_process():
        sys.unraisablehook = lambda unraisable: None


def _keep_what_is_compiled():
    """JAX's compilation cache, in the user's cache folder unless the environment says where, or JAX is here already."""
    if "jax" in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = cache_folder("compiled")
        folder.mkdir(parents=True, exist_ok=True)
    except (DataError, OSError):
        return  # a home that is read-only, or none: everything is compiled again
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _see_the_current_folder():
    """Modules in it are found, also by worker processes: `python -m` sees it first, an installed program not at all.

    Here it comes last, so that nothing installed is hidden by a file of the same name.
    """
    with contextlib.suppress(OSError):  # a folder that was removed meanwhile
        if not {"", os.getcwd()} & set(sys.path):
            sys.path.append(os.getcwd())


def _forget_flags(main):
    """As they were before, so that a command can run again in the same interpreter: then it defines its own again."""
    if main.__module__ == "__main__":
        module = id(sys.modules["__main__"])
        for flag in list(flags.FLAGS.flags_by_module_id_dict().get(module, [])):
            delattr(flags.FLAGS, flag.name)
    flags.FLAGS.unparse_flags()


def _let_others_end():
    """The first of several processes serves the others, which abort if it ends before they have said why they do."""
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized() and jax.process_index() == 0:
        time.sleep(_SECONDS_FOR_OTHERS)


def _is_own_process() -> bool:
    """Not in a notebook or a test, which have replaced the terminal and go on afterwards."""
    return sys.stderr is sys.__stderr__


def _fail(message: str):
    print(f"error: {message}", file=sys.stderr, flush=True)
    if _is_own_process():
        sys.stdout.flush()
        for child in multiprocessing.active_children():
            child.terminate()
        # Not sys.exit: threads of libraries would say more, or crash in a compilation, while the interpreter ends.
        os._exit(2)
    sys.exit(2)
