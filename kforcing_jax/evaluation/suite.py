"""The whole evaluation of a run: every finished stage against the AR teacher, into summary.json and report.html."""

import datetime
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.decoding import generate
from kforcing_jax.evaluation.fidelity import agreement, compare_with_joint, exact_joint, student_counts
from kforcing_jax.evaluation.report import write_report
from kforcing_jax.evaluation.samples import measure_samples
from kforcing_jax.training.progress import say
from kforcing_jax.workdir import Workdir

# The largest joint that is enumerated, in blocks.
_MOST_BLOCKS = 100_000


def evaluate(workdir: Workdir, corpus: Corpus) -> dict:
    """Measures all finished stages; returns what it writes to summary.json.

    Raises:
      RunError: the AR teacher is not finished.
    """
    teacher, teacher_params = workdir.load("ar", corpus)
    summary = workdir.summary()
    summary |= {"device": _device(), "date": datetime.date.today().isoformat()}
    key = jax.random.fold_in(jax.random.key(workdir.config.seed), zlib.crc32(b"evaluation"))
    for name in workdir.finished_stages():
        say(f"{name:<11} evaluating")
        model, params = workdir.load(name, corpus)
        measured = _measure_samples(workdir, corpus, name, model, params, teacher, teacher_params)
        if workdir.config.stages[name].window:
            measured |= _measure_map(workdir, corpus, name, model, params, teacher, teacher_params, key)
        summary["stages"][name] = summary["stages"].get(name, {}) | measured
    summary["samples"] = [_continuations(workdir, corpus)]
    workdir.write_summary(summary)
    write_report(workdir.path)
    return summary


def _measure_samples(workdir, corpus, name, model, params, teacher, teacher_params):
    settings = workdir.config.evaluation
    prompts_BxP = _prompts(workdir, corpus, settings.samples)
    return measure_samples(
        model,
        params,
        teacher,
        teacher_params,
        prompts_BxP,
        new_tokens=settings.new_tokens,
        k=max(workdir.config.stages[name].window, 1),
        tau=workdir.config.stages[name].tau_max,
        seeds=np.arange(len(prompts_BxP)),
        eos_id=corpus.eos_id,
    )


def _measure_map(workdir, corpus, name, student, params, teacher, teacher_params, key):
    """Agreement with the teacher, and the joint distribution where it can be enumerated."""
    settings, window = workdir.config.evaluation, workdir.config.stages[name].window
    rows_RxN = corpus.validation_rows(settings.rows)
    batches_IxBxN = corpus.validation_batches(settings.rows, settings.batch_size)
    measured = agreement(
        teacher,
        teacher_params,
        student,
        params,
        jnp.asarray(batches_IxBxN),
        key,
        window=window,
        tau=workdir.config.stages[name].tau_max,
        eos_id=corpus.eos_id,
    )
    if workdir.config.data.source == "markov" and (corpus.vocab_size - 1) ** window <= _MOST_BLOCKS:
        # Half a row leaves room for the window inside the positions that were trained.
        contexts_CxN = jnp.asarray(rows_RxN[: settings.joint_contexts, : rows_RxN.shape[1] // 2])
        joint = exact_joint(teacher, teacher_params, contexts_CxN, window)
        counts = student_counts(student, params, contexts_CxN, window, settings.joint_samples, key)
        measured |= compare_with_joint(counts, joint, workdir.config.seed)
    return measured


def _continuations(workdir, corpus):
    """One validation prompt continued by every finished stage under the same noise."""
    settings, seed = workdir.config.evaluation, workdir.config.seed
    prompt = _prompts(workdir, corpus, 1)
    continuations = {}
    for name in workdir.finished_stages():
        model, params = workdir.load(name, corpus)
        decoded = generate(
            model,
            params,
            prompt,
            max_new_tokens=settings.new_tokens,
            k=max(workdir.config.stages[name].window, 1),
            tau=workdir.config.stages[name].tau_max,
            seeds=[seed],
            eos_id=corpus.eos_id,
        )
        continuations[name] = corpus.tokenizer.decode(decoded.tokens[0, prompt.shape[1] : decoded.lengths[0]])
    return {"prompt": corpus.tokenizer.decode(prompt[0]), "seed": seed, "continuations": continuations}


def _prompts(workdir, corpus, count):
    return corpus.validation_rows(count)[:, : workdir.config.evaluation.prompt_length]


def _device() -> str:
    device = jax.devices()[0]
    return f"{jax.device_count()} x {device.device_kind} ({device.platform}), jax {jax.__version__}"
