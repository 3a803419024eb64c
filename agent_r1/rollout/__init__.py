"""Rollout: engines that sample tokens, and the episode loop between environment and engine."""

from agent_r1.config.registry import Registry

ENGINES = Registry(
    "engine",
    {
        "native": "agent_r1.rollout.native.engine:NativeEngine",
        "padded": "agent_r1.rollout.padded:PaddedEngine",
    },
    default="native",
)
