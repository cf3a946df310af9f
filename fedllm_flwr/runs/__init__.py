"""Run directories: what a run leaves behind, and everything that reads it.

``directory`` and ``checkpoints`` write; ``results`` and ``breakdown`` turn records into figures; ``report``,
``tensorboard``, ``progress`` and ``compare`` show them.
"""
