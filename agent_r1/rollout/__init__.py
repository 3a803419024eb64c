"""Rollout: engines that sample tokens, and the episode loop between environment and engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_r1.config.registry import Registry

if TYPE_CHECKING:
    from agent_r1.rollout.engine import Engine

ENGINES: Registry[Engine] = Registry(
    "engine",
    {
        "native": "agent_r1.rollout.native.engine:NativeEngine",
        "padded": "agent_r1.rollout.padded:PaddedEngine",
        "vllm": "agent_r1.rollout.remote.vllm:VLLMEngine",
        "sglang": "agent_r1.rollout.remote.sglang:SGLangEngine",
    },
    default="native",
)
