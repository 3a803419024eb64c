"""The reference page lists what the package exports, all of it and nothing else."""

import re

import agent_r1
from tests import ROOT


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "reference.rst").read_text()
    assert sorted(re.findall(r"auto\w+:: (\w+)", text)) == sorted(agent_r1.__all__)
    for name in agent_r1.__all__:
        assert getattr(agent_r1, name).__doc__, name
