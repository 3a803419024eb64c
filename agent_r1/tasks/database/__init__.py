"""Questions that are answered by SQL."""
