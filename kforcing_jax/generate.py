"""Prints text from a trained run or a released checkpoint: from the teacher, a student, or both.

python -m kforcing_jax.generate --workdir=runs/tiny --prompt="The president said" --confidence=0.3
python -m kforcing_jax.generate --workdir=runs/tiny --prompt_file=prompts.txt --mode=exact > texts.jsonl
python -m kforcing_jax.generate --checkpoint=pflm_lm1b_k4.ckpt --prefix_file=prefixes.jsonl --output_dir=samples
"""

import json
import math
import sys
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from kforcing_jax import cli
from kforcing_jax.cli import checkpoints as checkpoint_flags
from kforcing_jax.cli.checkpoints import (
    BASE,
    CHECKPOINT,
    MAX_NEW_TOKENS,
    NUM_SAMPLES,
    PREFIX_FILE,
    TOKENIZER,
    WEIGHTS,
    K,
    check_one_model,
    check_output_dir,
    check_readable,
)
from kforcing_jax.cli.stages import choose_stage, choose_tau
from kforcing_jax.config import check_tau, check_top_p
from kforcing_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from kforcing_jax.data.tokenizers import Tokenizer
    from kforcing_jax.models import CausalLM, PushForwardLM

flags.adopt_module_key_flags(checkpoint_flags)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "Text to continue; more of them by giving it again. Empty, or none, starts a new document."
)
_PROMPT_IDS = flags.DEFINE_list("prompt_ids", None, "Token ids to continue, instead of --prompt.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file",
    None,
    'Prompts to continue whole: lines of a .txt, or {"prompt": "..."} of a .jsonl. Prints JSON lines.',
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "samples", "Where samples.jsonl and throughput.json of prefixes go.")
_MODE = flags.DEFINE_enum(
    "mode",
    "student",
    ["student", "ar", "exact"],
    "Who decodes: the student, the AR teacher, or exactly the teacher, from drafts of the student.",
)
_TEACHER = flags.DEFINE_string("teacher", None, "The AR .ckpt for --mode=ar and exact of a --checkpoint.")
_CONFIDENCE = flags.DEFINE_float(
    "confidence", 0.0, "How likely the part of a window that is kept has to be, in [0, 1]; 0 keeps whole windows."
)
_STAGE = flags.DEFINE_string("stage", None, "Decode with this stage (k4-from-ar, ...), not the nearest window's.")
_STEP = flags.DEFINE_integer(
    "step", None, "Decode with the stage's checkpoint of this step, not with its newest.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Noise seed of the first sample; the others count up.", lower_bound=0)
_TAU = flags.DEFINE_float(
    "tau", None, "Temperature, in [1e-6, 1000]; by default 1, or the nearest that the students were trained with."
)
_TOP_P = flags.DEFINE_float(
    "top_p", None, "Draw from the fewest likeliest tokens of this probability; by default that of students' training."
)
_FREQUENCY_PENALTY = flags.DEFINE_float("frequency_penalty", 0.0, "Logit penalty per earlier use of a token.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the blocks and their caches.")
_EXACT_WINDOWS = flags.DEFINE_integer(
    "exact_windows",
    None,
    "Mode exact of a gated student: windows that a pass drafts beside what it verifies, by default k; 0: two passes.",
    lower_bound=0,
)
_SLOTS = flags.DEFINE_integer("slots", None, "Texts at a time; by default all, up to 64.", lower_bound=1)
# As `decoding.requests.MOST_PENALTY`, which takes importing JAX.
_MOST_PENALTY = 1e6
_JSON = flags.DEFINE_bool(
    "json", False, 'Print one object: {"tokens": [[...]], "text": [...], "passes": [...]}, or throughput.json.'
)


class Decoder(NamedTuple):
    """What decodes, and what has to be known of it; `seq_len` and `prefix_length` are None when nothing says them."""

    name: str  # the stage or file
    model: "CausalLM | PushForwardLM"
    params: dict
    teacher: tuple | None
    tokenizer: "Tokenizer | None"
    eos_id: int | None
    k: int
    seq_len: int | None
    prefix_length: int | None
    tau: float
    top_p: float

    @property
    def settings(self) -> dict:
        """What `generate` and its like take, but for prompts and seeds."""
        return {
            "k": self.k,
            "tau": self.tau,
            "top_p": self.top_p,
            "frequency_penalty": _FREQUENCY_PENALTY.value,
            "mode": _MODE.value,
            "confidence": _CONFIDENCE.value,
            "teacher": self.teacher,
            "dtype": _DTYPE.value,
            "exact_windows": _EXACT_WINDOWS.value,
        }


def main(_: Sequence[str]) -> None:
    """Decodes what the flags name, and prints texts, or writes completions of prefixes."""
    _check_flags()
    decoder = _from_run(_WORKDIR.value) if _WORKDIR.value else _from_checkpoint()
    if PREFIX_FILE.value:
        _complete_prefixes(decoder)
    else:
        _continue_prompts(decoder)


