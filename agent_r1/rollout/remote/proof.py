"""The proof at start-up: a server samples what the learner would, or the option is named that must
be changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from agent_r1.errors import ConfigError
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.model_thread import EngineThread
from agent_r1.rollout.remote.wire import Answer, Facts, RefusedError
from agent_r1.utils.log import LOG
from agent_r1.utils.text import describe

if TYPE_CHECKING:
    from agent_r1.model.policy import Policy
    from agent_r1.rollout.remote.engine import RemoteEngine
    from agent_r1.rollout.remote.server import Server
    from agent_r1.rollout.remote.weights import WeightFolders

NUM_TOKENS = 64
TEMPERATURE = 0.7
TOLERANCES = {"float32": 2e-3, "float16": 0.03, "bfloat16": 0.1}
"""Largest mean difference (nats) of log-probabilities by the coarser of the two number formats."""
SEED = 20


async def must_be_right(engine: RemoteEngine, server: Server, folders: WeightFolders) -> None:
    """Samples and compares; raises ``ConfigError`` with the option to change."""
    wire, policy = engine.wire, engine.policy
    cures = wire.cures

    def wrong(what: str, option: str) -> ConfigError:
        return ConfigError(
            f"engine {engine.settings.name!r}, server {server.url}: {what}; {option}"
        )

    try:
        facts = await wire.facts(server)
    except (LookupError, TypeError, AttributeError) as error:
        what = f"what it says of itself is not understood ({describe(error)})"
        raise wrong(what, f"look at {cures['version']}") from error
    ours = str(policy.base.dtype).removeprefix("torch.")
    _declared(facts, engine.longest, ours, cures, wrong)
    size = policy.base.config.get_text_config().vocab_size
    prompt = [(7 * i + 3) % size for i in range(1, 40)]
    sampling = Sampling(NUM_TOKENS, (), temperature=TEMPERATURE)
    try:
        first, again = [
            await wire.generate(server, prompt, sampling, SEED, session="") for _ in range(2)
        ]
    except (LookupError, TypeError, AttributeError) as error:
        raise wrong(
            f"its answers are not understood ({describe(error)})", f"look at {cures['version']}"
        ) from error
    except RefusedError as error:
        options = f"look at {cures['sampling']}, {cures['model']}"
        raise wrong(f"it refuses to sample: {error}", options) from error
    if len(first.token_ids) != NUM_TOKENS or len(first.logprobs) != NUM_TOKENS:
        raise wrong(
            f"{len(first.token_ids)} tokens with {len(first.logprobs)} log-probabilities, "
            f"{NUM_TOKENS} were asked for",
            f"look at {cures['truncation']}",
        )
    if max(first.token_ids) >= size:
        raise wrong("a token that the policy does not have", f"look at {cures['model']}")
    known = {version for version, _, _ in first.spans}
    if known != {folders.name(folders.present)}:
        raise wrong(
            f"its tokens are of weights {sorted(known)}, not of those it was given",
            f"look at {cures['version']}",
        )
    same = NUM_TOKENS if ours == "float32" else 1  # the second finds its prompt computed
    if first.token_ids[:same] != again.token_ids[:same]:
        raise wrong("the same seed gives other tokens", f"look at {cures['seed']}")
    learner = await EngineThread().run(functools.partial(_logprobs, policy, prompt, first))
    _compare(learner, first, TOLERANCES.get(ours, 0.1), cures, wrong)
    LOG.info(
        f"engine {engine.settings.name!r}: log-probabilities of {NUM_TOKENS} tokens by "
        f"{server.url} and by the learner differ by {_mean(learner[0], first):.1e} on average"
    )


def _declared(
    facts: Facts,
    longest: int | None,
    dtype: str,
    cures: Mapping[str, str],
    wrong: Callable[[str, str], ConfigError],
) -> None:
    """Raises if what the server says of itself does not fit."""
    if facts.longest is not None and longest and facts.longest < longest:
        raise wrong(
            f"contexts of at most {facts.longest} tokens, limits.tokens is {longest}",
            f"start it with {cures['longest']} {longest}",
        )
    if facts.dtype is not None and facts.dtype != dtype:
        raise wrong(
            f"its weights are {facts.dtype}, the policy's {dtype}",
            f"start it with {cures['dtype']} {dtype}, or set model.dtype",
        )


def _compare(
    learner: tuple[list[float], list[float]],
    first: Answer,
    tolerance: float,
    cures: Mapping[str, str],
    wrong: Callable[[str, str], ConfigError],
) -> None:
    """Raises for the likeliest reason why the log-probabilities are not the learner's."""
    tempered, plain = learner
    if (error := _mean(tempered, first)) <= tolerance:
        return
    differ = f"log-probabilities differ from the learner's by {error:.3g} on average"
    if _mean(plain, first) <= tolerance:
        raise wrong(
            f"{differ}: they are those before temperature", f"start it with {cures['logprobs']}"
        )
    gains = [theirs - ours for theirs, ours in zip(first.logprobs, tempered, strict=True)]
    if min(gains) > -tolerance:
        raise wrong(
            f"{differ}: improbable tokens are left out (top-k, top-p)",
            f"start it with {cures['truncation']}",
        )
    raise wrong(f"{differ}: it has another model or other weights", f"look at {cures['model']}")


def _mean(ours: list[float], answer: Answer) -> float:
    pairs = zip(ours, answer.logprobs, strict=True)
    return sum(abs(a - b) for a, b in pairs) / len(ours)


def _logprobs(policy: Policy, prompt: list[int], answer: Answer) -> tuple[list[float], list[float]]:
    """The learner's log-probabilities of sampled tokens, with temperature and without."""
    import torch

    from agent_r1.model.logprobs import token_logprobs

    ids = torch.tensor([[*prompt, *answer.token_ids]], device=policy.device)
    with torch.inference_mode():
        logits = policy.model(ids).logits[0, len(prompt) - 1 : -1]
        sampled = ids[0, len(prompt) :]
        found = [token_logprobs(logits.clone(), sampled, t)[0].tolist() for t in (TEMPERATURE, 1.0)]
    return found[0], found[1]
