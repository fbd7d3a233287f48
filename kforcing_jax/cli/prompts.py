"""Prompts and files of prefixes, and what becomes of them: read, continued, written."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kforcing_jax.cli.checkpoints import BATCH_SIZE, MAX_NEW_TOKENS, NUM_SAMPLES, PREFIX_FILE, PREFIX_LENGTH
from kforcing_jax.data.places import expanded
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.data.whole_file import write_text
from kforcing_jax.decoding.completions import Completions, Prefix, complete
from kforcing_jax.errors import ConfigError, DataError, RunError
from kforcing_jax.models import CausalLM, PushForwardLM

# New tokens, unless more are wanted: the contexts of some models hold a hundred times as many, and so would the cache.
_MOST_BY_DEFAULT = 1024


class Prompt(NamedTuple):
    """What is continued: the number of the prompt or the line of its file, its text if it came as text, its tokens."""

    line: int
    text: str | None
    tokens: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Text:
    """A continued prompt, `tokens` and `text` with the prompt."""

    prompt: Prompt
    sample: int
    seed: int
    tokens: list[int]
    text: str
    completion: str
    passes: int

    def record(self) -> dict:
        """A line of the output for a file of prompts."""
        prompt = {"prompt": self.prompt.text, "completion": self.completion}
        where = {"line": self.prompt.line, "sample": self.sample, "seed": self.seed}
        return where | prompt | {"tokens": self.tokens, "passes": self.passes}

    def titled(self, prompts: int, samples: int) -> str:
        """The text, under a title where there are several."""
        names = [f"prompt {self.prompt.line}"] * (prompts > 1) + [f"sample {self.sample}"] * (samples > 1)
        return f"--- {', '.join(names)} (seed {self.seed})\n{self.text}" if names else self.text


def read_prompts(path: str | Path, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of a file, whole: lines of text, or of JSON with a string `prompt` where the file is a .jsonl.

    Raises:
      DataError: a line that is not such a prompt (all of them have to be: a text must not be lost unseen), or none.
    """
    is_json, prompts = str(path).lower().endswith(".jsonl"), []
    for number, line in _lines("prompt_file", path):
        try:
            text = _field(line, "prompt") if is_json else _decoded(line)
            prompts.append(Prompt(number, text, tokenizer.encode_prompt(text)))
        except (ValueError, DataError) as problem:
            raise DataError(f"--prompt_file={path}, line {number}: {problem}") from None
    if not prompts:
        raise DataError(f"--prompt_file={path} is empty; it should have a prompt on every line")
    return prompts


def continue_prompts(
    decoder: Any, prompts: Sequence[Prompt], seed: int, slots: int | None, say: bool
) -> Iterator[Text]:
    """Every prompt --num_samples times, in order, each as soon as it and those before it are done.

    Text number r has noise seed `seed + r`. `decoder` is a `generate.Decoder`. At the end one line on stderr, if it is
    to `say` it: tokens, passes, and tokens/s without what compiling took.

    Raises:
      ConfigError: nothing says how many new tokens there are to be.
      DataError: texts do not fit the context, or what `decode` raises.
    """
    from kforcing_jax.decoding import Request, decode
    from kforcing_jax.decoding.generate import engine_for

    wanted = [(prompt, sample) for prompt in prompts for sample in range(1, NUM_SAMPLES.value + 1)]
    settings = decoder.settings
    models = {name: settings.pop(name) for name in ("teacher", "dtype", "k", "mode", "exact_windows")}
    rooms = [room_for(len(prompt.tokens), decoder.seq_len, MAX_NEW_TOKENS.value) for prompt, _ in wanted]
    ends = () if decoder.eos_id is None else (decoder.eos_id,)
    mode, engine = engine_for(decoder.model, decoder.params, _rooms_end(wanted, rooms), slots=slots, **models)
    requests = [
        Request(prompt.tokens, room, seed=seed + row, mode=mode, end_ids=ends, **settings)
        for row, ((prompt, _), room) in enumerate(zip(wanted, rooms, strict=True))
    ]
    tokens = passes = 0
    for row, update in _in_order(decode(engine, requests)):
        tokens, passes = tokens + len(update.tokens), passes + sum(update.passes.values())
        prompt, sample = wanted[row]
        yield _text(decoder.tokenizer, prompt, sample, seed + row, update)
    if say:
        print(
            f"{decoder.name}, {_described(mode, engine.models.k, settings)}: {tokens:,} tokens in {passes:,} passes, "
            f"{tokens / passes:.2f} tokens a pass, {tokens / engine.seconds:,.0f} tokens/s",
            file=sys.stderr,
        )


