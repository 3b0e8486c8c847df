"""``madpo chat``: a policy and its reference answer the same words side by side in a terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled

from madpo.core.errors import ConfigError, located
from madpo.data.messages import Text, said
from madpo.data.tokens import Encoder
from madpo.models.engine.responses import respond
from madpo.models.load import load_model, load_tokenizer, resolve_model
from madpo.operations.preconditions import find_policy
from madpo.operations.responses import ends_of_responses
from madpo.operations.settings import ChatSettings

# Sequences that move the cursor, set titles or colours; whatever is left of control characters; and marks that turn
# the direction of the text around them.
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-Z\\-_]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)


def without_control(text: str) -> str:
    """A model's text without anything that a terminal would obey; tabs and line ends stay."""
    return _CONTROL.sub("", text)


class Chat:
    """Two conversations that hear the same words: the policy's and its reference's.

    With a chat template each side remembers its own answers; without one every text is a beginning to continue.

    Args:
        policy: as for :func:`madpo.operations.evaluate`.

    Raises:
        ConfigError: there is no policy or no reference.
    """

    def __init__(self, policy: str | Path, settings: ChatSettings) -> None:
        found = find_policy(policy, settings.reference)
        self.settings, self.turn = settings, 0
        self.names = (Path(found.name).name, Path(found.reference).name)
        self._sides: list[tuple[Any, Any]] = []  # model and tokenizer
        for source, adapter in ((found.base, found.adapter), (found.reference, None)):
            resolved = resolve_model(source)
            self._sides.append((load_model(resolved, adapter=adapter), load_tokenizer(resolved)))
        self.remembers = all(tokenizer.chat_template for _, tokenizer in self._sides)
        if settings.system is not None and not self.remembers:
            raise ConfigError(
                f"{policy} has no chat template, so nothing says where a system prompt goes; leave it out"
            )
        self.forget()

    def forget(self) -> None:
        """Start both conversations over."""
        before = said("system", self.settings.system) if self.settings.system is not None else []
        self._said = [list(before), list(before)]

    def answer(self, words: str) -> tuple[str, str]:
        """What policy and reference answer, drawn with the same random numbers.

        Raises:
            DataError: the chat template refuses the conversation.
        """
        answers = []
        for (model, tokenizer), history in zip(self._sides, self._said, strict=True):
            encoder, question = Encoder(tokenizer), said("user", words)
            prompt: Text = [*history, *question] if self.remembers else words
            ends = ends_of_responses(tokenizer, [prompt], model)
            with located("the conversation"):
                ids = encoder.prompt_ids(prompt)
            ((response,),) = respond(
                model, tokenizer, [ids], self.settings, keys=[self.turn], draw=0, ends=ends, description="Answering"
            )
            history += [*question, *said("assistant", response.text)]
            answers.append(response.text)
        self.turn += 1
        return answers[0], answers[1]

    def show(self, words: str, console: Console) -> None:
        """Print both answers side by side."""
        table = Table(expand=True)
        for name in self.names:
            table.add_column(Styled(without_control(name)), ratio=1, overflow="fold")
        table.add_row(*(Styled(without_control(answer)) for answer in self.answer(words)))
        console.print(table)
