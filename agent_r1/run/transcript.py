"""An episode as text, for people: who said what, how it ended."""

from __future__ import annotations

from agent_r1.types import Message, Trajectory


def transcript(trajectory: Trajectory, *, max_chars: int = 600) -> str:
    """An episode as text; each message has at most ``max_chars`` characters."""
    lines = []
    for message in trajectory.prompt:
        if message.role != "system":
            lines.append(f"[{message.role}] {_said(message)[:max_chars]}")
    for step in trajectory.steps:
        lines.append(f"[agent] {_said(step.message)[:max_chars]}")
        lines += [
            f"[{message.role}] " + message.content[:max_chars].replace("\n", "\n       ")
            for message in step.observation
        ]
    outcome = trajectory.outcome
    ending = (
        f"reward {outcome.reward:g}, {'solved' if outcome.success else 'not solved'}"
        if outcome
        else trajectory.fault
    )
    return "\n".join([*lines, f"({trajectory.stop}: {ending})"])


def _said(message: Message) -> str:
    calls = [
        f"-> {getattr(call, 'name', 'malformed call')} {getattr(call, 'arguments', '')}"
        for call in message.tool_calls
    ]
    return "\n        ".join(part for part in (message.content, *calls) if part)
