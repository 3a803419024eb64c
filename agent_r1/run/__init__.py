"""A run on disk: its recipe, its folder, its checkpoints; and the console output."""
