"""What the frozen blocks below the lowest adapter make of a row: computed once, then kept.

Where adapters sit in the upper blocks only, everything below them gives the same states in every epoch, round and
evaluation. A row is always computed by itself, so its states do not depend on the rows that it is batched with, nor on
what is kept at the moment; a resumed run therefore has the same bits.

Axes: b rows of a pass, t tokens of the longest, n of one row, d width.
"""

import random
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedllm_flwr.training.decoder import LeanDecoder

MIB = 1 << 20
Key = tuple[int, bytes]


class FrozenStates:
    """States of rows where they enter a block, within a budget of memory.

    When the budget is full a kept row drawn at random makes room. Epochs visit all rows in turn; keeping the newest
    would find nothing again as soon as the rows exceed the budget, a random choice finds its share.

    Args:
        limit_bytes: Of all states kept, > 0.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._states: dict[Key, Tensor] = {}
        self._keys: list[Key] = []
        self._random = random.Random(0)

    def __len__(self) -> int:
        return len(self._keys)

    def entering(
        self, decoder: LeanDecoder, input_ids: Tensor, lengths: Sequence[int], block: int
    ) -> Tensor:
        """The states of a batch of rows where they enter a block; zero at padding.

        Args:
            decoder: Computes what is not kept.
            input_ids: Padded on the right. [b, t]
            lengths: n of each row; 0 for a row that is all padding.
            block: Which block, > 0.

        Returns:
            [b, t, d], a new tensor.
        """
        found: list[Tensor | None] = []
        rows = input_ids.cpu().numpy()
        for line, length in enumerate(lengths):
            key = (block, rows[line, :length].tobytes())
            states = self._states.get(key)
            if states is None and length:
                states = decoder.entering(input_ids[line : line + 1, :length], block)[0]
                self._keep(key, states)
            found.append(states)
        sample = next(states for states in found if states is not None)
        padded = sample.new_zeros((*input_ids.shape, sample.shape[-1]))
        for line, states in enumerate(found):
            if states is not None:
                padded[line, : len(states)] = states
        return padded

    def _keep(self, key: Key, states: Tensor) -> None:
        if states.nbytes > self.limit_bytes:
            return
        while self.held_bytes + states.nbytes > self.limit_bytes:
            place = self._random.randrange(len(self._keys))
            self._keys[place], self._keys[-1] = self._keys[-1], self._keys[place]
            self.held_bytes -= self._states.pop(self._keys.pop()).nbytes
        self._states[key] = states
        self._keys.append(key)
        self.held_bytes += states.nbytes


_LIMIT = [0]
_KEPT: "WeakKeyDictionary[LeanDecoder, FrozenStates]" = WeakKeyDictionary()


def keep_at_most(mib: int) -> None:
    """Say how much this process may keep for each model, in MiB; 0 = compute everything in every pass."""
    limit = mib * MIB
    if limit != _LIMIT[0]:
        _LIMIT[0] = limit
        _KEPT.clear()


def entering_states(
    decoder: LeanDecoder, input_ids: Tensor, lengths: Sequence[int], lowest: int
) -> tuple[Tensor, int]:
    """What :meth:`LeanDecoder.forward` should begin with, and at which block.

    Args:
        decoder: The model.
        input_ids: Padded on the right. [b, t]
        lengths: Tokens of each row; none if they are not known.
        lowest: The lowest block that has an adapter.

    Returns:
        The ids and block 0, where nothing can be kept; else states and ``lowest``.
    """
    if not lowest or not any(lengths) or not _LIMIT[0]:
        return input_ids, 0
    kept = _KEPT.get(decoder)
    if kept is None:
        kept = _KEPT[decoder] = FrozenStates(_LIMIT[0])
    with torch.no_grad():
        return kept.entering(decoder, input_ids, lengths, lowest), lowest
