"""Agent-R1: train language-model agents on their own tools by reinforcement learning.

Importing this package is light; torch is imported by the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Agent": "agent_r1.api",
    "CallError": "agent_r1.tools",
    "Env": "agent_r1.env",
    "EnvSettings": "agent_r1.env",
    "FailurePolicy": "agent_r1.failure",
    "Message": "agent_r1.types",
    "Outcome": "agent_r1.types",
    "Task": "agent_r1.types",
    "Tool": "agent_r1.tools",
    "ToolEnv": "agent_r1.env",
    "ToolResult": "agent_r1.tools",
    "Transition": "agent_r1.env",
    "UserEnv": "agent_r1.users",
    "advantage": "agent_r1.algorithms.base",
    "check_env": "agent_r1.env_check",
    "export": "agent_r1.api",
    "load": "agent_r1.api",
    "resume": "agent_r1.api",
    "tool": "agent_r1.tools",
    "train": "agent_r1.api",
}
__all__ = [
    "Agent",
    "CallError",
    "Env",
    "EnvSettings",
    "FailurePolicy",
    "Message",
    "Outcome",
    "Task",
    "Tool",
    "ToolEnv",
    "ToolResult",
    "Transition",
    "UserEnv",
    "advantage",
    "check_env",
    "export",
    "load",
    "resume",
    "tool",
    "train",
]

if TYPE_CHECKING:
    from agent_r1.algorithms.base import advantage
    from agent_r1.api import Agent, export, load, resume, train
    from agent_r1.env import Env, EnvSettings, ToolEnv, Transition
    from agent_r1.env_check import check_env
    from agent_r1.failure import FailurePolicy
    from agent_r1.tools import CallError, Tool, ToolResult, tool
    from agent_r1.types import Message, Outcome, Task
    from agent_r1.users import UserEnv


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
