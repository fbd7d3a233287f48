"""Who decodes."""

import pytest


@pytest.fixture(scope="session")
def student(push_forward_lm):
    return push_forward_lm


@pytest.fixture(scope="session")
def teacher(causal_lm):
    return causal_lm
