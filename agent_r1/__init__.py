"""Agent-R1: train language-model agents on their own tools by reinforcement learning.

Importing this package is light; torch is imported by the first name that needs it.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Read by OpenMP when torch is loaded. By default its threads spin while they wait for one another,
# and beside another busy program a run takes ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_HOME = {
    "Action": "agent_r1.types",
    "Agent": "agent_r1.api",
    "AgentR1Error": "agent_r1.errors",
    "Algorithm": "agent_r1.algorithms.base",
    "Attempt": "agent_r1.algorithms.credit",
    "CallError": "agent_r1.errors",
    "CallResult": "agent_r1.types",
    "ConfigError": "agent_r1.errors",
    "Credit": "agent_r1.algorithms.credit",
    "Engine": "agent_r1.rollout.engine",
    "Env": "agent_r1.envs.base",
    "EnvCheckError": "agent_r1.errors",
    "EnvSettings": "agent_r1.envs.base",
    "Estimates": "agent_r1.types",
    "Evaluation": "agent_r1.training.evaluate",
    "FailurePolicy": "agent_r1.tools.failure_policy",
    "FunctionTool": "agent_r1.tools.function_tool",
    "Group": "agent_r1.types",
    "GroupAlgorithm": "agent_r1.algorithms.base",
    "MalformedCall": "agent_r1.types",
    "Message": "agent_r1.types",
    "NamedSection": "agent_r1.config.section",
    "Outcome": "agent_r1.types",
    "Passage": "agent_r1.search",
    "PolicyGradient": "agent_r1.algorithms.base",
    "Recipe": "agent_r1.run.recipe",
    "Renderer": "agent_r1.render",
    "Result": "agent_r1.api",
    "RunError": "agent_r1.errors",
    "Sampling": "agent_r1.rollout.engine",
    "Searcher": "agent_r1.search",
    "Session": "agent_r1.rollout.engine",
    "Step": "agent_r1.types",
    "StepKey": "agent_r1.types",
    "StopReason": "agent_r1.types",
    "Task": "agent_r1.types",
    "Tool": "agent_r1.tools.base",
    "ToolCall": "agent_r1.types",
    "ToolEnv": "agent_r1.envs.tool_env",
    "ToolFailureError": "agent_r1.errors",
    "ToolResult": "agent_r1.tools.base",
    "Traits": "agent_r1.rollout.engine",
    "Trajectory": "agent_r1.types",
    "Transition": "agent_r1.envs.base",
    "UserEnv": "agent_r1.envs.user",
    "VersionSpan": "agent_r1.types",
    "advantage": "agent_r1.algorithms.base",
    "check_env": "agent_r1.envs.check_env",
    "export": "agent_r1.api",
    "load": "agent_r1.api",
    "load_recipe": "agent_r1.run.recipe",
    "open_search": "agent_r1.search",
    "resume": "agent_r1.api",
    "scope": "agent_r1.utils.scope",
    "shared": "agent_r1.utils.scope",
    "tool": "agent_r1.tools.function_tool",
    "train": "agent_r1.api",
}
__all__ = [
    "Action",
    "Agent",
    "AgentR1Error",
    "Algorithm",
    "Attempt",
    "CallError",
    "CallResult",
    "ConfigError",
    "Credit",
    "Engine",
    "Env",
    "EnvCheckError",
    "EnvSettings",
    "Estimates",
    "Evaluation",
    "FailurePolicy",
    "FunctionTool",
    "Group",
    "GroupAlgorithm",
    "MalformedCall",
    "Message",
    "NamedSection",
    "Outcome",
    "Passage",
    "PolicyGradient",
    "Recipe",
    "Renderer",
    "Result",
    "RunError",
    "Sampling",
    "Searcher",
    "Session",
    "Step",
    "StepKey",
    "StopReason",
    "Task",
    "Tool",
    "ToolCall",
    "ToolEnv",
    "ToolFailureError",
    "ToolResult",
    "Traits",
    "Trajectory",
    "Transition",
    "UserEnv",
    "VersionSpan",
    "advantage",
    "check_env",
    "export",
    "load",
    "load_recipe",
    "open_search",
    "resume",
    "scope",
    "shared",
    "tool",
    "train",
]

if TYPE_CHECKING:
    from agent_r1.algorithms.base import Algorithm, GroupAlgorithm, PolicyGradient, advantage
    from agent_r1.algorithms.credit import Attempt, Credit
    from agent_r1.api import Agent, Result, export, load, resume, train
    from agent_r1.config.section import NamedSection
    from agent_r1.envs.base import Env, EnvSettings, Transition
    from agent_r1.envs.check_env import check_env
    from agent_r1.envs.tool_env import ToolEnv
    from agent_r1.envs.user import UserEnv
    from agent_r1.errors import (
        AgentR1Error,
        CallError,
        ConfigError,
        EnvCheckError,
        RunError,
        ToolFailureError,
    )
    from agent_r1.render import Renderer
    from agent_r1.rollout.engine import Engine, Sampling, Session, Traits
    from agent_r1.run.recipe import Recipe, load_recipe
    from agent_r1.search import Passage, Searcher, open_search
    from agent_r1.tools.base import Tool, ToolResult
    from agent_r1.tools.failure_policy import FailurePolicy
    from agent_r1.tools.function_tool import FunctionTool, tool
    from agent_r1.training.evaluate import Evaluation
    from agent_r1.types import (
        Action,
        CallResult,
        Estimates,
        Group,
        MalformedCall,
        Message,
        Outcome,
        Step,
        StepKey,
        StopReason,
        Task,
        ToolCall,
        Trajectory,
        VersionSpan,
    )
    from agent_r1.utils.scope import scope, shared


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
