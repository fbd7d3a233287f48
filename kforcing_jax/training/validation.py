"""Looking at a stage while it trains: its loss and its agreement with the AR teacher on a fixed sample, and a text.

All of it is of the averaged weights, with the same rows and the same noise at every step, so that curves show the
model and not the luck of a draw. Nothing of it touches what is trained.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.config import Config
from kforcing_jax.data.packing import Batch
from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.decoding.generate import engine_for, generate
from kforcing_jax.errors import ConfigError, UserError
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.noise import sample_uniform
from kforcing_jax.sharding import replicated
from kforcing_jax.training.agreement import agreement_sums
from kforcing_jax.training.losses import Mean
from kforcing_jax.training.objectives import Objective, mean_loss

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

    def compile(self, params: dict) -> None:
        """All that `text` needs."""
        longest = len(self.prompt) + self.new_tokens
        mode, engine = engine_for(self.model, params, (1, longest), k=self.k)
        engine.prepare(mode, longest)

    def text(self, params: dict) -> str:
        """Prompt and continuation. All processes of a run have to call this together.

        Raises:
          DataError: logits that are not finite.
          RunError: the device's memory does not suffice.
        """
        done = generate(
            self.model,
            params,
            [self.prompt],
            max_new_tokens=self.new_tokens,
            k=self.k,
            tau=self.tau,
            seeds=[self.seed],
            eos_id=self.eos_id,
        )
        return self.decode(done.tokens[0, : done.lengths[0]])


class Validation:
    """What a stage is looked at with: one program, compiled when it is first asked for, and a sample.

    Args:
      objective: of the stage, in f32.
      teacher_params: those of the stage's own teacher, {} without one.
      batches: leaves (I, B, N), on the mesh.
      key: of the noise of the loss, and of the agreement.
      comparison: of a student with the AR teacher, None for the AR stage itself.
      sample: None for none.
    """

    def __init__(
        self,
        objective: Objective,
        teacher_params: dict,
        batches: Batch,
        key: jax.Array,
        comparison: Comparison | None = None,
        sample: Sample | None = None,
    ):
        self._objective, self._comparison, self._sample = objective, comparison, sample
        self._fixed = (teacher_params, comparison.teacher_params if comparison else {}, batches, key)
        self._program: jax.stages.Compiled | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether nothing compiles any more when it is called."""
        return self._program is not None

    def compile(self, params: dict) -> None:
        """Compiles for averaged weights that lie as these do."""
        sharding = replicated(jax.tree.leaves(params)[0].sharding.mesh)
        self._program = jax.jit(self._figures, out_shardings=sharding).lower(params, *self._fixed).compile()
        self._sampled(lambda sample: sample.compile(params))

    def __call__(self, params: dict) -> dict[str, float | str]:
        """`validation_loss`; of students `validation_agreement_1` and so on, `validation_block_agreement`; `sample`.

        All processes of a run have to call this together.
        """
        if self._program is None:
            self.compile(params)
        assert self._program is not None
        figures = {name: float(value) for name, value in jax.device_get(self._program(params, *self._fixed)).items()}
        text = self._sampled(lambda sample: sample.text(params))
        return figures | ({} if text is None else {"sample": text})

    def _figures(self, params, teacher_params, ar_params, batches, key):
        figures = {"validation_loss": mean_loss(self._objective, params, teacher_params, batches, key)}
        if self._comparison:
            figures |= _agreement(self._comparison, params, ar_params, batches, key)
        return figures

    def _sampled(self, action):
        """What an action on the sample gives, None without one. A sample that fails is said, and no reason to stop."""
        try:
            return self._sample and action(self._sample)
        except UserError as error:
            _LOG.warning(f"no sample: {error}")
            return None


def _agreement(comparison: Comparison, params, ar_params, batches, key) -> dict[str, jax.Array]:
    """As `evaluation.fidelity.agreement`."""
    window = comparison.window

    def of_batch(index_and_batch):
        index, (tokens_BxN, segments_BxN) = index_and_batch
        noise_BxNxK = sample_uniform(jax.random.fold_in(key, index), (*tokens_BxN.shape, window))
        tau_B = jnp.full(len(tokens_BxN), comparison.tau)
        students = comparison.student, params, tokens_BxN, segments_BxN, noise_BxNxK, tau_B
        sums = agreement_sums(comparison.teacher, ar_params, *students, comparison.eos_id)
        return [x.sum(0) for x in sums]

    of_batches = jax.lax.map(of_batch, (jnp.arange(len(batches.tokens)), batches))
    agree_K, _, count_K, agree, blocks = (x.sum(0) for x in of_batches)
    figures = {f"validation_agreement_{j + 1}": Mean(agree_K[j], count_K[j]).value for j in range(window)}
    return figures | {"validation_block_agreement": Mean(agree, blocks).value}


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
    )


def _prompt(config, corpus) -> tuple[Sequence[int], int]:
    """(tokens, how many new ones fit after them)"""
    if config.logging.sample_prompt:
        prompt = corpus.tokenizer.encode_prompt(config.logging.sample_prompt)
    else:
        length = config.evaluation.prompt_length
        prompt = corpus.beginnings(1, length)[0][:length]
    if len(prompt) >= corpus.seq_len:
        raise ConfigError(
            f"logging.sample_prompt has {len(prompt)} tokens; it should have fewer than data.seq_len = {corpus.seq_len}"
        )
    return prompt, corpus.seq_len - len(prompt)
