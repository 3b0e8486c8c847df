"""Nothing that only some systems have is imported where a module loads."""

import ast
from collections.abc import Iterator

from repository import ROOT

POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "nis", "crypt", "spwd"}
WINDOWS = {"msvcrt", "winreg", "winsound", "_winapi"}


def at_import(node: ast.AST) -> Iterator[str]:
    """Modules that are imported when the file is: not in functions, not where an ImportError is caught."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name.split(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            yield (child.module or "").split(".")[0]
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try):
            yield from at_import(child)


def test_every_module_loads_on_every_system() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in (ROOT / "src").rglob("*.py")
        for name in at_import(ast.parse(path.read_text(encoding="utf-8")))
        if name in POSIX | WINDOWS
    }
    assert not found
