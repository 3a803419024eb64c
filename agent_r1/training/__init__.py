"""The training loop, its parts, the checks before it, evaluation and metrics."""
