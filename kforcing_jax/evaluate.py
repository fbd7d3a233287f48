"""Evaluates the finished stages of a run again, and rewrites its summary.json and report.html.

python -m kforcing_jax.evaluate --workdir=runs/tiny
"""

import json

from absl import flags

from kforcing_jax import cli, distributed

_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.", required=True)
_JSON = flags.DEFINE_bool("json", False, "Print what summary.json holds instead of a table.")


def main(_):
    distributed.start()
    import jax

    from kforcing_jax.evaluation.suite import evaluate
    from kforcing_jax.evaluation.tables import samples_text, table
    from kforcing_jax.workdir import Workdir

    workdir = Workdir.open(_WORKDIR.value)
    summary = evaluate(workdir, workdir.corpus())
    if jax.process_index() == 0:
        print(json.dumps(summary) if _JSON.value else f"{table(summary)}\n\n{samples_text(summary)}")


if __name__ == "__main__":
    cli.run(main)
