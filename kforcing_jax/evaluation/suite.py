"""The whole evaluation of a run: every finished stage against the AR teacher, into summary.json and report.html."""

import datetime
import logging
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.errors import RunError
from kforcing_jax.evaluation.external import external_figures
from kforcing_jax.evaluation.fidelity import agreement, compare_with_joint, exact_joint, student_counts
from kforcing_jax.evaluation.report import write_report
from kforcing_jax.evaluation.samples import decode, measure
from kforcing_jax.evaluation.scorer import Scorer
from kforcing_jax.training.checkpoints import finished_stages, load_stage
from kforcing_jax.training.records import stage_progress
from kforcing_jax.workdir import Workdir

_LOG = logging.getLogger("kforcing_jax")

# Noise seed of the first continued prompt; the others count up.
_FIRST_SEED = 0
# The largest joint that is enumerated, in blocks.
_MOST_BLOCKS = 100_000


def evaluate(workdir: Workdir, corpus: Corpus, scorer: Scorer | None = None) -> dict:
    """Measures all finished stages; returns what it writes to summary.json. With a scorer also `external` figures.

    Of several processes each does the same on its own first device, and the first one writes.

    Raises:
      RunError: the AR teacher is not finished.
    """
    settings = workdir.config.evaluation
    teacher, teacher_params = load_stage(workdir, "ar", corpus)
    if not workdir.is_writable():
        _LOG.warning(f"{workdir.path} is not writable: what is measured will not be kept")
    key = jax.random.fold_in(jax.random.key(workdir.config.seed), zlib.crc32(b"evaluation"))
    texts = corpus.beginnings(settings.samples, settings.prompt_length)
    prompts_BxP = np.stack([text_M[: settings.prompt_length] for text_M in texts])
    stages, continuations = {}, {}
    for name in finished_stages(workdir):
        _LOG.info(f"{name:<11} evaluating")
        model, params = load_stage(workdir, name, corpus)
        decoded, speed = _decode(workdir, corpus, name, model, params, prompts_BxP)
        measured = measure(teacher, teacher_params, decoded, settings.prompt_length)
        measured |= {"tokens_per_second": round(speed, 1), "tokens_per_pass": _tokens_per_pass(workdir, name)}
        if scorer:
            rows = decoded.tokens, decoded.lengths, settings.prompt_length, corpus.tokenizer
            measured["external"] = external_figures(scorer, *rows)
        if workdir.config.stages[name].window:
            measured |= _measure_map(workdir, corpus, name, model, params, teacher, teacher_params, key)
        stages[name] = measured | {"weights": stage_progress(workdir, name).get("weights")}
        continuations[name] = corpus.tokenizer.decode(decoded.tokens[0, settings.prompt_length : decoded.lengths[0]])
    prompt = corpus.tokenizer.decode(prompts_BxP[0])
    samples = [{"prompt": prompt, "seed": _FIRST_SEED, "continuations": continuations}]
    general = {"device": _device(), "date": datetime.date.today().isoformat(), "samples": samples}
    try:
        with workdir.changed_summary() as summary:
            _merge(workdir, summary, general, stages)
        if jax.process_index() == 0:
            write_report(workdir.path)
    except (OSError, RunError) as error:
        _LOG.warning(f"not kept: {error}")
        summary = workdir.summary()
        _merge(workdir, summary, general, stages)
    return summary


def _merge(workdir, summary, general, stages):
    """Adds what was measured to a summary, which a training run may have changed meanwhile."""
    summary |= general
    summary["stages"] = {name: s for name, s in summary["stages"].items() if name in finished_stages(workdir)}
    for name, measured in stages.items():
        progress, before = stage_progress(workdir, name), summary["stages"].get(name, {})
        if progress.get("weights") != measured["weights"]:
            continue  # trained again while it was measured
        if before.get("weights") != measured["weights"]:
            before = {"steps": workdir.config.stages[name].last_step, "seconds": round(progress.get("seconds", 0.0), 1)}
        before.pop("external", None)  # of the samples before
        summary["stages"][name] = before | measured


def _decode(workdir, corpus, name, model, params, prompts_BxP):
    """Every stage continues the same prompts under the same noise."""
    return decode(
        model,
        params,
        prompts_BxP,
        max_new_tokens=workdir.config.evaluation.new_tokens,
        k=_tokens_per_pass(workdir, name),
        tau=workdir.config.stages[name].tau_max,
        seeds=_FIRST_SEED + np.arange(len(prompts_BxP)),
        eos_id=corpus.eos_id,
    )


def _tokens_per_pass(workdir, name):
    return max(workdir.config.stages[name].window, 1)


def _measure_map(workdir, corpus, name, student, params, teacher, teacher_params, key):
    """Agreement with the teacher, and the joint distribution where it can be enumerated."""
    settings, window = workdir.config.evaluation, workdir.config.stages[name].window
    measured = agreement(
        teacher,
        teacher_params,
        student,
        params,
        corpus.validation_batches(settings.rows, settings.batch_size),
        key,
        window=window,
        tau=workdir.config.stages[name].tau_max,
        eos_id=corpus.eos_id,
    )
    if workdir.config.data.source == "markov" and (corpus.vocab_size - 1) ** window <= _MOST_BLOCKS:
        # Half a row leaves room for the window inside the positions that were trained.
        rows_RxN = corpus.validation_rows(settings.joint_contexts).tokens
        contexts_CxN = jnp.asarray(rows_RxN[:, : rows_RxN.shape[1] // 2])
        joint = exact_joint(teacher, teacher_params, contexts_CxN, window)
        counts = student_counts(student, params, contexts_CxN, window, settings.joint_samples, key)
        measured |= compare_with_joint(counts, joint, workdir.config.seed)
    return measured


def _device() -> str:
    device = jax.devices()[0]
    return f"{jax.device_count()} x {device.device_kind} ({device.platform}), jax {jax.__version__}"
