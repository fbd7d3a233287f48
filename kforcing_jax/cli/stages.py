"""Which stage of a run decodes, and at which temperature."""

from kforcing_jax.errors import ConfigError


def choose_stage(config, finished: list[str], mode: str, k: int | None, stage: str | None) -> tuple[str, int]:
    """(stage, k) to decode with: any k up to a trained window, by default the largest; the stage nearest above it.

    Raises:
      ConfigError: no such finished stage, or k exceeds what it was trained with.
    """
    if mode == "ar" or stage == "ar":
        return "ar", 1
    windows = {name: config.stages[name].window for name in finished if name != "ar"}
    if stage is not None:
        if stage not in windows:
            raise ConfigError(f"--stage={stage} is not a finished stage of this run; finished: {', '.join(finished)}")
        windows = {stage: windows[stage]}
    if not windows:
        raise ConfigError("this run has no finished student; train one, or decode the teacher with --mode=ar")
    largest = max(windows.values())
    k = largest if k is None else k
    if k > largest:
        raise ConfigError(f"--k={k} exceeds the largest trained window, {largest}")
    return min((name for name in windows if windows[name] >= k), key=windows.get), k


def choose_tau(wanted: float | None, trained: tuple[float, float] | None) -> float:
    """`wanted`, by default 1 or what is nearest to it. `trained` is the range that a student knows, if it is known.

    Raises:
      ConfigError: `wanted` is outside that range, where it would have no effect that is known.
    """
    least, most = trained or (wanted or 1.0, wanted or 1.0)
    if wanted is not None and not least <= wanted <= most:
        known = f"{least}" if least == most else f"{least} to {most}"
        raise ConfigError(f"--tau={wanted} is not a temperature that this student was trained with: {known}")
    return min(max(1.0, least), most) if wanted is None else wanted
