"""Every random draw has an address: a root seed and the labels of the place that draws.

Two draws with different addresses are independent; the same address always gives the same numbers, whatever
process, worker or order it is drawn in. Nothing in this project uses a global generator.
"""

import hashlib

import numpy as np
import torch


def derive_seed(root: int, *labels: str | int) -> int:
    """Derive a seed for one place in the program.

    Args:
        root: The experiment's seed.
        labels: The address, for example ``"client", partition_id, server_round``. Text and integers with the
            same spelling are different labels.

    Returns:
        An integer in [0, 2**63), the first 63 bits of a SHA-256 digest.
    """
    address = "\x1f".join(f"{type(label).__name__}:{label}" for label in (root, *labels))
    return int.from_bytes(hashlib.sha256(address.encode()).digest()[:8], "big") >> 1


def numpy_generator(root: int, *labels: str | int) -> np.random.Generator:
    """A NumPy generator at an address (see :func:`derive_seed`)."""
    return np.random.default_rng(derive_seed(root, *labels))


def torch_generator(root: int, *labels: str | int) -> torch.Generator:
    """A CPU torch generator at an address (see :func:`derive_seed`)."""
    return torch.Generator().manual_seed(derive_seed(root, *labels))
