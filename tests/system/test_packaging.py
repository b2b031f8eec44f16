"""How the page gets into the package: builds of a stand-in for web/, by themselves and as parts of wheels."""

from __future__ import annotations

import gzip
import json
import shutil
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import hatch_build
from hatch_build import Node, build_page, find_node
from tests.kit.harness import free_port
from tests.kit.wheels import package_around, uv_build

PAGE_PATH = "anynode/server/page/"
AGAIN = "uv sync --inexact --reinstall-package anynode"
BUILD = """
import { appendFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';

const directory = process.argv[process.argv.indexOf('--outDir') + 1];
const source = readFileSync('source', 'utf8');
appendFileSync('../builds', `${process.pid}\\n`);
if (source === 'hangs') await new Promise((resolve) => setTimeout(resolve, 60_000));
if (source === 'broken') throw new Error('the source is broken');
mkdirSync(`${directory}/assets`, { recursive: true });
writeFileSync(`${directory}/index.html`, `<script src="/assets/${source}.js"></script>`);
writeFileSync(`${directory}/assets/${source}.js`, `// ${source}\\n`.repeat(200));
writeFileSync(`${directory}/assets/font.woff2`, new Uint8Array(2000).fill(255));
"""
PAGE = {".digest", "index.html", "assets/first.js", "assets/first.js.gz", "assets/font.woff2"}


@pytest.fixture
def node() -> Node:
    """The Node.js of this environment."""
    node = find_node()
    assert node is not None
    return node


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree with a web/ that is built in no time, and needs no packages."""
    root = tmp_path / "root"
    (root / "anynode" / "server").mkdir(parents=True)
    (root / "web").mkdir()
    package = {"name": "page", "version": "1.0.0", "type": "module", "scripts": {"build": "node build.mjs"}}
    (root / "web" / "package.json").write_text(json.dumps(package))
    (root / "web" / "build.mjs").write_text(BUILD)
    write_source(root, "first")
    require(root, {})
    return root


@pytest.fixture
def no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """npm finds nothing where its registry should be, and has nothing of its own."""
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_noproxy", "127.0.0.1")


def write_source(root: Path, source: str) -> None:
    """What the page is made of: `hangs` and `broken` make none."""
    (root / "web" / "source").write_text(source)


def require(root: Path, packages: Mapping[str, str], *, tools: Mapping[str, str] | None = None) -> None:
    """Let web/ depend on these packages and versions, and its developers on these tools."""
    file = root / "web" / "package.json"
    tools = tools or {}
    package = {**json.loads(file.read_text()), "dependencies": packages, "devDependencies": tools}
    file.write_text(json.dumps(package))
    installed = {
        **{f"node_modules/{name}": {"version": version} for name, version in packages.items()},
        **{f"node_modules/{name}": {"version": version, "dev": True} for name, version in tools.items()},
    }
    lock = {"name": "page", "version": "1.0.0", "lockfileVersion": 3, "requires": True}
    (root / "web" / "package-lock.json").write_text(json.dumps({**lock, "packages": {"": package, **installed}}))


def files_of(directory: Path) -> set[str]:
    """The names of all files in it."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def page_of(root: Path) -> Path:
    """Where the page is built."""
    return root / "anynode" / "server" / "page"


def builds_of(root: Path) -> int:
    """How often the build has begun."""
    return len((root / "builds").read_text().splitlines())


def test_a_page_is_built_with_compressed_files_beside_those_that_are_worth_it(root: Path, node: Node) -> None:
    assert build_page(root, node=node) is None
    page = page_of(root)
    assert files_of(page) == PAGE
    packed = (page / "assets" / "first.js.gz").read_bytes()
    assert gzip.decompress(packed) == (page / "assets" / "first.js").read_bytes()
    assert packed[4:8] == bytes(4)  # the time: the same sources are the same bytes
    assert not (root / "web" / "dist").exists()


def test_sources_that_have_not_changed_are_not_built_again(root: Path, node: Node) -> None:
    build_page(root, node=node)
    before = (page_of(root) / "index.html").stat()
    assert build_page(root, node=node) is None
    after = (page_of(root) / "index.html").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert builds_of(root) == 1


