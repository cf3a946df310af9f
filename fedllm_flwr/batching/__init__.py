"""Three ways of answering many prompts at once: decompose, pack, batch."""
