"""What many test modules start from: a tiny model, a cache of one's own, a browser."""

import pytest

from madpo.models import build_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a random Llama of two layers."""
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
def browser(tmp_path_factory):
    """Headless Chromium."""
    from browser import open_browser

    yield from open_browser(tmp_path_factory.mktemp("profile"))


@pytest.fixture
def window(browser, page):
    """The browser at the module's own ``page``."""
    browser.get(page.resolve().as_uri())
    return browser
