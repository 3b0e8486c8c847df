"""FlexAttention in two processes, split and whole weights, against dense masks in one."""

import json

import numpy as np
import pytest

import launch_cases
from madpo.models.engine.packed_attention import BLOCK


@pytest.fixture(scope="module")
def launched(forked, llama, tmp_path_factory):
    """The folder of what each of two processes found, by ``ddp`` and by ``fsdp``."""
    root = tmp_path_factory.mktemp("flexed")
    ended = forked(launch_cases.drive_flexed, llama, root).end()
    assert ended.status == 0, ended.err[-4000:]
    return root


@pytest.fixture(scope="module")
def single(llama, tmp_path_factory):
    """One process, with dense masks."""
    return launch_cases.long_course(llama, tmp_path_factory.mktemp("dense"), 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_with_flex_attention_follow_one_with_dense_masks(launched, single, kind):
    for rank in range(2):
        found = json.loads((launched / kind / f"{rank}.json").read_text())
        assert len(found["calls"]) >= 2 * 2  # layers, steps
        assert min(found["calls"]) > BLOCK
        np.testing.assert_allclose(found["losses"], single["losses"], rtol=1e-5)
        assert found["weights"].keys() == single["weights"].keys()
        for name, wanted in single["weights"].items():
            np.testing.assert_allclose(found["weights"][name], wanted, rtol=0, atol=1e-5, err_msg=name)