def _check_flags():
    """Raises ConfigError for flags that are wrong, do not fit each other, or would have no effect."""
    if _TAU.value is not None:
        check_tau("--tau", _TAU.value)
    if _TOP_P.value is not None:
        check_top_p("--top_p", _TOP_P.value)
    if not math.isfinite(_FREQUENCY_PENALTY.value):
        raise ConfigError(f"--frequency_penalty={_FREQUENCY_PENALTY.value} is not finite")
    if abs(_FREQUENCY_PENALTY.value) > _MOST_PENALTY:
        raise ConfigError(f"--frequency_penalty={_FREQUENCY_PENALTY.value} is not in [-1e6, 1e6]")
    check_one_model(_WORKDIR.value)
    if _WORKDIR.value:
        cli.refuse_flags(["tokenizer", "weights", "teacher", "base"], "without --checkpoint")
    else:
        cli.refuse_flags(["stage", "step"], "without --workdir")
    _check_mode()
    _check_prompts()


def _check_mode():
    if not 0 <= _CONFIDENCE.value <= 1:
        raise ConfigError(f"--confidence={_CONFIDENCE.value} is not in [0, 1]")
    if _MODE.value != "exact":
        cli.refuse_flags(["exact_windows"], f"with --mode={_MODE.value}")
    if _MODE.value == "student":
        cli.refuse_flags(["teacher"], "with --mode=student")
    else:
        cli.refuse_flags(["confidence"], f"with --mode={_MODE.value}: only a student's own tokens are weighed")
    if _MODE.value == "ar":
        cli.refuse_flags(["k"], "with --mode=ar, which draws one token per pass")
        if _STAGE.value not in (None, "ar"):
            raise ConfigError(f"--stage={_STAGE.value} is a student, and --mode=ar decodes the teacher; leave one out")
    if _STAGE.value == "ar":
        cli.refuse_flags(["k", "confidence"], "with --stage=ar, which draws one token per pass")
        if _MODE.value == "exact":
            raise ConfigError(
                "--mode=exact needs a student that drafts, and --stage=ar is the teacher; leave --stage out"
            )


def _check_prompts():
    if PREFIX_FILE.value:
        cli.refuse_flags(["prompt", "prompt_ids", "prompt_file", "slots"], "with --prefix_file")
        check_readable("prefix_file", PREFIX_FILE.value)
        check_output_dir(_OUTPUT_DIR.value)
    else:
        cli.refuse_flags(["prefix_length", "batch_size", "output_dir"], "without --prefix_file")
    if _PROMPT_IDS.value is not None:
        cli.refuse_flags(["prompt"], "with --prompt_ids")
    if _PROMPT_FILE.value:
        cli.refuse_flags(["prompt", "prompt_ids", "json"], "with --prompt_file")
        if not _PROMPT_FILE.value.lower().endswith((".txt", ".jsonl")):
            raise ConfigError(
                f"--prompt_file={_PROMPT_FILE.value} should be a .txt or a .jsonl, which say how to read it"
            )
        check_readable("prompt_file", _PROMPT_FILE.value)


def _from_run(path: str) -> Decoder:
    from kforcing_jax.training.checkpoints import finished_stages, load_checkpoint, load_stage, unfinished_stages
    from kforcing_jax.workdir import Workdir

    workdir = Workdir.open(path)
    tokenizer = workdir.tokenizer()
    stages = finished_stages(workdir), unfinished_stages(workdir)
    stage, k = choose_stage(workdir.config, stages[0], _MODE.value, K.value, _STAGE.value, stages[1])
    data, evaluation = workdir.config.data, workdir.config.evaluation
    settings = workdir.config.stages[stage]
    # The teacher takes any temperature and nucleus, and by default those of its students.
    trained = (settings.tau_min, settings.tau_max) if settings.window else None
    tau = choose_tau(_TAU.value, trained, workdir.config.evaluation_tau, _MODE.value)
    top_p = _top_p(_MODE.value if settings.window else "ar", workdir.config.top_p)
    if not PREFIX_FILE.value:
        _prompts(tokenizer, tokenizer.vocab_size, data.seq_len)  # before weights are loaded
    model, params, _ = load_checkpoint(workdir, stage, tokenizer, step=_STEP.value)
    needs_teacher = _MODE.value == "exact" and not model.cfg.is_gated
    teacher = load_stage(workdir, "ar", tokenizer) if needs_teacher else None
    known = tokenizer, tokenizer.eos_id, k, data.seq_len, evaluation.prompt_length
    return Decoder(stage, model, params, teacher, *known, tau, top_p)


def _top_p(mode: str, trained: float) -> float:
    """That of the requests; `trained` is that of the students."""
    from kforcing_jax.decoding.requests import top_p_for

    try:
        return top_p_for(mode, _TOP_P.value, trained)
    except DataError as error:
        raise ConfigError(f"--{str(error).replace(' = ', '=', 1)}; modes ar and exact take any") from None


