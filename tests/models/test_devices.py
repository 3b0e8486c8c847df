"""Memory that a processor's training steps have freed serves the next values, or goes back to the system."""

import platform
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from madpo.models.engine import devices

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) / 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory_to_be_filled_has_the_asked_form_and_no_other_owner(dtype):
    like = torch.ones(2, dtype=dtype)
    first, second = (devices.memory_for(like, 3, 5).fill_(value) for value in (1, 2))
    assert first.shape == (3, 5)
    assert first.is_contiguous()
    assert (first.dtype, first.device) == (dtype, like.device)
    assert first.sum() == 15
    assert second.sum() == 30
    assert not first._is_view(), "models write into results, which autograd refuses of views"
    assert devices.memory_for(like, 0, 4) is None
    with FakeTensorMode():
        assert devices.memory_for(torch.ones(2, dtype=dtype), 2**20, 2**20) is None


@glibc
def test_a_kept_value_fills_the_hole_of_a_freed_one():
    """Small tensors between large ones take the ends of what torch asks for: then three times as much would be held."""
    like, floats, count = torch.ones(1), 500_000, 40
    kept, small = [torch.ones(floats)], []
    kept.clear()  # from here on blocks of this size are of the heap
    devices._malloc_trim()(0)
    before = resident()
    for _ in range(count):
        passing, other = devices.memory_for(like, floats).fill_(1), torch.ones(floats)
        small += [torch.zeros(1) for _ in range(5)]
        del passing
        small += [torch.zeros(1) for _ in range(5)]
        kept.append(devices.memory_for(like, floats).fill_(2))
        del other
    assert resident() - before < 1.5 * count * floats * 4 / 2**20


@glibc
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
