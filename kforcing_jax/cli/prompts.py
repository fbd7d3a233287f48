"""Files of prefixes and what becomes of them: read, completed, written."""

import json
import sys
from pathlib import Path

from kforcing_jax.cli.checkpoints import BATCH_SIZE, MAX_NEW_TOKENS, NUM_SAMPLES, PREFIX_FILE, PREFIX_LENGTH
from kforcing_jax.data.places import expanded
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.data.whole_file import write_text
from kforcing_jax.decoding.completions import Completions, Prefix, complete
from kforcing_jax.errors import ConfigError, DataError, RunError


def complete_prefixes(model, params, tokenizer, *, k: int, seq_len: int | None, prefix_length: int | None, **settings):
    """The `Completions` of --prefix_file, `settings` as of `complete`. Lines that cannot be used are said on stderr.

    Raises:
      ConfigError: nothing says how prefixes become tokens, or how many new ones there are to be.
      DataError: the file has no usable line, or texts do not fit `seq_len`.
    """
    length = PREFIX_LENGTH.value or prefix_length
    check_prefixes_fit(tokenizer, length)
    max_new_tokens = room_for(length, seq_len, MAX_NEW_TOKENS.value)
    prefixes, problems = read_prefixes(PREFIX_FILE.value, tokenizer, length)
    for problem in problems:
        print(problem, file=sys.stderr)
    return complete(
        model,
        params,
        prefixes,
        max_new_tokens=max_new_tokens,
        k=k,
        batch_size=BATCH_SIZE.value,
        samples_per_prefix=NUM_SAMPLES.value,
        eos_id=tokenizer.eos_id,
        **settings,
    )


def read_prefixes(path: str | Path, tokenizer: Tokenizer, length: int) -> tuple[list[Prefix], list[str]]:
    """The first `length` tokens of every line `{"prefix": ...}`, and a sentence about every line that has none.

    The names of special tokens (`[CLS]`) stand for themselves, as in the released files.

    Raises:
      DataError: the file cannot be read, or no line is usable.
    """
    try:
        lines = expanded(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
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


def write_completions(folder: str | Path, completions: Completions, tokenizer: Tokenizer, more: dict | None = None):
    """Writes samples.jsonl, throughput.json and `more` (JSON by file name), each whole or not at all.

    Raises:
      RunError: the folder cannot be written.
    """
    folder = expanded(folder)
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


def _sample(completions, row, tokenizer):
    tokens = completions.tokens[row, : completions.lengths[row]].tolist()
    prefix = completions.prefix_of(row)
    return {
        "prefix": tokenizer.decode(tokens[: len(prefix.tokens)], show_special=True),
        "completion": tokenizer.decode(tokens[len(prefix.tokens) :], show_special=True),
        "line": prefix.line,
        "tokens": tokens,
    }
