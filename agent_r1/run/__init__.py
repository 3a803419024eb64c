"""What a run is on disk: its recipe, its folder, its checkpoints; and what a person sees of it."""
