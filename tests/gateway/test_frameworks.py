"""Agents of the frameworks, as they are: one training iteration each, and who wrote which token."""

import json
import sys

import pytest

import agent_r1
from agent_r1.run.trajectories import read_groups
from agent_r1.tree import build_tree
from agent_r1.types import Kind

HERE = "tests/gateway/frameworks.py"


def trained(tmp_path, **env):
    """A run of one iteration; its groups and the figures of its iteration."""
    overrides = {
        "env": {"name": "agent", "tasks": f"{HERE}:tasks", "score": f"{HERE}:score", **env},
        "train.iterations": 1,
        "train.tasks": 3,
        "train.attempts": 4,
        "evaluation.every": 0,
        "evaluation.test_tasks": 0,
    }
    agent_r1.train("hopworld", run=str(tmp_path / "run"), overrides=overrides)
    groups = [g for g, _ in read_groups(next((tmp_path / "run").rglob("*.jsonl.gz")))]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return groups, json.loads(lines[-1])["figures"]


def audit(groups, figures):
    """Every sampled token is in the tree once, as the agent's, and the learner agrees with it."""
    for group in groups:
        sampled = [s.action.token_ids for _, s in group.steps()]
        nodes = [node for node in build_tree(group).nodes if node.kind is Kind.ACTION]
        assert sorted(sampled) == sorted(node.token_ids for node in nodes)
        for trajectory in group.trajectories:
            assert trajectory.fault is None
            assert all(step.context_ids is None for step in trajectory.steps)
    assert figures["logprob_error"] < 1e-4


@pytest.mark.parametrize(
    "run",
    [
        "langgraph",
        "streamed_langgraph",
        "openai_agents",
        "openai_agents_streamed",
        "anthropic_loop",
    ],
)
def test_an_agent_of_a_framework_is_trained_as_it_is(tmp_path, run):
    groups, figures = trained(tmp_path, run=f"{HERE}:{run}")
    audit(groups, figures)
    assert figures["turns"] > 1.2


def test_a_shell_command_is_trained_as_it_is(tmp_path):
    groups, figures = trained(tmp_path, command=[sys.executable, HERE])
    audit(groups, figures)
    (output,) = groups[0].trajectories[0].steps[-1].results
    assert '"object": "chat.completion"' in output.text
