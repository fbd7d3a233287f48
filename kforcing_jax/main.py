"""The whole curriculum of a config: data, AR teacher, k stages, evaluation, report. Run again, it resumes.

python -m kforcing_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

import contextlib
import logging
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from kforcing_jax import cli
from kforcing_jax.cli import processes
from kforcing_jax.errors import ConfigError

_LOG = logging.getLogger("kforcing_jax")

_CONFIG = flags.DEFINE_string(
    "config", None, "A file, or an installed one's name (tiny); fields by --config.model.num_layers=6."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; it is created, or resumed.")
_PROFILE = flags.DEFINE_string("profile", None, "FIRST:LAST: profile these steps of every stage, into WORKDIR/profile.")


def main(_: Sequence[str]) -> None:
    """Trains what is not finished, evaluates, reports and prints a table. Raises ConfigError for wrong flags."""
    config = cli.config_from_flag(_CONFIG)
    path = _WORKDIR.value
    if path is None:
        raise ConfigError("--workdir is missing, for example --workdir=runs/tiny")
    processes.start()

    # Heavy imports come after the configuration is known to be right.
    import jax

    from kforcing_jax.evaluation.aligned import samples_text
    from kforcing_jax.evaluation.suite import evaluate
    from kforcing_jax.evaluation.tables import table
    from kforcing_jax.interop.teachers import with_teacher
    from kforcing_jax.sharding import check_divisible, make_mesh
    from kforcing_jax.training import curriculum
    from kforcing_jax.training.profiling import ProfiledSteps
    from kforcing_jax.training.trackers import check_trackers

    profile = None if _PROFILE.value is None else ProfiledSteps.parse(_PROFILE.value)
    # The first process alone tracks.
    processes.together(lambda: check_trackers(config.logging.trackers if jax.process_index() == 0 else ()))
    mesh = make_mesh(config.mesh)
    config = processes.together(lambda: with_teacher(config, path))
    check_divisible(config, mesh)
    with contextlib.ExitStack() as stack:
        workdir, corpus = processes.together(lambda: _claimed(path, config, stack))
        curriculum.run(workdir, corpus, mesh, profile)
        command = shlex.join(["python", "-m", "kforcing_jax.main", *sys.argv[1:]])
        summary = evaluate(workdir, corpus, mesh, command=command)
    if jax.process_index() == 0:
        report = workdir.path / "report.html"
        where = f"Report: {report}" if report.exists() else "No report: it could not be written"
        print(f"\n{table(summary)}\n\n{samples_text(summary)}\n\n{where}")


def _claimed(path: str, config, stack):
    """(work directory, data). Other runs are kept out of the directory until the stack is closed."""
    from kforcing_jax.interop.released import check_teacher_of
    from kforcing_jax.training.init_from import check_sources
    from kforcing_jax.training.records import is_finished
    from kforcing_jax.workdir import Workdir

    # Before anything is written; a run that goes on has the teacher's weights, and no longer needs their file.
    if not is_finished(Workdir.at(path, config), "ar"):
        check_teacher_of(config)
    check_sources(Workdir.at(path, config))
    stack.enter_context(Workdir.at(path, config).locked())
    workdir = Workdir.claim(path, config)
    _LOG.info(f"{'data':<11} {config.data.source}, preparing or reading {workdir.data_path}")
    corpus = workdir.corpus()
    _LOG.info(f"{'data':<11} {corpus.describe()}")
    return workdir, corpus


if __name__ == "__main__":
    cli.run(main)
