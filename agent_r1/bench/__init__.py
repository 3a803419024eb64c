"""``agent-r1 bench``: compares baselines and algorithms over seeds, with tables and figures."""
