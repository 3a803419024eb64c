"""Numbers travel by key: what one process sampled, another one trains on, bit for bit."""

import asyncio
import functools
import hashlib
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from agent_r1.algorithms import ALGORITHMS, CREDITS
from agent_r1.learner.learner import Learner
from agent_r1.learner.mask_ablation import masks_of
from agent_r1.learner.settings import LearnerSettings
from agent_r1.model.load import load_policy
from agent_r1.model.settings import ModelSettings
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.rollout.rollout import Rollout
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.types import Outcome

ALGORITHM = {
    "grpo": {"name": "grpo", "kl": {"coef": 0.1, "place": "reward"}, "importance_cap": 2.0},
    "ppo": {"name": "ppo"},
    "ppo, masks off": {"name": "ppo", "loss_mask": False, "advantage_mask": False},
}


def trained(pickled: bytes, name: str) -> tuple[str, bytes]:
    """Two updates on groups from elsewhere: a hash of all weights, and what was found out."""
    torch.set_num_threads(1)
    groups = pickle.loads(pickled)
    section = ALGORITHMS.section(ALGORITHM[name])
    algorithm = ALGORITHMS.make(section)
    credit = CREDITS.make(CREDITS.section("step"))
    policy = load_policy(ModelSettings(), seed=0)
    reference = load_policy(ModelSettings(), seed=0) if algorithm.kl else None
    settings = LearnerSettings(lr=1e-3, minibatches=2)
    learner = Learner(policy, algorithm, settings, temperature=1.0, reference=reference)
    masks = masks_of(algorithm)
    seen, known = masks.credited(groups, learner, algorithm, credit)
    for seed in range(2):
        update = learner.update(seen, known, lr=1e-3, seed=seed)
        known.ratios = known.ratios | update.ratios
    digest = hashlib.sha256()
    for value in policy.model.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest(), pickle.dumps(masks.own(groups, known).tables())


@pytest.fixture(scope="module")
def groups(base_policy, renderer):
    settings = HopWorld.Settings()
    engine = NativeEngine(NativeEngine.Settings(), base_policy)
    limits = Limits(turns=3, tokens_per_turn=48, tokens=600)
    rollout = Rollout(functools.partial(HopWorld, settings), engine, renderer, limits)
    tasks = HopWorld.tasks(settings, "train")[:3]
    groups = asyncio.run(rollout.run(tasks, attempts=3, temperature=1.0, seed=3))
    for group in groups:
        for attempt, trajectory in enumerate(group.trajectories):
            trajectory.outcome = Outcome(float(attempt == 1), attempt == 1)
    return groups


@pytest.mark.parametrize("name", ALGORITHM)
def test_groups_sent_to_another_process_give_the_same_update(groups, name):
    threads = torch.get_num_threads()
    sent = pickle.dumps(groups)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as elsewhere:
        there = elsewhere.submit(trained, sent, name)
        weights, numbers = there.result()
    try:
        here, own = trained(sent, name)
    finally:
        torch.set_num_threads(threads)
    assert weights == here
    assert pickle.loads(numbers) == pickle.loads(own)
    assert set(pickle.loads(own)["ratios"]) == {key for g in groups for key, _ in g.steps()}
