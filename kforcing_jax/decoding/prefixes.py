"""Completing a file of prefixes, as the released inference code does: samples, and how fast they came."""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.decoding.generate import generate
from kforcing_jax.errors import ConfigError, DataError, RunError
from kforcing_jax.models import CausalLM
from kforcing_jax.output import write_text


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
        return len(self.prefixes[0].tokens)

    def prefix_of(self, row: int) -> Prefix:
        return self.prefixes[row // self.samples_per_prefix]


def read_prefixes(path: str | Path, tokenizer: Tokenizer, length: int) -> tuple[list[Prefix], list[str]]:
    """The first `length` tokens of every line `{"prefix": ...}`, and a sentence about every line that has none.

    The names of special tokens (`[CLS]`) stand for themselves, as in the released files.

    Raises:
      DataError: the file cannot be read, or no line is usable.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"--prefix_file={path} cannot be read: {error.strerror}") from None
    prefixes, problems = [], []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line:
            break  # what follows the last line break is not a line
        try:
            prefixes.append(Prefix(number, _prefix_tokens(line, tokenizer, length)))
        except ValueError as problem:
            problems.append(f"{path}, line {number}: {problem}; left out")
    if not prefixes:
        reasons = f"; {problems[0]}" if problems else ""
        raise DataError(f'--prefix_file={path} has no usable line {{"prefix": "..."}}{reasons}')
    return prefixes, problems


def check_prefixes_fit(tokenizer: Tokenizer | None, length: int | None):
    """Raises ConfigError when nothing says how prefixes become tokens, and how many of these count."""
    if tokenizer is None:
        raise ConfigError("--tokenizer is missing: the checkpoint's vocabulary is of neither LM1B nor OpenWebText")
    if length is None:
        raise ConfigError("--prefix_length is missing; it is 6 for LM1B and 64 for OpenWebText")


def room_for(prompt_length: int, seq_len: int | None, wanted: int | None) -> int:
    """New tokens after a prompt: `wanted`, or all that the context of `seq_len` holds.

    Raises:
      ConfigError: neither is known.
      DataError: they do not fit.
    """
    if seq_len is None:
        if wanted is None:
            raise ConfigError("--max_new_tokens is missing: nothing says how long the texts of this checkpoint are")
        return wanted
    room = seq_len - prompt_length
    wanted = room if wanted is None else wanted
    if wanted > room or room < 1:
        raise DataError(
            f"a prompt of {prompt_length} tokens and {max(wanted, 1)} new ones exceed the cache of {seq_len} positions "
            "(data.seq_len); shorten the prompt or lower --max_new_tokens"
        )
    return wanted


def complete(
    model,
    params,
    prefixes: Sequence[Prefix],
    *,
    max_new_tokens: int,
    k: int,
    batch_size: int,
    samples_per_prefix: int = 1,
    tau: float = 1.0,
    seed: int = 0,
    frequency_penalty: float = 0.0,
    eos_id: int | None = None,
) -> Completions:
    """Continues every prefix `samples_per_prefix` times by `max_new_tokens`, `batch_size` at a time.

    Every text is decoded to its full length, as the released code does, so that batches take equal time; a first batch,
    which compiles, is not timed. Row r has noise seed `seed + r`.
    """
    prompts = [prefix.tokens for prefix in prefixes for _ in range(samples_per_prefix)]
    batch_size = min(batch_size, len(prompts))
    k = 1 if isinstance(model, CausalLM) else k

    def decode(first):
        # A last batch that is short is filled up with the beginning again.
        rows = [(first + i) % len(prompts) for i in range(batch_size)]
        settings = dict(max_new_tokens=max_new_tokens, k=k, tau=tau, frequency_penalty=frequency_penalty)
        return generate(model, params, [prompts[r] for r in rows], seeds=[seed + r for r in rows], **settings).tokens

    decode(0)
    tokens, seconds = [], []
    for first in range(0, len(prompts), batch_size):
        start = time.perf_counter()
        tokens.append(decode(first))
        seconds.append(time.perf_counter() - start)
    tokens = np.concatenate(tokens)[: len(prompts)]
    lengths = _lengths(tokens, len(prompts[0]), eos_id)
    useful = int((lengths - len(prompts[0])).sum())
    throughput = _throughput(model, len(prompts), len(prompts[0]), max_new_tokens, k, batch_size, seconds, useful)
    return Completions(prefixes, samples_per_prefix, tokens, lengths, throughput)


def write_completions(folder: str | Path, completions: Completions, tokenizer: Tokenizer, more: dict | None = None):
    """Writes samples.jsonl, throughput.json and `more` (JSON by file name), each whole or not at all.

    Raises:
      RunError: the folder cannot be written.
    """
    folder = Path(folder)
    rows = range(len(completions.tokens))
    samples = [json.dumps(_sample(completions, row, tokenizer), ensure_ascii=False) for row in rows]
    others = {"throughput.json": completions.throughput} | (more or {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "samples.jsonl", "\n".join(samples) + "\n")
        for name, content in others.items():
            write_text(folder / name, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"--output_dir={folder} cannot be written: {error.strerror}") from None


def _prefix_tokens(line, tokenizer, length):
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if not text:
        raise ValueError("blank")
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prefix"), str):
        raise ValueError('no string field "prefix"')
    try:
        entry["prefix"].encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    try:
        tokens = tokenizer.encode_marked(entry["prefix"])
    except DataError as error:
        raise ValueError(str(error)) from None
    if len(tokens) < length:
        raise ValueError(f"{len(tokens)} tokens, too short for a prefix of {length} (--prefix_length)")
    return tuple(tokens[:length])


def _lengths(tokens_RxM, prefix_length, eos_id):
    """Tokens of each row up to and with the first EOS after the prefix."""
    ended_RxT = tokens_RxM[:, prefix_length:] == (-1 if eos_id is None else eos_id)
    first_R = np.where(ended_RxT.any(axis=1), ended_RxT.argmax(axis=1) + 1, ended_RxT.shape[1])
    return prefix_length + first_R


def _throughput(model, texts, prefix_length, new_tokens, k, batch_size, seconds, useful):
    """The fields of the released code's throughput.json but `task`; `useful` tokens are those up to EOS."""
    device, passes = jax.devices()[0], math.ceil(new_tokens / k)
    decoded = len(seconds) * batch_size
    return {
        "model": "ar" if isinstance(model, CausalLM) else "pflm",
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
        "total_nfe": texts * passes,
        "nfe_per_token": passes / new_tokens,
        "device": f"{device.device_kind} ({device.platform}), jax {jax.__version__}",
    }


def _sample(completions, row, tokenizer):
    tokens = completions.tokens[row, : completions.lengths[row]].tolist()
    prefix = completions.prefix_of(row)
    return {
        "prefix": tokenizer.decode(tokens[: len(prefix.tokens)], show_special=True),
        "completion": tokenizer.decode(tokens[len(prefix.tokens) :], show_special=True),
        "line": prefix.line,
        "tokens": tokens,
    }
