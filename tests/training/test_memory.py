import platform
from pathlib import Path

import numpy as np
import pytest

from fedllm_flwr.training.memory import KEEP_BYTES, FreeMemory

BLOCK_BYTES = 2**17


def resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_blocks_go_back_to_the_system_when_there_are_many() -> None:
    memory = FreeMemory()
    memory.release()
    assert not memory.release()  # nothing has grown
    # in the heap, and every other one freed: glibc alone would keep the holes
    blocks = [np.ones(BLOCK_BYTES // 8) for _ in range(4 * KEEP_BYTES // BLOCK_BYTES)]
    full = resident()
    del blocks[::2]
    assert memory.release()
    assert resident() < full - KEEP_BYTES
    assert not memory.release()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_little_growth_is_kept_for_the_next_message() -> None:
    memory = FreeMemory()
    memory.release()
    blocks = [np.ones(BLOCK_BYTES // 8) for _ in range(KEEP_BYTES // 2 // BLOCK_BYTES)]
    assert not memory.release()
    assert len(blocks) == KEEP_BYTES // 2 // BLOCK_BYTES
