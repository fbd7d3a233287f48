"""Gen-PPL: what a causal LM that is not ours, read from a local folder, thinks of our samples.

Low perplexity alone is no evidence: repetitive text has it. `intervals.py` has the figures that belong next to it.
Needs `pip install -e ".[scorer]"`: torch and transformers. Nothing is ever downloaded.
"""

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers as hf

from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.errors import DataError

# Logits of tokens that come before a changed one may differ by this share of the largest logit: rounding.
_ROUNDING = 1e-4
_CAUSAL_LM_NEEDED = "give the local folder of a causal LM such as GPT-2, as save_pretrained of transformers writes it"
_TOKENIZER_NEEDED = "add its tokenizer.json, or vocab.json and merges.txt"


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prefix and the text that continues it, without special tokens; `prefix + text` is the whole text."""

    prefix: str
    text: str


@dataclasses.dataclass(frozen=True)
class Score:
    """Negative log-likelihood of a completion, summed over its tokens (nats), and the number of these tokens."""

    nll: float
    tokens: int


def new_tokens(tokens: np.ndarray, prompt_length: int, length: int, eos_id: int | None) -> np.ndarray:
    """The generated ids of one row of a `Generation`, up to its first EOS and without it."""
    new = np.asarray(tokens[prompt_length:length])
    ends = np.flatnonzero(new == eos_id) if eos_id is not None else []
    return new[: ends[0]] if len(ends) else new


def clean(tokens: np.ndarray, prompt_length: int, length: int, eos_id: int | None, tokenizer: Tokenizer) -> Completion:
    """The text of one row of a `Generation`: cut at the first generated EOS, special tokens left out.

    Prompt and completion are decoded together and parted where the text stops being that of the prompt alone. A
    character whose bytes are on both sides, or a space that only exists between two words, so goes to the completion.
    """
    kept = prompt_length + len(new_tokens(tokens, prompt_length, length, eos_id))
    whole = tokenizer.decode(tokens[:kept])
    boundary = _common_length(tokenizer.decode(tokens[:prompt_length]), whole)
    return Completion(whole[:boundary], whole[boundary:])


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A causal LM of `transformers`, in f32, with its own tokenizer.

    `model` is the torch module and `encoder` the tokenizer, which adds nothing to a text. `first_id` is put in front
    of every text: BOS, or EOS where there is no BOS. `context` is the model's longest input, None without a limit.
    """

    model: object
    encoder: hf.Tokenizer
    first_id: int
    context: int | None

    @classmethod
    def load(cls, path: str | Path, device: str | None = None) -> "Scorer":
        """Reads a folder as `save_pretrained` writes it: config.json, the weights and the tokenizer.

        Args:
          path: a local folder. Code that it may hold is not run.
          device: where torch computes; by default "cuda" where there is one, otherwise "cpu".

        Raises:
          DataError: torch or transformers is not installed, or the folder holds no causal LM with its tokenizer.
        """
        torch = _torch()
        path = Path(path)
        _check_folder(path)
        with _quiet():
            model = _load_model(path)
            encoder, first_id = _load_tokenizer(path)
            _check_pair(path, encoder, first_id, model)
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, encoder, first_id, _longest_input(model.config.get_text_config()))

    def score(self, completions: Sequence[Completion], batch_size: int = 8) -> list[Score]:
        """Scores the completions' tokens given their prefixes, as Gen-PPL does; the order is that of the input.

        Prefix and completion are tokenised as one text. A token belongs to the completion if it starts at or after the
        end of the prefix, or straddles it. A text beyond the context is read in windows that advance by half of it:
        each token is scored once, and given at least half a context once the text is that long.

        Args:
          completions: texts as `clean` gives them. One without text has no tokens and no effect.
          batch_size: windows in one forward pass; scores do not depend on it.
        """
        texts = [self._encode(completion) for completion in completions]
        # (text, its ids from the window's first one, how many of them are context alone)
        windows = [
            (text, ids[begin:end], first - begin)
            for text, (ids, first_scored) in enumerate(texts)
            for begin, first, end in _windows(len(ids), first_scored, self.context or len(ids))
        ]
        nll = np.zeros(len(texts))
        for batch in _by_length(windows, batch_size, lambda window: len(window[1])):
            for (text, _, _), value in zip(batch, self._nll(batch), strict=True):
                nll[text] += value
        return [Score(float(total), len(ids) - first) for total, (ids, first) in zip(nll, texts, strict=True)]

    def features(self, completions: Sequence[Completion], batch_size: int = 8) -> np.ndarray:
        """The last layer's hidden state at the last token of every whole text, (texts, width).

        The feature of MAUVE (Pillutla et al. 2021). Of a text beyond the context, only its beginning is read.
        """
        numbered = [(i, self._encode(completion)[0][: self.context]) for i, completion in enumerate(completions)]
        found = {}
        for batch in _by_length(numbered, batch_size, lambda item: len(item[1])):
            found |= zip((i for i, _ in batch), self._last_hidden([ids for _, ids in batch]), strict=True)
        return np.stack([found[i] for i in range(len(found))])

    def _encode(self, completion) -> tuple[list[int], int]:
        """`first_id` and the ids of the whole text; the index of the completion's first token, or their number."""
        encoding = self.encoder.encode(completion.prefix + completion.text, add_special_tokens=False)
        boundary = len(completion.prefix)
        belongs = [start >= boundary or end > boundary for start, end in encoding.offsets]
        return [self.first_id, *encoding.ids], 1 + (belongs.index(True) if True in belongs else len(belongs))

    def _nll(self, windows) -> list[float]:
        import torch

        with _quiet(), torch.inference_mode():
            inputs, mask = self._padded([ids[:-1] for _, ids, _ in windows])
            logits_BxNxV = self.model(input_ids=inputs, attention_mask=mask).logits
            # Row by row: a softmax over all rows at once would double the memory, which logits dominate.
            rows = zip(windows, logits_BxNxV, strict=True)
            return [_sum_nll(logits_NxV[first - 1 : len(ids) - 1], ids[first:]) for (_, ids, first), logits_NxV in rows]

    def _last_hidden(self, texts) -> list[np.ndarray]:
        import torch

        with _quiet(), torch.inference_mode():
            inputs, mask = self._padded(texts)
            hidden_BxNxD = self.model.base_model(input_ids=inputs, attention_mask=mask).last_hidden_state
            return [row[len(ids) - 1].float().cpu().numpy() for row, ids in zip(hidden_BxNxD, texts, strict=True)]

    def _padded(self, rows):
        """Ids and attention mask, padded on the right, where no token of a causal model looks."""
        import torch

        inputs, mask = torch.zeros(2, len(rows), max(map(len, rows)), dtype=torch.long)
        for i, row in enumerate(rows):
            inputs[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return inputs.to(self.model.device), mask.to(self.model.device)


def mauve_score(
    scorer: Scorer, samples: Sequence[Completion], references: Sequence[Completion], batch_size: int = 8, seed: int = 25
) -> float | None:
    """MAUVE (Pillutla et al. 2021) of samples against real continuations, in (0, 1], higher is better.

    On the scorer's own features, so that figures compare only under one scorer, and with as many texts (thousands).

    Returns:
      None when the package mauve-text is not installed.

    Raises:
      ValueError: there are no samples, or no references.
    """
    try:
        import mauve
    except ImportError:
        return None
    if not samples or not references:
        raise ValueError(f"MAUVE of {len(samples)} samples and {len(references)} references; it needs both")
    features = [scorer.features(texts, batch_size) for texts in (references, samples)]
    return float(mauve.compute_mauve(p_features=features[0], q_features=features[1], seed=seed, verbose=False).mauve)


def _torch():
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise DataError(f'a scorer needs torch and transformers: {error}; pip install -e ".[scorer]"') from None
    return torch


def _unusable(path, why) -> DataError:
    return DataError(f"scorer {path}: {why}")


def _check_folder(path):
    if not path.is_dir():
        raise _unusable(path, f"no such folder; {_CAUSAL_LM_NEEDED}, nothing is downloaded")
    if not (path / "config.json").is_file():
        raise _unusable(path, f"no config.json; {_CAUSAL_LM_NEEDED}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Turns the warnings and progress bars of transformers off, and leaves them as they were."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def _load_model(path):
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # whatever is wrong with the folder
        raise _unusable(path, f"not a causal LM that can be loaded ({_reason(error)}); {_CAUSAL_LM_NEEDED}") from None
    saved, name, missing = model.config.architectures or [], type(model).__name__, sorted(info["missing_keys"])
    if saved and name not in saved:
        raise _unusable(path, f"holds a {saved[0]}, which is not a causal LM ({name}); {_CAUSAL_LM_NEEDED}")
    if missing:
        raise _unusable(path, f"{len(missing)} weights are missing, such as {missing[0]}; {_CAUSAL_LM_NEEDED}")
    model = model.float().eval()
    model.config.use_cache = False
    if not _is_causal(model):
        raise _unusable(path, f"the tokens of {name} see later ones, which is not causal; {_CAUSAL_LM_NEEDED}")
    return model


def _is_causal(model) -> bool:
    """Whether a token can be changed without an effect on those before it."""
    import torch

    with torch.inference_mode():
        before, after = model(input_ids=torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])).logits[:, :-1]
    return bool((before - after).abs().max() <= _ROUNDING * before.abs().max())


