"""The whole evaluation of a run: every stage against the AR teacher, into summary.json and report.html."""

import dataclasses
import datetime
import logging
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kforcing_jax.config import EvaluationConfig
from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.errors import RunError
from kforcing_jax.evaluation.external import external_figures
from kforcing_jax.evaluation.fidelity import agreement, compare_with_joint, exact_joint, student_counts
from kforcing_jax.evaluation.provenance import device, revision
from kforcing_jax.evaluation.report import write_report
from kforcing_jax.evaluation.samples import generate, measure, prompts, speeds, stride_figures
from kforcing_jax.evaluation.scorer import Scorer
from kforcing_jax.sharding import replicated
from kforcing_jax.training.checkpoints import LoadedStage, finished_stages, load_checkpoint, unfinished_stages
from kforcing_jax.training.recipes import trained_part
from kforcing_jax.training.records import stage_progress, weights_digest
from kforcing_jax.workdir import Workdir

_LOG = logging.getLogger("kforcing_jax")

# Noise seed of the first continued prompt; the others count up.
_FIRST_SEED = 0
# Prompts whose continuations are shown.
_SHOWN = 3
# The largest joint that is enumerated, in blocks.
_MOST_BLOCKS = 100_000


def evaluate(workdir: Workdir, corpus: Corpus, mesh: Mesh, scorer: Scorer | None = None, command: str = "") -> dict:
    """Measures all stages on a mesh; returns what it writes to summary.json.

    Stages that are not finished, at their newest checkpoints, are under `unfinished` there, with the `step` and the
    `steps` that they are to have, until they or others are evaluated next.

    With a scorer also `external` figures. `command` is what the run was started with, for the report. All processes of
    a run have to call this together; the first one writes.

    Raises:
      RunError: the AR teacher has no checkpoint yet.
    """
    start = time.perf_counter()
    if not workdir.is_writable():
        _LOG.warning(f"{workdir.path} is not writable: what is measured will not be kept")
    with jax.set_mesh(mesh):
        unfinished = unfinished_stages(workdir)
        recorded = {name: stage_progress(workdir, name).get("weights") for name in finished_stages(workdir)}
        names = ["ar", *(name for name in [*recorded, *unfinished] if name != "ar")]
        run = _Run.load(workdir, corpus, mesh, names)
        # Of what was loaded: where the last checkpoint is damaged, that is an earlier one.
        weights = {
            name: recorded[name] and weights_digest(trained_part(*run.models[name]))
            for name in names
            if name in recorded
        }
        stages = {}
        continuations = {}
        for name in run.models:
            _LOG.info(f"{name:<11} evaluating")
            decoded = run.decode(name)
            stages[name] = run.measure(name, decoded, scorer) | {"weights": weights.get(name)}
            if name == run.largest and run.settings.confidences:
                stages[name]["confident"] = run.confident(name, decoded)
            label = f"{name}@{run.steps[name]}" if name in unfinished and name != "ar" else name
            continuations[label] = run.texts(decoded)
        for name, speed in run.speeds().items():
            stages[name] |= _speed_figures(speed, run.useful_share(stages[name].pop("new_tokens")))
    general = {
        "device": device(mesh),
        "date": datetime.date.today().isoformat(),
        "revision": revision(),
        "data": f"{workdir.config.data.source}, {corpus.describe()}",
        "seed": workdir.config.seed,
        "tau": run.tau,
        "top_p": workdir.config.top_p,
        "evaluation_seconds": round(time.perf_counter() - start, 1),
        "samples": run.samples(continuations),
    }
    general |= {"command": command} if command else {}
    running = {name: _of_running(stages.pop(name), workdir, name, run.steps[name]) for name in unfinished}
    return _keep(workdir, general, stages, running)


