"""The command line: ``boundary`` runs commands and tells errors, ``parser`` has the arguments."""

from agent_r1.cli.boundary import main

__all__ = ["main"]