def test_changed_sources_are_built_and_leave_nothing_of_the_earlier_page(root: Path, node: Node) -> None:
    build_page(root, node=node)
    write_source(root, "second")
    assert build_page(root, node=node) is None
    assert "second.js" in (page_of(root) / "index.html").read_text()
    assert files_of(page_of(root)) == {name.replace("first", "second") for name in PAGE}


def test_packages_are_installed_again_only_where_the_lock_file_has_changed(root: Path, node: Node) -> None:
    told: list[str] = []
    build_page(root, node=node, tell=told.append)
    assert [line.split()[0] for line in told] == ["Installing", "Building"]
    write_source(root, "second")
    build_page(root, node=node, tell=told.append)
    assert [line.split()[0] for line in told[2:]] == ["Building"]
    lock = root / "web" / "package-lock.json"
    lock.write_text(lock.read_text() + "\n")
    build_page(root, node=node, tell=told.append)
    assert [line.split()[0] for line in told[3:]] == ["Installing", "Building"]


@pytest.mark.usefixtures("no_registry")
def test_a_page_is_built_without_the_tools_of_its_developers(root: Path, node: Node) -> None:
    require(root, {}, tools={"left-pad": "1.3.0"})
    assert build_page(root, node=node) is None
    assert files_of(page_of(root)) == PAGE
    with pytest.raises(hatch_build.RegistryUnreachable):
        hatch_build.install(root / "web", node, has_tools=True)


def test_a_page_is_built_with_the_tools_where_they_are_installed(root: Path, node: Node) -> None:
    told: list[str] = []
    hatch_build.install(root / "web", node, has_tools=True, tell=told.append)
    build_page(root, node=node, tell=told.append)
    hatch_build.install(root / "web", node, has_tools=True, tell=told.append)
    assert [line.split()[0] for line in told] == ["Installing", "Building"]


def test_a_page_that_is_cut_short_in_being_replaced_is_whole(root: Path, node: Node) -> None:
    build_page(root, node=node)
    write_source(root, "second")
    in_the_way = page_of(root) / "assets" / "second.js"
    in_the_way.mkdir()
    with pytest.raises(IsADirectoryError):
        build_page(root, node=node)
    assert "first.js" in (page_of(root) / "index.html").read_text()
    assert files_of(page_of(root)) >= PAGE - {".digest"}
    in_the_way.rmdir()
    write_source(root, "first")  # what the earlier page was built from: but who knows how much of that still is there?
    assert build_page(root, node=node) is None
    assert files_of(page_of(root)) == PAGE


def test_two_builds_at_once_are_one(root: Path, node: Node) -> None:
    with ThreadPoolExecutor() as threads:
        builds = [threads.submit(build_page, root, node=node) for _ in range(2)]
        assert [build.result() for build in builds] == [None, None]
    assert builds_of(root) == 1
    assert files_of(page_of(root)) == PAGE


@pytest.mark.usefixtures("no_registry")
def test_without_a_registry_there_is_a_word_on_it_until_there_is_one(root: Path, node: Node) -> None:
    require(root, {"left-pad": "1.3.0"})
    said = build_page(root, node=node)
    assert said is not None
    assert said.startswith("The chat page has not been built: npm's registry could not be reached. ")
    assert AGAIN in said
    assert "ECONNREFUSED" in said
    assert files_of(page_of(root)) == {"NOT_BUILT"}
    assert (page_of(root) / "NOT_BUILT").read_text() == said
    require(root, {})
    assert build_page(root, node=node) is None
    assert files_of(page_of(root)) == PAGE


def test_a_build_that_fails_keeps_the_earlier_page(root: Path, node: Node) -> None:
    build_page(root, node=node)
    write_source(root, "broken")
    said = build_page(root, node=node)
    assert said is not None
    assert said.startswith("The chat page is older than its sources: `npm run build` fails in web/. ")
    assert "the source is broken" in said
    assert "    at " not in said  # a stack is longer than what is shown of it
    assert files_of(page_of(root)) == {*PAGE, "NOT_BUILT"}
    write_source(root, "first")
    assert build_page(root, node=node) is None
    assert files_of(page_of(root)) == PAGE
    assert builds_of(root) == 2  # the page of these sources was there all the time


