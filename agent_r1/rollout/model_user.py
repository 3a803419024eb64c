"""A user played by a language model, on any engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from agent_r1.config.section import NamedSection
from agent_r1.envs.user import UserEnv, flipped
from agent_r1.model.settings import ModelSettings
from agent_r1.render import RENDERERS, Renderer
from agent_r1.rollout import ENGINES
from agent_r1.rollout.engine import Engine, Sampling
from agent_r1.types import Message, derive_seed
from agent_r1.utils.scope import kept, shared


class ModelUser:
    """The model is loaded once per run, besides the agent's, and never trained."""

    class Settings(NamedSection):
        """The model that plays the user.

        Attributes:
            renderer, engine: As of the agent, by name.
            max_tokens: Most tokens of an answer.
            temperature: Of sampling; 0 is greedy.
            instruction: What the user is told after what the environment tells it.
        """

        name: str = "model"
        model: ModelSettings = ModelSettings(path="smollm2-135m")
        renderer: str = "chatml"
        engine: str = "native"
        max_tokens: int = Field(48, ge=1)
        temperature: float = Field(0.7, ge=0)
        instruction: str = "Answer the assistant's question in one short sentence."

        @model_validator(mode="after")
        def _one_process(self) -> Self:
            if self.model.matmul is not None:
                raise ValueError("model.matmul: set the agent's, which holds for the whole process")
            return self

    def __init__(self, settings: Any) -> None:
        self._settings = settings
        self._engine, self._renderer = _load(settings.model_dump_json())

    async def answer(self, env: UserEnv, said: Sequence[Message], seed: int) -> str:
        settings = self._settings
        messages = flipped(said, f"{env.brief()}\n{settings.instruction}")
        sampling = Sampling(
            settings.max_tokens, self._renderer.stop_token_ids, temperature=settings.temperature
        )
        shared(("engine", id(self._engine)), lambda: self._engine)  # closed with the run
        await self._engine.start()
        session = self._engine.session()
        try:
            action = await session.generate(
                self._renderer.prompt(messages, []), sampling, derive_seed(seed, len(said))
            )
        finally:
            session.close()
        return self._renderer.parse(action).content


@kept
def _load(settings_json: str) -> tuple[Engine, Renderer]:
    from agent_r1.model.load import load_policy  # brings torch, which `agent-r1 keys` does not need

    settings = ModelUser.Settings.model_validate_json(settings_json)
    policy = load_policy(settings.model)
    engine = ENGINES.make(ENGINES.section(settings.engine), policy)
    return engine, RENDERERS.make(RENDERERS.section(settings.renderer), policy.tokenizer)
