"""Programs that only some tests need: where they are, and what becomes of a test that lacks one."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from typing import Final, NoReturn

import pytest

LACKING: Final = "for want of "  # how the reason of such a skip begins
PLACES: Final = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
IN_CI: Final = "CI"  # the environment variable


def program(*names: str, install: str) -> str:
    """Return the path of the first of these programs that is installed; see `give_up_without` where none is."""
    path = next(filter(None, (shutil.which(name, path=PLACES) for name in names)), None)
    return path or give_up_without(names[0], install)


def give_up_without(what: str, install: str, why: str = "") -> NoReturn:
    """Skip the running test for want of something; the end of the run says which command installs it.

    In CI, which installs everything, the test fails, and tells `why` if that is known.
    """
    if os.environ.get(IN_CI):
        pytest.fail("\n".join(filter(None, (f"CI must have {what}: {install}", why))))
    pytest.skip(f"{LACKING}{what}: {install}")


def summary_of(reasons: Iterable[str]) -> list[str]:
    """Return a line for each thing that tests were skipped for want of, given the reasons of all skips."""
    lacking = Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    return [
        f"{count} {'test was' if count == 1 else 'tests were'} skipped {reason}"
        for reason, count in sorted(lacking.items())
        if reason.startswith(LACKING)
    ]
