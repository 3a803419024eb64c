"""The native engine: continuous batching on the very model object that is trained."""
