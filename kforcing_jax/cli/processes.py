"""Several processes as one run: started from flags, or found on a Cloud TPU slice.

Every process runs the same command. They share the work directory; the first one writes everything but checkpoints.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from absl import flags

from kforcing_jax.errors import ConfigError, RunError, UserError

_Result = TypeVar("_Result")

_LONGEST_ERROR = 2000  # bytes

_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0. Only for several processes that are not a Cloud TPU slice."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
NAMES = tuple(flag.name for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID))


def start() -> None:
    """Joins the other processes of a run, if there are any. To be called before JAX looks for devices.

    Raises:
      ConfigError: flags that do not fit each other.
      RunError: the other processes did not come.
    """
    given = {name: flags.FLAGS[name].value for name in NAMES}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ConfigError(f"{' and '.join(missing)} missing: several processes need all of --{', --'.join(given)}")
    if not missing:
        _check(given)
        _join(**given)
    elif _has_tpu():
        _join()


def together(action: Callable[[], _Result]) -> _Result:
    """What `action` returns, in every process; where it fails in one, it fails in all, with the same error.

    Otherwise the others would wait for that one. Raises the UserError or OSError of this process, or else a RunError.
    """
    import jax

    if jax.process_count() == 1:
        return action()
    from jax.experimental import multihost_utils

    result: _Result | None = None
    error: UserError | OSError | None = None
    try:
        result = action()
    except (UserError, OSError) as raised:
        error = raised
    words = np.zeros(_LONGEST_ERROR, np.uint8)
    said = str(error or "").encode()[:_LONGEST_ERROR]
    words[: len(said)] = list(said)
    of_all = multihost_utils.process_allgather(words)
    failed = [bytes(row[row > 0]).decode(errors="replace") for row in of_all if row.any()]
    if failed:
        raise error or RunError(failed[0])
    return cast(_Result, result)  # nothing was raised


def _check(given):
    host, _, port = given["coordinator_address"].rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--coordinator_address={given['coordinator_address']} should be host:port")
    if given["process_id"] >= given["num_processes"]:
        raise ConfigError(
            f"--process_id={given['process_id']} should be below --num_processes={given['num_processes']}"
        )


def _join(**settings):
    import jax

    try:
        jax.distributed.initialize(**settings)
    except ValueError:
        # JAX knows no cluster here: one TPU host outside Google Cloud, such as a notebook's.
        if settings:
            raise
    except Exception as error:  # the coordination service raises whatever its C++ status maps to
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"the processes of this run did not find each other ({reason}); start the same command on every host, "
            "each with its own --process_id"
        ) from None


def _has_tpu() -> bool:
    """Whether this machine has TPU chips, without waking them."""
    import jax

    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # JAX gives the class its options later
    if platforms and "tpu" not in platforms:
        return False
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
