"""Prints text from a trained run: from the teacher, or from a student at k tokens per pass.

python -m kforcing_jax.generate --workdir=runs/tiny --prompt="The president said" --k=4
"""

import json

from absl import flags

from kforcing_jax import cli
from kforcing_jax.config import check_tau
from kforcing_jax.errors import ConfigError, DataError

_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.", required=True)
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; empty starts a new document.")
_PROMPT_IDS = flags.DEFINE_list("prompt_ids", None, "Token ids to continue, instead of --prompt.")
_MODE = flags.DEFINE_enum("mode", "student", ["student", "ar"], "Which model decodes.")
_K = flags.DEFINE_integer("k", None, "Tokens per pass; the largest trained window by default.", lower_bound=1)
_STAGE = flags.DEFINE_string("stage", None, "Decode with this stage (k4-from-ar, ...), not the nearest window's.")
_SEED = flags.DEFINE_integer("seed", 0, "Noise seed of the first sample; the others count up.", lower_bound=0)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "How many continuations.", lower_bound=1)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "As many as the context holds by default.", lower_bound=1
)
_TAU = flags.DEFINE_float("tau", 1.0, "Temperature, in (0, 1000].")
_FREQUENCY_PENALTY = flags.DEFINE_float("frequency_penalty", 0.0, "Logit penalty per earlier use of a token.")
_JSON = flags.DEFINE_bool("json", False, 'Print one object: {"tokens": [[...]], "text": [...], "passes": [...]}.')


def main(_):
    check_tau("--tau", _TAU.value)

    from kforcing_jax.decoding import generate
    from kforcing_jax.workdir import Workdir

    workdir = Workdir.open(_WORKDIR.value)
    tokenizer = workdir.tokenizer()
    stage, k = choose_stage(workdir.config, workdir.finished_stages(), _MODE.value, _K.value, _STAGE.value)
    prompt = _prompt_ids(tokenizer)
    new_tokens = _new_tokens(prompt, workdir.config.data.seq_len)
    model, params = workdir.load(stage, tokenizer)
    decoded = generate(
        model,
        params,
        [prompt] * _NUM_SAMPLES.value,
        max_new_tokens=new_tokens,
        k=k,
        tau=_TAU.value,
        seeds=range(_SEED.value, _SEED.value + _NUM_SAMPLES.value),
        frequency_penalty=_FREQUENCY_PENALTY.value,
        eos_id=tokenizer.eos_id,
    )
    tokens = [row[:length].tolist() for row, length in zip(decoded.tokens, decoded.lengths, strict=True)]
    text = [tokenizer.decode(row) for row in tokens]
    if _JSON.value:
        print(json.dumps({"tokens": tokens, "text": text, "passes": decoded.passes.tolist()}))
    else:
        print("\n\n".join(text))


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


def _prompt_ids(tokenizer) -> list[int]:
    if _PROMPT_IDS.value is None:
        return tokenizer.encode_prompt(_PROMPT.value)
    for word in _PROMPT_IDS.value:
        if not word.strip().isdecimal() or int(word) >= tokenizer.vocab_size:
            raise DataError(f"--prompt_ids has {word!r}, expected ids from 0 to {tokenizer.vocab_size - 1}")
    return [int(word) for word in _PROMPT_IDS.value]


def _new_tokens(prompt, seq_len) -> int:
    room = seq_len - len(prompt)
    wanted = room if _MAX_NEW_TOKENS.value is None else _MAX_NEW_TOKENS.value
    if wanted > room or room < 1:
        raise DataError(
            f"a prompt of {len(prompt)} tokens and {max(wanted, 1)} new ones exceed the cache of {seq_len} positions "
            "(data.seq_len); shorten the prompt or lower --max_new_tokens"
        )
    return wanted


if __name__ == "__main__":
    cli.run(main)