def _from_checkpoint() -> Decoder:
    from kforcing_jax.interop.released import open_released, open_teacher
    from kforcing_jax.models import CausalLM

    path, needs_tokenizer = CHECKPOINT.value, _PROMPT_IDS.value is None
    assert path is not None  # `check_one_model`
    dtype = _DTYPE.value
    released = open_released(path, TOKENIZER.value, WEIGHTS.value, needs_tokenizer, BASE.value, dtype=dtype)
    model, params, tokenizer, release = released[:4]
    if isinstance(model, CausalLM):
        cli.refuse_flags(["k", "confidence", "teacher"], f"with {path}, an AR model")
        if _MODE.value == "exact":
            raise ConfigError(
                f"--mode=exact needs a student that drafts, and {path} is an AR model; give --teacher={path}"
            )
    elif model.cfg.is_gated:
        cli.refuse_flags(["teacher"], f"with {path}, a student that has its teacher")
    elif _MODE.value != "student" and not _TEACHER.value:
        raise ConfigError(f"--mode={_MODE.value} needs an AR model, and {path} is a student: give one by --teacher")
    teacher = open_teacher(_TEACHER.value, released, dtype=dtype)[:2] if _TEACHER.value else None
    if release and not tokenizer:
        print(f"the tokenizer {release.tokenizer} is not here: ids in, ids out", file=sys.stderr)
    k = released.tokens_per_pass(K.value)
    is_student = _MODE.value != "ar" and not isinstance(model, CausalLM)
    tau = choose_tau(_TAU.value, released.tau_range if is_student else None, released.usual_tau, _MODE.value)
    top_p = _top_p(_MODE.value if is_student else "ar", released.top_p)
    name = _TEACHER.value if _MODE.value == "ar" and _TEACHER.value else path
    known = tokenizer, released.eos_id, k, released.seq_len, released.prefix_length
    return Decoder(name, model, params, teacher, *known, tau, top_p)


def _continue_prompts(decoder: Decoder):
    from kforcing_jax.cli.prompts import continue_prompts

    prompts = _prompts(decoder.tokenizer, decoder.model.cfg.vocab_size, decoder.seq_len)
    texts = continue_prompts(decoder, prompts, seed=_SEED.value, slots=_SLOTS.value, say=not _JSON.value)
    if _PROMPT_FILE.value:
        for text in texts:
            print(json.dumps(text.record(), ensure_ascii=False), flush=True)
        return
    done = list(texts)
    if _JSON.value:
        print(json.dumps({name: [getattr(text, name) for text in done] for name in ("tokens", "text", "passes")}))
    else:
        print("\n\n".join(text.titled(len(prompts), NUM_SAMPLES.value) for text in done))


def _complete_prefixes(decoder: Decoder):
    from kforcing_jax.cli.prompts import complete_prefixes, write_completions

    completions = complete_prefixes(
        decoder.model,
        decoder.params,
        decoder.tokenizer,
        seq_len=decoder.seq_len,
        prefix_length=decoder.prefix_length,
        seed=_SEED.value,
        **decoder.settings,
    )
    assert decoder.tokenizer is not None  # prefixes have become tokens
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


def _prompts(tokenizer, size: int, seq_len: int | None) -> list:
    """The prompts of the flags, or of the file. Raises DataError for one that leaves no room in the context."""
    from kforcing_jax.cli.prompts import Prompt, read_prompts, room_for

    if _PROMPT_IDS.value is not None:
        prompts = [Prompt(1, None, _prompt_ids(_PROMPT_IDS.value, size))]
    elif tokenizer is None:
        raise ConfigError(f"--tokenizer or --prompt_ids is missing: nothing says which one {CHECKPOINT.value} has")
    elif _PROMPT_FILE.value:
        prompts = read_prompts(_PROMPT_FILE.value, tokenizer)
    else:
        texts = enumerate(_PROMPT.value or [""], start=1)
        prompts = [Prompt(number, text, tokenizer.encode_prompt(text)) for number, text in texts]
    for prompt in prompts:
        try:
            room_for(len(prompt.tokens), seq_len, MAX_NEW_TOKENS.value)
        except DataError as error:
            line = f"--prompt_file={_PROMPT_FILE.value}, line {prompt.line}: " if _PROMPT_FILE.value else ""
            raise DataError(f"{line}{error}") from None
    return prompts


def _prompt_ids(words: list[str], size: int) -> list[int]:
    for word in words:
        if not word.strip().isdecimal() or int(word) >= size:
            raise DataError(f"--prompt_ids has {word!r}, expected ids from 0 to {size - 1}")
    return [int(word) for word in words]


class _Callable(types.ModuleType):
    """The package offers a function of this module's name, `kforcing_jax.generate`; importing the module hides it."""

    def __call__(self, *args, **settings):
        from kforcing_jax.decoding import generate

        return generate(*args, **settings)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    cli.run(main)
