"""Agent-R1: train language-model agents on their own tools by reinforcement learning.

Importing this package is light; torch is imported by the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Action": "agent_r1.types",
    "Agent": "agent_r1.api",
    "AgentR1Error": "agent_r1.errors",
    "Algorithm": "agent_r1.algorithms.base",
    "CallError": "agent_r1.errors",
    "ConfigError": "agent_r1.errors",
    "Env": "agent_r1.envs.base",
    "EnvCheckError": "agent_r1.errors",
    "EnvSettings": "agent_r1.envs.base",
    "Evaluation": "agent_r1.training.evaluate",
    "FailurePolicy": "agent_r1.tools.failure_policy",
    "FunctionTool": "agent_r1.tools.function_tool",
    "Group": "agent_r1.types",
    "Message": "agent_r1.types",
    "NamedSection": "agent_r1.config.section",
    "Outcome": "agent_r1.types",
    "Recipe": "agent_r1.run.recipe",
    "Result": "agent_r1.api",
    "RunError": "agent_r1.errors",
    "Step": "agent_r1.types",
    "StopReason": "agent_r1.types",
    "Task": "agent_r1.types",
    "Tool": "agent_r1.tools.base",
    "ToolCall": "agent_r1.types",
    "ToolEnv": "agent_r1.envs.tool_env",
    "ToolFailureError": "agent_r1.errors",
    "ToolResult": "agent_r1.tools.base",
    "Trajectory": "agent_r1.types",
    "Transition": "agent_r1.envs.base",
    "UserEnv": "agent_r1.envs.user",
    "advantage": "agent_r1.algorithms.base",
    "check_env": "agent_r1.envs.check_env",
    "export": "agent_r1.api",
    "load": "agent_r1.api",
    "load_recipe": "agent_r1.run.recipe",
    "resume": "agent_r1.api",
    "tool": "agent_r1.tools.function_tool",
    "train": "agent_r1.api",
}
__all__ = [
    "Action",
    "Agent",
    "AgentR1Error",
    "Algorithm",
    "CallError",
    "ConfigError",
    "Env",
    "EnvCheckError",
    "EnvSettings",
    "Evaluation",
    "FailurePolicy",
    "FunctionTool",
    "Group",
    "Message",
    "NamedSection",
    "Outcome",
    "Recipe",
    "Result",
    "RunError",
    "Step",
    "StopReason",
    "Task",
    "Tool",
    "ToolCall",
    "ToolEnv",
    "ToolFailureError",
    "ToolResult",
    "Trajectory",
    "Transition",
    "UserEnv",
    "advantage",
    "check_env",
    "export",
    "load",
    "load_recipe",
    "resume",
    "tool",
    "train",
]

if TYPE_CHECKING:
    from agent_r1.algorithms.base import Algorithm, advantage
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
    from agent_r1.run.recipe import Recipe, load_recipe
    from agent_r1.tools.base import Tool, ToolResult
    from agent_r1.tools.failure_policy import FailurePolicy
    from agent_r1.tools.function_tool import FunctionTool, tool
    from agent_r1.training.evaluate import Evaluation
    from agent_r1.types import (
        Action,
        Group,
        Message,
        Outcome,
        Step,
        StopReason,
        Task,
        ToolCall,
        Trajectory,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
