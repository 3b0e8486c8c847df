"""Memory that a processor's training steps have freed goes back to the system."""

import platform
from pathlib import Path

import pytest

from madpo.models.engine import devices


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) / 256


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
def test_freed_blocks_go_back_at_the_first_of_eight_steps(monkeypatch):
    monkeypatch.setattr(devices, "_steps", iter(range(100)))
    devices.return_freed_memory()  # step 0
    blocks = [bytearray(b"x" * 100_000) for _ in range(1000)]  # of the heap: smaller than what is mapped
    full, blocks = resident(), blocks[-1:]  # the last one keeps the heap's end in use
    for _ in range(7):
        devices.return_freed_memory()
    kept = resident()
    devices.return_freed_memory()  # step 8
    assert kept > full - 20
    assert resident() < full - 60
    assert len(blocks[0]) == 100_000
