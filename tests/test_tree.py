"""The token tree, with ids written by hand."""

from agent_r1.tree import build_tree
from agent_r1.types import (
    Action,
    Group,
    Kind,
    Message,
    Outcome,
    Step,
    StepKey,
    StopReason,
    Task,
    Trajectory,
)

ACT, OBS, CTX = Kind.ACTION, Kind.OBSERVATION, Kind.CONTEXT


def step(ids, observation=(), context=None):
    action = Action(tuple(ids), (-1.0,) * len(ids), (0.0,) * len(ids), (), "stop")
    return Step(
        action,
        Message("assistant", ""),
        observation_ids=tuple(observation),
        context_ids=None if context is None else tuple(context),
    )


def trajectory(steps, prompt=(1, 2, 3), scored=True):
    outcome = Outcome(1.0, True) if scored else None
    return Trajectory("t", "", 0, (), prompt, steps, StopReason.DONE, outcome)


def group(*trajectories, number=0):
    return Group(Task("t", "?"), list(trajectories), number)


def test_attempts_share_the_prompt():
    tree = build_tree(group(trajectory([step([4, 5])]), trajectory([step([4, 6], [7]), step([8])])))
    assert [(n.parent, n.kind, n.token_ids) for n in tree.nodes] == [
        (None, OBS, (1, 2, 3)),
        (0, ACT, (4, 5)),
        (0, ACT, (4, 6)),
        (2, OBS, (7,)),
        (3, ACT, (8,)),
    ]
    assert tree.num_tokens == 9


def test_branches_list_ids_kinds_and_actions():
    turns = [step([4, 6], [7]), step([8])]
    tree = build_tree(group(trajectory([step([4, 5])]), trajectory(turns)))
    one, two = tree.branches()
    assert one.token_ids == [1, 2, 3, 4, 5]
    assert one.kinds == [OBS, OBS, OBS, ACT, ACT]
    assert two.token_ids == [1, 2, 3, 4, 6, 7, 8]
    assert two.kinds == [OBS, OBS, OBS, ACT, ACT, OBS, ACT]
    assert two.actions == [(3, 5, StepKey(0, 1, 0)), (6, 7, StepKey(0, 1, 1))]


def test_a_rewritten_history_is_a_branch_and_trains_each_action_once():
    first, second = step([4], [5]), step([6], context=[1, 2, 3, 9, 9])
    tree = build_tree(group(trajectory([first, second])))
    one, two = tree.branches()
    assert one.token_ids == [1, 2, 3, 4, 5]
    assert one.actions == [(3, 4, StepKey(0, 0, 0))]
    assert two.token_ids == [1, 2, 3, 9, 9, 6]
    assert two.kinds == [OBS, OBS, OBS, CTX, CTX, ACT]
    assert two.actions == [(5, 6, StepKey(0, 0, 1))]


def test_an_action_on_two_branches_is_trained_by_the_first():
    shared = step([4], [5])
    tree = build_tree(group(trajectory([shared])))
    tree.add(1, ACT, (6,), StepKey(0, 0, 1))
    tree.add(1, ACT, (7,), StepKey(0, 0, 2))
    branches = list(tree.branches())
    assert [b.token_ids for b in branches] == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 4, 7]]
    assert [start for b in branches for start, _, _ in b.actions] == [3, 4, 4]


def test_failed_attempts_and_those_without_a_step_are_left_out():
    tree = build_tree(
        group(trajectory([step([4])], scored=False), trajectory([]), trajectory([step([5])]))
    )
    assert tree.num_tokens == 4


def test_different_prompts_are_different_roots():
    tree = build_tree(group(trajectory([step([4])]), trajectory([step([4])], prompt=(1, 2))))
    assert [(n.parent, n.token_ids) for n in tree.nodes] == [
        (None, (1, 2)),
        (None, (1, 2, 3)),
        (1, (4,)),
        (0, (4,)),
    ]


def test_prompts_share_what_they_begin_with():
    system = tuple(range(100, 120))
    one, two, three = ((*system, 1, 2), (*system, 1, 3), (*system, 1))
    first = group(trajectory([step([4])], prompt=one), trajectory([step([5])], prompt=two))
    tree = build_tree(first, group(trajectory([step([6])], prompt=three), number=1))
    assert [(n.parent, n.token_ids) for n in tree.nodes] == [
        (None, (*system, 1)),
        (0, (2,)),
        (0, (3,)),
        (1, (4,)),
        (2, (5,)),
        (0, (6,)),
    ]


def test_a_rewritten_history_branches_off_where_it_differs():
    """The first turn is kept, so its action stands in two branches; it is trained once."""
    steps = [step([4], [5]), step([6], [7]), step([8], context=[1, 2, 3, 4, 5, 9, 9])]
    tree = build_tree(group(trajectory(steps)))
    one, two = tree.branches()
    assert one.token_ids == [1, 2, 3, 4, 5, 6, 7]
    assert [start for start, _, _ in one.actions] == [3, 5]
    assert two.token_ids == [1, 2, 3, 4, 5, 9, 9, 8]
    assert two.kinds == [OBS, OBS, OBS, ACT, OBS, CTX, CTX, ACT]
    assert two.actions == [(7, 8, StepKey(0, 0, 2))]
    assert tree.num_tokens == 10
