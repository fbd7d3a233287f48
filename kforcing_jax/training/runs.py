"""A trained stage of a run as one object: a model, its weights, its tokenizer, and what has to be known to decode."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kforcing_jax.config import Config, stage_name
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.decoding import Generation, generate
from kforcing_jax.decoding.requests import check_mode, top_p_for
from kforcing_jax.errors import DataError, RunError
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.training.checkpoints import load_checkpoint, load_stage
from kforcing_jax.training.records import begun_stages, finished_stages
from kforcing_jax.workdir import Workdir

_LOG = logging.getLogger("kforcing_jax")


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A stage of a run at one of its checkpoints; `load_run` opens one.

    `params` are the averaged weights, whole on this process's first device; in a gated student they lie beside its
    teacher's. `window` is the number of tokens per pass that the stage was trained with, 1 for the AR teacher;
    `tau_range` are the least and the largest temperature that it knows, None where it takes any; `top_p` is that of
    the AR teacher's draws that it was taught. Texts end with `eos_id`, None where nothing ends them.
    """

    workdir: Workdir
    stage: str
    step: int
    model: CausalLM | PushForwardLM
    params: dict
    tokenizer: Tokenizer

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return self.workdir.config

    @property
    def window(self) -> int:
        """Tokens per pass."""
        return self.config.stages[self.stage].window or 1

    @property
    def tau_range(self) -> tuple[float, float] | None:
        """(least, largest) temperature of a student, None for the AR teacher, which has logits."""
        settings = self.config.stages[self.stage]
        return (settings.tau_min, settings.tau_max) if settings.window else None

    @property
    def top_p(self) -> float:
        """Of the nucleus that a student's tokens are from; 1 of the AR teacher."""
        return self.config.stages[self.stage].top_p

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text."""
        return self.tokenizer.eos_id

    @functools.cached_property
    def teacher(self) -> tuple[CausalLM | PushForwardLM, dict]:
        """(model, averaged weights) of the run's AR teacher, read when first asked for; a gated student has it.

        Raises:
          RunError: as `load_run`.
        """
        if isinstance(self.model, PushForwardLM) and self.model.cfg.is_gated:
            return self.model.text_model, self.params
        return (self.model, self.params) if self.stage == "ar" else load_stage(self.workdir, "ar", self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the id that begins a document where the tokenizer has one; "" is the beginning of one.

        Raises:
          DataError: a character is outside the vocabulary.
        """
        return self.tokenizer.encode_prompt(text)

    def decode(self, ids: Sequence[int] | np.ndarray, show_special: bool = False) -> str:
        """Text of ids. Special tokens do not end it; they are left out unless `show_special`."""
        return self.tokenizer.decode(ids, show_special)

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]] | np.ndarray,
        *,
        max_new_tokens: int,
        k: int | None = None,
        tau: float | Sequence[float] | np.ndarray | None = None,
        seeds: Sequence[int] | np.ndarray | None = None,
        mode: str = "student",
        confidence: float = 0.0,
        noise_BxT: np.ndarray | None = None,
        frequency_penalty: float = 0.0,
        dtype: str | None = None,
        slots: int | None = None,
        top_p: float | None = None,
        exact_windows: int | None = None,
    ) -> Generation:
        """Continues every prompt by up to `max_new_tokens` tokens, see `kforcing_jax.decoding.generate`.

        What is not given: `k` is the stage's window; `tau` and `top_p` are the `evaluation_tau` and `top_p` of the
        run's config in every mode, so that "exact" gives what "ar" gives; `seeds` count up from 0. The teacher of modes
        "ar" and "exact" is the run's; it takes any `tau` and `top_p`.

        Args:
          prompts: texts, or ids as `encode` gives them.

        Raises:
          DataError: as `kforcing_jax.decoding.generate`; `k`, `tau` or `top_p` that the stage was not trained with; a
            character outside the vocabulary.
          RunError: the teacher is needed and cannot be loaded.
        """
        if isinstance(prompts, str):
            raise DataError(f"prompts = {prompts!r} should be a list of texts, or of ids")
        check_mode(mode)
        ids = [self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        self._warn_of_length(ids, max_new_tokens)
        return generate(
            self.model,
            self.params,
            ids,
            max_new_tokens=max_new_tokens,
            k=self._known_k(k),
            tau=self._known_tau(tau, mode),
            seeds=range(len(ids)) if seeds is None and noise_BxT is None else seeds,
            mode=mode,
            teacher=self.teacher if mode in ("ar", "exact") and self.stage != "ar" else None,
            confidence=confidence,
            noise_BxT=noise_BxT,
            frequency_penalty=frequency_penalty,
            eos_id=self.eos_id,
            dtype=dtype,
            slots=slots,
            top_p=top_p_for("ar" if self.stage == "ar" else mode, top_p, self.config.top_p),
            exact_windows=exact_windows,
        )

    def _known_k(self, k):
        if k is not None and k > self.window:
            raise DataError(f"k = {k} is above the window that stage {self.stage} was trained with, {self.window}")
        return self.window if k is None else k

    def _known_tau(self, tau, mode):
        """A teacher's logits take any temperature; a student has to have been trained with it."""
        if tau is None:
            return self.config.evaluation_tau
        if mode != "student" or self.tau_range is None:
            return tau
        least, most = self.tau_range
        wrong = [value for value in np.ravel(tau) if not least <= value <= most]
        if wrong:
            known = f"{least}" if least == most else f"{least} to {most}"
            raise DataError(f"tau = {wrong[0]} is not a temperature that stage {self.stage} was trained with: {known}")
        return tau

    def _warn_of_length(self, ids, max_new_tokens):
        longest, known = max(map(len, ids), default=0) + max_new_tokens, self.config.data.seq_len
        if longest > known:
            _LOG.warning(f"texts of up to {longest} tokens: stage {self.stage} was trained on {known} (data.seq_len)")


def load_run(path: str | Path, stage: str | None = None, step: int | None = None) -> Run:
    """Opens a trained stage of a run directory, also while the run goes on.

    Args:
      path: the run directory.
      stage: its name (ar, k4, ...). By default the finished student of the largest window; while no student is finished
        one that has begun; otherwise the AR teacher.
      step: of the checkpoint, by default the newest.

    Raises:
      RunError: there is no run, no such stage or checkpoint, or the stage was made from something else than is there.
    """
    workdir = Workdir(path)
    tokenizer = workdir.tokenizer()
    stage = _chosen(workdir, stage)
    model, params, step = load_checkpoint(workdir, stage, tokenizer, step=step)
    return Run(workdir, stage, step, model, params, tokenizer)


def _chosen(workdir, stage) -> str:
    begun, stage = begun_stages(workdir), stage and stage_name(stage)
    if stage is not None and stage not in begun:
        there = ", ".join(begun) or "none"
        raise RunError(f"{workdir.path} has no stage {stage!r} that has a checkpoint; there are: {there}")
    if not begun:
        raise RunError(f"{workdir.path} has no stage with a checkpoint yet; run kforcing_jax.main on it")
    finished = finished_stages(workdir)
    students = [name for name in finished if name != "ar"] or [name for name in begun if name != "ar"] or ["ar"]
    return stage or max(students, key=lambda name: workdir.config.stages[name].window)
