"""How often exact decoding and AR part, and how often AR parts from itself in an engine of another size.

python benchmarks/exactness.py --workdir=runs/tiny

Only rounding can part them: a uniform within it of a bin's edge. Rates are first differences per token before them.
"""

import numpy as np
from absl import app, flags, logging
from device import device_text

from kforcing_jax.decoding import generate
from kforcing_jax.evaluation.samples import prompts
from kforcing_jax.training.checkpoints import load_stage
from kforcing_jax.workdir import Workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "A trained run.", required=True)
_STAGE = flags.DEFINE_string("stage", "k4", "The student that drafts.")
_TEXTS = flags.DEFINE_integer("texts", 256, "How many, at most.", lower_bound=1)
_PROMPT_LENGTH = flags.DEFINE_integer("prompt_length", 16, "Tokens of a prompt.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 100, "Of every text.", lower_bound=1)


def main(_):
    logging.set_verbosity(logging.FATAL)  # orbax reports every file
    workdir = Workdir.open(_WORKDIR.value)
    tokenizer, k = workdir.tokenizer(), workdir.config.stages[_STAGE.value].window
    teacher, student = (load_stage(workdir, name, tokenizer) for name in ("ar", _STAGE.value))
    starts = prompts(workdir.prepared(), _TEXTS.value, _PROMPT_LENGTH.value)
    print(device_text())
    for dtype in ("float32", "bfloat16"):
        settings = dict(max_new_tokens=_NEW_TOKENS.value, seeds=range(len(starts)), dtype=dtype)
        ar = generate(*teacher, starts, slots=64, **settings)
        others = {} if student[0].cfg.is_gated else {"teacher": teacher}
        exact = generate(*student, starts, slots=64, k=k, mode="exact", **others, **settings)
        print(f"{dtype}: exact and AR part in {_parted(exact, ar)}")
        print(f"{dtype}: AR in 16 and in 64 slots in {_parted(generate(*teacher, starts, slots=16, **settings), ar)}")


def _parted(one, other) -> str:
    differs_BxT = (one.tokens != other.tokens)[:, _PROMPT_LENGTH.value :]
    parted_B = differs_BxT.any(axis=1)
    same = np.where(parted_B, differs_BxT.argmax(axis=1), differs_BxT.shape[1]).sum()
    return (
        f"{parted_B.sum()} of {len(parted_B)} texts, after {same:,} equal tokens: {parted_B.sum() / same:.1e} a token"
    )


if __name__ == "__main__":
    app.run(main)
