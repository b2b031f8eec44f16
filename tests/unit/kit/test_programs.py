"""A test that lacks a program is skipped, and the end of the run says what installs it; in CI the test fails."""

from __future__ import annotations

import pytest

from tests.kit.programs import give_up_without, program, summary_of

INSTALL = "apt-get install nginx"


def test_the_path_is_that_of_the_first_program_that_is_installed() -> None:
    assert program("no-such-program", "sh", install=INSTALL).endswith("/sh")


def test_without_its_program_a_test_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"^for want of no-such-program: apt-get install nginx$"):
        program("no-such-program", install=INSTALL)


def test_in_ci_it_fails_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"^CI must have nginx: apt-get install nginx\nit is gone$"):
        give_up_without("nginx", INSTALL, "it is gone")


def test_the_end_of_a_run_names_each_thing_once_with_its_command() -> None:
    nginx, npm = f"Skipped: for want of nginx: {INSTALL}", "Skipped: for want of npm's registry: npm ping"
    assert summary_of([nginx, npm, nginx, "Skipped: this is not a checkout", nginx]) == [
        "3 tests were skipped for want of nginx: apt-get install nginx",
        "1 test was skipped for want of npm's registry: npm ping",
    ]
