"""Tools of MCP servers, in any tool environment."""
