"""A run's report: one page that opens from disk, with its tables and figures beside it as files.

The page loads nothing from anywhere: styles, scripts and data stand inside, a content security policy allows those
and nothing else, and all text that comes from data is escaped. It says what it has to say without scripts too. A
part of a study gives a report of that part, which says what is missing.

``published``: the paper's numbers; ``families``: which rows are settings of one method, the choice among them and
paired differences; ``frontier``: reward at equal KL; ``claims``: the paper's claims and their verdicts; ``charts``:
what figures show, ``drawing`` and ``plots``: how; ``tables``, ``sections``, ``samples``, ``provenance``: the rest.
"""

from madpo.report.build import build_report, rebuild_report
from madpo.report.export import export_report
from madpo.report.markup import MARGINS_SHOWN, page, page_part, table
from madpo.report.tables import report_markdown_table

__all__ = [
    "MARGINS_SHOWN",
    "build_report",
    "export_report",
    "page",
    "page_part",
    "rebuild_report",
    "report_markdown_table",
    "table",
]
