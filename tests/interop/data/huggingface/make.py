"""Makes the folders beside it: tiny random models of the Llama family, and the logits that transformers gives.

python tests/interop/data/huggingface/make.py     (needs torch and transformers; others only read what it wrote)
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from families import BFLOAT16, FAMILIES, write_folder  # noqa: E402

RECORDED = ("llama", "llama_biases", "linear", "yarn", "mistral", "qwen2", "qwen3")
LENGTH = 40


def main():
    for name in RECORDED:
        folder = write_folder(HERE / name, FAMILIES[name], dtype=BFLOAT16)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        tokens = np.random.default_rng(1).integers(0, FAMILIES[name]["vocab_size"], (1, LENGTH))
        with torch.no_grad():
            logits = model(torch.tensor(tokens)).logits.numpy()
        np.savez_compressed(folder / "logits.npz", tokens=tokens.astype(np.int32), logits=logits)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    (HERE / "made_with.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main()
