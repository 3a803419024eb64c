"""The mask of blocks that the GPU's attention kernel gets, against the parts that a CPU runs."""

import random
import shutil

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention

from agent_r1.model import flex_tree
from agent_r1.model.flex_tree import BLOCK, FlexTree, padded_length
from agent_r1.model.tree_attention import PackedTree, Span

CPU = torch.device("cpu")


def random_spans(seed, *, roots=3, longest=90):
    """Trees of spans, depth first, and their number of tokens."""
    rng, spans = random.Random(seed), []

    def lay(start, position, depth):
        end, slot = start + rng.randint(1, longest), len(spans)
        spans.append(None)
        last = end
        for _ in range(rng.randint(0, 3) if depth < 3 else 0):
            last = lay(last, position + end - start, depth + 1)
        spans[slot] = Span(start, end, last, position)
        return last

    last = 0
    for _ in range(roots):
        last = lay(last, 0, 0)
    return spans, last


def visible(spans, num_tokens, window):
    """(T, T) by the parts."""
    seen = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for part in PackedTree(spans, CPU).parts(window):
        block = seen[part.q0 : part.q1, part.k0 : part.k1]
        block |= torch.ones_like(block).tril() if part.causal else True
        if part.mask is not None:
            block &= part.mask
    return seen


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [None, 1, 20, 300])
def test_a_query_sees_what_it_sees_by_parts(seed, window):
    spans, num_tokens = random_spans(seed)
    mask = FlexTree(spans, CPU).mask(window)
    length = padded_length(num_tokens)
    by_token = create_mask(mask.mask_mod, None, None, length, length, device="cpu")[0, 0]
    expected = torch.eye(length, dtype=torch.bool)  # tokens added see themselves alone
    expected[:num_tokens, :num_tokens] = visible(spans, num_tokens, window)
    assert torch.equal(by_token, expected)
    of_blocks = expected.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    partly, wholly = of_blocks.any(3).any(1), of_blocks.all(3).all(1)
    for number in range(len(partly)):
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, number)
        some = listed(mask.kv_num_blocks, mask.kv_indices, number)
        assert full <= set(wholly[number].nonzero().flatten().tolist())
        assert full | some >= set(partly[number].nonzero().flatten().tolist())
        assert not full & some


def listed(num_blocks, indices, row):
    return set(indices[0, 0, row, : num_blocks[0, 0, row]].tolist())


def test_blocks_without_a_pair_are_left_out():
    """Two branches of a long prompt: the second skips the first."""
    spans = [Span(0, 512, 1536, 0), Span(512, 1024, 1024, 512), Span(1024, 1536, 1536, 512)]
    mask = FlexTree(spans, CPU).mask(None)
    assert listed(mask.full_kv_num_blocks, mask.full_kv_indices, 11) == {0, 1, 2, 3, 8, 9, 10}
    assert listed(mask.kv_num_blocks, mask.kv_indices, 11) == {11}


def attend(tree, inputs, window):
    return tree.attend(0, *inputs, scale=0.3, window=window)


def random_inputs(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, num_tokens, 16, generator=generator) for heads in (6, 2, 2)]


@pytest.mark.parametrize("window", [None, 20])
def test_the_kernel_gives_what_the_parts_give(window, monkeypatch):
    monkeypatch.setattr(flex_tree, "_compiled", lambda: flex_attention)
    spans, num_tokens = random_spans(1, longest=30)
    inputs = random_inputs(num_tokens)
    with torch.no_grad():
        found = attend(FlexTree(spans, CPU), inputs, window)
    assert torch.allclose(found, attend(PackedTree(spans, CPU), inputs, window), atol=1e-5)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_it_is_compiled_once_for_a_length(monkeypatch):
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in (0, 1, 2):
        spans, num_tokens = random_spans(seed, roots=1, longest=6)
        assert padded_length(num_tokens) == BLOCK
        inputs = random_inputs(num_tokens, seed)
        with torch.no_grad():
            found = attend(FlexTree(spans, CPU), inputs, None)
        assert torch.allclose(found, attend(PackedTree(spans, CPU), inputs, None), atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_lengths_are_few_and_not_much_longer():
    lengths = {padded_length(n) for n in range(1, 33_000)}
    assert all(length % BLOCK == 0 for length in lengths)
    assert all(n <= padded_length(n) <= max(1.25 * n, n + BLOCK) for n in range(1, 33_000))
    assert len([length for length in lengths if 4096 < length <= 32768]) == 12
