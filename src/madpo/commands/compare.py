"""``madpo compare``: the study on a user's own pairs."""

from __future__ import annotations

from pathlib import Path

from madpo.commands.from_settings import Configurable
from madpo.commands.shared import Data, HeldOut
from madpo.commands.study import Graph, print_graph
from madpo.core.config import part
from madpo.core.libraries import loading_libraries
from madpo.operations.settings import PROBE
from madpo.study.compare import CompareSettings


class Compare(Configurable, CompareSettings, HeldOut, Graph, Data):
    output_dir: Path
    """Where results go; finished steps in it are kept. Not needed with dry_run."""


def compare(options: Compare) -> int:
    """Train several losses on your pairs, compare the policies, and write the report; or continue.

    Example:
        madpo compare pairs.jsonl --model gemma-3-270m --output_dir comparison
        madpo compare pairs.jsonl --model gemma-3-270m --judge probe --samples_per_prompt 4 --output_dir comparison
        madpo compare pairs.jsonl --model gemma-3-270m --losses dpo '{ kind = "madpo", tau = 4 }' --dry_run
    """
    from madpo.operations.preconditions import refuse_missing

    o = options
    judge = None if o.judge == PROBE else o.judge
    refuse_missing(pairs=[o.data, o.eval_data], reading=o.reading, models=[o.model], rewards=[judge])
    with loading_libraries():
        from madpo.study.compare import compare

    settings = part(o, CompareSettings)
    return print_graph(compare(o.data, o.output_dir, settings, eval_data=o.eval_data, **o.arguments()), o)
