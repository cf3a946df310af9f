"""Give memory that a message has used back to the system."""

import ctypes
import os
from functools import lru_cache
from pathlib import Path

KEEP_BYTES = 64 * 2**20
"""Memory that a worker may keep between messages beyond what it needs. Giving it back costs the next
message a page fault for each 4 KB, which a small message would notice."""
_STATM = Path("/proc/self/statm")


class FreeMemory:
    """Returns freed heap memory to the system when there may be much of it.

    The activations of a pass are many blocks of some hundred kilobytes; glibc keeps them for later, so that
    an idle worker would hold its peak.
    """

    def __init__(self) -> None:
        self._resting = 0

    def release(self) -> bool:
        """Return it if the process has grown by ``KEEP_BYTES`` since the last time.

        Returns:
            Whether something was returned; never on systems without glibc and /proc.
        """
        trim = _malloc_trim()
        if trim is None or _private_bytes() - self._resting <= KEEP_BYTES:
            return False
        released = bool(trim(0))
        self._resting = _private_bytes()
        return released


def _private_bytes() -> int:
    """Resident memory that no file backs."""
    _, resident, shared, *_ = map(int, _STATM.read_text(encoding="ascii").split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


@lru_cache(maxsize=1)
def _malloc_trim() -> "ctypes._NamedFuncPointer | None":
    if not _STATM.exists():
        return None
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None


FREE_MEMORY = FreeMemory()
"""Of this process."""
