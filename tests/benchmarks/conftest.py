"""Servers for what drives them."""

from serving.conftest import start, tokenizer  # noqa: F401
