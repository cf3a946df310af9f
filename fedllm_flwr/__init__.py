"""Adapting large language models across many parties that cannot share their data."""

__version__ = "0.1.0"
