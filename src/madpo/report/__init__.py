"""Reports: the page of a study with its tables and figures, and the pages of commands. Imports no torch.

A page loads nothing from anywhere: styles, scripts and data are inside, a content security policy allows those and
nothing else, and templates escape all text. It says what it has to say without scripts, too. A part of a study gives a
report of that part, which says what is missing.

``sources`` reads what steps left behind; ``results`` is the long table of samples, and a tier's methods; ``compare``,
``claims`` and ``summary`` say what follows from it; ``charts`` are what figures show, ``drawing`` and ``svg`` how;
``pages`` renders templates; ``study`` reads and compares a whole run, ``study_charts`` and ``study_page``
show it, and ``build`` writes its report.
"""

from typing import TYPE_CHECKING

from madpo.core.lazy import attach

if TYPE_CHECKING:
    from madpo.report.build import build_report as build_report
    from madpo.report.build import rebuild_report as rebuild_report
    from madpo.report.export import export_report as export_report

__getattr__, __dir__, __all__ = attach(__name__)
