"""Gen-PPL: what a causal LM that is not ours, read from a local folder, thinks of our samples.

Low perplexity alone is no evidence: repetitive text has it. `intervals.py` has the figures that belong next to it.
Needs `pip install 'kforcing-jax[scorer]'`: torch and transformers. Nothing is ever downloaded.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers as hf

from kforcing_jax.data.places import expanded
from kforcing_jax.errors import DataError

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_CAUSAL_LM_NEEDED = "give the local folder of a causal LM such as GPT-2, as save_pretrained of transformers writes it"
_TOKENIZER_NEEDED = "add its tokenizer.json, or vocab.json and merges.txt"


class Completion(NamedTuple):
    """A prefix and the text that continues it, without special tokens; `prefix + text` is the whole text."""

    prefix: str
    text: str


class Score(NamedTuple):
    """Negative log-likelihood of a completion, summed over its tokens (nats), and the number of these tokens."""

    nll: float
    tokens: int


class Scorer(NamedTuple):
    """A causal LM of `transformers`, in f32, with its own tokenizer.

    `encoder` adds nothing to a text. `first_id` is put in front of every text: BOS, or EOS where there is no BOS.
    `context` is the model's longest input, None without a limit.
    """

    model: Any
    encoder: hf.Tokenizer
    first_id: int
    context: int | None

    @classmethod
    def load(cls, path: str | Path, device: str | None = None) -> "Scorer":
        """Reads a local folder as `save_pretrained` writes it. Code that it may hold is not run.

        `device` is where torch computes; by default "cuda" where there is one, otherwise "cpu".

        Raises:
          DataError: torch or transformers is not installed, or the folder holds no causal LM with its tokenizer.
        """
        path = expanded(path)
        if not (path / "config.json").is_file():
            missing = "no config.json in it" if path.is_dir() else "no such folder"
            raise _unusable(path, f"{missing}; {_CAUSAL_LM_NEEDED}, nothing is downloaded")
        torch = _torch()
        model = _load_model(path)
        encoder, first_id = _load_tokenizer(path, model.get_input_embeddings().num_embeddings)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config = model.config.get_text_config()
        limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
        return cls(model, encoder, first_id, next(filter(None, limits), None))

    def score(self, completions: Sequence[Completion], batch_size: int = 8) -> list[Score]:
        """Scores the completions' tokens given their prefixes, as Gen-PPL does; the order is that of the input.

        Prefix and completion are tokenised as one text. A token belongs to the completion if it starts at or after the
        end of the prefix, or straddles it. A text beyond the context is read in windows that advance by half of it:
        each token is scored once, and given at least half a context once the text is that long.

        `batch_size` windows are in one forward pass; scores do not depend on it.
        """
        texts = [self._encode(completion) for completion in completions]
        windows = [  # (text, its ids from the window's first one, how many of them are context alone)
            (text, ids[begin:end], first - begin)
            for text, (ids, first_scored) in enumerate(texts)
            for begin, first, end in _windows(len(ids), first_scored, self.context or len(ids))
        ]
        nll = np.zeros(len(texts))
        # Windows of similar length together, the longest first, which need the most memory.
        windows.sort(key=lambda window: -len(window[1]))
        for begin in range(0, len(windows), batch_size):
            batch = windows[begin : begin + batch_size]
            for (text, _, _), value in zip(batch, self._nll(batch), strict=True):
                nll[text] += value
        return [Score(float(total), len(ids) - first) for total, (ids, first) in zip(nll, texts, strict=True)]

    def _encode(self, completion) -> tuple[list[int], int]:
        """`first_id` and the ids of the whole text; the index of the completion's first token, or their number."""
        encoding = self.encoder.encode(completion.prefix + completion.text, add_special_tokens=False)
        boundary = len(completion.prefix)
        belongs = [start >= boundary or end > boundary for start, end in encoding.offsets]
        return [self.first_id, *encoding.ids], 1 + (belongs.index(True) if True in belongs else len(belongs))

    def _nll(self, windows) -> list[float]:
        import torch

        # Padded on the right, where no token of a causal model looks.
        rows = [torch.tensor(ids, device=self.model.device) for _, ids, _ in windows]
        inputs_BxN = torch.nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
        with torch.inference_mode():
            logits_BxNxV = self.model(input_ids=inputs_BxN).logits
            nll = []
            # Row by row: a softmax over all rows at once would double the memory, which logits dominate.
            for (_, _, first), row, logits_NxV in zip(windows, rows, logits_BxNxV, strict=True):
                scored_MxV, targets_M = logits_NxV[first - 1 : len(row) - 1].float(), row[first:]
                nll_M = torch.nn.functional.cross_entropy(scored_MxV, targets_M, reduction="none")
                nll.append(nll_M.double().sum().item())
        return nll


