"""What notebooks show: progress in its place, and errors without tracebacks."""

import logging

import IPython
import IPython.display
import pytest

from kforcing_jax.cli.notebook import live_progress
from kforcing_jax.errors import DataError, RunError

LOG = logging.getLogger("kforcing_jax")


@pytest.fixture
def shown(monkeypatch):
    """The texts that the cell shows, one after the other in the same place."""
    texts = []

    class Handle:
        def update(self, data, raw):
            assert raw
            texts.append(data["text/plain"])

    def display(data, raw, display_id):
        assert not texts, "a second place"
        handle = Handle()
        handle.update(data, raw)
        return handle

    monkeypatch.setattr(IPython.display, "display", display)
    return texts


def test_a_line_takes_the_place_of_the_one_that_began_alike(shown):
    with live_progress():
        for line in ("ar  compiling", "ar  compiled in 2 s", "ar  step 25/50", "ar  sample: a", "ar  step 50/50"):
            LOG.info(line)
        LOG.info("k1  step 25/50")
    assert shown[-1] == "ar  compiled in 2 s\nar  step 50/50\nar  sample: a\nk1  step 25/50"
    assert len(shown) == 6


def test_afterwards_the_log_is_as_it_was(shown):
    before = LOG.handlers, LOG.level, LOG.propagate
    with pytest.raises(DataError), live_progress():
        LOG.info("seen")
        raise DataError("no text")
    LOG.info("not seen")
    assert (LOG.handlers, LOG.level, LOG.propagate) == before and shown == ["seen"]


def test_an_interrupted_cell_says_that_it_can_be_run_again(shown):
    with pytest.raises(RunError, match="run the cell again"), live_progress():
        raise KeyboardInterrupt


def test_a_cell_shows_an_error_as_one_line(capsys):
    shell = IPython.InteractiveShell.instance()
    result = shell.run_cell("from kforcing_jax.errors import DataError; raise DataError('no text')")
    assert isinstance(result.error_in_exec, DataError)
    assert capsys.readouterr().out.strip() == "error: no text"
