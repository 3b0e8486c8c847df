"""Products of every layout and precision; memory that was freed serves the next values, or goes back to the system."""

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
@pytest.mark.parametrize("rows", [0, 1, 7, 130])
def test_a_product_is_that_of_float64_in_every_layout(dtype, rows):
    drawn = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*shape, generator=drawn).to(dtype) for shape in ((rows, 48), (33, 48), (33,)))
    wanted = x.double() @ weight.double().T
    bound = {"atol": 0.1 if dtype is torch.bfloat16 else 1e-5, "rtol": 1e-2 if dtype is torch.bfloat16 else 1e-5}
    for a, b in ((x, weight), (x.T.contiguous().T, weight.T.contiguous().T), (x, torch.nn.Parameter(weight))):
        with torch.no_grad():
            out, total = x.new_empty(rows, 33), torch.ones(rows, 33, dtype=dtype)
            torch.testing.assert_close(devices.product(a, b).double(), wanted, **bound)
            assert devices.product(a, b, bias, out) is out
            assert devices.add_product(total, a, b) is total
        torch.testing.assert_close(out.double(), wanted + bias.double(), **bound)
        torch.testing.assert_close(total.double(), wanted + 1, **bound)


def test_a_product_whose_factors_ask_for_a_gradient_has_one():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    devices.product(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 8))
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 8))


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
