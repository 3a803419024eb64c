"""The real tokenizer and the real tiny model, loaded once."""

import copy
import os

import pytest

from agent_r1.model.load import load_policy
from agent_r1.model.settings import ModelSettings
from agent_r1.render.chatml import ChatML


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory):
    """What runs here is noted apart from the user's own (``agent_r1/run/trust.py``)."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    if before is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = before


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