def _torch():
    """torch, with transformers told to be silent: it warns and draws bars."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise DataError(f"a scorer needs torch and transformers: {error}; pip install 'kforcing-jax[scorer]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch


def _unusable(path, why) -> DataError:
    return DataError(f"scorer {path}: {why}")


def _load_model(path):
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, **_LOCAL, output_loading_info=True)
    except Exception as error:  # whatever is wrong with the folder
        raise _unusable(path, f"not a causal LM that can be loaded ({_reason(error)}); {_CAUSAL_LM_NEEDED}") from None
    name, missing = type(model).__name__, sorted(info["missing_keys"])
    saved = model.config.architectures or [name]
    if missing:
        raise _unusable(path, f"{len(missing)} weights are missing, such as {missing[0]}; {_CAUSAL_LM_NEEDED}")
    model = model.float().eval()
    model.config.use_cache = False
    if name not in saved or not _is_causal(model):
        raise _unusable(path, f"holds a {saved[0]}, which is not a causal LM; {_CAUSAL_LM_NEEDED}")
    return model


def _is_causal(model) -> bool:
    """Whether a token can be changed without an effect on those before it."""
    import torch

    with torch.inference_mode():
        before, after = model(input_ids=torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])).logits[:, :-1]
    return bool((before - after).abs().max() <= 1e-4 * before.abs().max())  # rounding


def _load_tokenizer(path, known: int) -> tuple[hf.Tokenizer, int]:
    """The tokenizer of a model that knows so many ids, and the id that it begins a text with."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **_LOCAL)
        encoder = _plain(tokenizer.backend_tokenizer)
    except Exception as error:  # each format has its own
        raise _unusable(path, f"no tokenizer that can be read ({_reason(error)}); {_TOKENIZER_NEEDED}") from None
    # Without its files, transformers makes up an empty vocabulary and says nothing.
    if set(encoder.encode("a text").ids) <= {tokenizer.unk_token_id}:
        raise _unusable(path, f"no tokenizer, or one that does not know plain English; {_TOKENIZER_NEEDED}")
    first_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first_id is None:
        raise _unusable(path, 'its tokenizer has neither BOS nor EOS; name a "bos_token" in tokenizer_config.json')
    largest = max(first_id, *encoder.get_vocab(with_added_tokens=False).values())
    if largest >= known:
        raise _unusable(path, f"its tokenizer has an id {largest}, its model {known} ids; both must be of one model")
    return encoder, first_id


def _plain(backend) -> hf.Tokenizer:
    """A copy that neither cuts nor pads, adds no token, and whose offsets are exact."""
    encoder = hf.Tokenizer.from_str(backend.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    # That of GPT-2 leaves spaces out of the offsets, which could put a token on the wrong side of the prefix's end.
    encoder.post_processor = hf.processors.Sequence([])
    encoder.encode_special_tokens = True  # a sample that spells <|endoftext|> is text
    return encoder


def _reason(error) -> str:
    """The first line of an error, which may list every model that there is."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".:")


def _windows(length, first, context) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end): ids[begin:end] is read to score ids[first:end], whose last id is no input.

    Together they score ids[first:length], each id once.
    """
    for end in [*range(context + 1, length, max(context // 2, 1)), length]:
        if first < end:
            yield max(end - context - 1, 0), first, end
        first = max(first, end)
