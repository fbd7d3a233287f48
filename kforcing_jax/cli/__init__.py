"""What the commands share: flags, errors as one line, several processes as one run, the terminal, files of prompts."""

from kforcing_jax.cli.command import config_from_flag, refuse_flags, run

__all__ = ["config_from_flag", "refuse_flags", "run"]
