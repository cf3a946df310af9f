"""Soft prompts as plain arrays: which segments they have, in which order, and where they stand in a row."""

from fedllm_flwr.prompts.spec import Placement, PromptSpec, Segment

__all__ = ["Placement", "PromptSpec", "Segment"]
