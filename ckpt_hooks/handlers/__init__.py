"""Handlers: what saves and restores one kind of item."""
