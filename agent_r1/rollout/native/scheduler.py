"""One pass of the native engine: who takes part, what is computed, what is drawn."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from agent_r1.model.policy import Policy
from agent_r1.rollout.native.forward_pass import Run, Tick
from agent_r1.rollout.native.kv_cache import MIN_TRUNK, Cache, Row, Trunk, slab_size
from agent_r1.rollout.native.request import Counters, Request, Stop
from agent_r1.rollout.sampling import draw, stop_of
from agent_r1.tree import MIN_SHARED, common_prefix

if TYPE_CHECKING:
    from agent_r1.rollout.native.engine import NativeSession as Session

MAX_NEW_TOKENS = 4096
"""New tokens of a pass, unless one session alone has more; bounds its memory."""


class Batch:
    """The sessions that the engine serves, and their rows in its cache.

    Args:
        policy: Whose model is run.
        budget: Tokens whose keys and values may be held.
    """

    def __init__(self, policy: Policy, budget: int) -> None:
        self._policy = policy
        like = torch.empty(0, dtype=policy.base.dtype, device=policy.device)
        self.cache = Cache(policy.cache_shape, like)
        self._budget = budget
        self._rows: dict[Session, Row] = {}
        self._dropped: set[Session] = set()

    @torch.inference_mode()
    def close(self, sessions: Sequence[Session]) -> None:
        """Their rows are no longer needed; shared runs stay as long as there is room."""
        for session in sessions:
            if row := self._rows.pop(session, None):
                self.cache.close(row)
            self._dropped.discard(session)

    @torch.inference_mode()
    def run(self, requests: Mapping[Session, Request], counters: Counters) -> dict[Session, Stop]:
        """One pass: a token more for every request that fits in memory. Returns those that are
        done, and why.
        """
        sessions = sorted(requests, key=lambda session: session.number)
        running = [s for s in sessions if requests[s].token_ids]
        entering, done = self._admit(sessions, requests)
        served = [*running, *entering]
        at_work = set(served)
        for session, row in self._rows.items():  # in order: where rows lie decides last bits
            if session not in at_work:
                self.cache.park(row)
        runs = self._enter(entering, requests, counters)
        for session in running:
            own = self._rows[session]
            self.cache.place(own, len(own.token_ids) + 1)
        sampling = [(self._rows[s], requests[s].token_ids[-1]) for s in running]
        tick = Tick(self.cache, sampling, runs)
        if not tick.num_tokens:
            return done
        hidden = self._forward(tick)
        counters.ticks += 1
        counters.prefilled += tick.num_tokens - len(running)
        counters.sampled += len(served)
        self._draw(
            [requests[s] for s in served], hidden, [tick.last[self._rows[s]] for s in served]
        )
        return done | {s: stop for s in served if (stop := self._stop(requests[s])) is not None}

    def _forward(self, tick: Tick) -> Tensor:
        device = self._policy.device
        with self._policy.packed():
            hidden = self._policy.hidden(
                torch.tensor(tick.token_ids, device=device),
                torch.tensor(tick.positions, device=device),
                tick,
            )
        tick.commit()
        return hidden

    # Who takes part ----------------------------------------------------------------------------

    def _admit(
        self, sessions: Sequence[Session], requests: Mapping[Session, Request]
    ) -> tuple[list[Session], dict[Session, Stop]]:
        """The sessions that begin to sample in this pass, and those that memory ends.

        Those that were served before come first, then new ones; each is sure of room for all that
        it may sample. For room, shared runs that nobody uses are let go, then rows of sessions that
        wait for tools.
        """
        active = {s for s in sessions if requests[s].token_ids}
        asking = [s for s in sessions if s not in active]
        known = self._rows.keys() | self._dropped
        asking.sort(key=lambda s: (s not in known, s.number))
        entering: list[Session] = []
        done: dict[Session, Stop] = {}
        num_new = 0
        previous: Sequence[int] = ()
        for session in asking:
            request = requests[session]
            request.limit = request.sampling.max_tokens
            row, trunk = self._promise(session, request)
            computed = row.end if row else trunk.end if trunk else 0
            computed = max(computed, common_prefix(previous, request.prefix))
            previous = request.prefix
            num_new += max(1, len(request.prefix) - computed)
            if entering and num_new > MAX_NEW_TOKENS:
                break
            if not self._make_room(session, active, requests):
                if active:
                    break
                alone = slab_size(self._budget + 1) // 2  # the largest slab within the budget
                request.limit = min(request.limit, alone - len(request.prefix))
                if request.limit <= 0:
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
        """Whether the budget holds what the active sessions and this one may come to."""
        at_work = active | {session}

        def promised() -> int:
            return sum(requests[s].room for s in at_work)

        def over() -> int:
            idle = sum(row.capacity for s, row in self._rows.items() if s not in at_work)
            return promised() + idle + self.cache.trunk_tokens - self._budget

        if over() <= 0:
            return True
        if promised() > self._budget:
            return False  # letting go of the rest would not do
        self.cache.prune(over())
        for other in at_work - self._rows.keys():  # a trunk that they counted on may be gone
            self._promise(other, requests[other])
        for other in sorted(self._rows.keys() - at_work, key=lambda s: s.number):
            if over() <= 0:
                break
            self.cache.close(self._rows.pop(other))
            self._dropped.add(other)
            self.cache.prune(over())
        return over() <= 0

    def _promise(self, session: Session, request: Request) -> tuple[Row | None, Trunk | None]:
        """Notes the room that a session's own tokens may come to take; its row, cut back to where
        its history was rewritten, and the trunk that it begins with.
        """
        row = self._kept(session, request.prefix)
        trunk = row.trunk if row else self.cache.match(request.prefix[:-1])
        own = len(request.prefix) - (trunk.end if trunk else 0)
        request.room = slab_size(own + request.limit)
        if row is not None and row.slab is not None:
            request.room = max(request.room, row.slab.capacity)
        return row, trunk

    # What is computed --------------------------------------------------------------------------

    def _enter(
        self, entering: Sequence[Session], requests: Mapping[Session, Request], counters: Counters
    ) -> list[Run]:
        """Rows for the sessions that enter, and the trees of their new tokens."""
        runs: list[Run] = []
        fresh: dict[Trunk | None, list[tuple[list[int], Session]]] = {}
        for session in entering:
            prefix = requests[session].prefix
            # A donor is a row that has been computed: those of this pass are made further below.
            row = self._rows.get(session) or self._begun(session, prefix)
            if session in self._dropped:
                self._dropped.remove(session)
                trunk = self.cache.match(prefix[:-1])
                counters.dropped += len(prefix) - (row.end if row else trunk.end if trunk else 0)
            if row is None:
                trunk = self.cache.match(prefix[:-1])
                fresh.setdefault(trunk, []).append((prefix[trunk.end if trunk else 0 :], session))
            else:
                runs.append(Run(prefix[row.end :], [row], row.trunk, row.end))
        for trunk, entries in fresh.items():
            entries.sort(key=lambda entry: (entry[0], entry[1].number))
            runs += self._share(entries, trunk, 0, trunk.end if trunk else 0, keep=True)
        for session in entering:
            request, row = requests[session], self._rows[session]
            self.cache.place(row, len(request.prefix) - row.base)
            own = len(request.prefix) - row.base + request.limit
            request.room = max(slab_size(own), row.capacity)
        return runs

    def _kept(self, session: Session, prefix: Sequence[int]) -> Row | None:
        """The session's row, cut back to where its history was rewritten."""
        row = self._rows.get(session)
        if row is None:
            return None
        keep = common_prefix([*row.history()], prefix[:-1])
        if keep < row.base:
            self.cache.close(self._rows.pop(session))
            return None
        del row.token_ids[keep - row.base :]
        return row

    def _begun(self, session: Session, prefix: Sequence[int]) -> Row | None:
        """A row that takes over what another session has computed of the same beginning."""
        trunk = self.cache.match(prefix[:-1])
        rest = prefix[trunk.end if trunk else 0 :]
        donor, length = self.cache.donor(trunk, rest[:-1])
        if donor is None or length < MIN_SHARED:
            return None
        kv = donor.kv[:, :, :, :length].clone()
        if length >= MIN_TRUNK:
            row = self.cache.open(self.cache.grow(trunk, rest[:length], kv))
        else:
            row = self.cache.open(trunk)
            row.token_ids, row.parked = list(rest[:length]), kv
        self._rows[session] = row
        return row

    def _share(
        self,
        entries: Sequence[tuple[list[int], Session]],
        above: Trunk | None,
        depth: int,
        position: int,
        *,
        keep: bool,
    ) -> list[Run]:
        """The trees of new tokens of sessions that are alike up to ``depth``, sorted by tokens.

        A long run that several share becomes a trunk, if ``keep``: if it hangs on a trunk itself.
        """
        runs: list[Run] = []
        alike = itertools.groupby(entries, key=lambda entry: entry[0][depth : depth + MIN_SHARED])
        for members in (list(group) for _, group in alike):
            first = members[0][0]
            shared = common_prefix(first, members[-1][0])
            token_ids = first[depth:shared]
            trunk = None
            if keep and len(members) > 1 and len(token_ids) >= MIN_TRUNK:
                trunk = self.cache.grow(above, token_ids, self.cache.empty(len(token_ids)))
            run = Run(token_ids, [], above, position, trunk)
            ending = [session for ids, session in members if len(ids) == shared]
            for session in ending:
                self._rows[session] = self.cache.open(trunk or above)
            run.below = self._share(
                members[len(ending) :],
                trunk or above,
                shared,
                position + len(token_ids),
                keep=trunk is not None,
            )
            run.rows = [self._rows[session] for _, session in members]
            runs.append(run)
        return runs

    # What is drawn -----------------------------------------------------------------------------

    def _draw(self, requests: Sequence[Request], hidden: Tensor, last: Sequence[int]) -> None:
        """The next token of each request, from the hidden state at its last token."""
        different = list(dict.fromkeys(last))  # attempts that have just begun have it in common
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
