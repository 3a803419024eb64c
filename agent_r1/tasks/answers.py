"""The final answer in what an agent wrote."""

from __future__ import annotations

import re

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def answer_in(text: str) -> str | None:
    """The text between the first answer tags, stripped; ``None`` if there are none."""
    match = _ANSWER.search(text)
    return match[1].strip() if match else None
