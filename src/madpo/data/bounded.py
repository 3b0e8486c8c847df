"""Rendering of untrusted Jinja templates: bounded in memory and time, and repeatable.

A sandbox keeps a template from running code, and not from ``{{ 'a'.zfill(9999999999) }}``. Everything in a template
that makes text or lists pays for it from a budget, and before it is made where its size can be foreseen.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import BuiltinMethodType
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from madpo.data.messages import texts_within

CHARACTERS = 2**26
"""What a rendering may make out of nothing; list entries and steps count as several characters."""
TIMES = 256
"""... and for each character that it is given: a template copies a message a dozen times, and accumulates some."""
SECONDS = 60.0
SOURCE = 1_000_000  # characters of a template: real ones have at most some tens of thousands
NUMBER = 2**20  # the largest width or count: real templates use none above some hundred
BITS = 2**16  # of a whole number
STEP, ENTRY = 32, 16  # what a call or a turn of a loop costs, and an entry of a list, in characters

_UNREPEATABLE = ("random", "urlize")
"""Filters that are taken away: the first gives another text every time, the second has no bound (and makes HTML)."""
# Filters that look at a container without writing it out.
_STRUCTURAL = (
    *("attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list"),
    *("map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "unique"),
)
_EVERYWHERE = ("expandtabs", "translate", "indent", "wordwrap", "tojson")
"""Methods and filters that may put an argument in the place of every character, or in front of every line."""
_CONTAINERS = (list, tuple, dict, set)
_DIGITS = re.compile(r"\d+")
_COUNTED, _CONCATENATED, _MADE = "madpo counted", "madpo concatenated", "madpo made"


class TooMuch(TemplateError):
    """A template that makes more than a conversation can need."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of transformers' chat templates, with a budget for each rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    seen: Callable[[Any, str], None]
    _left = 0
    _deadline = 0.0

    @classmethod
    def like(
        cls, other: ImmutableSandboxedEnvironment, seen: Callable[[Any, str], None], **names: Callable[..., Any]
    ) -> BoundedEnvironment:
        """A bounded copy of ``other`` with some globals replaced by ``names``; ``seen`` is called with the messages and
        the text of every rendering.
        """
        made = cls.__new__(cls)
        vars(made).update(vars(other))
        made.globals = {name: value for name, value in other.globals.items() if name != "lipsum"} | names
        made.filters = {
            name: _bounded_filter(name, function)
            for name, function in other.filters.items()
            if name not in _UNREPEATABLE
        }
        made.finalize = _filter(cls.printed)
        made.filters |= {_COUNTED: _filter(lambda environment, items: _Counted(items, environment))}
        made.filters |= {_CONCATENATED: _filter(cls.concatenated), _MADE: _filter(cls.made)}
        made.extensions = {name: extension.bind(made) for name, extension in other.extensions.items()}
        made.cache = None
        made.template_class = _BoundedTemplate
        made.seen = seen
        return made

    def begin(self, given: object) -> None:
        """Fill the budget for a rendering of ``given``."""
        self._left = CHARACTERS + TIMES * sum(map(len, texts_within(given)))
        self._deadline = time.monotonic() + SECONDS

    def spend(self, characters: int) -> None:
        """Take from the budget. Raises TooMuch: nothing is left of it, or the rendering takes too long."""
        self._left -= characters
        if self._left < 0:
            raise TooMuch("it makes far more text than it is given")
        if time.monotonic() > self._deadline:
            raise TooMuch(f"it takes more than {SECONDS:g} s for one conversation")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > SOURCE:
            raise TooMuch(f"it is {len(source)} characters long")
        tree: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def concat(self, pieces: Iterable[str]) -> str:
        """What a template, a macro or a block has written."""
        found = []
        for piece in pieces:
            self.spend(len(piece) + 1)
            found.append(piece)
        return "".join(found)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.spend(STEP)
        if isinstance(left, int) and isinstance(right, int):
            bits = (left.bit_length(), right.bit_length())
            made = {"*": sum(bits), "**": bits[0] * max(right, 1), "%": 0, "+": max(bits)}[operator]
            if made > BITS:
                raise TooMuch("it counts to a number of thousands of digits")
        elif operator == "%" and isinstance(left, str | bytes):
            self._spend_on_format(left, right)
        elif operator == "*":
            sized, count = (left, right) if isinstance(right, int) else (right, left)
            if isinstance(count, int) and hasattr(sized, "__len__"):
                self.spend(max(count, 0) * _cost(sized))
        elif operator == "+":
            self.spend(_cost(left) + _cost(right))
        return self.refuse_unfolding(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spend(STEP)
        if isinstance(obj, LoopContext) and args:
            args = (_Counted(args[0], self), *args[1:])
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        if isinstance(method, BuiltinMethodType) and isinstance(owner := method.__self__, str | bytes | int):
            if method.__name__ == "join" and args:
                args = (self._spend_on_join(owner, args[0]), *args[1:])
            else:
                self.foresee(method.__name__, owner, [*args, *kwargs.values()])
        return self.made(super().call(context, obj, *args, **kwargs))

    def made(self, value: Any) -> Any:
        """Pay for what was made; the value."""
        self.spend(_cost(value))
        return self.refuse_unfolding(value)

    def printed(self, value: Any) -> Any:
        """Pay for what Jinja makes text of next, apart from the text, which :meth:`concat` pays for; the value."""
        if not isinstance(value, str):
            self.written(value)
        return value

    def concatenated(self, pieces: Sequence[Any]) -> str:
        """The pieces of ``a ~ b`` in one text."""
        for piece in pieces:
            self.spend(self.written(piece))
        return "".join(map(str, pieces))

    def refuse_unfolding(self, value: Any) -> Any:
        """Refuse a container that is small in memory and has no end where it is compared, hashed or written out.

        A list that holds another one twice does so at each level of forty.
        """
        if isinstance(value, _CONTAINERS) and _unfolded(value, {}) > max(self._left, 0):
            raise TooMuch("it makes far more text than it is given")
        return value

    def foresee(self, name: str, value: Any, given: Sequence[Any]) -> None:
        """Pay for what a method or a filter is about to make of text, where that may be much more than it is given."""
        number, size = max(_small_numbers(given), default=0), self.written(value)
        self.spend(size // 256)
        if name in ("format", "format_map"):
            self._spend_on_format(value if isinstance(value, bytes) else str(value), given)
        elif name == "replace" and len(given) > 1:
            texts = (value, *given[:2])
            self.spend(_replaced(*(texts if isinstance(value, bytes) else map(str, texts))))
        elif name in _EVERYWHERE:
            longest = max((self.written(entry) for entry in given if not isinstance(entry, int)), default=0)
            self.spend(size * (longest + (number or 8)))
        elif name in ("split", "rsplit", "splitlines"):
            mark = given[0] if given and isinstance(given[0], type(value)) and given[0] else None
            self.spend(ENTRY * (size // 2 if mark is None else value.count(mark)))

    def _spend_on_format(self, pattern: str | bytes, given: Any) -> None:
        numbers = _small_numbers(list(self.entries(given)))
        text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
        widths = [int(digits[:20]) for digits in _DIGITS.findall(text)]
        fields = text.count("%") + text.count("{")
        self.spend(sum(widths) + fields * (max(numbers, default=0) + self.written(given)))

    def _spend_on_join(self, mark: Any, items: Any) -> list[Any]:
        found = []
        for item in items:
            self.spend(_cost(mark) + self.written(item) + ENTRY)
            found.append(item)
        return found

    def entries(self, value: Any) -> Iterator[Any]:
        """A value and all that is in it, at every level.

        Each one is paid for: a list that holds another one twice is small in memory, and doubles with each level here.
        """
        left = [value]
        while left:
            entry = left.pop()
            self.spend(ENTRY)
            yield entry
            if isinstance(entry, Mapping):
                left.extend(entry)
                left.extend(entry.values())
            elif isinstance(entry, list | tuple | set):
                left.extend(entry)

    def written(self, value: Any) -> int:
        """About how many characters a value has as text."""
        if isinstance(value, str | bytes):
            return len(value)
        return sum(len(entry) if isinstance(entry, str | bytes) else ENTRY for entry in self.entries(value))


class _BoundedTemplate(Template):
    """Fills the budget at each rendering."""

    environment: BoundedEnvironment

    def render(self, *args: Any, **kwargs: Any) -> str:
        self.environment.begin((args, kwargs))
        text = super().render(*args, **kwargs)
        self.environment.seen(kwargs.get("messages"), text)
        return text

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        self.environment.begin((args, kwargs))
        return super().generate(*args, **kwargs)


class _Counting(NodeTransformer):
    """Puts a filter of ours where Jinja asks its environment nothing: loops, slices and ``~``."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        assert isinstance(node.iter, nodes.Expr)
        node.iter = _filtered(node.iter, _COUNTED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _CONCATENATED)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE) if isinstance(node.arg, nodes.Slice) else node

    def _literal(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        return node if constant or getattr(node, "ctx", "load") != "load" else _filtered(node, _MADE)

    visit_List = visit_Tuple = visit_Dict = _literal


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Counted:
    """An iterable whose entries cost a step each; with a length where the iterable has one, for ``loop.length``."""

    def __init__(self, items: Any, environment: BoundedEnvironment) -> None:
        self._items, self._environment = items, environment

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._environment.spend(STEP)
            yield item


def _filter(method: Callable[[Any, Any], Any]) -> Callable[[Context, Any], Any]:
    """A filter that Jinja does not evaluate while it compiles, since it takes the context."""
    return pass_context(lambda context, value: method(context.environment, value))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that pays for what it makes."""
    passes = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    def bounded(context: Context, value: Any = "", /, *args: Any, **kwargs: Any) -> Any:
        environment: Any = context.environment
        environment.spend(STEP)
        given = [*args, *kwargs.values()]
        if name in ("join", "sum"):
            value = environment._spend_on_join("", value)
            mark = max((environment.written(entry) for entry in given), default=0)
            # A sum of lists copies all that it has at each step.
            lists = sum(_cost(entry) for entry in value if isinstance(entry, list | tuple))
            environment.spend(len(value) * (mark + (lists if name == "sum" else 0)))
        elif name in _STRUCTURAL:
            _small_numbers(given)
        else:
            environment.foresee(name, value, given)
        first = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (environment,)}
        return environment.made(function(*first.get(str(passes), ()), value, *args, **kwargs))

    return bounded


def _cost(value: Any) -> int:
    """Characters that a value takes, less what other values hold."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple | dict | set):
        return ENTRY * len(value)
    return value.bit_length() // 8 if isinstance(value, int) else 0


def _unfolded(value: Any, known: dict[int, int]) -> int:
    """What a value costs if every part that it shares is there as often as it is named."""
    if not isinstance(value, _CONTAINERS):
        return len(value) if isinstance(value, str | bytes) else 1
    if id(value) not in known:
        entries = (*value, *value.values()) if isinstance(value, dict) else value
        known[id(value)] = ENTRY + sum(_unfolded(entry, known) for entry in entries)
    return known[id(value)]


def _small_numbers(given: Iterable[Any]) -> list[int]:
    """The whole numbers among arguments, which may be widths or counts."""
    numbers = [abs(entry) for entry in given if isinstance(entry, int)]
    if any(number > NUMBER for number in numbers):
        raise TooMuch(f"it asks for a width or a count above {NUMBER}")
    return numbers


def _replaced(text: str | bytes, old: Any, new: Any) -> int:
    """Characters of ``text.replace(old, new)`` at most."""
    if not isinstance(old, type(text)) or not isinstance(new, type(text)):
        return 0  # Python refuses it
    return len(text) + (text.count(old) * len(new))  # type: ignore[arg-type]
