"""The environments of this package. Your own: ``name = "my_env.py:MyEnv"``, or an entry point
``agent_r1.env``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_r1.config.registry import Registry

if TYPE_CHECKING:
    from agent_r1.envs.base import Env

ENVS: Registry[Env] = Registry(
    "env",
    {
        "agent": "agent_r1.gateway.agent:AgentEnv",
        "database": "agent_r1.tasks.database.env:DatabaseEnv",
        "gymnasium": "agent_r1.tasks.adapters.gymnasium:GymEnv",
        "hopworld": "agent_r1.tasks.hopworld.env:HopWorld",
        "hopworld-user": "agent_r1.tasks.hopworld.user:HopWorldUser",
        "hopworld-rag": "agent_r1.tasks.naive_rag:HopWorldRAG",
        "multihop": "agent_r1.tasks.multihop.env:MultiHop",
        "multihop-rag": "agent_r1.tasks.naive_rag:MultiHopRAG",
        "openenv": "agent_r1.tasks.adapters.openenv:OpenEnv",
        "tools": "agent_r1.tasks.from_files:Tools",
        "verifiers": "agent_r1.tasks.adapters.verifiers:VerifiersEnv",
    },
)
