"""Breaks the product in one place at a time, in a copy of it, and sees that the tests notice; `make mutants`.

It takes names of mutations, or parts of them, and `--list` lists them. A mutation is an exact replacement; where its
text is not there as often as it should be, nothing is run. The tests run one after another: several are about time.
All of it takes about half an hour.

`--quick` asks another question: how many of the mutations in server/engine do the tests of `make quick` notice by
themselves? It fails below 60 %. With names it tries those mutations, in whatever file; it takes a few minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from tests.kit.examples import QUICK
from tests.kit.repository import copied_to
from tests.mutations import MUTATIONS
from tests.mutations.mutation import Mutation, broken

TOP: Final = Path(__file__).resolve().parent.parent
SECONDS_MAX: Final = 240.0  # for one run of tests that should notice; one that takes longer hangs
SECONDS_MAX_UNCHANGED: Final = 1800.0
ENGINE: Final = "server/engine/"
# The tests of `make quick`, the engine's own first. The test of the mutations themselves fails with each of them.
QUICK_TESTS: Final = ("unit/engine", "unit")
QUICK_OPTIONS: Final = ("-m", "not slow", f"--hypothesis-profile={QUICK}", "--ignore=tests/unit/test_mutations.py")
QUICK_SHARE_MIN: Final = 0.6
CLEANING_UP_SECONDS: Final = 30.0
RED: Final = re.compile(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", re.MULTILINE)


class Run(NamedTuple):
    """What became of tests: the first red one; "" where none is, None where they could not be run."""

    red: str | None
    output: str


def run(top: Path, tests: Sequence[str], seconds_max: float, *options: str) -> Run:
    """Run tests of a copy, with the product beside them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "--tb=short",
        "-rfE",
        "-p",
        "no:cacheprovider",
        *options,
    ]
    process = subprocess.Popen(  # noqa: S603
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=top,
        env={**os.environ, "PYTHONPATH": str(top), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds_max)
    except subprocess.TimeoutExpired:
        return Run(f"{' '.join(tests)} (not done after {seconds_max:g} s)", stop(process))
    except BaseException:
        stop(process)
        raise
    if process.returncode == 0:
        return Run("", output)
    found = RED.search(output)
    return Run(None if found is None or process.returncode != 1 else found[1], output)


def stop(process: subprocess.Popen[str]) -> str:
    """End a run as Ctrl-C does, so that it stops what it has started; or all of it at once where it does not end."""
    process.terminate()
    try:
        return process.communicate(timeout=CLEANING_UP_SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def try_out(mutation: Mutation, top: Path, *options: str) -> str:
    """Return the test of a copy that notices the mutation, or "". Raises RuntimeError if a test cannot be run."""
    for file, text in broken(mutation, top).items():
        (top / file).write_text(text)
    for test in mutation.tests:
        red, output = run(top, [test], SECONDS_MAX, "-x", *options)
        if red is None:
            raise RuntimeError(f"{mutation.name}: {test} could not be run\n{output}")
        if red:
            return red
    return ""


def chosen(names: Sequence[str], *, is_quick: bool) -> list[Mutation]:
    """The mutations with one of these in their names. Without names: all; when quick, those of the engine."""
    if names:
        found = [mutation for mutation in MUTATIONS if any(name in mutation.name for name in names)]
    elif is_quick:
        found = [m for m in MUTATIONS if any(change.file.startswith(ENGINE) for change in m.changes)]
    else:
        found = [*MUTATIONS]
    if not found:
        raise SystemExit("there is no such mutation: see --list")
    return [replace(mutation, tests=QUICK_TESTS) for mutation in found] if is_quick else found


def main() -> int:
    """Try the mutations out, and say which of them survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of mutations")
    parser.add_argument("--list", action="store_true", help="list the mutations")
    parser.add_argument("--quick", action="store_true", help="try only what `make quick` runs; see above")
    arguments = parser.parse_args()
    mutations = chosen(arguments.names, is_quick=arguments.quick)
    if arguments.list:
        print(*(mutation.name for mutation in mutations), sep="\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        if arguments.quick:
            return try_all(mutations, Path(scratch), *QUICK_OPTIONS, share_min=QUICK_SHARE_MIN)
        return try_all(mutations, Path(scratch))


def try_all(mutations: Sequence[Mutation], scratch: Path, *options: str, share_min: float = 1.0) -> int:
    """Try the mutations one after another. Return the exit status: 0 when at least this share has been noticed."""
    original = copied_to(scratch / "original")  # others may be working on the files meanwhile
    no_longer = []
    for mutation in mutations:
        try:
            broken(mutation, original)
        except ValueError as error:
            no_longer.append(str(error))
    if no_longer:
        print("no longer applies:", *no_longer, sep="\n")
        return 1

    tests = {test for mutation in mutations for test in mutation.tests}
    tests -= {test for test in tests if "::" in test and test.split("::")[0] in tests}
    unchanged = shutil.copytree(original, scratch / "unchanged", symlinks=True)
    red, output = run(unchanged, sorted(tests), SECONDS_MAX_UNCHANGED, *options)
    if red != "":
        print(output, "the tests are not green to begin with", sep="\n")
        return 1
    print(f"unchanged, all is green: {output.strip().splitlines()[-1]}\n", flush=True)

    survived = 0
    width = max(len(mutation.name) for mutation in mutations)
    for mutation in mutations:
        began_at = time.monotonic()
        top = shutil.copytree(original, scratch / "broken", symlinks=True)
        red = try_out(mutation, top, *options)
        shutil.rmtree(top)
        survived += not red
        print(f"{mutation.name:{width}}  {time.monotonic() - began_at:4.0f} s  {red or 'SURVIVED'}", flush=True)
    share = 1 - survived / len(mutations)
    print(f"\n{len(mutations)} mutations, {survived} survived: {share:.0%} noticed")
    return 0 if share >= share_min else 1


if __name__ == "__main__":
    sys.exit(main())
