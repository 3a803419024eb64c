"""Control tokens and call tags stand in ``render/`` alone, where they are made and read."""

import re

from tests import ROOT

CONTROL = re.compile(r"<\|?/?(tool_call|tool_response|think|im_start|im_end|start_of_turn|eot_id)")


def test_no_other_room_knows_a_control_token():
    package = ROOT / "agent_r1"
    rooms = [path for path in package.rglob("*.py") if (package / "render") not in path.parents]
    assert len(rooms) > 100
    for path in rooms:
        found = CONTROL.search(path.read_text())
        assert found is None, f"{path}: {found and found[0]}"
