"""Prints text from a trained run or a released checkpoint: from the teacher, or from a student at k tokens per pass.

python -m kforcing_jax.generate --workdir=runs/tiny --prompt="The president said" --k=4
python -m kforcing_jax.generate --checkpoint=pflm_lm1b_k4.ckpt --prefix_file=prefixes.jsonl --output_dir=samples
"""

import json
import math
import sys
from typing import NamedTuple

from absl import flags

from kforcing_jax import cli
from kforcing_jax.cli import checkpoints as checkpoint_flags
from kforcing_jax.cli.checkpoints import (
    CHECKPOINT,
    MAX_NEW_TOKENS,
    NUM_SAMPLES,
    PREFIX_FILE,
    TOKENIZER,
    WEIGHTS,
    K,
    check_one_model,
    check_output_dir,
    check_prefix_file,
)
from kforcing_jax.config import check_tau
from kforcing_jax.errors import ConfigError, DataError

flags.adopt_module_key_flags(checkpoint_flags)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.")
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; empty starts a new document.")
_PROMPT_IDS = flags.DEFINE_list("prompt_ids", None, "Token ids to continue, instead of --prompt.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "samples", "Where samples.jsonl and throughput.json of prefixes go.")
_MODE = flags.DEFINE_enum("mode", "student", ["student", "ar"], "Which model of a run decodes.")
_STAGE = flags.DEFINE_string("stage", None, "Decode with this stage (k4-from-ar, ...), not the nearest window's.")
_SEED = flags.DEFINE_integer("seed", 0, "Noise seed of the first sample; the others count up.", lower_bound=0)
_TAU = flags.DEFINE_float(
    "tau", None, "Temperature, in [1e-6, 1000]; by default 1, or the nearest that the stage was trained with."
)
_FREQUENCY_PENALTY = flags.DEFINE_float("frequency_penalty", 0.0, "Logit penalty per earlier use of a token.")
_JSON = flags.DEFINE_bool(
    "json", False, 'Print one object: {"tokens": [[...]], "text": [...], "passes": [...]}, or throughput.json.'
)


class Decoder(NamedTuple):
    """A model with what decoding needs to know of it; `seq_len` and `prefix_length` are None when nothing says them."""

    model: object
    params: dict
    tokenizer: object | None
    eos_id: int | None
    k: int
    seq_len: int | None
    prefix_length: int | None
    tau: float


def main(_):
    _check_flags()
    decoder = _from_run() if _WORKDIR.value else _from_checkpoint()
    if PREFIX_FILE.value:
        _complete_prefixes(decoder)
    else:
        _continue_prompt(decoder)


def _check_flags():
    """Raises ConfigError for flags that are wrong, do not fit each other, or would have no effect."""
    if _TAU.value is not None:
        check_tau("--tau", _TAU.value)
    if not math.isfinite(_FREQUENCY_PENALTY.value):
        raise ConfigError(f"--frequency_penalty={_FREQUENCY_PENALTY.value} is not finite")
    check_one_model(_WORKDIR.value)
    if _WORKDIR.value:
        cli.refuse_flags(["tokenizer", "weights"], "without --checkpoint")
    else:
        cli.refuse_flags(["stage"], "without --workdir")
    if _MODE.value == "ar":
        cli.refuse_flags(["k"], "with --mode=ar, which draws one token per pass")
        if _STAGE.value not in (None, "ar"):
            raise ConfigError(f"--stage={_STAGE.value} is a student, and --mode=ar decodes the teacher; leave one out")
    if _STAGE.value == "ar":
        cli.refuse_flags(["k"], "with --stage=ar, which draws one token per pass")
    if PREFIX_FILE.value:
        cli.refuse_flags(["prompt", "prompt_ids"], "with --prefix_file")
        check_prefix_file(PREFIX_FILE.value)
        check_output_dir(_OUTPUT_DIR.value)
    else:
        cli.refuse_flags(["prefix_length", "batch_size", "output_dir"], "without --prefix_file")
    if _PROMPT_IDS.value is not None:
        cli.refuse_flags(["prompt"], "with --prompt_ids")


def _from_run() -> Decoder:
    from kforcing_jax.cli.prompts import room_for
    from kforcing_jax.training.checkpoints import finished_stages, load_stage
    from kforcing_jax.workdir import Workdir

    workdir = Workdir.open(_WORKDIR.value)
    tokenizer = workdir.tokenizer()
    stage, k = choose_stage(workdir.config, finished_stages(workdir), _MODE.value, K.value, _STAGE.value)
    data, evaluation = workdir.config.data, workdir.config.evaluation
    settings = workdir.config.stages[stage]
    tau = choose_tau(_TAU.value, (settings.tau_min, settings.tau_max) if settings.window else None)
    if not PREFIX_FILE.value:
        room_for(len(_prompt_ids(tokenizer, tokenizer.vocab_size)), data.seq_len, MAX_NEW_TOKENS.value)
    loaded = load_stage(workdir, stage, tokenizer)
    return Decoder(*loaded, tokenizer, tokenizer.eos_id, k, data.seq_len, evaluation.prompt_length, tau)


def _from_checkpoint() -> Decoder:
    from kforcing_jax.interop.released import open_released
    from kforcing_jax.models import CausalLM

    needs_tokenizer = _PROMPT_IDS.value is None
    released = open_released(CHECKPOINT.value, TOKENIZER.value, WEIGHTS.value, needs_tokenizer)
    model, params, tokenizer, release = released[:4]
    if _MODE.value == "ar" and not isinstance(model, CausalLM):
        raise ConfigError(f"--mode=ar: {CHECKPOINT.value} is a student; leave --mode out or give an AR checkpoint")
    if release and not tokenizer:
        print(f"the tokenizer {release.tokenizer} is not here: ids in, ids out", file=sys.stderr)
    if isinstance(model, CausalLM):
        cli.refuse_flags(["k"], f"with {CHECKPOINT.value}, an AR model")
    k, tau = released.tokens_per_pass(K.value), choose_tau(_TAU.value, released.tau_range)
    return Decoder(model, params, tokenizer, released.eos_id, k, released.seq_len, released.prefix_length, tau)


def _continue_prompt(decoder: Decoder):
    from kforcing_jax.cli.prompts import room_for
    from kforcing_jax.decoding import generate

    prompt = _prompt_ids(decoder.tokenizer, decoder.model.cfg.vocab_size)
    decoded = generate(
        decoder.model,
        decoder.params,
        [prompt] * NUM_SAMPLES.value,
        max_new_tokens=room_for(len(prompt), decoder.seq_len, MAX_NEW_TOKENS.value),
        k=decoder.k,
        tau=decoder.tau,
        seeds=range(_SEED.value, _SEED.value + NUM_SAMPLES.value),
        frequency_penalty=_FREQUENCY_PENALTY.value,
        eos_id=decoder.eos_id,
    )
    tokens = [row[:length].tolist() for row, length in zip(decoded.tokens, decoded.lengths, strict=True)]
    text = [decoder.tokenizer.decode(row) if decoder.tokenizer else " ".join(map(str, row)) for row in tokens]
    if _JSON.value:
        print(json.dumps({"tokens": tokens, "text": text, "passes": decoded.passes.tolist()}))
    else:
        print("\n\n".join(text))


def _complete_prefixes(decoder: Decoder):
    from kforcing_jax.cli.prompts import complete_prefixes, write_completions

    completions = complete_prefixes(
        decoder.model,
        decoder.params,
        decoder.tokenizer,
        k=decoder.k,
        seq_len=decoder.seq_len,
        prefix_length=decoder.prefix_length,
        tau=decoder.tau,
        seed=_SEED.value,
        frequency_penalty=_FREQUENCY_PENALTY.value,
    )
    write_completions(_OUTPUT_DIR.value, completions, decoder.tokenizer)
    speed = completions.throughput
    if _JSON.value:
        print(json.dumps(speed))
    else:
        print(
            f"{len(completions.tokens)} completions of {len(completions.prefixes)} prefixes, "
            f"{speed['throughput_tok_per_sec_total']:,.0f} tokens/s, {speed['useful_tok_per_sec']:,.0f} of them useful "
            f"(up to EOS): {_OUTPUT_DIR.value}/samples.jsonl, {_OUTPUT_DIR.value}/throughput.json"
        )


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


def _prompt_ids(tokenizer, size: int) -> list[int]:
    if _PROMPT_IDS.value is None:
        if tokenizer is None:
            raise ConfigError(f"--tokenizer or --prompt_ids is missing: nothing says which one {CHECKPOINT.value} has")
        return tokenizer.encode_prompt(_PROMPT.value)
    for word in _PROMPT_IDS.value:
        if not word.strip().isdecimal() or int(word) >= size:
            raise DataError(f"--prompt_ids has {word!r}, expected ids from 0 to {size - 1}")
    return [int(word) for word in _PROMPT_IDS.value]


if __name__ == "__main__":
    cli.run(main)