def _load_tokenizer(path) -> tuple[hf.Tokenizer, int]:
    """The tokenizer, and the id that it begins a text with."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each format has its own
        raise _unusable(path, f"no tokenizer that can be read ({_reason(error)}); {_TOKENIZER_NEEDED}") from None
    if not tokenizer.is_fast:
        raise _unusable(path, f"its tokenizer does not tell where in a text its tokens are; {_TOKENIZER_NEEDED}")
    encoder = _plain(tokenizer.backend_tokenizer)
    # Without its files, transformers makes up an empty vocabulary and says nothing.
    if set(encoder.encode("a text", add_special_tokens=False).ids) <= {tokenizer.unk_token_id}:
        raise _unusable(path, f"no tokenizer, or one that does not know plain English; {_TOKENIZER_NEEDED}")
    first_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first_id is None:
        raise _unusable(path, 'its tokenizer has neither BOS nor EOS; name a "bos_token" in tokenizer_config.json')
    return encoder, first_id


def _plain(backend):
    """A copy that neither cuts nor pads, adds no token, and whose offsets are exact."""
    encoder = hf.Tokenizer.from_str(backend.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    # That of GPT-2 leaves spaces out of the offsets, which could put a token on the wrong side of the prefix's end.
    encoder.post_processor = hf.processors.Sequence([])
    # A sample that spells <|endoftext|> is text.
    encoder.encode_special_tokens = True
    return encoder


def _longest_input(config) -> int | None:
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next(filter(None, limits), None)


def _check_pair(path, encoder, first_id, model):
    known = model.get_input_embeddings().num_embeddings
    largest = max(first_id, *encoder.get_vocab(with_added_tokens=False).values())
    if largest >= known:
        raise _unusable(
            path, f"its tokenizer has an id {largest}, its model only {known} ids; both must come from one model"
        )


def _reason(error) -> str:
    """The first line of an error, which may list every model that there is."""
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".:") if lines else type(error).__name__


def _windows(length, first, context) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end): ids[begin:end] is read to score ids[first:end], whose last id is no input.

    Together they score ids[first:length], each id once.
    """
    for end in [*range(context + 1, length, max(context // 2, 1)), length]:
        if first < end:
            yield max(end - context - 1, 0), first, end
        first = max(first, end)


def _common_length(a, b) -> int:
    """Length of the longest common beginning."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _by_length(items, batch_size, length) -> Iterator[list]:
    """Batches of items of similar length, so with little padding; the longest first, which need the most memory."""
    items = sorted(items, key=length, reverse=True)
    return (items[i : i + batch_size] for i in range(0, len(items), batch_size))


def _sum_nll(logits_NxV, targets) -> float:
    import torch

    targets_N = torch.tensor(targets, device=logits_NxV.device)
    return torch.nn.functional.cross_entropy(logits_NxV.float(), targets_N, reduction="none").double().sum().item()
