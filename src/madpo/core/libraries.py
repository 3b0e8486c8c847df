"""Loading PyTorch and the libraries above it: most of what a command does at its start."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from madpo.core.progress import hint


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Context for the imports of a command: names them on a terminal, and loads without garbage collections.

    What is loaded stays, so collections meanwhile find nothing and take a third of the time; later ones leave the
    loaded modules out. Only the command line does so, since a user's process is not ours.
    """
    hint("loading PyTorch and transformers ...")
    # Notices from one library about another's names say nothing to the person who runs a command.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\.")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
