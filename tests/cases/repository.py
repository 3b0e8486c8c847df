"""Where the repository's folders are, for tests that read its files."""

from pathlib import Path

CASES = Path(__file__).resolve().parent
TESTS = CASES.parent
ROOT = TESTS.parent
