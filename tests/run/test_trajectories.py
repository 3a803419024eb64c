"""Stored episodes: what an older version wrote is read as if it were written today."""

import gzip
import json

import pytest

from agent_r1.errors import ConfigError
from agent_r1.run.trajectories import read_groups, write_groups
from agent_r1.types import (
    Action,
    Estimates,
    Group,
    Message,
    Outcome,
    Step,
    StepKey,
    Task,
    Trajectory,
    VersionSpan,
)


def a_group():
    action = Action((5, 6, 7), (-0.5, -0.2, -0.1), (), (VersionSpan(3, 0, 1), (4, 1, 3)), "stop")
    steps = [Step(action, Message("assistant", "hi"))]
    return Group(Task("t", "?"), [Trajectory("t", "", 0, steps=steps, outcome=Outcome(1.0, True))])


def test_versions_of_every_token_are_stored(tmp_path):
    known = Estimates(entropies={StepKey(0, 0, 0): (0.1, 0.2, 0.3)})
    write_groups(tmp_path / "t.gz", [a_group()], known)
    ((group, found),) = read_groups(tmp_path / "t.gz")
    action = group.trajectories[0].steps[0].action
    assert action.versions == (VersionSpan(3, 0, 1), VersionSpan(4, 1, 3))
    assert found == known


def test_an_action_of_one_version_is_read_as_one_span(tmp_path):
    write_groups(tmp_path / "t.gz", [a_group()], Estimates())
    row = json.loads(gzip.decompress((tmp_path / "t.gz").read_bytes()))
    action = row["trajectories"][0]["steps"][0]["action"]
    del action["versions"]
    action["policy_version"] = 2
    (tmp_path / "t.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    ((group, _),) = read_groups(tmp_path / "t.gz")
    assert group.trajectories[0].steps[0].action.versions == (VersionSpan(2, 0, 3),)


@pytest.mark.parametrize("line", [b"[]", b'{"trajectories": 3}', b'{"a": 1}', b"{"])
def test_a_line_that_is_no_group_is_an_error_that_names_the_file(tmp_path, line):
    (tmp_path / "t.gz").write_bytes(gzip.compress(line))
    with pytest.raises(ConfigError, match=r"t\.gz cannot be read"):
        list(read_groups(tmp_path / "t.gz"))
