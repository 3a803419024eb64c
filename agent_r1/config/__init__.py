"""Sections, names and overrides: how a TOML file becomes a checked, typed recipe."""
