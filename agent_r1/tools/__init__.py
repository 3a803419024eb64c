"""What an agent can call, and all that happens between a call and its result."""
