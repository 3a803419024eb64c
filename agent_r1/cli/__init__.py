"""The command line: ``boundary`` has its beginning and its end, ``parser`` its words."""

from agent_r1.cli.boundary import main

__all__ = ["main"]
