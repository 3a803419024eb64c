"""The logger of the package: ``logging.getLogger("agent_r1")``. Warnings, and as information what a
run does; an iteration's record has its row of ``metrics.jsonl`` as ``record.row``. Python shows
warnings alone; the command line listens with ``run/console.py``, programs with handlers of theirs.
"""

from __future__ import annotations

import logging

from agent_r1.utils.text import clean, printable

LOG = logging.getLogger("agent_r1")


class _Printable(logging.Filter):
    """What tools and files say goes into messages, and must not move a terminal's cursor."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(clean(record.getMessage())), ()
        return True


LOG.addFilter(_Printable())
