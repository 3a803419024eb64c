"""PyTorch's kernel, given to all threads in equal pieces, against plain matrix products."""

import pytest
import torch

from agent_r1.model import attention_kernels


@pytest.mark.parametrize("queries", [63, 128, 501])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_queries_cut_for_the_threads_give_the_same(queries, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(queries)
    shapes = [(9, queries), (3, 77), (3, 77), (9, queries)]
    query, key, value, grad = (torch.randn(1, h, n, 8, generator=generator) for h, n in shapes)

    def both():
        out, lse = attention_kernels.attend(query, key, value, scale=0.3)
        back = attention_kernels.attend_backward(grad, query, key, value, out, lse, scale=0.3)
        return out, lse, *back

    rows = query.view(1, 3, -1, 8)
    cut = attention_kernels._pieces(rows, False, None) > 1
    assert cut == (threads > 1 and rows.shape[2] >= 64 * threads)
    ours = both()
    monkeypatch.setattr(attention_kernels, "_kernel_works", lambda: False)
    for found, expected in zip(ours, both(), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
