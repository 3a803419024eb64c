"""The real tokenizer and the real tiny model, loaded once."""

import copy

import pytest

from agent_r1.policy import load_policy
from agent_r1.render.chatml import ChatML
from agent_r1.sections import ModelSettings


@pytest.fixture(scope="session")
def base_policy():
    return load_policy(ModelSettings(path="hopworld-base", device="cpu"))


@pytest.fixture
def policy(base_policy):
    """A copy that a test may train."""
    return copy.deepcopy(base_policy)


@pytest.fixture(scope="session")
def tokenizer(base_policy):
    return base_policy.tokenizer


@pytest.fixture(scope="session")
def renderer(tokenizer):
    return ChatML(ChatML.Settings(), tokenizer)
