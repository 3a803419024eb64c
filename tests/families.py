"""Small random models of every family that is supported, and random trees of tokens."""

from __future__ import annotations

import dataclasses
import random

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agent_r1.algorithms.base import Algorithm
from agent_r1.learner.credit_assignment import loss_weights, steps_of
from agent_r1.learner.micro_batch import Batch
from agent_r1.model.policy import Policy, make_policy
from agent_r1.types import (
    Action,
    Estimates,
    Group,
    Message,
    Outcome,
    Step,
    StopReason,
    Task,
    Trajectory,
)

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,  # so that attention is not uniform and errors show
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _families() -> dict[str, PreTrainedModel]:
    sliding = {"sliding_window": 7}
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
        "qwen2-sliding": Qwen2ForCausalLM(
            Qwen2Config(**SIZES, **sliding, use_sliding_window=True, max_window_layers=1)
        ),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES)),
        "mistral": MistralForCausalLM(MistralConfig(**SIZES, **sliding)),
        "gemma3": Gemma3ForCausalLM(
            Gemma3TextConfig(
                **SIZES,
                **sliding,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            )
        ),
    }


FAMILIES = ("llama", "qwen2", "qwen2-sliding", "qwen3", "mistral", "gemma3")


def make_family(name: str) -> Policy:
    """A random policy without a tokenizer, the same at every call."""
    torch.manual_seed(0)
    return make_policy(_families()[name], None)  # type: ignore[arg-type]


def random_groups(seed: int = 0, *, num_groups: int = 2, rewrite: bool = True) -> list[Group]:
    """Groups with shared prompts, several turns, rewritten contexts and unequal lengths, scored."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high)))

    system = ids(20, 20)
    groups = []
    for number in range(num_groups):
        prompt = system + ids(3, 12)
        trajectories = []
        for attempt in range(3):
            steps: list[Step] = []
            for turn in range(rng.randint(1, 4)):
                action_ids = ids(1, 9)
                count = len(action_ids)
                action = Action(
                    action_ids,
                    tuple(rng.uniform(-5, -1) for _ in range(count)),
                    (1.0,) * count,
                    (),
                    "stop",
                )
                observed = ids(1, 12)
                rng.uniform(-1, 1)  # so that a seed gives what it always gave
                context_ids = None
                if rewrite and turn and rng.random() < 0.5:  # keeps the first turn, or less
                    first = steps[0].action.token_ids + steps[0].observation_ids
                    kept = rng.choice([prompt + first, prompt, prompt[:-2], ()])
                    context_ids = kept + ids(1, 10)
                steps.append(
                    Step(
                        action,
                        Message("assistant", ""),
                        observation_ids=observed,
                        context_ids=context_ids,
                    )
                )
            steps[-1] = dataclasses.replace(steps[-1], observation_ids=())
            outcome = Outcome(rng.random(), False)
            trajectories.append(
                Trajectory("t", "", attempt, (), prompt, steps, StopReason.DONE, outcome)
            )
        groups.append(Group(Task(f"t{number}", "?"), trajectories, number))
    return groups


def random_estimates(groups: list[Group], seed: int = 0) -> Estimates:
    """One advantage for all tokens of a step."""
    rng, known = random.Random(seed), Estimates()
    for group in groups:
        for key, step in group.steps():
            known.advantages[key] = (rng.uniform(-1, 1),) * len(step.action.token_ids)
    return known


def random_batch(groups: list[Group], algorithm: Algorithm) -> Batch:
    """The groups as one mini-batch with random advantages."""
    known = random_estimates(groups)
    return Batch(steps_of(groups), known, loss_weights(groups, algorithm))
