"""One batch of the native engine: prefill what is not cached, then sample token by token until all
rows are done.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from agent_r1.policy import Policy, token_logprobs
from agent_r1.rollout.native import NativeSession as Session
from agent_r1.rollout.native import Request
from agent_r1.types import Action


@torch.inference_mode()
def sample(
    policy: Policy, sessions: list[Session], requests: list[Request], *, version: int
) -> list[Action]:
    """Serves all requests together; the keys and values go back to the sessions."""
    batch = _Batch.start(policy, sessions, requests)
    while batch.rows:
        batch.sample_next()
        if 2 * sum(not row.finished for row in batch.rows) <= len(batch.rows):
            batch.retire()
        if batch.rows:
            batch.forward_sampled()
    by_session = {row.session: row for row in batch.retired}
    return [by_session[session].action(version) for session in sessions]


@dataclass
class _Row:
    """One sequence that is being sampled."""

    session: Session
    request: Request
    uniforms: np.ndarray[Any, np.dtype[np.float64]]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        return (
            self.token_ids[-1:] != [] and self.token_ids[-1] in self.request.sampling.stop_token_ids
        )

    @property
    def finished(self) -> bool:
        return self.stopped or len(self.token_ids) == self.request.sampling.max_tokens

    def action(self, version: int) -> Action:
        return Action(
            tuple(self.token_ids),
            tuple(self.logprobs),
            tuple(self.entropies),
            version,
            "stop" if self.stopped else "length",
        )


class _Batch:
    """Rows that share forward passes. B rows; the cache has K slots, of which ``mask`` says which
    are real.
    """

    def __init__(
        self,
        policy: Policy,
        rows: list[_Row],
        mask: Tensor,
        cache: DynamicCache,
        keep_cache: bool,
    ) -> None:
        self.policy = policy
        self.rows = rows
        self.retired: list[_Row] = []
        self.mask = mask
        self.cache = cache
        self.keep_cache = keep_cache
        self.logits: Tensor
        temperatures = [row.request.sampling.temperature for row in rows]
        assert len(set(temperatures)) == 1, "one batch, one temperature"
        self.temperature = temperatures[0]

    @classmethod
    def start(cls, policy: Policy, sessions: list[Session], requests: list[Request]) -> _Batch:
        """Prefills what the sessions' caches do not hold. Layout of a row: padding, cached,
        padding, new.
        """
        rows, kept, new = [], [], []
        for session, request in zip(sessions, requests, strict=True):
            rng = np.random.default_rng(request.seed)
            rows.append(_Row(session, request, rng.random(request.sampling.max_tokens)))
            keep = _common_prefix(session.cached_ids, request.prefix[:-1])
            session.cache = [(k[:, :keep], v[:, :keep]) for k, v in session.cache]
            kept.append(keep)
            new.append(request.prefix[keep:])
        num_kept, num_new = max(kept), max(map(len, new))
        ids = torch.zeros(len(rows), num_new, dtype=torch.long)
        positions = torch.zeros_like(ids)
        mask = torch.zeros(len(rows), num_kept + num_new, dtype=torch.long)
        for row, (keep, tokens) in enumerate(zip(kept, new, strict=True)):
            ids[row, num_new - len(tokens) :] = torch.tensor(tokens)
            positions[row, num_new - len(tokens) :] = torch.arange(keep, keep + len(tokens))
            mask[row, num_kept - keep : num_kept] = 1
            mask[row, num_kept + num_new - len(tokens) :] = 1
        cache = DynamicCache(config=policy.model.config)
        # With padding between cached and new tokens a sliding window would be too short.
        keep_cache = all(type(layer) is DynamicLayer for layer in cache.layers)
        cache.layers = [
            _Growing() if type(layer) is DynamicLayer else layer for layer in cache.layers
        ]
        if num_kept:
            for layer in range(policy.model.config.num_hidden_layers):
                _fill(cache, layer, [session.cache for session in sessions], num_kept)
        batch = cls(policy, rows, mask.to(policy.device), cache, keep_cache)
        batch._forward(ids, positions)
        return batch

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        output = self.policy.model(
            input_ids=ids.to(self.policy.device),
            position_ids=positions.to(self.policy.device),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]

    def sample_next(self) -> None:
        """Draws the next token of every unfinished row from its own stream of uniform numbers."""
        if self.temperature == 0.0:
            token_ids = self.logits.argmax(-1)
        else:
            steps = [min(len(row.token_ids), len(row.uniforms) - 1) for row in self.rows]
            u = torch.tensor([row.uniforms[i] for row, i in zip(self.rows, steps, strict=True)])
            token_ids = _inverse_cdf(self.logits / self.temperature, u.to(self.logits.device))
        logprobs, entropies = token_logprobs(self.logits, token_ids, self.temperature)
        drawn = zip(token_ids.tolist(), logprobs.tolist(), entropies.tolist(), strict=True)
        for row, (token_id, logprob, entropy) in zip(self.rows, drawn, strict=True):
            if not row.finished:
                row.token_ids.append(token_id)
                row.logprobs.append(logprob)
                row.entropies.append(entropy)

    def forward_sampled(self) -> None:
        """Runs the tokens just drawn; finished rows run along, their slots masked."""
        real = torch.tensor([[not row.finished] for row in self.rows], dtype=torch.long)
        self.mask = torch.cat([self.mask, real.to(self.mask.device)], dim=1)
        ids = torch.tensor([[row.token_ids[-1]] for row in self.rows])
        positions = [[len(row.request.prefix) + len(row.token_ids) - 1] for row in self.rows]
        self._forward(ids, torch.tensor(positions))

    def retire(self) -> None:
        """Takes finished rows out, their keys and values back to their sessions."""
        for index, row in enumerate(self.rows):
            if not row.finished:
                continue
            self.retired.append(row)
            row.session.cached_ids, row.session.cache = [], []
            if self.keep_cache:
                slots = self.mask[index].nonzero().squeeze(-1)
                # Iterating gives (keys, values, window) of each layer, (B, heads, K, width).
                row.session.cache = [
                    (k[index][:, slots], v[index][:, slots]) for k, v, *_ in self.cache
                ]
                row.session.cached_ids = (row.request.prefix + row.token_ids)[: len(slots)]
        active = [index for index, row in enumerate(self.rows) if not row.finished]
        self.rows = [self.rows[index] for index in active]
        if active:
            chosen = torch.tensor(active, device=self.mask.device)
            self.mask = self.mask[chosen]
            self.logits = self.logits[chosen]
            self.cache.batch_select_indices(chosen)


class _Growing(DynamicLayer):
    """A layer of the cache with room to grow; the library's own copies all of it at every token."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the library's
        self._room: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        size = used + key_states.shape[2]
        fits = self._room is not None and self._room[0].shape[2] >= size
        if self._room is None or not fits or len(self._room[0]) != len(key_states):
            batch, heads, _, width = key_states.shape
            rooms = [key_states.new_empty(batch, heads, size + 64, width) for _ in range(2)]
            for room, old in zip(rooms, (self.keys, self.values), strict=True):
                if old is not None and used:
                    room[:, :, :used] = old
            self._room = rooms[0], rooms[1]
        self._room[0][:, :, used:size], self._room[1][:, :, used:size] = key_states, value_states
        self.keys, self.values = self._room[0][:, :, :size], self._room[1][:, :, :size]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._room = None


def _common_prefix(a: list[int], b: list[int]) -> int:
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def _fill(
    cache: DynamicCache, layer: int, kept: list[list[tuple[Tensor, Tensor]]], num_kept: int
) -> None:
    """Puts the sessions' keys and values of one layer into the batch's cache, padded on the
    left.
    """
    example = next(session[layer][0] for session in kept if session)
    heads, _, width = example.shape
    keys = example.new_zeros(len(kept), heads, num_kept, width)
    values = torch.zeros_like(keys)
    for row, session in enumerate(kept):
        if session:
            k, v = session[layer]
            keys[row, :, num_kept - k.shape[1] :] = k
            values[row, :, num_kept - v.shape[1] :] = v
    cache.update(keys, values, layer)


def _inverse_cdf(logits: Tensor, u: Tensor) -> Tensor:
    """Samples (B,) from softmax of (B, V) logits with one uniform number in [0, 1) each."""
    cdf = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    index = torch.searchsorted(cdf, (u * cdf[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    return index.clamp(max=logits.shape[-1] - 1)
