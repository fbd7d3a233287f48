"""Model folders, served as they are: with the tokenizer and the chat template that came along."""

import httpx
import pytest
from interop.families import write_teacher
from serving_process import Serving

from kforcing_jax.decoding import generate
from kforcing_jax.interop import huggingface

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("hub") / "tiny")


def test_a_folder_answers_chats_and_prompts(teacher):
    serving = Serving(f"--checkpoint={teacher}", "--slots=2")
    assert "2 slots of 64 tokens, modes ar" in "".join(serving.lines) and serving.name == "tiny"
    asked = {"seed": 3, "max_tokens": 6, "temperature": 1}
    answer = httpx.post(f"{serving.url}/v1/completions", json=asked | {"prompt": "The cat"}, timeout=60).json()
    chat = asked | {"messages": [{"role": "user", "content": "The cat"}]}
    said = httpx.post(f"{serving.url}/v1/chat/completions", json=chat, timeout=60).json()
    assert serving.end()[0] == 0
    model, params = huggingface.load(teacher)
    tokenizer = huggingface.tokenizer(teacher)
    rendered = "<|im_start|>user\nThe cat<|im_end|>\n<|im_start|>assistant\n"
    prompts = [tokenizer.encode("The cat"), tokenizer.encode_marked(rendered)]
    expected = generate(model, params, prompts, max_new_tokens=6, k=1, seeds=[3, 3], eos_id=tokenizer.eos_id)
    texts = [
        tokenizer.decode(row[len(prompt) : end])
        for row, prompt, end in zip(expected.tokens, prompts, expected.lengths, strict=True)
    ]
    assert [answer["choices"][0]["text"], said["choices"][0]["message"]["content"]] == texts
    assert said["usage"]["prompt_tokens"] == len(prompts[1])
