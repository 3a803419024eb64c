"""The generated pages of the documentation, of what the code says of itself:

python scripts/reference.py            writes docs/keys.md and docs/metrics.md
python scripts/reference.py keys       prints one of them
"""

import sys
from itertools import groupby
from pathlib import Path

from agent_r1.analysis.keys import all_keys, known_metrics

KEYS = """# Every key of a recipe

Written by `scripts/reference.py` from the code; `agent-r1 keys SECTION` tells the same. Each can
be set in the TOML file or on the command line (`--train.iterations 5`). A key that belongs to some
names of its section only is marked with them; for another name it is an error. Defaults are written
as in Python; *needed* means that there is none.
"""
METRICS = """# Every metric of a run

Written by `scripts/reference.py` from the code; `agent-r1 keys --metrics NAME` tells the same.
These are the names of the curves in `agent-r1 view` and in trackers. Words in capitals stand for
names of the run's own.

| metric | unit | meaning | what to watch |
|---|---|---|---|
"""


def keys() -> str:
    text = KEYS
    for section, members in groupby(all_keys(), key=lambda key: key.name.partition(".")[0]):
        text += f"\n## {section}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
        for key in members:
            of = f"<br>*of {', '.join(key.of)}*" if key.of else ""
            default = "*needed*" if key.default is None else f"`{key.default}`"
            cells = (f"`{key.name}`{of}", f"`{key.type}`", default, escaped(key.meaning))
            text += f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"
    return text


def metrics() -> str:
    return METRICS + "".join(
        f"| `{m['name']}` | {m['unit']} | {escaped(m['meaning'])} | {escaped(m['watch'])} |\n"
        for m in known_metrics()
    )


def escaped(text: str) -> str:
    """Text of a cell in Markdown."""
    for mark in "<*_$":
        text = text.replace(mark, chr(92) + mark)
    return text


PAGES = {"keys": keys, "metrics": metrics}

if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.stdout.write(PAGES[sys.argv[1]]())
    else:
        for name, make in PAGES.items():
            (Path(__file__).parent.parent / "docs" / f"{name}.md").write_text(make())
