"""Which stage of a run decodes, and at which temperature."""

from collections.abc import Sequence

from kforcing_jax.config import Config
from kforcing_jax.errors import ConfigError


def choose_stage(
    config: Config,
    finished: Sequence[str],
    mode: str,
    k: int | None,
    stage: str | None,
    unfinished: Sequence[str] = (),
) -> tuple[str, int]:
    """(stage, k) to decode with: any k up to a trained window, by default the largest; the stage nearest above it.

    `unfinished` are stages that have a checkpoint, but not their last one. They decode where they are named, or where
    no student is finished.

    Raises:
      ConfigError: no such stage, or k exceeds what it is trained with.
    """
    if mode == "ar" or stage == "ar":
        return "ar", 1
    windows = _windows(config, finished)
    begun = _windows(config, unfinished)
    if stage is not None:
        if stage not in windows | begun:
            there = ", ".join([*finished, *(f"{name} (not finished)" for name in unfinished)]) or "none"
            raise ConfigError(f"--stage={stage} is not a stage of this run that has a checkpoint; there are: {there}")
        windows = {stage: (windows | begun)[stage]}
    windows = windows or begun
    if not windows:
        raise ConfigError("this run has no finished student; train one, or decode the teacher with --mode=ar")
    largest = max(windows.values())
    k = largest if k is None else k
    if k > largest:
        wider = next((name for name in begun if begun[name] >= k and stage is None), None)
        hint = f"; --stage={wider} takes {wider}, which is not finished, as it is" if wider else ""
        raise ConfigError(f"--k={k} exceeds the largest trained window, {largest}{hint}")
    return min((name for name in windows if windows[name] >= k), key=lambda name: windows[name]), k


def _windows(config, names) -> dict[str, int]:
    """Of students."""
    return {name: config.stages[name].window for name in names if name != "ar"}


def choose_tau(
    wanted: float | None, trained: tuple[float, float] | None, usual: float = 1.0, mode: str = "student"
) -> float:
    """`wanted`, by default `usual`. `trained` is the range that a student knows, if it is known.

    Raises:
      ConfigError: `wanted` is outside that range and mode is `student`, where it would have no effect that is known.
    """
    least, most = trained or (wanted or usual, wanted or usual)
    if mode == "student" and wanted is not None and not least <= wanted <= most:
        known = f"{least}" if least == most else f"{least} to {most}"
        raise ConfigError(f"--tau={wanted} is not a temperature that this student was trained with: {known}")
    return usual if wanted is None else wanted
