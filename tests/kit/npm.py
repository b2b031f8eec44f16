"""npm packages for tests: a lock file's packages, installed once a machine, and Node.js processes that use them."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, NoReturn

from platformdirs import user_cache_path

from hatch_build import find_node
from tests.kit.programs import give_up_without

_FOUND = find_node()
assert _FOUND is not None, "the nodejs wheel is among the development dependencies"
NODE: Final = _FOUND.program
NPM: Final = _FOUND.npm
INSTALL_SECONDS_MAX: Final = 300.0
ANSWER_SECONDS_MAX: Final = 40.0
UNUSED_SECONDS_MAX: Final = 30 * 86_400.0
# What npm says where it does not come through to its registry.
UNREACHABLE: Final = (
    "EAI_AGAIN",
    "ENOTFOUND",
    "ECONNREFUSED",
    "ECONNRESET",
    "ETIMEDOUT",
    "ENETUNREACH",
    "EHOSTUNREACH",
)
CHOSEN: Final = ("package.json", "package-lock.json", ".npmrc")


class RegistryUnreachable(Exception):
    """npm's registry cannot be reached, and the packages are not there yet."""


def node_modules(directory: Path) -> Path:
    """A directory with the `node_modules` of this one's lock file, shared by all who have the same lock: not to be
    written to. Where the registry cannot be reached the test is skipped, except in CI."""
    try:
        return install(directory)
    except RegistryUnreachable as error:
        give_up_without("npm's registry", "npm ping", str(error))


def project(directory: Path, to: Path, *, is_copied: bool = False) -> Path:
    """Lay out a copy of a directory's sources with its packages beside them; returns it. The packages are a symbolic
    link, or hard links where a bundler takes offence at packages outside of its root (`is_copied`)."""
    installed = node_modules(directory)
    shutil.copytree(directory, to, ignore=shutil.ignore_patterns("node_modules", "__pycache__"), dirs_exist_ok=True)
    if is_copied:
        shutil.copytree(installed / "node_modules", to / "node_modules", symlinks=True, copy_function=_link)
    else:
        (to / "node_modules").symlink_to(installed / "node_modules", target_is_directory=True)
    return to


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another file system
        shutil.copy2(source, target, follow_symlinks=False)
    return target


def install(directory: Path) -> Path:
    """Install like the fixture `node_modules`, for callers other than tests. Raises RegistryUnreachable."""
    chosen = [directory / name for name in CHOSEN if (directory / name).exists()]
    digest = hashlib.sha256()
    for file in chosen:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    cache = user_cache_path("anynode-tests", ensure_exists=True) / "npm"
    cache.mkdir(exist_ok=True)
    installed = cache / f"{directory.name}-{digest.hexdigest()[:20]}"
    with _locked(cache / f"{installed.name}.lock"):
        if not installed.is_dir():
            _npm_ci(chosen, installed)
        os.utime(installed)
    _forget_unused(cache)
    return installed


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _npm_ci(chosen: Sequence[Path], installed: Path) -> None:
    """Install into a directory of another name, so that nobody finds a half."""
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=installed.parent))
    try:
        for file in chosen:
            shutil.copy(file, unfinished)
        # No scripts: what they would download or compile is not in the lock file.
        command = ("ci", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund", "--no-update-notifier")
        retries = ("--fetch-retries=2", "--fetch-retry-mintimeout=500", "--fetch-retry-maxtimeout=2000")
        done = run_npm(*command, *retries, directory=unfinished)
        if done.returncode != 0:
            if any(code in done.stdout for code in UNREACHABLE):
                raise RegistryUnreachable(done.stdout.strip()[-300:])
            raise AssertionError(f"npm ci fails:\n{done.stdout[-3000:]}")
        unfinished.rename(installed)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _forget_unused(cache: Path) -> None:
    for old in cache.iterdir():
        try:
            if old.is_dir() and time.time() - old.stat().st_mtime > UNUSED_SECONDS_MAX:
                shutil.rmtree(old, ignore_errors=True)
        except FileNotFoundError:
            pass  # somebody else has forgotten it


def node_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that finds the wheel's `node` first."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("NODE_OPTIONS", "NODE_PATH")}
    return {**inherited, "PATH": f"{NODE.parent}{os.pathsep}{inherited.get('PATH', '')}", **(environment or {})}


def run_npm(
    *arguments: str,
    directory: Path,
    environment: Mapping[str, str] | None = None,
    within_seconds: float = INSTALL_SECONDS_MAX,
) -> subprocess.CompletedProcess[str]:
    """Run npm (`run`, `build`; see also `run_node`) to its end in a directory; its output is in `stdout`."""
    return run_node(NPM, *arguments, directory=directory, environment=environment, within_seconds=within_seconds)


def run_node(
    script: Path | str,
    *arguments: str,
    directory: Path,
    environment: Mapping[str, str] | None = None,
    within_seconds: float = INSTALL_SECONDS_MAX,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end in a directory; what it has written, errors included, is in `stdout`."""
    return subprocess.run(
        [str(NODE), str(script), *arguments],
        cwd=directory,
        env=node_environment(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=within_seconds,
        check=False,
    )


class ScriptError(Exception):
    """The script answered with an error, or ended."""


class Script:
    """A script that runs and answers: a request is a line of JSON, `{"id", "method", "parameters"}`, its answer
    another, `{"id", "result"}` or `{"id", "error"}`. Requests may overlap, from any thread or event loop."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log
        self._ids = itertools.count(1)
        self._answers: dict[int, Future[Any]] = {}
        self._is_over = False
        self._writing = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    async def call(self, method: str, *, within_seconds: float = ANSWER_SECONDS_MAX, **parameters: Any) -> Any:
        """The result of a method of the script. Raises ScriptError, TimeoutError."""
        answer: Future[Any] = Future()
        id = next(self._ids)
        with self._writing:
            if self._is_over:
                self._end()
            self._answers[id] = answer
            self._input.write(json.dumps({"id": id, "method": method, "parameters": parameters}) + "\n")
            self._input.flush()
        async with asyncio.timeout(within_seconds):
            return await asyncio.wrap_future(answer)

    def close(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass

    @property
    def _input(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            answer = self._answers.pop(message["id"], None)
            if answer is None or answer.cancelled():
                continue
            if "error" in message:
                answer.set_exception(ScriptError(message["error"]))
            else:
                answer.set_result(message["result"])
        with self._writing:
            self._is_over = True
        while self._answers:
            _, answer = self._answers.popitem()
            if not answer.cancelled():
                answer.set_exception(ScriptError(f"the script has ended: {self.log.read_text()[-2000:]}"))

    def _end(self) -> NoReturn:
        raise ScriptError(f"the script has ended: {self.log.read_text()[-2000:]}")


@contextmanager
def running_script(script: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Script]:
    """A script that answers requests, in its own directory; killed at the end. Its standard error is in a log beside
    it."""
    log = script.with_name(f"{script.name}.{os.getpid()}.log")
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [str(NODE), str(script), *arguments],
            cwd=script.parent,
            env=node_environment(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    running = Script(process, log)
    try:
        yield running
    finally:
        running.close()
