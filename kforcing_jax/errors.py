"""Errors that a user can act on. Entry points print them as one line and exit with status 2."""


class UserError(Exception):
    """What is wrong, the value that is wrong, and what would be right, in one line."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"error: {self}"]


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """A corpus, tokenizer or prompt that cannot be used."""


class RunError(UserError):
    """A work directory, checkpoint or training run that cannot go on."""
