"""Policies beside which a server's actions are checked."""

import asyncio

import torch

from agent_r1.model.load import load_policy
from agent_r1.model.logprobs import token_logprobs
from agent_r1.model.settings import LoraSettings, ModelSettings
from agent_r1.rollout.engine import Sampling
from agent_r1.utils.scope import run_async


def changed(factor):
    """The tiny base with other weights."""
    policy = load_policy(ModelSettings())
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.ndim == 2:
                parameter *= factor
    return policy


def adapted(number):
    """The tiny base with as many adapters, each of which has an effect of its own."""
    policies = [load_policy(ModelSettings(lora=LoraSettings(rank=4))) for _ in range(number)]
    for seed, policy in enumerate(policies):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.1 * torch.randn_like(parameter)
    return policies


def sampled_by_each(policies):
    """A scenario in which each of them samples the same twice; gives the actions, the engine's
    report, and how many adapters the server has at the end.
    """

    async def scenario(engine):
        found = []
        for version, policy in enumerate(policies):
            if version:
                await engine.sync(policy, version)
            short = Sampling(40, (), temperature=0.8)
            found += [await engine.session().generate(list(range(5, 60)), short, 7) for _ in "ab"]
        (server,) = engine._started.result()[0].servers
        return found, engine.report(), len(server.adapters)

    return scenario


def check(policies, prefix, action, temperature=1.0, tolerance=1e-4):
    """Every token's log-probability is that of the weights that its span names."""
    ids = torch.tensor([[*prefix, *action.token_ids]])
    assert action.versions[0].start == 0 and action.versions[-1].end == len(action.token_ids)
    assert len(action.logprobs) == len(action.token_ids)
    for version, start, end in action.versions:
        with torch.inference_mode():
            logits = policies[version].model(ids).logits[0, len(prefix) - 1 : -1]
        expected = token_logprobs(logits, ids[0, len(prefix) :], temperature)[0]
        found = torch.tensor(action.logprobs)
        assert (found - expected)[start:end].abs().max() < tolerance


def played(engine, scenario, longest=1024):
    """What a scenario gives with a started engine, which is closed after it."""

    async def whole():
        try:
            await engine.start(longest)
            return await scenario(engine)
        finally:
            await engine.close()

    return run_async(whole())


async def sampled_across(engine, prefix, sampling, weights):
    """An action that was being sampled when the weights changed, and its versions' policies. When
    that is depends on the machine, so it is tried at several moments; every action is checked.
    """
    given = [weights[0]]
    for wait in (0.2, 0.1, 0.4, 0.05, 0.8, 1.6):
        running = asyncio.ensure_future(engine.session().generate(prefix, sampling, 8))
        await asyncio.sleep(wait)
        given.append(weights[len(given) % 2])
        await engine.sync(given[-1], len(given) - 1)
        action = await running
        check(given, prefix, action, sampling.temperature)
        if len(action.versions) > 1:
            return action, given
    raise AssertionError("no change of weights came while an action was sampled")
