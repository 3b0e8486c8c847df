"""One contract, every executor."""

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from madpo.core.errors import ConfigError, DataError
from madpo.runner.executors import Cluster, Inline, Processes
from refusals import refused


def add(a: int, b: int) -> int:
    return a + b


def refuse() -> None:
    raise DataError("row 3 is empty")


def die() -> None:
    os._exit(9)


def environment(name: str) -> str | None:
    return os.environ.get(name)


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def slow(folder: Path) -> str:
    """Leaves its process id; on the second call it has been there before and ends at once."""
    mark = folder / "pid"
    if mark.exists():
        return "again"
    mark.write_text(str(os.getpid()))
    time.sleep(60)
    return "undisturbed"


needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='ray is not installed; pip install "madpo[ray]"'
)


@pytest.fixture(scope="module", params=["inline", "processes", pytest.param("ray", marks=needs_ray)])
def executor(request: pytest.FixtureRequest) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        # Ray's workers are given the places of this file and of what it imports; the others find them by themselves.
        here = Path(__file__).parent
        places = [str(here), str(here.parent / "cases"), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(places))
        with {"inline": Inline, "processes": lambda: Processes(1), "ray": Cluster}[request.param]() as chosen:
            yield chosen


def test_gives_results(executor: Any) -> None:
    futures = [executor.submit(add, i, 1) for i in range(5)]
    assert [f.result() for f in futures] == [1, 2, 3, 4, 5]


def test_keeps_an_exception_in_the_future(executor: Any) -> None:
    error = executor.submit(refuse).exception()
    assert isinstance(error, DataError)
    assert str(error) == "row 3 is empty"
    assert executor.submit(add, 1, 1).result() == 2


def test_work_has_the_priority_of_the_process_that_waits_for_it(executor: Any) -> None:
    assert executor.submit(priority).result() == priority()


def test_light_work_is_work(executor: Any) -> None:
    assert executor.submit(add, 1, 2, light=True).result() == 3


def test_a_lost_workers_task_starts_again_on_a_cluster(executor: Any, tmp_path: Path) -> None:
    if not isinstance(executor, Cluster):
        pytest.skip("only a cluster starts a task again; on one machine the next run continues")
    future = executor.submit(slow, tmp_path)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert not future.done(), future.exception()
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert future.result() == "again"


def test_inline_lets_an_interrupt_through() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Inline().submit(interrupt)


def test_a_dead_worker_is_an_error_and_the_next_task_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with Processes(1) as pool:
        assert pool.submit(die).exception() is not None
        assert pool.submit(environment, "MADPO_PROGRESS").result() == "plain"
        assert pool.submit(environment, "OMP_NUM_THREADS").result() == str(os.cpu_count())


@needs_ray
def test_no_cluster_is_one_sentence() -> None:
    with refused(ConfigError, "127.0.0.1:1"), Cluster("127.0.0.1:1"):
        pass


def test_needs_a_worker() -> None:
    with refused(ConfigError, "0"):
        Cluster(slots=0)
    with refused(ConfigError, "0"):
        Processes(0)
