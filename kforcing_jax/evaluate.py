"""Evaluates the stages of a run, also of one that trains, or a released checkpoint, also under an external scorer.

python -m kforcing_jax.evaluate --workdir=runs/tiny
python -m kforcing_jax.evaluate --checkpoint=pflm_lm1b_k4.ckpt --teacher=ar_lm1b.ckpt --prefix_file=prefixes.jsonl
"""

import json
from collections.abc import Sequence

from absl import flags

from kforcing_jax import cli
from kforcing_jax.cli import checkpoints as checkpoint_flags
from kforcing_jax.cli import processes
from kforcing_jax.cli.checkpoints import (
    BASE,
    CHECKPOINT,
    PREFIX_FILE,
    TOKENIZER,
    WEIGHTS,
    K,
    check_one_model,
    check_output_dir,
    check_readable,
)
from kforcing_jax.errors import ConfigError

flags.adopt_module_key_flags(checkpoint_flags)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; its summary.json and report.html are rewritten.")
_SCORER = flags.DEFINE_string("scorer", None, "A local folder of a causal LM that transformers loads, for Gen-PPL.")
_TEACHER = flags.DEFINE_string("teacher", None, "The released AR .ckpt that a student's tokens are compared with.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where samples and figures of --checkpoint go, if anywhere.")
_JSON = flags.DEFINE_bool("json", False, "Print the figures as one object: for a run, what summary.json holds.")

_OF_CHECKPOINTS = (
    *("teacher", "tokenizer", "weights", "base", "prefix_file", "prefix_length"),
    *("max_new_tokens", "k", "batch_size", "num_samples", "output_dir"),
)


def main(_: Sequence[str]) -> None:
    """Evaluates what the flags name, and prints the figures."""
    check_one_model(_WORKDIR.value)
    if _WORKDIR.value:
        cli.refuse_flags(_OF_CHECKPOINTS, "without --checkpoint")
        _evaluate_run(_WORKDIR.value)
    else:
        cli.refuse_flags(processes.NAMES, "without --workdir")
        _evaluate_checkpoint()


def _evaluate_run(path: str):
    processes.start()
    import jax

    from kforcing_jax.evaluation.aligned import samples_text
    from kforcing_jax.evaluation.suite import evaluate
    from kforcing_jax.evaluation.tables import table
    from kforcing_jax.sharding import make_mesh_that_fits
    from kforcing_jax.workdir import Workdir

    def opened():
        workdir = Workdir.open(path)
        return workdir, workdir.prepared(), make_mesh_that_fits(workdir.config), _scorer()

    summary = evaluate(*processes.together(opened))
    if jax.process_index() == 0:
        print(json.dumps(summary) if _JSON.value else f"{table(_shown(summary))}\n\n{samples_text(summary)}")


def _shown(summary):
    """With the stages that are not finished, by their steps."""
    running = {f"{name}@{figures['step']}": figures for name, figures in summary.get("unfinished", {}).items()}
    return summary | {"stages": summary["stages"] | running}


def _evaluate_checkpoint():
    if PREFIX_FILE.value is None:
        raise ConfigError("--prefix_file is missing: a released checkpoint is evaluated on completions of prefixes")
    check_readable("prefix_file", PREFIX_FILE.value)
    if _OUTPUT_DIR.value:
        check_output_dir(_OUTPUT_DIR.value)
    scorer = _scorer()

    from kforcing_jax.cli.prompts import complete_prefixes, write_completions
    from kforcing_jax.evaluation.released import evaluate_released, figures_text
    from kforcing_jax.interop.released import open_released, open_teacher

    assert CHECKPOINT.value is not None  # `check_one_model`
    released = open_released(CHECKPOINT.value, TOKENIZER.value, WEIGHTS.value, base=BASE.value)
    if released.model.cfg.is_gated:
        cli.refuse_flags(["teacher"], f"with {CHECKPOINT.value}, a student that has its teacher")
    teacher = open_teacher(_TEACHER.value, released) if _TEACHER.value else None
    completions = complete_prefixes(
        released.model,
        released.params,
        released.tokenizer,
        k=released.tokens_per_pass(K.value),
        seq_len=released.seq_len,
        prefix_length=released.prefix_length,
        tau=released.usual_tau,
    )
    assert released.tokenizer is not None  # prefixes have become tokens
    figures = evaluate_released(released, completions, teacher, scorer, released.usual_tau)
    if _OUTPUT_DIR.value:
        write_completions(_OUTPUT_DIR.value, completions, released.tokenizer, {"evaluation.json": figures})
    print(json.dumps(figures) if _JSON.value else figures_text(figures))


def _scorer():
    if _SCORER.value is None:
        return None
    from kforcing_jax.evaluation.scorer import Scorer

    return Scorer.load(_SCORER.value)


if __name__ == "__main__":
    cli.run(main)
