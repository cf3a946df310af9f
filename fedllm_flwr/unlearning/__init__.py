"""Removing a client, exactly where the method can, and proving it."""
