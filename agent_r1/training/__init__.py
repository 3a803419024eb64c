"""The loop, what it is built of, what is checked before it, evaluation and metrics."""
