"""Chat templates: rendered within bounds and at a fixed date, with one sentence for whatever goes wrong."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

from madpo.core.errors import ConfigError, MadpoError, RowError, first_line
from madpo.data.conversation import Conversation
from madpo.data.messages import Message, content_of, encodable

_FORMAT = 1000  # characters of a date's format
UNUSED_TEMPLATE = (
    "The model has a chat template, which text does not use. For a chat model read the text as messages of a user and "
    "an assistant: --columns.chat true"
)
Seen = Callable[[Sequence[Mapping[str, Any]], str], None]
"""Called with the messages of a conversation and the text that the template made of them."""


class Clock:
    """The date and time (local) that a chat template prints: fixed, so that one conversation has one text. ``read``: a
    template has asked for it.
    """

    def __init__(self, now: datetime | None = None) -> None:
        self.now = now or datetime.now().replace(microsecond=0)
        self.read = False

    def strftime(self, form: str) -> str:
        """``strftime_now`` of transformers' chat templates."""
        if len(form) > _FORMAT:
            raise ValueError(f"a date's format has {len(form)} characters")
        self.read = True
        return self.now.strftime(form)

    def text(self) -> str | None:
        """``now`` as ISO 8601; None where no template has asked for it."""
        return self.now.isoformat() if self.read else None


_RENDERING: ContextVar[tuple[Clock, Seen | None]] = ContextVar("rendering")


@contextmanager
def bounded_templates(clock: Clock, seen: Seen | None = None) -> Iterator[None]:
    """Context in which transformers renders chat templates within bounds, and at ``clock``'s time.

    Args:
        seen: is shown every conversation that is rendered.
    """
    from transformers.utils import chat_template_utils as library

    theirs = library._compile_jinja_template
    token = _RENDERING.set((clock, seen))
    library._compile_jinja_template = _compiled
    try:
        yield
    finally:
        library._compile_jinja_template = theirs
        _RENDERING.reset(token)


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    from transformers.utils import chat_template_utils as library

    from madpo.data.bounded import BoundedEnvironment

    def show(messages: Sequence[Mapping[str, Any]], text: str) -> None:
        if (seen := _RENDERING.get()[1]) is not None:
            seen(messages, text)

    # An empty template is compiled for its environment: compiling this one there would evaluate its constants.
    plain = library._cached_compile_jinja_template("").environment
    bounded = BoundedEnvironment.like(plain, show, strftime_now=lambda form: _RENDERING.get()[0].strftime(form))
    with warnings.catch_warnings():  # Python's compiler on what Jinja makes of it
        warnings.simplefilter("ignore", SyntaxWarning)
        return bounded.from_string(source)


def render(tokenizer: Any, messages: list[Message], clock: Clock, **options: Any) -> str:
    """A conversation as its chat template writes it; ``options`` take precedence over those of a :class:`Conversation`.

    Raises RowError: the template refuses the conversation. Raises ConfigError: there is none, or it can render
    nothing.
    """
    text: str = applied(tokenizer, messages, clock, tokenize=False, **options)
    return encodable(text, "what the chat template writes")


def applied(tokenizer: Any, messages: list[Message], clock: Clock, seen: Seen | None = None, **options: Any) -> Any:
    """What the tokenizer's ``apply_chat_template`` returns, within bounds; arguments and errors as for :func:`render`.

    Args:
        seen: as in :func:`bounded_templates`.
    """
    template = tokenizer.chat_template
    if not template:
        raise ConfigError(
            f"the data holds messages but the tokenizer{_of(tokenizer)} has no chat template; take an "
            "instruction-tuned model's tokenizer or set its chat_template (chat_template.jinja next to the model)"
        )
    if isinstance(template, dict) and "default" not in template:
        raise ConfigError(
            f"the tokenizer{_of(tokenizer)} has the chat templates {', '.join(sorted(map(str, template)))} and no "
            "default; in the model's folder, copy the one to use from additional_chat_templates/NAME.jinja to "
            "chat_template.jinja"
        )
    if isinstance(messages, Conversation):
        options = messages.options | options
    try:
        with bounded_templates(clock, seen):
            return tokenizer.apply_chat_template(messages, **options)
    except MadpoError:
        raise
    except Exception as error:  # the template's own program: anything
        raise refusal(tokenizer, error) from error


def refusal(tokenizer: Any, error: Exception) -> MadpoError:
    """The sentence for what a chat template raised, without the place of the conversation."""
    from jinja2 import TemplateError, TemplateSyntaxError

    from madpo.data.bounded import TooMuch

    reason = first_line(error, 160)
    reason = reason if reason.isprintable() else repr(reason)
    if not isinstance(error, TemplateError):
        reason = f"{type(error).__name__}: {reason}"
    # These are no matter of the row.
    if isinstance(error, TooMuch | TemplateSyntaxError | SyntaxError | MemoryError | RecursionError):
        broken = ConfigError(
            f"the chat template{_of(tokenizer)} cannot be used ({reason}); correct it (chat_template.jinja next to the "
            "model), or take another model's tokenizer"
        )
        broken.placed = False
        return broken
    return RowError(
        f"the chat template{_of(tokenizer)} refuses the conversation ({reason}); correct the roles or use another "
        "template"
    )


def _of(tokenizer: Any) -> str:
    name = getattr(tokenizer, "name_or_path", "")
    return f" of {name}" if name else ""


def left_out(messages: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    """The messages with content that does not occur in the text that a template made of them.

    White space does not count. Every content needs a place of its own: an answer that occurs inside a question is no
    sign that the answer is there.
    """
    position = 0
    for message in messages:
        content = content_of(message).strip()
        at = text.find(content, position)
        if at < 0:
            return _left_out_of_any_order(messages, text)
        position = at + len(content)
    return []


def _left_out_of_any_order(messages: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    text = _without_space(text)
    contents = [content_of(message) for message in messages]
    missing = []
    for i in sorted(range(len(messages)), key=lambda i: -len(contents[i])):
        # Templates write what a tool said as JSON.
        forms = [_without_space(form) for form in (contents[i], json.dumps(contents[i], ensure_ascii=False)[1:-1])]
        there = next((form for form in forms if form in text), None)
        if there is None:
            missing.append(i)
        elif there:
            text = text.replace(there, "\0", 1)
    return [messages[i] for i in sorted(missing)]


def _without_space(text: str) -> str:
    return "".join(text.split())
