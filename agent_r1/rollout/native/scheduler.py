"""One pass of the native engine: sessions that take part, tokens computed, tokens sampled."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from agent_r1.model.policy import Policy
from agent_r1.model.sampling_weights import SamplingWeights
from agent_r1.rollout.native.decode_graph import DecodeGraphs
from agent_r1.rollout.native.forward_pass import ForwardPass, Run
from agent_r1.rollout.native.kv_cache import (
    MIN_PREFIX,
    CachedSequence,
    KVCache,
    SharedPrefix,
    block_size,
)
from agent_r1.rollout.native.request import Counters, Request, Stop
from agent_r1.rollout.native.slot_cache import SlotCache
from agent_r1.rollout.native.slot_pass import SlotPass
from agent_r1.rollout.sampling import draw, stop_of
from agent_r1.tree import MIN_SHARED, common_prefix

if TYPE_CHECKING:
    from agent_r1.rollout.native.engine import NativeSession as Session

MAX_NEW_TOKENS = 4096
"""New tokens of a pass, unless one session alone has more; bounds its memory."""
ENTER_EVERY = 8
"""With captured passes sessions enter together, after so many: entering costs as much as they."""


class Scheduler:
    """The sessions that the engine serves, and their sequences in its cache.

    Args:
        policy: Its model is run.
        weights: What its linear layers compute with.
        budget: Most tokens in the KV cache.
        slots: Whether they lie in slots, not in blocks.
    """

    def __init__(
        self, policy: Policy, weights: SamplingWeights, budget: int, *, slots: bool = False
    ) -> None:
        self._policy = policy
        self._weights = weights
        like = torch.empty(0, dtype=policy.base.dtype, device=policy.device)
        self.cache, self._graphs = KVCache(policy.cache_shape, like), None
        if slots:
            self.cache = cache = SlotCache(policy.cache_shape, like, budget)
            self._graphs = DecodeGraphs(policy, cache)
        self._since_entry = 0
        self._budget = budget
        self._sequences: dict[Session, CachedSequence] = {}
        self._dropped: set[Session] = set()

    @torch.inference_mode()
    def close(self, sessions: Sequence[Session]) -> None:
        """Frees the sessions' sequences; shared prefixes stay as long as there is room."""
        for session in sessions:
            if sequence := self._sequences.pop(session, None):
                self.cache.close(sequence)
            self._dropped.discard(session)

    @torch.inference_mode()
    def run(self, requests: Mapping[Session, Request], counters: Counters) -> dict[Session, Stop]:
        """One pass: a token more for every request that fits in memory. Returns those that are
        done, and why.
        """
        sessions = sorted(requests, key=lambda session: session.number)
        running = [s for s in sessions if requests[s].is_sampling]
        entering, done = self._admit(sessions, requests) if self._may_enter(running) else ([], {})
        served = [*running, *entering]
        at_work = set(served)
        for (
            session,
            sequence,
        ) in self._sequences.items():  # in order: places in blocks decide last bits
            if session not in at_work:
                self.cache.park(sequence)
        runs = self._enter(entering, requests, counters)
        for session in running:
            own = self._sequences[session]
            self.cache.place(own, len(own.token_ids) + 1, most=len(own.token_ids) + 1)
        if not served:
            return done
        counters.passes += 1
        counters.sampled += len(served)
        self._since_entry = 0 if entering else self._since_entry + 1
        if self._graphs and not entering and self._graphs.serves([requests[s] for s in served]):
            self._graphs.run([self._sequences[s] for s in served], [requests[s] for s in served])
        else:
            self._compute(served, runs, requests, counters)
        return done | {s: stop for s in served if (stop := self._stop(requests[s])) is not None}

    def _may_enter(self, running: Sequence[Session]) -> bool:
        return self._graphs is None or not running or self._since_entry >= ENTER_EVERY

    def _compute(
        self,
        served: Sequence[Session],
        runs: Sequence[Run],
        requests: Mapping[Session, Request],
        counters: Counters,
    ) -> None:
        """Runs new tokens and the last ones of those who are sampling, and draws the next ones."""
        running = [s for s in served if requests[s].is_sampling]
        sampling = [(self._sequences[s], requests[s].token_ids[-1]) for s in running]
        cache, device = self.cache, self._policy.device
        lay = SlotPass if isinstance(cache, SlotCache) else ForwardPass
        forward: SlotPass | ForwardPass = lay(cache, sampling, runs)  # type: ignore[arg-type]
        counters.prefilled += forward.num_tokens - len(running)
        with self._weights.used():
            with self._policy.packed():
                hidden = self._policy.hidden(
                    torch.tensor(forward.token_ids, device=device),
                    torch.tensor(forward.positions, device=device),
                    forward,
                )
            forward.commit()
            last = [forward.last[self._sequences[s]] for s in served]
            self._draw([requests[s] for s in served], hidden, last)

    # Who takes part ----------------------------------------------------------------------------

    def _admit(
        self, sessions: Sequence[Session], requests: Mapping[Session, Request]
    ) -> tuple[list[Session], dict[Session, Stop]]:
        """The sessions that begin to sample in this pass, and those stopped for lack of memory.

        Sessions served before come first, then new ones; each has room for all that it may
        sample. For room, unused prefixes are evicted, then sequences of sessions that wait
        for tools.
        """
        active = {s for s in sessions if requests[s].is_sampling}
        asking = [s for s in sessions if s not in active]
        known = self._sequences.keys() | self._dropped
        asking.sort(key=lambda s: (s not in known, s.number))
        entering: list[Session] = []
        done: dict[Session, Stop] = {}
        num_new = 0
        previous: Sequence[int] = ()
        for session in asking:
            request = requests[session]
            request.limit = request.sampling.max_tokens
            sequence, prefix = self._reserve(session, request)
            computed = sequence.end if sequence else prefix.end if prefix else 0
            computed = max(computed, common_prefix(previous, request.context))
            previous = request.context
            num_new += max(1, len(request.context) - computed)
            if entering and num_new > MAX_NEW_TOKENS:
                break
            if not self._make_room(session, active, requests):
                if active:
                    break
                for other in sorted(self._sequences.keys() - {session}, key=lambda s: s.number):
                    self._evict(other)
                self.cache.prune(self._budget)
                alone = block_size(self._budget + 1) // 2  # the largest block within the budget
                alone = min(alone, self._budget)
                possible = request.inherited + alone - len(request.context)
                request.limit = min(request.limit, possible)
                if request.left <= 0:
                    done[session] = "memory"
                    continue
            rng = np.random.default_rng(request.seed)
            request.uniforms = rng.random(request.sampling.max_tokens).tolist()
            entering.append(session)
            active.add(session)
        return entering, done

    def _make_room(
        self, session: Session, active: set[Session], requests: Mapping[Session, Request]
    ) -> bool:
        """Makes room for the active sessions and this one; false if the budget is too small."""
        at_work = active | {session}

        def promised() -> int:
            return sum(requests[s].room for s in at_work)

        def over() -> int:
            idle = sum(
                sequence.capacity for s, sequence in self._sequences.items() if s not in at_work
            )
            return promised() + idle + self.cache.prefix_tokens - self._budget

        if over() <= 0:
            return True
        if promised() > self._budget:
            return False  # evicting all the rest is not enough
        idle = sorted(self._sequences.keys() - at_work, key=lambda s: s.number)
        for other in (None, *idle):
            if over() <= 0:
                break
            if other is not None:
                self._evict(other)
            self.cache.prune(over())
            for entering in at_work - self._sequences.keys():  # their prefix may be gone
                self._reserve(entering, requests[entering])
        return over() <= 0

    def _evict(self, session: Session) -> None:
        """Frees the sequence of a session that waits for tools; it is computed again."""
        self.cache.close(self._sequences.pop(session))
        self._dropped.add(session)

    def _reserve(
        self, session: Session, request: Request
    ) -> tuple[CachedSequence | None, SharedPrefix | None]:
        """Reserves room for a session. Returns its sequence, cut back to where its history was
        rewritten, and its prefix.
        """
        sequence = self._cut_back(session, request.context)
        prefix = sequence.prefix if sequence else self.cache.match_or_split(request.context[:-1])
        own = len(request.context) - (prefix.end if prefix else 0)
        request.room = block_size(own + request.left)
        if sequence is not None:
            request.room = max(request.room, sequence.capacity)
        return sequence, prefix

    # What is computed --------------------------------------------------------------------------

    def _enter(
        self, entering: Sequence[Session], requests: Mapping[Session, Request], counters: Counters
    ) -> list[Run]:
        """Sequences for the sessions that enter, and the trees of their new tokens."""
        runs: list[Run] = []
        fresh: dict[SharedPrefix | None, list[tuple[list[int], Session]]] = {}
        for session in entering:
            context = requests[session].context
            # A donor is a sequence computed before: those of this pass are made further below.
            sequence = self._sequences.get(session) or self._begun(session, context)
            if session in self._dropped:
                self._dropped.remove(session)
                prefix = self.cache.match_or_split(context[:-1])
                counters.dropped += len(context) - (
                    sequence.end if sequence else prefix.end if prefix else 0
                )
            if sequence is None:
                prefix = self.cache.match_or_split(context[:-1])
                fresh.setdefault(prefix, []).append(
                    (context[prefix.end if prefix else 0 :], session)
                )
            else:
                runs.append(Run(context[sequence.end :], [sequence], sequence.prefix, sequence.end))
        for prefix, entries in fresh.items():
            entries.sort(key=lambda entry: (entry[0], entry[1].number))
            runs += self._share(entries, prefix, 0, prefix.end if prefix else 0, keep=True)
        for session in entering:
            request, sequence = requests[session], self._sequences[session]
            own = len(request.context) - sequence.base
            self.cache.place(sequence, own, most=own + request.left)
            request.room = max(block_size(own + request.left), sequence.capacity)
        return runs

    def _cut_back(self, session: Session, context: Sequence[int]) -> CachedSequence | None:
        """The session's sequence, cut back to where its history was rewritten."""
        sequence = self._sequences.get(session)
        if sequence is None:
            return None
        keep = common_prefix([*sequence.history()], context[:-1])
        if keep < sequence.base:
            self.cache.close(self._sequences.pop(session))
            return None
        del sequence.token_ids[keep - sequence.base :]
        return sequence

    def _begun(self, session: Session, context: Sequence[int]) -> CachedSequence | None:
        """A sequence that takes over keys and values of a prefix that another session shares."""
        prefix = self.cache.match_or_split(context[:-1])
        rest = context[prefix.end if prefix else 0 :]
        donor, length = self.cache.donor(prefix, rest[:-1])
        if donor is None or length < MIN_SHARED:
            return None
        if length >= MIN_PREFIX:
            sequence = self.cache.open(self.cache.grow(prefix, rest[:length], donor))
        else:
            sequence = self.cache.open(prefix, rest[:length], donor)
        self._sequences[session] = sequence
        return sequence

    def _share(
        self,
        entries: Sequence[tuple[list[int], Session]],
        above: SharedPrefix | None,
        depth: int,
        position: int,
        *,
        keep: bool,
    ) -> list[Run]:
        """The trees of new tokens of sessions that agree up to ``depth``, sorted by tokens.

        A long run that several share becomes a prefix, if ``keep``: if its parent was kept, too.
        """
        runs: list[Run] = []
        alike = itertools.groupby(entries, key=lambda entry: entry[0][depth : depth + MIN_SHARED])
        for members in (list(group) for _, group in alike):
            first = members[0][0]
            shared = common_prefix(first, members[-1][0])
            token_ids = first[depth:shared]
            prefix = None
            if keep and len(members) > 1 and len(token_ids) >= MIN_PREFIX:
                prefix = self.cache.grow(above, token_ids)
            run = Run(token_ids, [], above, position, prefix)
            ending = [session for ids, session in members if len(ids) == shared]
            for session in ending:
                self._sequences[session] = self.cache.open(prefix or above)
            run.below = self._share(
                members[len(ending) :],
                prefix or above,
                shared,
                position + len(token_ids),
                keep=prefix is not None,
            )
            run.sequences = [self._sequences[session] for _, session in members]
            runs.append(run)
        return runs

    # What is drawn -----------------------------------------------------------------------------

    def _draw(self, requests: Sequence[Request], hidden: Tensor, last: Sequence[int]) -> None:
        """The next token of each request, from the hidden state at its last token."""
        different = list(dict.fromkeys(last))  # attempts that have just begun share it
        logits = self._policy.logits(hidden[different])
        if len(different) < len(last):
            place = {index: number for number, index in enumerate(different)}
            logits = logits[[place[index] for index in last]]
        uniforms = [request.uniforms[len(request.token_ids)] for request in requests]
        drawn = draw(logits, uniforms, [request.sampling for request in requests])
        for request, token_id, logprob, entropy in zip(requests, *drawn, strict=True):
            request.note(token_id, logprob, entropy)

    def _stop(self, request: Request) -> Stop | None:
        stop: Stop | None = stop_of(request.token_ids, request.sampling, self._policy.tokenizer)
        return stop or ("memory" if len(request.token_ids) >= request.limit else None)
