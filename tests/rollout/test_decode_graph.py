"""Passes that a GPU captures, run plainly here; captured ones are compared by ``pytest -m gpu``."""

import asyncio

import pytest
import torch

from agent_r1.errors import RunError
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.native import decode_graph, engine, scheduler
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.rollout.sampling import draw, draw_plain
from tests.families import make_family

PROMPT = [7 * i % 97 for i in range(150)]


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(engine, "SHARE_OF_FREE", 1e-3)


def sample(policy, samplings, *, later=0):
    """One turn for each sampling; the last ``later`` sessions ask when the first is done."""
    native = NativeEngine(NativeEngine.Settings(patience=0.0, cache="slots"), policy)

    async def everything():
        sessions = [native.session(number) for number in range(len(samplings))]
        first = asyncio.Event()

        async def one(number):
            if number >= len(samplings) - later:
                await first.wait()
            action = await sessions[number].generate(
                [*PROMPT, number], samplings[number], seed=number
            )
            first.set()
            sessions[number].close()
            return action

        return await asyncio.gather(*map(one, range(len(samplings))))

    return asyncio.run(everything()), native.report()


def test_all_passes_but_those_with_new_sessions_are_of_few_sizes(monkeypatch):
    made = []
    real = decode_graph._Pass.__init__

    def noted(self, policy, cache, memory, rows, keys):
        made.append((rows, keys))
        real(self, policy, cache, memory, rows, keys)

    monkeypatch.setattr(decode_graph._Pass, "__init__", noted)
    entered = []
    compute = scheduler.Scheduler._compute
    monkeypatch.setattr(
        scheduler.Scheduler, "_compute", lambda self, *x: entered.append(1) or compute(self, *x)
    )
    _, report = sample(make_family("llama"), [Sampling(4 + 20 * n, ()) for n in range(6)])
    assert len(entered) == 1
    assert report["passes"] == 104
    assert made == [(16, 256), (4, 256), (1, 256)]


def test_who_comes_later_waits_for_a_few_passes_and_gets_the_same(monkeypatch):
    policy = make_family("llama")
    samplings = [Sampling(3, ()), Sampling(60, ()), Sampling(5, ())]
    together, _ = sample(policy, samplings)
    entered, run = [], scheduler.Scheduler.run

    def noted(self, requests, counters):
        before = {session for session in requests if not requests[session].token_ids}
        done = run(self, requests, counters)
        entered.append(sum(1 for session in before if requests[session].token_ids))
        return done

    monkeypatch.setattr(scheduler.Scheduler, "run", noted)
    apart, report = sample(policy, samplings, later=1)
    assert [a.token_ids for a in apart] == [a.token_ids for a in together]
    assert report["passes"] == 60
    assert [number for number, count in enumerate(entered) if count] == [0, 9]


@pytest.mark.parametrize("other", [{"top_p": 0.5}, {"top_k": 3}])
def test_truncated_sampling_takes_the_plain_way(other, monkeypatch):
    monkeypatch.setattr(decode_graph._Pass, "run", None)
    actions, _ = sample(make_family("llama"), [Sampling(5, (), **other)])
    assert len(actions[0].token_ids) == 5


def test_a_pass_draws_what_draw_draws():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(64, 1000, generator=generator)
    logits[3, 7] = float("-inf")
    uniforms = torch.rand(64, dtype=torch.float64, generator=generator)
    temperatures = [(0.0, 0.7, 1.0)[i % 3] for i in range(64)]
    samplings = [Sampling(1, (), temperature=t) for t in temperatures]
    found = draw_plain(
        logits.clone(),
        uniforms,
        torch.tensor([t or 1.0 for t in temperatures]),
        torch.tensor([t == 0.0 for t in temperatures]),
    )
    token_ids, logprobs, entropies = draw(logits, uniforms.tolist(), samplings)
    assert found[:, 0].long().tolist() == token_ids
    assert torch.allclose(found[:, 1], torch.tensor(logprobs).double(), atol=1e-5)
    assert torch.allclose(found[:, 2], torch.tensor(entropies).double(), atol=1e-5)
    assert found[:, 3].isfinite().all()


def test_output_that_is_not_finite_is_an_error():
    policy = make_family("llama")
    layer = policy.base.get_output_embeddings()
    calls = []

    def break_later(module, inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) > 2 else output

    layer.register_forward_hook(break_later)
    with pytest.raises(RunError, match="not finite"):
        sample(policy, [Sampling(9, ())])


def test_a_row_without_a_sequence_writes_to_nobodys_slot():
    """Five sequences leave one by one and come back; rows that are left hold nothing of theirs."""
    policy = make_family("llama")
    samplings = [Sampling(3 + 2 * n, ()) for n in range(6)]
    alone = [sample(policy, samplings[: n + 1])[0][n] for n in (3, 5)]
    together, _ = sample(policy, samplings)
    for expected, found in zip(alone, (together[3], together[5]), strict=True):
        assert found.token_ids == expected.token_ids
        assert torch.allclose(
            torch.tensor(found.logprobs), torch.tensor(expected.logprobs), atol=1e-4
        )


def test_the_table_follows_the_sequences(monkeypatch):
    """Row by row as if it were written anew each time."""
    checked = []
    fill = decode_graph._Pass._fill_table

    def compared(self, sequences):
        fill(self, sequences)
        expected = torch.zeros_like(self._table)
        for row, sequence in enumerate(sequences):
            slots = torch.tensor(decode_graph.path_slots(sequence))[: expected.shape[1]]
            expected[row, : len(slots)] = slots
        assert torch.equal(self._table, expected)
        checked.append(1)

    monkeypatch.setattr(decode_graph._Pass, "_fill_table", compared)
    sample(make_family("llama"), [Sampling(4 + 20 * n, ()) for n in range(6)], later=2)
    assert len(checked) > 50
