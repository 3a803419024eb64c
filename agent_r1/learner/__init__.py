"""From scored trajectories to one optimiser step a mini-batch."""
