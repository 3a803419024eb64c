"""What the parts share: time, models of random weights, workloads, variants, the card's peak."""

from __future__ import annotations

import copy
import dataclasses
import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import token_tree
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from agent_r1.algorithms.grpo import GRPO
from agent_r1.learner.learner import Learner
from agent_r1.learner.packed_trees import packs
from agent_r1.learner.padded_rows import rows
from agent_r1.learner.settings import LearnerSettings
from agent_r1.model.adapter import with_adapter
from agent_r1.model.policy import Policy, make_policy
from agent_r1.model.settings import LoraSettings
from agent_r1.types import Estimates, Group, Step

Item = TypeVar("Item")
Figures = dict[str, Any]
Found = Iterator[tuple[str, Any]]
"""What a part yields: names and figures."""


# Time and errors ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What the parts are told.

    Attributes:
        device: ``cuda``, or ``cpu`` to try the script.
        small: Tiny shapes.
        data: The folder with HotpotQA, if given.
        model: The model of the parts that need a real one.
        deadline: When the part should end, by ``time.monotonic``.
    """

    device: str
    small: bool
    data: Path | None
    model: str
    deadline: float

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The type that speed is measured in: on a CPU, bfloat16 is slow."""
        return torch.bfloat16 if self.cuda else torch.float32

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def tried(self, measure: Callable[[], Any], *, seconds: float = 1.0) -> Any:
        """What a measurement gives; the error that it raised; or that it was left out, as it
        would take ``seconds`` and fewer are left.
        """
        if seconds > self.left() and not self.small:
            return f"left out: about {seconds:.0f} s are needed, {max(self.left(), 0):.0f} are left"
        free()
        try:
            return measure()
        except Exception as error:
            return {"error": described(error)}
        finally:
            free()


def described(error: BaseException) -> Figures:
    """An error as plain data."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    return {"type": type(error).__name__, "message": f"{error}"[:600], "trace": trace[-2500:]}


def free() -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall seconds of a call, the card's work included."""
    sync()
    start = time.perf_counter()
    call()
    sync()
    return time.perf_counter() - start


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product, the best of ten."""
    size = 8192 if device == "cuda" else 128
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        x @ y
    return 2.0 * size**3 / min(seconds_of(lambda: x @ y) for _ in range(10))


# Variants -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A way of computing: a choice of kernels.

    Attributes:
        name: How the report calls it; ``default`` is what a run does by itself.
        learner, engine: Keys of their settings.
    """

    name: str = "default"
    learner: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)


DEFAULT = Variant()


def variants(part: str, bench: Bench) -> Sequence[Variant]:
    """What a part measures one after another, the fast first, as time may run out; the only place
    that names kernels.
    """
    if not bench.cuda:
        return [DEFAULT]
    flex, slots = {"attention": "flex"}, {"cache": "slots"}
    both = Variant("flex, slots", flex, slots)
    special = {"decode": Variant("slots", engine=slots), "exactness": both, "quickstart": both}
    return [special.get(part, Variant("flex", flex)), DEFAULT]


def labelled(name: str, variant: Variant) -> str:
    """The key of a figure: the variant is named unless it is the default."""
    return name if variant == DEFAULT else f"{name}, {variant.name}"


def shared_out(bench: Bench, items: Sequence[Item]) -> Iterator[tuple[Bench, Item]]:
    """Each item with a deadline of its own: what is left is shared among those to come."""
    for number, item in enumerate(items):
        share = bench.left() / (len(items) - number)
        yield dataclasses.replace(bench, deadline=time.monotonic() + share), item


# Models of random weights -------------------------------------------------------------------------

SHAPES = {
    "tiny": (64, 172, 2, 4, 2),
    "narrow": (448, 1216, 4, 7, 1),  # heads as those of 0.5B
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "3B": (2048, 11008, 36, 16, 2),
}
"""Width, width of the MLP, layers, heads and key-value heads of Qwen2.5, and of smaller ones."""


def vocabulary(size: str) -> int:
    return 1000 if size == "tiny" else 151_936 if size.endswith("B") else 40_000


def qwen(size: str) -> Qwen2Config:
    """The configuration of a size."""
    width, inner, layers, heads, key_heads = SHAPES[size]
    return Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary(size),
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def random_policy(
    config: PreTrainedConfig, device: str, dtype: torch.dtype, *, lora: bool = False
) -> Policy:
    """A policy of random weights without a tokenizer, the same at every call."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        if lora:
            model = with_adapter(model, LoraSettings(), None, 0)
    return make_policy(model, None)  # type: ignore[arg-type]


def in_float32(policy: Policy) -> Policy:
    """A policy of the same weights in float32: what half precision is compared with."""
    single = random_policy(policy.base.config, str(policy.device), torch.float32)
    single.model.load_state_dict(policy.model.state_dict())
    return single


# Workloads and updates ----------------------------------------------------------------------------


def workload(num_episodes: int, size: str) -> tuple[list[Group], Estimates]:
    """Long-tailed episodes of several turns as scored groups with advantages. 64 episodes have 16
    thousand tokens in a tree, 256 have 54 thousand.
    """
    most = min(40_000, vocabulary(size))
    groups, known = token_tree.groups_of(token_tree.workload(num_episodes, most))
    for trajectory in (t for group in groups for t in group.trajectories):
        trajectory.steps = [_within(step, most) for step in trajectory.steps]
    return groups, known


def _within(step: Step, most: int) -> Step:
    """A step whose action's tokens are below ``most``."""
    ids = tuple(i % most for i in step.action.token_ids)
    return dataclasses.replace(step, action=dataclasses.replace(step.action, token_ids=ids))


def make_learner(
    policy: Policy, *, tokens: int, variant: Variant = DEFAULT, **settings: Any
) -> Learner:
    """GRPO with micro-batches of so many tokens; ``settings`` are the learner's."""
    return Learner(
        policy,
        GRPO(GRPO.Settings()),
        LearnerSettings(**settings, **variant.learner),
        temperature=1.0,
        micro_batch_tokens=tokens,
    )


@contextmanager
def padded(learner: Learner, *, tokens: int) -> Iterator[None]:
    """The learner trains padded rows, as that of a model whose trees cannot be packed."""
    policy, before = learner.policy, (learner.cut, learner.micro_batch_tokens)
    policy.unpackable, learner.cut = "measured as if it were", rows
    learner.micro_batch_tokens = tokens
    try:
        yield
    finally:
        policy.unpackable = None
        learner.cut, learner.micro_batch_tokens = before


def useful_flops(policy: Policy, groups: list[Group], *, tokens: int) -> float:
    """Multiplications and additions of an update that no way of computing it on trees could leave
    out: linear layers, the logits of action tokens, attention to visible keys; forward and
    backward, nothing twice.
    """
    config = policy.base.config
    weights = sum(a * b for a, b in token_tree.linear_shapes(policy.base))
    total = 0.0
    for pack in packs(groups, max_tokens=tokens, device=torch.device("cpu")):
        # A token sees as many keys as its position says, and itself.
        pairs = int((pack.positions + 1).sum())
        logits = len(pack.action_ids) * config.vocab_size * config.hidden_size
        attention = 2 * pairs * config.hidden_size * config.num_hidden_layers
        total += 6.0 * (pack.num_tokens * weights + logits + attention)
    return total
