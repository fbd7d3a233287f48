"""What the commands share that take a released checkpoint or complete a file of prefixes: flags, and what they do."""

import sys

from absl import flags

from kforcing_jax.errors import ConfigError

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A released .ckpt, instead of a run directory.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Of --checkpoint: a name or path; by its vocabulary by default.")
WEIGHTS = flags.DEFINE_enum("weights", "state_dict", ["state_dict", "ema"], "Which weights of --checkpoint.")
PREFIX_FILE = flags.DEFINE_string("prefix_file", None, 'Lines {"prefix": ...} to complete.')
PREFIX_LENGTH = flags.DEFINE_integer(
    "prefix_length", None, "Tokens of each that are kept; by default 6 for LM1B, 64 for OpenWebText.", lower_bound=1
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Prefixes that are completed at a time.", lower_bound=1)
K = flags.DEFINE_integer("k", None, "Tokens per pass; the (largest) trained window by default.", lower_bound=1)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "How many continuations (of every prefix).", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "As many as the context holds by default.", lower_bound=1)


def check_one_model(workdir: str | None):
    """Raises ConfigError unless either --workdir or --checkpoint is given."""
    if (workdir is None) == (CHECKPOINT.value is None):
        raise ConfigError("give one of --workdir (a trained run) and --checkpoint (a released .ckpt)")


def complete_prefixes(model, params, tokenizer, *, k: int, seq_len: int | None, prefix_length: int | None, **settings):
    """The `Completions` of --prefix_file, `settings` as of `complete`. Lines that cannot be used are said on stderr.

    Raises:
      ConfigError: nothing says how prefixes become tokens, or how many new ones there are to be.
      DataError: the file has no usable line, or texts do not fit `seq_len`.
    """
    from kforcing_jax.decoding.prefixes import check_prefixes_fit, complete, read_prefixes, room_for

    length = PREFIX_LENGTH.value or prefix_length
    check_prefixes_fit(tokenizer, length)
    max_new_tokens = room_for(length, seq_len, MAX_NEW_TOKENS.value)
    prefixes, problems = read_prefixes(PREFIX_FILE.value, tokenizer, length)
    for problem in problems:
        print(problem, file=sys.stderr)
    return complete(
        model,
        params,
        prefixes,
        max_new_tokens=max_new_tokens,
        k=k,
        batch_size=BATCH_SIZE.value,
        samples_per_prefix=NUM_SAMPLES.value,
        eos_id=tokenizer.eos_id,
        **settings,
    )
