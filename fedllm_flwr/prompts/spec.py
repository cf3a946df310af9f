"""What a soft prompt is: its segments, its place in a row, and the order of its values in one flat array.

A soft prompt is a run of input embeddings that belong to no token. It may have segments with different owners,
such as a personal one before a shared one.

Axes: l soft tokens of a prompt, d width of the model's input embeddings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fedllm_flwr.errors import ConfigError, ShapeError

Placement = Literal["before", "after"]


@dataclass(frozen=True)
class Segment:
    """Neighbouring soft tokens that are learned and sent together.

    Attributes:
        name: Of its owner or use, for example ``personal`` or ``shared``.
        length: Soft tokens, at least 1.

    Raises:
        ConfigError: The name is empty or the length is below 1.
    """

    name: str
    length: int

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("prompt segment: expected a name, got an empty one")
        if self.length < 1:
            raise ConfigError(
                f"prompt segment {self.name}: expected a length of at least 1, got {self.length}"
            )


@dataclass(frozen=True)
class PromptSpec:
    """Settings of a soft prompt. Its flat array holds the embeddings [l, d] row by row, float32.

    Attributes:
        segments: In reading order, with unique names.
        placement: ``before``: ahead of the whole row, its leading special tokens included, as PEFT's prompt tuning
            does. ``after``: right behind the fixed text that all rows of a task begin with, so that nothing that
            comes before the prompt depends on it.

    Raises:
        ConfigError: There is no segment, two have the same name, or the placement is unknown.

    Source:
        Lester et al. 2021 (prompt tuning), section 2, for ``before``; ``after`` is the same with a part of the
        text ahead of the prompt.
    """

    segments: tuple[Segment, ...]
    placement: Placement

    def __post_init__(self) -> None:
        names = [segment.name for segment in self.segments]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"prompt segments: expected unique names, at least one, got {names}")
        if self.placement not in get_args(Placement):
            raise ConfigError(f"prompt placement: expected before or after, got {self.placement!r}")

    @property
    def length(self) -> int:
        """Soft tokens of all segments, l."""
        return sum(segment.length for segment in self.segments)

    @property
    def dropout(self) -> float:
        """A prompt has no dropout."""
        return 0.0

    def rows(self, name: str) -> slice:
        """The soft tokens of one segment.

        Raises:
            ConfigError: There is no such segment; lists those that there are.
        """
        start = 0
        for segment in self.segments:
            if segment.name == name:
                return slice(start, start + segment.length)
            start += segment.length
        known = ", ".join(segment.name for segment in self.segments)
        raise ConfigError(f"prompt segment {name!r}: expected one of {known}")

    def trained_rows(self, names: Sequence[str] = ()) -> np.ndarray:
        """Which soft tokens are trained when only some segments are.

        Args:
            names: The segments; none stands for all of them.

        Returns:
            Booleans [l].

        Raises:
            ConfigError: A segment is unknown.
        """
        chosen = np.full(self.length, not names)
        for name in names:
            chosen[self.rows(name)] = True
        return chosen

    def join(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """One flat prompt from the flat values of its segments.

        Args:
            parts: Segment name -> [length of the segment * d], in any order.

        Returns:
            float32 [l * d], a copy.

        Raises:
            ShapeError: A segment is missing or too many, or the sizes do not have one width d.
        """
        wanted = [segment.name for segment in self.segments]
        if sorted(parts) != sorted(wanted):
            raise ShapeError(f"prompt: expected segments {sorted(wanted)}, got {sorted(parts)}")
        width = parts[wanted[0]].size // self.segments[0].length
        for segment in self.segments:
            shape = parts[segment.name].shape
            if not width or shape != (segment.length * width,):
                raise ShapeError(
                    f"prompt segment {segment.name}: expected {segment.length} x width values in "
                    f"one row, the width of every segment the same, got shape {shape}"
                )
        return np.concatenate([parts[name] for name in wanted]).astype(np.float32)

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of :meth:`join`.

        Args:
            flat: [l * d].

        Returns:
            Segment name -> a copy of its values, in reading order.

        Raises:
            ShapeError: The array is not flat, is empty, or its size is no multiple of the length.
        """
        if flat.ndim != 1 or not flat.size or flat.size % self.length:
            raise ShapeError(
                f"flat prompt: expected {self.length} x width values, got shape {flat.shape}"
            )
        values = flat.reshape(self.length, -1)
        return {
            segment.name: values[self.rows(segment.name)].flatten() for segment in self.segments
        }
