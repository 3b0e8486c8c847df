"""What many test modules start from: a tiny model, a cache of one's own, a browser."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Properties are tried with the same inputs every time: few in `make test`, more in `make check`.
SEARCH = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=15, **SEARCH)
settings.register_profile("many", max_examples=300, **SEARCH)
settings.load_profile("few")

# Garbage collections while libraries are loaded find nothing, and take a third of the time.
gc.disable()


def pytest_collection_finish() -> None:
    """Leave the libraries out of later collections as well: every trainer asks for one, and it took 0.4 s each time."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start programs come first, then those with a browser: they take long, and begin in one process of
    two, so that the fork server and the browser are started once.
    """

    def users(fixture: str) -> set[Path]:
        return {item.path for item in items if fixture in getattr(item, "fixturenames", ())}

    forked, browser = users("forked"), users("chromium")
    items.sort(key=lambda item: (item.path not in forked, item.path not in browser))


@pytest.fixture(autouse=True)
def nothing_said_yet():
    """Lines that are said once a process are said once a test."""
    from madpo.core.progress import say_once

    say_once.cache_clear()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a random Llama of two layers."""
    from madpo.models.load import build_tiny

    return build_tiny("llama", tmp_path_factory.mktemp("models") / "llama", seed=1)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """``$MADPO_CACHE`` for one test."""
    monkeypatch.setenv("MADPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory):
    """``$MADPO_CACHE`` for all tests of a module, for those whose fixtures fill it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MADPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def module_float32():
    """No half precision, for modules whose expected numbers come from other batches than the library's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cpu.get_capabilities", dict)
        yield


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """Headless Chromium, started once."""
    from browser import open_browser

    yield from open_browser(tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module")
def browser(chromium):
    """Headless Chromium, at an empty page and without what earlier modules have logged."""
    chromium.get("about:blank")
    chromium.get_log("browser")
    return chromium


@pytest.fixture
def window(browser, page):
    """The browser at the module's own ``page``."""
    browser.get(page.resolve().as_uri())
    return browser


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """``forked(function, *arguments, folder=, cache=, NAME=value)``: a :class:`Program`, in an empty folder by default.

    Those that a failed test has left behind are ended.
    """
    from forked import Program

    started = []

    def start(work, *arguments, folder=None, cache=None, **env):
        place = tmp_path_factory.mktemp("program")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env}
        if cache is not None:
            environment["MADPO_CACHE"] = str(cache)
        program = Program(work, arguments, place, Path(folder or place), environment)
        started.append(program)
        return program

    yield start
    for program in started:
        if program.running():
            program.kill()


@pytest.fixture(scope="session")
def command(forked):
    """``command("run", "smoke", ..., folder=, cache=, NAME=value)``: the command line in a process of its own."""
    from forked import command_line

    return lambda *words, **settings: forked(command_line, *map(str, words), **settings)
