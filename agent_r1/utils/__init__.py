"""Code of others, text and disk: what all rooms above rely on."""
