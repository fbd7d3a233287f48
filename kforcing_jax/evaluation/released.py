"""Evaluating a released checkpoint, which has no run directory: on completions of prefixes."""

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.data.packing import Batch
from kforcing_jax.decoding.completions import Completions, complete
from kforcing_jax.evaluation.external import external_figures
from kforcing_jax.evaluation.fidelity import agreement
from kforcing_jax.evaluation.intervals import text_report
from kforcing_jax.evaluation.samples import under_teacher
from kforcing_jax.evaluation.scorer import Scorer
from kforcing_jax.evaluation.text_metrics import new_tokens
from kforcing_jax.interop.released import Released
from kforcing_jax.models import CausalLM
from kforcing_jax.models.gated import base_params


def evaluate_released(
    released: Released, completions: Completions, teacher: Released | None, scorer: Scorer | None, tau: float = 1.0
) -> dict:
    """Figures of a released model's completions at `tau`, and of its map where its AR teacher is given.

    Returns:
      throughput and the texts' own figures always; sample_nll and sample_entropy with a teacher (an AR model is its
      own, and a gated student has its own); agreement, chance and block_agreement for a student with a teacher, at
      every position of the teacher's own completions of the same prefixes; external with a scorer.
    """
    prompt_of = np.arange(len(completions.tokens)) // completions.samples_per_prefix
    tokenizer, length = released.tokenizer, completions.prefix_length
    assert tokenizer is not None  # prefixes have become tokens
    rows = zip(completions.tokens, completions.lengths, strict=True)
    figures = {"tau": tau, "throughput": completions.throughput}
    figures |= text_report([new_tokens(row, length, end, tokenizer.eos_id) for row, end in rows], prompt_of)
    is_student = not isinstance(released.model, CausalLM)
    teacher = teacher or _own_teacher(released)
    if teacher:
        assert isinstance(teacher.model, CausalLM)
        texts = completions.tokens, completions.lengths
        figures |= under_teacher(teacher.model, teacher.params, *texts, length, prompt_of)
    if teacher and is_student:
        figures |= _agreement(released, completions, teacher, tau)
    if scorer:
        samples = completions.tokens, completions.lengths, length, tokenizer
        figures["external"] = external_figures(scorer, *samples, prompt_of=prompt_of)
    return figures


def _own_teacher(released) -> Released | None:
    model = released.model
    if isinstance(model, CausalLM):
        return released
    own = model.cfg.is_gated
    return released._replace(model=model.text_model, params=base_params(released.params)) if own else None


def _agreement(released, completions, teacher, tau):
    """On the teacher's own texts: the contexts that a student meets when it decodes as it should."""
    throughput = completions.throughput
    texts = complete(
        teacher.model,
        teacher.params,
        completions.prefixes,
        max_new_tokens=throughput["max_new_tokens"],
        k=1,
        batch_size=throughput["batch_size"],
        tau=tau,
        eos_id=released.tokenizer.eos_id,
        top_p=released.top_p,
    )
    return agreement(
        teacher.model,
        teacher.params,
        released.model,
        released.params,
        _batches(texts, throughput["batch_size"]),
        jax.random.key(0),
        window=throughput["K_per_step"],
        tau=tau,
        eos_id=released.tokenizer.eos_id,
        top_p=released.top_p,
    )


def _batches(texts, batch_size) -> Batch:
    """Leaves (batches, B, N); what follows a text's end is padding, a remainder is left out."""
    batch_size = min(batch_size, len(texts.tokens))
    whole = len(texts.tokens) // batch_size * batch_size
    tokens_RxN = texts.tokens[:whole]
    segments_RxN = (np.arange(tokens_RxN.shape[1]) < texts.lengths[:whole, None]).astype(np.int32)
    return jax.tree.map(
        lambda x_RxN: jnp.asarray(x_RxN).reshape(-1, batch_size, x_RxN.shape[1]), Batch(tokens_RxN, segments_RxN)
    )


def figures_text(figures: dict) -> str:
    """The figures, a line each, with their intervals where they have one."""
    flat = {name: value for name, value in figures.items() if not isinstance(value, dict)}
    for group in ("throughput", "external"):
        flat |= {f"{group}.{name}": value for name, value in figures.get(group, {}).items()}
    names = [name for name in flat if not name.endswith("_interval")]
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {_figure(flat[name], flat.get(f'{name}_interval'))}" for name in names)


def _figure(value, interval) -> str:
    if isinstance(value, list):
        return " ".join(f"{share:.2f}" for share in value)
    text = f"{value:,.4g}" if isinstance(value, float) else str(value if value is not None else "-")
    return text + (f"  [{interval[0]:,.4g}, {interval[1]:,.4g}]" if interval else "")
