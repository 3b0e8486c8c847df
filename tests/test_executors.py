"""One contract, every executor."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from madpo.errors import ConfigError, DataError
from madpo.executors import Inline, Processes


def add(a: int, b: int) -> int:
    return a + b


def refuse() -> None:
    raise DataError("row 3 is empty")


def die() -> None:
    os._exit(9)


def environment(name: str) -> str | None:
    return os.environ.get(name)


@pytest.fixture(scope="module", params=["inline", "processes"])
def executor(request: pytest.FixtureRequest) -> Iterator[Any]:
    with Inline() if request.param == "inline" else Processes(1) as chosen:
        yield chosen


def test_gives_results(executor: Any) -> None:
    futures = [executor.submit(add, i, 1) for i in range(5)]
    assert [f.result(timeout=60) for f in futures] == [1, 2, 3, 4, 5]


def test_keeps_an_exception_in_the_future(executor: Any) -> None:
    error = executor.submit(refuse).exception(timeout=60)
    assert isinstance(error, DataError)
    assert str(error) == "row 3 is empty"
    assert executor.submit(add, 1, 1).result(timeout=60) == 2


def test_inline_lets_an_interrupt_through() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Inline().submit(interrupt)


def test_a_dead_worker_is_an_error_and_the_next_task_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with Processes(1) as pool:
        assert pool.submit(die).exception(timeout=60) is not None
        assert pool.submit(environment, "MADPO_PROGRESS").result(timeout=60) == "plain"
        assert pool.submit(environment, "OMP_NUM_THREADS").result(timeout=60) == str(os.cpu_count())


def test_needs_a_worker() -> None:
    with pytest.raises(ConfigError, match="0 worker processes"):
        Processes(0)
