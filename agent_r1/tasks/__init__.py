"""The environments that ship, by name. Your own: ``name = "my_env.py:MyEnv"``, or an entry point
``agent_r1.env``.
"""

from agent_r1.config import Registry

ENVS = Registry(
    "env",
    {
        "database": "agent_r1.tasks.database:DatabaseEnv",
        "gymnasium": "agent_r1.tasks.gym:GymEnv",
        "hopworld": "agent_r1.tasks.hopworld:HopWorld",
        "hopworld-user": "agent_r1.tasks.hopworld_user:HopWorldUser",
        "hopworld-rag": "agent_r1.tasks.naive_rag:HopWorldRAG",
        "multihop": "agent_r1.tasks.multihop:MultiHop",
        "multihop-rag": "agent_r1.tasks.naive_rag:MultiHopRAG",
        "openenv": "agent_r1.tasks.openenv:OpenEnv",
        "tools": "agent_r1.tasks.tools:Tools",
        "verifiers": "agent_r1.tasks.verifiers:VerifiersEnv",
    },
)
