"""``agent-r1 bench``: baselines and algorithms by seeds, side by side, and what came of them."""