def _of_running(measured, workdir, name, step):
    measured.pop("weights")
    return measured | {"step": step, "steps": workdir.config.stages[name].last_step}


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is evaluated: models with parameters on the mesh, and what all of them continue, under the same noise."""

    workdir: Workdir
    corpus: Corpus
    models: dict[str, tuple[Any, dict]]
    prompts_BxP: np.ndarray
    key: jax.Array
    steps: dict[str, int] = dataclasses.field(default_factory=dict)  # of the checkpoints that the models are of

    @classmethod
    def load(cls, workdir: Workdir, corpus: Corpus, mesh: Mesh, names: list[str]) -> "_Run":
        settings, framed = workdir.config.evaluation, workdir.config.data.packing == "framed"
        loaded: dict[str, LoadedStage] = {}
        for name in names:
            base = loaded["ar"].params if "ar" in loaded else None  # gated students are beside it
            loaded[name] = load_checkpoint(workdir, name, corpus, mesh, base=base)
        models, steps = {name: each[:2] for name, each in loaded.items()}, {n: each.step for n, each in loaded.items()}
        prompts_BxP = prompts(corpus, settings.samples, settings.prompt_length, kept=int(framed))
        key = jax.random.fold_in(jax.random.key(workdir.config.seed), zlib.crc32(b"evaluation"))
        return cls(workdir, corpus, models, prompts_BxP, jax.device_put(key, replicated(mesh)), steps)

    @property
    def settings(self) -> EvaluationConfig:
        return self.workdir.config.evaluation

    @property
    def tau(self) -> float:
        return self.workdir.config.evaluation_tau

    def top_p(self, name) -> float:
        """Of the AR teacher's draws, which students are compared with; they have theirs from training."""
        return 1.0 if self.window(name) else self.workdir.config.top_p

    def window(self, name) -> int:
        return self.workdir.config.stages[name].window

    @property
    def largest(self) -> str | None:
        """The student of the widest window whose stride may vary; of two, the one that the smaller ones led to."""
        students = [name for name in self.workdir.config.students if name in self.models and self.window(name) > 1]
        return max(students, key=self.window, default=None)

    def decode(self, name, confidence=0.0):
        model, params = self.models[name]
        seeds = _FIRST_SEED + np.arange(len(self.prompts_BxP))
        return generate(
            model,
            params,
            self.prompts_BxP,
            max_new_tokens=self.settings.new_tokens,
            k=max(self.window(name), 1),
            tau=self.tau,
            seeds=seeds,
            eos_id=self.corpus.eos_id,
            confidence=confidence,
            top_p=self.top_p(name),
        )

    def confident(self, name, decoded) -> list[dict]:
        """Figures of a student at every confidence; at 0 all of a window is kept, as in its own sample."""
        _LOG.info(f"{name:<11} at confidences {', '.join(f'{c:g}' for c in self.settings.confidences)}")
        return [
            {"confidence": confidence}
            | stride_figures(
                *self.models["ar"],
                self.decode(name, confidence) if confidence else decoded,
                self.settings.prompt_length,
            )
            for confidence in self.settings.confidences
        ]

    def measure(self, name, decoded, scorer) -> dict:
        length = self.settings.prompt_length
        measured = measure(*self.models["ar"], decoded, length, self.corpus.eos_id)
        measured["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(self.models[name][1]))
        measured["new_tokens"] = int((decoded.lengths - length).sum())
        if scorer:
            rows = decoded.tokens, decoded.lengths, length, self.corpus.tokenizer
            measured["external"] = external_figures(scorer, *rows)
        if self.window(name):
            measured |= self._agreement(name) | self._joint(name)
        return measured

    def _agreement(self, name):
        settings = self.settings
        return agreement(
            *self.models["ar"],
            *self.models[name],
            self.corpus.validation_batches(settings.rows, settings.batch_size),
            self.key,
            window=self.window(name),
            tau=self.tau,
            eos_id=self.corpus.eos_id,
            top_p=self.workdir.config.top_p,
        )

    def _joint(self, name):
        """The distribution itself, where it can be enumerated."""
        window, settings = self.window(name), self.settings
        is_small = (self.corpus.vocab_size - 1) ** window <= _MOST_BLOCKS
        if self.workdir.config.data.source != "markov" or not is_small:
            return {}
        # Half a row leaves room for the window inside the positions that were trained.
        rows_RxN = self.corpus.validation_rows(settings.joint_contexts).tokens
        contexts_CxN = jnp.asarray(rows_RxN[:, : rows_RxN.shape[1] // 2])
        joint = exact_joint(*self.models["ar"], contexts_CxN, window, tau=self.tau, top_p=self.workdir.config.top_p)
        counts = student_counts(
            *self.models[name], contexts_CxN, window, settings.joint_samples, self.key, tau=self.tau
        )
        return compare_with_joint(counts, joint, self.workdir.config.seed)

    def speeds(self):
        settings = self.settings
        sizes = ", ".join(map(str, settings.speed_batches))
        _LOG.info(f"{'speed':<11} all stages in turns, {sizes} requests at a time")
        stages = {name: (*model, max(self.window(name), 1)) for name, model in self.models.items()}
        shared = dict(max_new_tokens=settings.new_tokens, tau=self.tau, top_p=self.workdir.config.top_p)
        return speeds(stages, self.prompts_BxP, settings.speed_batches, settings.speed_rounds, **shared)

    def useful_share(self, new_tokens: int) -> float:
        """Of the tokens of texts at full length: those up to EOS."""
        return new_tokens / (len(self.prompts_BxP) * self.settings.new_tokens)

    def texts(self, decoded) -> list[str]:
        """The first continuations, as text."""
        rows = list(zip(decoded.tokens, decoded.lengths, strict=True))
        return [self.corpus.tokenizer.decode(tokens[self.settings.prompt_length : end]) for tokens, end in rows]

    def samples(self, continuations) -> list[dict]:
        """A few different prompts, and what every stage made of them."""
        shown: dict[str, int] = {}
        for row, prompt_P in enumerate(self.prompts_BxP):
            shown.setdefault(self.corpus.tokenizer.decode(prompt_P).lstrip(), row)
        return [
            {
                "prompt": prompt,
                "seed": _FIRST_SEED + row,
                "continuations": {name: texts[row] for name, texts in continuations.items()},
            }
            for prompt, row in list(shown.items())[:_SHOWN]
        ]


def _speed_figures(speed, useful_share):
    largest = speed[max(speed, key=int)]
    return {"speed": speed, "tokens_per_second": round(useful_share * largest["tokens_per_second"], 1)}


def _keep(workdir, general, stages, running) -> dict:
    """Adds what was measured to summary.json and writes the report, where that can be done; returns the summary."""
    try:
        with workdir.changed_summary() as summary:
            _merge(workdir, summary, general, stages, running)
        if jax.process_index() == 0:
            write_report(workdir.path)
    except (OSError, RunError) as error:
        _LOG.warning(f"not kept: {error}")
        summary = workdir.summary()
        _merge(workdir, summary, general, stages, running)
    return summary


def _merge(workdir, summary, general, stages, running):
    """Adds what was measured to a summary, which a training run may have changed meanwhile."""
    summary.pop("unfinished", None)
    summary |= general | ({"unfinished": running} if running else {})
    summary["stages"] = {name: s for name, s in summary["stages"].items() if name in finished_stages(workdir)}
    for name, measured in stages.items():
        progress, before = stage_progress(workdir, name), summary["stages"].get(name, {})
        if progress.get("weights") != measured["weights"]:
            continue  # trained again while it was measured, or measured at an earlier checkpoint
        if before.get("weights") != measured["weights"]:
            before = {"steps": workdir.config.stages[name].last_step, "seconds": round(progress.get("seconds", 0.0), 1)}
        for of_samples in ("external", "confident"):  # of those before
            before.pop(of_samples, None)
        summary["stages"][name] = before | measured