def _rooms_end(wanted, rooms):
    """(texts, the longest of them)"""
    return len(wanted), max(len(prompt.tokens) + room for (prompt, _), room in zip(wanted, rooms, strict=True))


def _described(mode, k, settings):
    if mode == "student":
        return f"k = {k}" + (f", confidence {settings['confidence']:g}" if settings["confidence"] else "")
    return "AR" if mode == "ar" else f"exact, k = {k}"


def _in_order(indexed):
    """Of (index, value) in any order: those from index 0 on, as soon as they are there."""
    kept, following = {}, 0
    for index, value in indexed:
        kept[index] = value
        while following in kept:
            yield following, kept.pop(following)
            following += 1


def _text(tokenizer, prompt, sample, seed, update) -> Text:
    def shown(ids):
        return tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))

    tokens = [*map(int, prompt.tokens), *update.tokens]
    passes = sum(update.passes.values())
    return Text(prompt, sample, seed, tokens, shown(tokens), shown(update.tokens), passes)


def complete_prefixes(
    model: CausalLM | PushForwardLM,
    params: dict,
    tokenizer: Tokenizer | None,
    *,
    k: int,
    seq_len: int | None,
    prefix_length: int | None,
    **settings: Any,
) -> Completions:
    """The `Completions` of --prefix_file, `settings` as of `complete`. Lines that cannot be used are said on stderr.

    Raises:
      ConfigError: nothing says how prefixes become tokens, or how many new ones there are to be.
      DataError: the file has no usable line, or texts do not fit `seq_len`.
    """
    length = PREFIX_LENGTH.value or prefix_length
    check_prefixes_fit(tokenizer, length)
    assert PREFIX_FILE.value is not None and tokenizer is not None and length is not None
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
    prefixes, problems = [], []
    for number, line in _lines("prefix_file", path):
        try:
            prefixes.append(Prefix(number, _prefix_tokens(line, tokenizer, length)))
        except ValueError as problem:
            problems.append(f"{path}, line {number}: {problem}; left out")
    if not prefixes:
        reasons = f"; {problems[0]}" if problems else ""
        raise DataError(f'--prefix_file={path} has no usable line {{"prefix": "..."}}{reasons}')
    return prefixes, problems


def check_prefixes_fit(tokenizer: Tokenizer | None, length: int | None) -> None:
    """Raises ConfigError when nothing says how prefixes become tokens, and how many of these count."""
    if tokenizer is None:
        raise ConfigError("--tokenizer is missing: the checkpoint's vocabulary is of neither LM1B nor OpenWebText")
    if length is None:
        raise ConfigError("--prefix_length is missing; it is 6 for LM1B and 64 for OpenWebText")


def room_for(prompt_length: int, seq_len: int | None, wanted: int | None) -> int:
    """New tokens after a prompt: `wanted`, or all that the context of `seq_len` holds, `_MOST_BY_DEFAULT` at most.

    Raises:
      ConfigError: neither is known.
      DataError: they do not fit.
    """
    if seq_len is None:
        if wanted is None:
            raise ConfigError("--max_new_tokens is missing: nothing says how long the texts of this checkpoint are")
        return wanted
    room = seq_len - prompt_length
    wanted = min(room, _MOST_BY_DEFAULT) if wanted is None else wanted
    if wanted > room or room < 1:
        raise DataError(
            f"a prompt of {prompt_length} tokens and {max(wanted, 1)} new ones exceed the cache of {seq_len} positions "
            "(data.seq_len); shorten the prompt or lower --max_new_tokens"
        )
    return wanted


def write_completions(
    folder: str | Path, completions: Completions, tokenizer: Tokenizer, more: dict | None = None
) -> None:
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


def _lines(flag, path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a file. What follows the last line break is not a line."""
    try:
        lines = expanded(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"--{flag}={path} cannot be read: {error.strerror}") from None
    return enumerate(lines if lines[-1] else lines[:-1], start=1)


def _decoded(line) -> str:
    try:
        text = line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if not text.strip():
        raise ValueError("blank")
    return text


def _field(line, name) -> str:
    """A string field of a line of JSON. Raises ValueError with what is wrong."""
    try:
        entry = json.loads(_decoded(line))
    except (json.JSONDecodeError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
        raise ValueError(f'no string field "{name}"')
    try:
        entry[name].encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    return entry[name]


def _prefix_tokens(line, tokenizer, length):
    try:
        tokens = tokenizer.encode_marked(_field(line, "prefix"))
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
