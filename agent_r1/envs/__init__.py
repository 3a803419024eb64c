"""What an agent acts in: environments, memory round them, users in them, and their checker."""
