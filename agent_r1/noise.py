"""Messy tools on purpose: ``[env.noise]`` makes calls fail, time out, come late or lose part of
their result, with given probabilities and from the episode's seed.

    [env.noise]
    fail = 0.1
    drop = 0.1

What was injected is counted as ``noise/...``, apart from real faults, never trips a breaker and
never excludes an episode; retries of the tool's policy apply to it.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from agent_r1.config import Section
from agent_r1.types import derive_seed

Kind = Literal["fail", "timeout", "late", "drop", "garble"]


class NoiseSettings(Section):
    """Probabilities per call; at most one of them strikes.

    Attributes:
        fail: The tool reports an internal error.
        timeout: It gives no result in time (reported at once: nobody waits for a simulation).
        late: The result comes ``late_seconds`` late.
        drop: ``share`` of the result is missing: items of a list, words of a text.
        garble: ``share`` of its letters are replaced by others.
    """

    fail: float = Field(0.0, ge=0, le=1)
    timeout: float = Field(0.0, ge=0, le=1)
    late: float = Field(0.0, ge=0, le=1)
    drop: float = Field(0.0, ge=0, le=1)
    garble: float = Field(0.0, ge=0, le=1)
    share: float = Field(0.3, gt=0, le=1)
    late_seconds: float = Field(0.05, gt=0)

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        if (total := sum(self.probabilities().values())) > 1 + 1e-9:
            raise ValueError(f"noise: the probabilities add up to {total:g}, more than 1")
        return self

    def probabilities(self) -> dict[Kind, float]:
        return {
            "fail": self.fail,
            "timeout": self.timeout,
            "late": self.late,
            "drop": self.drop,
            "garble": self.garble,
        }


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of one episode. All attempts at a task meet the same noise at the same call."""

    settings: NoiseSettings
    seed: int

    def draw(self, *call: int) -> Kind | None:
        """What strikes a call, if anything; ``call`` is its number and that of the try."""
        point = self._rng("draw", *call).random()
        for kind, probability in self.settings.probabilities().items():
            point -= probability
            if point < 0:
                return kind
        return None

    def spoil(self, kind: Kind, value: Any, *call: int) -> Any:
        """The value with a part of it dropped or garbled; of text, and of lists, dictionaries and
        records that hold some. Never longer than it was.
        """
        rng = self._rng("spoil", *call)
        return (
            _drop(value, self.settings.share, rng) if kind == "drop" else self._garble(value, rng)
        )

    def _garble(self, value: Any, rng: random.Random) -> Any:
        def garbled(text: str) -> str:
            letters = "abcdefghijklmnopqrstuvwxyz"
            return "".join(
                rng.choice(letters) if c.isalnum() and rng.random() < self.settings.share else c
                for c in text
            )

        return _map_text(value, garbled)

    def _rng(self, *key: object) -> random.Random:
        return random.Random(derive_seed("noise", self.seed, *key))


def _drop(value: Any, share: float, rng: random.Random) -> Any:
    def kept(items: Any) -> list[Any]:
        whole = list(items)
        lost = set(rng.sample(range(len(whole)), min(len(whole), round(share * len(whole)) or 1)))
        return [item for index, item in enumerate(whole) if index not in lost]

    if isinstance(value, list | tuple):
        return type(value)(kept(value)) if type(value) in (list, tuple) else kept(value)
    return _map_text(value, lambda text: " ".join(kept(text.split(" "))))


def _map_text(value: Any, change: Any) -> Any:
    """``value`` with all text in it changed, its structure kept."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_text(item, change) for item in value]
    if type(value) is tuple:
        return tuple(_map_text(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_text(item, change) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(
            value, **{name: _map_text(getattr(value, name), change) for name in names}
        )
    if isinstance(value, BaseModel):
        names = list(type(value).model_fields)
        return value.model_copy(
            update={name: _map_text(getattr(value, name), change) for name in names}
        )
    return value
