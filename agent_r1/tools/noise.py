"""Messy tools on purpose: ``[env.noise]`` makes calls fail, time out, come late or lose part of
their result, with given probabilities and from the episode's seed.

    [env.noise]
    fail = 0.1
    drop = 0.1

Injected noise is counted as ``noise/...``, apart from real faults, never trips a breaker and
never excludes an episode; the tool's policy retries such calls as usual.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from agent_r1.config.section import Section
from agent_r1.types import derive_seed

Kind = Literal["fail", "timeout", "late", "drop", "garble"]


class NoiseSettings(Section):
    """Probabilities per call; at most one kind of noise applies.

    Attributes:
        fail: The tool reports an internal error.
        timeout: The tool gives no result in time (simulated: reported at once).
        late: The result comes ``late_seconds`` late.
        drop: ``share`` of the result is missing: items of lists, words of texts.
        garble: ``share`` of its letters are replaced by others.
        share: The share of a result that ``drop`` and ``garble`` spoil.
        late_seconds: Seconds by which a ``late`` result is late.
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
            raise ValueError(f"the probabilities add up to {total:g}, more than 1")
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
        """The noise that a call meets, if any; ``call``: its number and that of the try."""
        point = self._rng("draw", *call).random()
        for kind, probability in self.settings.probabilities().items():
            point -= probability
            if point < 0:
                return kind
        return None

    def spoil(self, kind: Kind, value: Any, *call: int) -> Any:
        """The value with part of its text dropped or garbled, also within lists, dictionaries and
        records. Dataclass fields whose metadata say ``{"noise": False}`` stay unchanged.
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

    def dropped(item: Any) -> Any:
        if type(item) in (list, tuple):
            return type(item)(kept(item))
        if isinstance(item, str) and " " in item:
            return " ".join(kept(item.split(" ")))
        return item

    return dropped(value) if isinstance(value, str | list | tuple) else _in_fields(value, dropped)


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` with all text in it changed, its structure kept."""
    if isinstance(value, str):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_map_text(item, change) for item in value)
    return _in_fields(value, lambda item: _map_text(item, change))


def _in_fields(value: Any, change: Callable[[Any], Any]) -> Any:
    """A dictionary or record with each of its values changed; anything else as it is."""
    if isinstance(value, dict):
        return {key: change(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if f.init and f.metadata.get("noise", True)]
        new = {field.name: change(getattr(value, field.name)) for field in fields}
        return dataclasses.replace(value, **new)
    if isinstance(value, BaseModel):
        names = type(value).model_fields
        return value.model_copy(update={name: change(getattr(value, name)) for name in names})
    return value