def test_a_build_that_hangs_is_killed(root: Path, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hatch_build, "BUILD_SECONDS_MAX", 4.0)
    write_source(root, "hangs")
    said = build_page(root, node=node)
    assert said is not None
    assert "npm was killed after 4 seconds" in said
    assert has_ended(int((root / "builds").read_text()))


def has_ended(pid: int, *, within_seconds: float = 10) -> bool:
    """Whether a process that is not ours is gone, or is so but for somebody who asks how it ended."""
    until = time.monotonic() + within_seconds
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_an_installation_that_hangs_is_killed(root: Path, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hatch_build, "INSTALL_SECONDS_MAX", 0.01)
    said = build_page(root, node=node)
    assert said is not None
    assert "npm's registry could not be reached" in said


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda root, node: build_page(root, node=node, is_skipped=True), "ANYNODE_NO_PAGE was set to 1"),
        (lambda root, node: build_page(root, node=None), "there is no Node.js for this platform"),
    ],
    ids=["skipped", "no Node.js"],
)
def test_what_is_not_tried_is_said_too(
    root: Path, node: Node, build: Callable[[Path, Node], str | None], why: str
) -> None:
    said = build(root, node)
    assert said is not None
    assert said.startswith(f"The chat page has not been built: {why}")
    assert files_of(page_of(root)) == {"NOT_BUILT"}


def test_without_sources_nothing_is_built(root: Path, node: Node) -> None:
    shutil.rmtree(root / "web")
    assert build_page(root, node=node) is None
    assert not page_of(root).exists()


def page_in(wheel: Path, root: Path) -> set[str]:
    """The files of the page in a wheel. All else in it is the code below `root`, under the one name `anynode`."""
    with zipfile.ZipFile(wheel) as archive:
        files = [file for file in archive.infolist() if ".dist-info/" not in file.filename]
    assert all(stat.S_ISREG(file.external_attr >> 16) for file in files)
    names = {file.filename for file in files}
    page = {name for name in names if name.startswith(PAGE_PATH)}
    code = {f"anynode/{path}" for path in code_of(root)}
    assert {"anynode/__init__.py", "anynode/py.typed", "anynode/server/cli.py", "anynode/models/queries.sql"} <= code
    assert names - page == code
    return {name.removeprefix(PAGE_PATH) for name in page}


def code_of(root: Path) -> set[str]:
    """The files that the package `anynode` is made of, but for the page, by their paths in it."""
    found = {path.name for path in (root / "anynode").iterdir() if path.is_file()}
    for name in ("server", "models"):
        found |= {f"{name}/{file}" for file in files_of(root / name)}
    return {path for path in found if not path.startswith("server/page/")}


def test_a_wheel_has_the_page_and_one_of_an_sdist_builds_nothing(root: Path, tmp_path: Path) -> None:
    package_around(root)
    assert page_in(uv_build(root, to=tmp_path / "wheel"), root) == PAGE
    sdist = uv_build(root, "--sdist", to=tmp_path / "sdist")
    assert builds_of(root) == 1
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert [name for name in names if name.endswith("/web/build.mjs")]
    assert not [name for name in names if "node_modules" in name]
    # Had it anything to build, it would say that it was told not to.
    assert page_in(uv_build(sdist, to=tmp_path / "wheel-of-sdist", is_skipped=True), root) == PAGE
    write_source(root, "second")
    assert page_in(uv_build(root, to=tmp_path / "skipped", is_skipped=True), root) == {*PAGE, "NOT_BUILT"}
    assert "ANYNODE_NO_PAGE was set to 1" in (page_of(root) / "NOT_BUILT").read_text()


@pytest.mark.usefixtures("no_registry")
def test_a_wheel_is_built_without_npms_registry(root: Path, tmp_path: Path) -> None:
    require(package_around(root), {"left-pad": "1.3.0"})
    assert page_in(uv_build(root, to=tmp_path / "wheel"), root) == {"NOT_BUILT"}
