"""Environments, the memory around them, simulated users in them, and their checker."""
