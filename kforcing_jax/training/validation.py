"""Looking at a stage while it trains: its loss and its agreement with the AR teacher on a fixed sample, and a text.

All of it is of the averaged weights, with the same rows and the same noise at every step, so that curves show the
model and not the luck of a draw. Nothing of it touches what is trained.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kforcing_jax.config import Config
from kforcing_jax.data.packing import Batch
from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.decoding.generate import engine_for, generate
from kforcing_jax.errors import ConfigError, DataError, UserError
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.models.cached import weights_forgotten_after
from kforcing_jax.models.gated import with_own
from kforcing_jax.sharding import put_validation, replicated
from kforcing_jax.training.agreement import RowSums, agreement_by_row
from kforcing_jax.training.objectives import Objective, batch_loss

_LOG = logging.getLogger("kforcing_jax")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A student and the AR teacher that it is held against, whoever teaches it."""

    teacher: CausalLM
    teacher_params: dict
    student: PushForwardLM
    window: int
    tau: float
    eos_id: int | None
    key: jax.Array
    top_p: float = 1.0

    def sums(self, params: dict, batches: Batch) -> RowSums:
        """By row, under the same noise every time; the program is that of the evaluation."""
        settings: dict = {"window": self.window, "tau": self.tau, "eos_id": self.eos_id, "top_p": self.top_p}
        return agreement_by_row(self.teacher, self.teacher_params, self.student, params, batches, self.key, **settings)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt, continued from the same noise every time."""

    model: CausalLM | PushForwardLM
    prompt: Sequence[int] | np.ndarray
    new_tokens: int
    k: int
    tau: float
    seed: int
    eos_id: int | None
    decode: Callable[[Sequence[int] | np.ndarray], str]
    top_p: float = 1.0  # of an AR teacher

    def compile(self, params: dict) -> None:
        """All that `text` needs."""
        longest = len(self.prompt) + self.new_tokens
        with weights_forgotten_after():
            mode, engine = engine_for(self.model, params, (1, longest), k=self.k)
            engine.prepare(mode, longest)

    def text(self, params: dict) -> str:
        """Prompt and continuation. All processes of a run have to call this together.

        Raises:
          DataError: logits that are not finite.
          RunError: the device's memory does not suffice.
        """
        with weights_forgotten_after():
            done = generate(
                self.model,
                params,
                [self.prompt],
                max_new_tokens=self.new_tokens,
                k=self.k,
                tau=self.tau,
                seeds=[self.seed],
                eos_id=self.eos_id,
                top_p=self.top_p,
            )
        return self.decode(done.tokens[0, : done.lengths[0]])


class MeanLoss:
    """A stage's loss over batches on the mesh, with the same noise at every call; one program for batches of a size.

    Args:
      objective: of the stage, in f32.
      teacher_params: those of the stage's own teacher, {} without one.
      key: of the noise, on the mesh.
    """

    def __init__(self, objective: Objective, teacher_params: dict, key: jax.Array, mesh: Mesh):
        self._teacher_params, self._key = teacher_params, key
        self._program = jax.jit(functools.partial(batch_loss, objective), out_shardings=replicated(mesh))

    def __call__(self, params: dict, batches: Batch) -> float:
        """Nats per token; `batches` has leaves (I, B, N)."""
        means = []
        for index in range(len(batches.tokens)):
            batch = jax.tree.map(lambda x, index=index: x[index], batches)
            means.append(self._program(params, self._teacher_params, batch, np.int32(index), self._key))
        total, weight = (sum(map(float, parts)) for parts in zip(*jax.device_get(means), strict=True))
        return total / weight if weight else 0.0


class Validation:
    """What a stage is looked at with; its programs are compiled when they are first asked for.

    Args:
      loss: of the stage.
      batches: rows to look at, leaves (I, B, N), that every process has whole.
      comparison: of a student with the AR teacher, None for the AR stage itself.
      sample: None for none.
      base: what the weights that are looked at lie beside, of a gated student: its AR teacher's.
    """

    def __init__(
        self,
        loss: MeanLoss,
        batches: Batch,
        mesh: Mesh,
        comparison: Comparison | None = None,
        sample: Sample | None = None,
        base: dict | None = None,
    ):
        self._base = base
        self._loss, self._comparison, self._sample = loss, comparison, sample
        self._batches, self._batches_on_mesh = batches, put_validation(batches, mesh)
        self.is_compiled = False  # whether nothing compiles any more

    def compile(self, params: dict) -> None:
        """Compiles for averaged weights that lie as these do: it looks at them once, for nothing."""
        self._figures(params)
        compiled = self._sampled(lambda sample: sample.compile(self._whole(params)) or True)
        if _fails_somewhere(self._sample is not None and not compiled):
            self._sample = None  # in all processes, which decode together
        self.is_compiled = True

    def __call__(self, params: dict) -> dict[str, float | str]:
        """`validation_loss`; of students `validation_agreement_1` and so on, `validation_block_agreement`; `sample`.

        All processes of a run have to call this together.
        """
        text = self._sampled(lambda sample: sample.text(self._whole(params)))
        return self._figures(params) | ({} if text is None else {"sample": text})

    def _figures(self, params) -> dict[str, float | str]:
        figures: dict[str, float | str] = {"validation_loss": self._loss(params, self._batches_on_mesh)}
        if self._comparison:
            sums = self._comparison.sums(self._whole(params), self._batches)
            figures |= {f"validation_agreement_{j + 1}": float(x) for j, x in enumerate(sums.agreement_K)}
            figures["validation_block_agreement"] = sums.block_agreement
        return figures

    def _whole(self, params):
        """All weights of the model."""
        return params if self._base is None else with_own(self._base, params)

    def _sampled(self, action):
        """What an action on the sample gives, None without one. A sample that fails is said, and no reason to stop."""
        try:
            return self._sample and action(self._sample)
        except UserError as error:
            _LOG.warning(f"no sample: {error}")
            return None


def _fails_somewhere(fails: bool) -> bool:
    """Whether something fails in any process. All processes of a run have to call this together."""
    return bool(np.any(multihost_utils.process_allgather(np.array(fails)))) if jax.process_count() > 1 else fails


def sample_of(config: Config, name: str, model: CausalLM | PushForwardLM, corpus: Corpus) -> Sample | None:
    """The sample of a stage: `logging.sample_prompt`, or the beginning of validation text; None for none.

    Raises:
      ConfigError: a prompt that leaves no room for a new token.
      DataError: characters outside the vocabulary, or no validation text that is long enough.
    """
    if not config.logging.sample_tokens:
        return None
    prompt, room = _prompt(config, corpus)
    return Sample(
        model=model,
        prompt=prompt,
        new_tokens=min(config.logging.sample_tokens, room),
        k=max(config.stages[name].window, 1),
        tau=config.evaluation_tau,
        seed=config.seed,
        eos_id=corpus.eos_id,
        decode=corpus.tokenizer.decode,
        top_p=1.0 if config.stages[name].window else config.top_p,
    )


def _prompt(config, corpus) -> tuple[Sequence[int], int]:
    """(tokens, how many new ones fit after them)"""
    if config.logging.sample_prompt:
        try:
            prompt = corpus.tokenizer.encode_prompt(config.logging.sample_prompt)
        except DataError as error:
            raise DataError(f"logging.sample_prompt = {config.logging.sample_prompt!r}: {error}") from None
    else:
        length = config.evaluation.prompt_length
        prompt = corpus.beginnings(1, length)[0][:length]
    if len(prompt) >= corpus.seq_len:
        raise ConfigError(
            f"logging.sample_prompt has {len(prompt)} tokens; it should have fewer than data.seq_len = {corpus.seq_len}"
        )
    return prompt, corpus.seq_len - len(prompt)
