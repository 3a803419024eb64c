"""Run by ``test_pretended_gpu.py`` in a process of its own: every family's forward passes on
``cuda:0``, which a CPU build of PyTorch pretends to have. Tensors have shapes, types and devices
but no content; to mix devices is an error there, and so is to ask a tensor for its content, which
on a GPU would wait for it. Prints one line for each model that was run.
"""

import sys

import peft
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from agent_r1.algorithms.ppo import PPO
from agent_r1.learner.learner import Learner
from agent_r1.learner.micro_batch import Actions
from agent_r1.learner.packed_trees import packs
from agent_r1.learner.settings import LearnerSettings
from agent_r1.learner.sums import Sums
from agent_r1.model.flex_tree import FlexTree
from agent_r1.model.policy import Policy
from agent_r1.model.sampling_weights import SamplingWeights
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.native import decode_graph, scheduler
from agent_r1.rollout.native.request import Counters, Request
from tests.families import FAMILIES, make_family, random_batch, random_groups

GPU = torch.device("cuda")
DRAWN: list[int] = []


def pretended(config, adapter, dtype):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if adapter:
            lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
            model = peft.get_peft_model(model, lora)
    moved = {}  # tied weights stay tied
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)
                    if isinstance(tensor, torch.nn.Parameter):
                        empty = torch.nn.Parameter(empty, tensor.requires_grad)
                    held[name] = moved.setdefault(id(tensor), empty)
    return Policy(model.eval(), None)


def learn(policy, attention):
    """The learner's forward pass up to the loss, with a critic, for one micro-batch."""
    algorithm = PPO(PPO.Settings())
    learner = Learner(policy, algorithm, LearnerSettings(attention=attention), temperature=0.7)
    groups = random_groups(num_groups=1)
    batch = random_batch(groups, algorithm)
    for key, step in batch.steps.items():
        batch.known.values[key] = (0.0,) * (len(step.action.token_ids) + 1)
        batch.known.value_targets[key] = (0.0,) * len(step.action.token_ids)
    for micro in packs(groups, max_tokens=1000, device=GPU, ends=True, attention=attention):
        actions = Actions.of(micro.keys, batch, GPU)
        with policy.packed():
            found = micro.forward(policy, 0.7)
        values = learner._values(found.before)
        sums = Sums()
        loss = learner._policy_loss(found, actions, sums)
        learner._note(micro, actions, found.logprobs, sums)  # asks for no number
        loss = loss + algorithm.value_loss(values, actions.old_values, actions.value_targets)
        assert loss.device.type == learner._values(found.after).device.type == "cuda"


def sample(policy):
    """Two sessions with a shared prompt: a pass that they enter, then passes to be captured."""

    class Session:
        def __init__(self, number):
            self.number = number

    prompt = [7 * i % 97 for i in range(400)]
    sampling = Sampling(max_tokens=6, stop_token_ids=())
    requests = {
        Session(n): Request([*prompt, n, 5], sampling, n, None)  # type: ignore[arg-type]
        for n in range(2)
    }
    serving = scheduler.Scheduler(policy, SamplingWeights(policy), 10_000, slots=True)
    for _ in range(4):
        serving.run(requests, Counters())
    assert serving._graphs is not None and len(serving._graphs._passes) == 1
    assert all(len(request.token_ids) == 4 for request in requests.values())


def without_content(data, *, dtype=None, device="cpu", made=torch.tensor):
    """In place of ``torch.tensor``, whose results a CPU build does not let go on from."""
    like = made(data, dtype=dtype)
    on_cpu = torch.device(device).type == "cpu"
    return like if on_cpu else torch.empty(like.shape, dtype=like.dtype, device=device)


class Indexing(TorchFunctionMode):
    """Python's ``x[...]`` by operators: PyTorch's own way asks for a device's guard, which a CPU
    build lacks. So do a few more methods.
    """

    OPERATORS = {  # noqa: RUF012
        torch.Tensor.copy_: torch.ops.aten.copy_,
        torch.Tensor.__invert__: torch.ops.aten.bitwise_not,
        torch.Tensor.contiguous: torch.ops.aten.contiguous,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            return self.of(*args)
        if function is torch.Tensor.__setitem__:
            view, indices = self.taken_apart(*args[:2])
            if indices:
                return torch.ops.aten.index_put_(view, indices, args[2])
            fill = (
                torch.ops.aten.copy_ if isinstance(args[2], torch.Tensor) else torch.ops.aten.fill_
            )
            return fill(view, args[2])
        if function is torch.Tensor.to and isinstance(args[1:2] and args[1], torch.device):
            return torch.empty(args[0].shape, dtype=args[0].dtype, device=args[1])
        if function in self.OPERATORS:
            return self.OPERATORS[function](*args)
        return function(*args, **(kwargs or {}))

    def of(self, tensor, key):
        view, indices = self.taken_apart(tensor, key)
        return torch.ops.aten.index.Tensor(view, indices) if indices else view

    def taken_apart(self, tensor, key):
        """The part by slices, and what is left: tensors of indices."""
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in [k for k in keys if not isinstance(k, torch.Tensor)]:
            at = next(i for i, k in enumerate(keys) if k is Ellipsis)
            missing = tensor.dim() - sum(k is not None for k in keys) + 1
            keys[at : at + 1] = [slice(None)] * missing
        dim, indices = 0, []
        for k in keys:
            if isinstance(k, int):
                tensor = tensor.select(dim, k)
                continue
            if k is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(k, slice):
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, k.start, k.stop, k.step or 1)
            elif isinstance(k, list):
                k = torch.empty(len(k), dtype=torch.long, device=tensor.device)
            indices.append(k if isinstance(k, torch.Tensor) else None)
            dim += 1
        return tensor, indices if any(i is not None for i in indices) else []


def drawn(logits, uniforms, samplings):
    assert logits.device.type == "cuda"
    return [3] * len(uniforms), [-1.0] * len(uniforms), [1.0] * len(uniforms)


def contents(tensor):
    """What a pass brings back: once, from the GPU."""
    assert tensor.device.type == "cuda"
    DRAWN.append(1)
    return [[3.0, -1.0, 1.0, 0.0]] * tensor.shape[0]


def main():
    configs = {name: make_family(name).model.config for name in FAMILIES}
    scheduler.draw = drawn
    decode_graph.Memory = lambda: None  # nothing is captured: passes run plainly
    torch.nn.init.kaiming_uniform_ = lambda *_, **__: None  # would draw from the GPU's generator
    torch.nn.init.uniform_ = lambda *_, **__: None
    FlexTree.attend = _masks_only
    torch.tensor = without_content
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Indexing():
        FakeTensor.tolist = contents
        for family, config in configs.items():
            for adapter, dtype in ((False, torch.float32), (True, torch.bfloat16)):
                policy = pretended(config, adapter, dtype)
                learn(policy, "parts")
                learn(policy, "flex")
                sample(policy)
                print(family, "adapter" if adapter else "whole", dtype, flush=True)
    assert len(DRAWN) == 3 * 2 * len(configs)  # one transfer a captured pass
    return 0


def _masks_only(self, layer, query, key, value, *, scale, window):
    """In place of the kernel, which is not compiled without a GPU."""
    mask = self.mask(window)
    assert {mask.kv_indices.device.type, mask.q_indices.device.type} == {query.device.type}
    return torch.empty_like(query)


if __name__ == "__main__":
    sys.exit(main())
