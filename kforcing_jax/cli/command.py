"""What the entry points share: flags, and errors as one line with a non-zero exit."""

import difflib
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging

from kforcing_jax.cli.terminal import show_progress
from kforcing_jax.config import Config, parse, unknown_field
from kforcing_jax.errors import ConfigError, UserError

_OVERRIDE = "--config."


def run(main: Callable[[Sequence[str]], None]):
    """Runs an entry point: a UserError ends it with one line on stderr and status 2."""

    def guarded(argv):
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; every option is a flag, see --help")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax reports every file that it opens
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
        except RuntimeError as error:
            if not str(error).startswith("Unable to initialize backend"):
                raise
            _fail(" ".join(str(error).split()))

    app.run(guarded, flags_parser=_parse_flags)


def config_from_flag(flag: flags.FlagHolder) -> Config:
    """The validated configuration of `--config`."""
    if flag.value is None:
        raise ConfigError("--config is missing, for example --config=configs/tiny.py")
    return parse(flag.value)


def refuse_flags(names: Sequence[str], reason: str):
    """Raises ConfigError when one of these flags was given, because it would be ignored."""
    given = [name for name in names if flags.FLAGS[name].present]
    if given:
        raise ConfigError(f"--{given[0]} has no effect {reason}; leave it out")


def _parse_flags(argv):
    file = _config_file(argv)
    if file is not None and not Path(file.split(":")[0]).is_file():
        _fail(f"--config={file.split(':')[0]}: no such file")
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=1)
        hint = f"; did you mean --{near[0]}?" if near else "; see --help"
        _fail(f"unknown flag --{error.flagname}{hint}")
    except Exception as error:  # config files are code, and overrides reach into them: anything can be raised
        _fail(_explain(argv, file, error))


def _config_file(argv) -> str | None:
    """The value of `--config=FILE` or `--config FILE`; what follows a colon is the argument of its get_config."""
    for arg, following in zip(argv, [*argv[1:], None], strict=True):
        name, given, value = arg.partition("=")
        if name.removeprefix("-") == "-config" and (given or following):
            return value if given else following
    return None


def _explain(argv, file, error) -> str:
    """One line about a config file that does not load or an override that does not fit."""
    for arg in argv:
        path = arg.split("=", 1)[0].removeprefix(_OVERRIDE)
        wrong = _missing_field(file, path) if arg.startswith(_OVERRIDE) else None
        if wrong:
            return wrong
    return " ".join(str(error).split()) or type(error).__name__


def _missing_field(file, path) -> str | None:
    """The message for an override of a field that the config file does not have; None when it has it."""
    path_of_file, *variant = file.split(":", 1)
    node = runpy.run_path(path_of_file)["get_config"](*variant)
    names = path.split(".")
    for depth, name in enumerate(names):
        if not hasattr(node, "keys") or name not in node:
            known = list(node.keys()) if hasattr(node, "keys") else []
            return str(unknown_field(".".join(names[: depth + 1]), known))
        node = node[name]
    return None


def _fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
