"""The policy: a Hugging Face causal language model, found, proven whole, run over trees."""
