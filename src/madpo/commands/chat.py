"""``madpo chat``: words from the command line or from standard input, answers side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from madpo.commands.from_settings import Configurable
from madpo.core.config import part
from madpo.core.errors import DataError
from madpo.core.libraries import loading_libraries
from madpo.core.options import Cli
from madpo.core.progress import say, show
from madpo.operations.settings import ChatSettings

if TYPE_CHECKING:
    from rich.console import Console


class Chat(Configurable, ChatSettings):
    policy: Annotated[str, Cli(positional=True)]
    """A folder of madpo train, a model or an adapter."""
    prompt: str | None = None
    """One question, in place of a conversation."""


def chat(options: Chat) -> int:
    """Answer one question, or every line of standard input.

    Lines that begin with a slash are for the program: /new starts both conversations over, /quit ends.

    Example:
        madpo chat policy
        madpo chat policy --prompt "What is a joy to watch?" --temperature 0
    """
    from madpo.operations.preconditions import find_policy

    o = options
    find_policy(o.policy, o.reference)
    with loading_libraries():
        from rich.console import Console

        from madpo.operations.chat import Chat as Conversation

    conversation, console = Conversation(o.policy, part(o, ChatSettings)), Console(highlight=False)
    if o.prompt is not None:
        conversation.show(o.prompt, console)
        return 0
    interactive = sys.stdin.isatty()
    if interactive:
        memory = (
            "Both remember the conversation"
            if conversation.remembers
            else "There is no chat template: texts are continued"
        )
        say(f"{memory}; /new forgets, /quit or Ctrl-D ends.")
    for words in _lines(console if interactive else None):
        if words == "/new":
            conversation.forget()
        elif words.startswith("/"):
            show(f"there is no {words.split()[0]}; /new starts over, /quit ends")
        elif words:
            try:
                conversation.show(words, console)
            except DataError as error:  # the template's, of these words only
                show(f"{error}")
    return 0


def _lines(console: Console | None) -> Iterator[str]:
    """The lines of standard input up to its end or /quit; a console shows a prompt before each."""
    while True:
        if console is not None:
            console.print("> ", end="")
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        yield line.strip()
