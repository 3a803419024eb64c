"""Environments of other libraries, played by our own loop."""
