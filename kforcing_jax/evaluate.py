"""Evaluates the finished stages of a run again, or a released checkpoint, also under an external scorer.

python -m kforcing_jax.evaluate --workdir=runs/tiny
python -m kforcing_jax.evaluate --checkpoint=pflm_lm1b_k4.ckpt --teacher=ar_lm1b.ckpt --prefix_file=prefixes.jsonl
"""

import json
import sys

from absl import flags

from kforcing_jax import cli, distributed
from kforcing_jax.errors import ConfigError
from kforcing_jax.output import check_output_dir

_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; its summary.json and report.html are rewritten.")
_SCORER = flags.DEFINE_string("scorer", None, "A local folder of a causal LM that transformers loads, for Gen-PPL.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A released .ckpt, instead of a run directory.")
_TEACHER = flags.DEFINE_string("teacher", None, "The released AR .ckpt that a student's tokens are compared with.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Of --checkpoint: a name or path; by its vocabulary by default.")
_WEIGHTS = flags.DEFINE_enum("weights", "state_dict", ["state_dict", "ema"], "Which weights of --checkpoint.")
_PREFIX_FILE = flags.DEFINE_string("prefix_file", None, 'Lines {"prefix": ...} that --checkpoint completes.')
_PREFIX_LENGTH = flags.DEFINE_integer(
    "prefix_length", None, "Tokens of each that are kept; by default 6 for LM1B, 64 for OpenWebText.", lower_bound=1
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "As many as the context holds by default.", lower_bound=1
)
_K = flags.DEFINE_integer("k", None, "Tokens per pass of --checkpoint; its trained window by default.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Prefixes that are completed at a time.", lower_bound=1)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Completions of every prefix.", lower_bound=1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where samples and figures of --checkpoint go, if anywhere.")
_JSON = flags.DEFINE_bool("json", False, "Print the figures as one object: for a run, what summary.json holds.")


_OF_CHECKPOINTS = (
    *("teacher", "tokenizer", "weights", "prefix_file", "prefix_length"),
    *("max_new_tokens", "k", "batch_size", "num_samples", "output_dir"),
)


def main(_):
    if (_WORKDIR.value is None) == (_CHECKPOINT.value is None):
        raise ConfigError("give one of --workdir (a trained run) and --checkpoint (a released .ckpt)")
    if _WORKDIR.value:
        cli.refuse_flags(_OF_CHECKPOINTS, "without --checkpoint")
        _evaluate_run()
    else:
        _evaluate_checkpoint()


def _evaluate_run():
    distributed.start()
    import jax

    from kforcing_jax.evaluation.suite import evaluate
    from kforcing_jax.evaluation.tables import samples_text, table
    from kforcing_jax.workdir import Workdir

    workdir = Workdir.open(_WORKDIR.value)
    scorer = _scorer()
    summary = evaluate(workdir, workdir.corpus(), scorer)
    if jax.process_index() == 0:
        print(json.dumps(summary) if _JSON.value else f"{table(summary)}\n\n{samples_text(summary)}")


def _evaluate_checkpoint():
    if _PREFIX_FILE.value is None:
        raise ConfigError("--prefix_file is missing: a released checkpoint is evaluated on completions of prefixes")
    if _OUTPUT_DIR.value:
        check_output_dir(_OUTPUT_DIR.value)
    scorer = _scorer()

    from kforcing_jax.decoding.prefixes import check_prefixes_fit, complete, read_prefixes, room_for, write_completions
    from kforcing_jax.evaluation.released import evaluate_released
    from kforcing_jax.evaluation.tables import figures_text
    from kforcing_jax.interop.released import open_released, open_teacher

    released = open_released(_CHECKPOINT.value, _TOKENIZER.value, _WEIGHTS.value)
    length = _PREFIX_LENGTH.value or (released.release and released.release.prefix_length)
    check_prefixes_fit(released.tokenizer, length)
    teacher = open_teacher(_TEACHER.value, released) if _TEACHER.value else None
    prefixes, problems = read_prefixes(_PREFIX_FILE.value, released.tokenizer, length)
    for problem in problems:
        print(problem, file=sys.stderr)
    completions = complete(
        released.model,
        released.params,
        prefixes,
        max_new_tokens=room_for(length, released.release and released.release.seq_len, _MAX_NEW_TOKENS.value),
        k=released.tokens_per_pass(_K.value),
        batch_size=_BATCH_SIZE.value,
        samples_per_prefix=_NUM_SAMPLES.value,
        eos_id=released.tokenizer.eos_id,
    )
    figures = evaluate_released(released, completions, teacher, scorer)
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
