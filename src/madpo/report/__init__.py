"""Reports: the page of a study with its tables and figures, and the pages of commands. Imports no torch.

A page loads nothing from anywhere: styles, scripts and data are inside, a content security policy allows those and
nothing else, and templates escape all text. It says what it has to say without scripts, too. A part of a study gives a
report of that part, which says what is missing.

``sources`` reads what steps left behind; ``results`` is the long table of samples, and a tier's methods; ``compare``,
``claims``, ``caveats`` and ``summary`` say what follows from it; ``charts`` are what figures show, ``drawing`` and
``svg`` how; ``pages`` renders templates; ``study`` puts a study together, and ``build`` writes its report.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from madpo.report.build import build_report, rebuild_report
    from madpo.report.export import export_report

__all__ = ["build_report", "export_report", "rebuild_report"]


def __getattr__(name: str) -> Any:
    # A command that draws a small page need not import what a study's report needs.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"madpo.report.{'export' if name == 'export_report' else 'build'}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
