"""Completing many prefixes, as the released inference code does: samples, and how fast they came."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kforcing_jax.decoding.generate import generate
from kforcing_jax.models import CausalLM, PushForwardLM


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The tokens of a line of the file."""

    line: int
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Completions:
    """Texts of `prefixes`, `tokens` (R, prefix + new): row r continues prefix r // samples_per_prefix.

    `lengths` (R,) count up to and with the first EOS. `throughput` is what throughput.json holds.
    """

    prefixes: Sequence[Prefix]
    samples_per_prefix: int
    tokens: np.ndarray
    lengths: np.ndarray
    throughput: dict

    @property
    def prefix_length(self) -> int:
        """Tokens of every prefix."""
        return len(self.prefixes[0].tokens)

    def prefix_of(self, row: int) -> Prefix:
        """The one that row `row` of `tokens` continues."""
        return self.prefixes[row // self.samples_per_prefix]


def complete(
    model: CausalLM | PushForwardLM,
    params: dict,
    prefixes: Sequence[Prefix],
    *,
    max_new_tokens: int,
    k: int,
    batch_size: int,
    samples_per_prefix: int = 1,
    seed: int = 0,
    eos_id: int | None = None,
    **settings: Any,
) -> Completions:
    """Continues every prefix `samples_per_prefix` times by `max_new_tokens`, `batch_size` at a time.

    Every text is decoded to its full length, as the released code does, so that batches take equal time; a first batch,
    which compiles, is not timed. Row r has noise seed `seed + r`. `settings` are further ones of `generate`.

    Raises:
      DataError: what `generate` raises; prefixes should be of one length.
    """
    prompts = [prefix.tokens for prefix in prefixes for _ in range(samples_per_prefix)]
    batch_size = min(batch_size, len(prompts))
    k = 1 if isinstance(model, CausalLM) else k

    def decode(first):
        # A last batch that is short is filled up with the beginning again.
        rows = [(first + i) % len(prompts) for i in range(batch_size)]
        return generate(
            model,
            params,
            [prompts[r] for r in rows],
            seeds=[seed + r for r in rows],
            max_new_tokens=max_new_tokens,
            k=k,
            slots=batch_size,
            **settings,
        )

    decode(0)
    decoded, seconds = [], []
    for first in range(0, len(prompts), batch_size):
        start = time.perf_counter()
        decoded.append(decode(first))
        seconds.append(time.perf_counter() - start)
    tokens, passes = (np.concatenate([getattr(each, name) for each in decoded]) for name in ("tokens", "passes"))
    tokens, nfe = tokens[: len(prompts)], int(passes[: len(prompts)].sum())
    lengths = _lengths(tokens, len(prompts[0]), eos_id)
    useful = int((lengths - len(prompts[0])).sum())
    decoder = _decoder(model, settings.get("mode", "student"))
    k = 1 if decoder == "ar" else k
    throughput = _throughput(
        decoder, len(prompts), len(prompts[0]), max_new_tokens, k, batch_size, seconds, useful, nfe
    )
    return Completions(prefixes, samples_per_prefix, tokens, lengths, throughput)


def _lengths(tokens_RxM, prefix_length, eos_id):
    """Tokens of each row up to and with the first EOS after the prefix."""
    ended_RxT = tokens_RxM[:, prefix_length:] == (-1 if eos_id is None else eos_id)
    first_R = np.where(ended_RxT.any(axis=1), ended_RxT.argmax(axis=1) + 1, ended_RxT.shape[1])
    return prefix_length + first_R


def _decoder(model, mode) -> str:
    """Who decoded, in the words of the released code where it has one."""
    return "ar" if isinstance(model, CausalLM) or mode == "ar" else {"student": "pflm"}.get(mode, mode)


def _throughput(decoder, texts, prefix_length, new_tokens, k, batch_size, seconds, useful, passes):
    """The fields of the released code's throughput.json but `task`; `useful` tokens are those up to EOS."""
    device = jax.devices()[0]
    decoded = len(seconds) * batch_size
    return {
        "model": decoder,
        "batch_size": batch_size,
        "num_samples": texts,
        "max_new_tokens": new_tokens,
        "K_per_step": k,
        "prefix_len": prefix_length,
        "n_batches": len(seconds),
        "n_warmup_batches": 1,
        "total_elapsed_sec": sum(seconds),
        "avg_batch_time_sec": sum(seconds) / len(seconds),
        "throughput_tok_per_sec_total": decoded * new_tokens / sum(seconds),
        "throughput_tok_per_sec_avg_batch": batch_size * new_tokens * len(seconds) / sum(seconds),
        "useful_tok_per_sec": useful * decoded / texts / sum(seconds),
        "total_nfe": passes,
        "nfe_per_token": passes / (texts * new_tokens),
        "device": f"{device.device_kind} ({device.platform}), jax {jax.__version__}",
    }
