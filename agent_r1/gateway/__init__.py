"""The gateway: agents that call a language model over HTTP, trained without being rewritten."""
