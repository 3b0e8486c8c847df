"""A whole study and its page, which several modules look at."""

from pathlib import Path

import pytest

from madpo.report import rebuild_report
from report_cases import Study, make_study


@pytest.fixture(scope="session")
def whole_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study with texts that mean harm, a step that has failed and one that is still to run."""
    study = make_study(tmp_path_factory.mktemp("study"))
    study.unfinished("policy/low/late/seed0", "MadpoError: <b>full</b>")
    study.unfinished("evaluation/low/late/seed0")
    study.write()
    return study


@pytest.fixture(scope="session")
def whole_page(whole_study: Study) -> Path:
    """Its report."""
    return rebuild_report(whole_study.root, figures=False)
