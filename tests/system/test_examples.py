"""Every example is run: pages in a real browser and scripts as processes, with the node killed that answers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import pytest_asyncio

from tests.agents.scripted import Strings, eventually, script_of
from tests.kit.browser import Browser, Locator, Page, expect, open_tab
from tests.kit.harness import NodeProcess, free_port, running_node, socket_to, sql, token_for
from tests.kit.npm import NODE, node_modules, project, run_node, run_npm
from tests.kit.stock.balancer import Balancer, running_balancer

TOP = Path(__file__).parents[2]
EXAMPLES = TOP / "examples"
TOKENS = 150
WHOLE = "".join(f"w{number} " for number in range(TOKENS)).strip()
ENVIRONMENT = {"ECHO_TOKENS": str(TOKENS), "ECHO_TOKENS_PER_SECOND": "50", "LEASE_SECONDS": "1"}
# What the applications are built with; the server of the test puts in what is so.
URL, TOKEN = "http://anynode.example", "the-token-of-the-user"
ONE_LINERS = re.findall(r"^```sh\n(.+?)\n```$", (EXAMPLES / "README.md").read_text(), re.M)
# Where the answer is, perhaps with other things.
SHOWN: Mapping[str, Callable[[Page], Locator]] = {
    "react": lambda page: page.locator("p.assistant"),
    "assistant-ui": lambda page: page.locator("main, #root").last,
    "browser": lambda page: page.locator("#answer"),
}


@contextmanager
def static_server(directory: Path, replaced: Mapping[str, str], port: int) -> Iterator[str]:
    """Serves the files of a directory with texts in them replaced; gives its base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            file = directory / (self.path.split("?")[0].strip("/") or "index.html")
            if not file.is_file():
                self.send_error(404)
                return
            text = file.read_text()
            for old, new in replaced.items():
                text = text.replace(old, new)
            self.send_response(200)
            kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
            self.send_header("Content-Type", kinds.get(file.suffix, "application/octet-stream"))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A tab with a profile of its own."""
    async with open_tab(browser) as tab:
        yield tab.page


@asynccontextmanager
async def two_nodes(
    database_url: str, directory: Path, **environment: str
) -> AsyncIterator[tuple[list[NodeProcess], Balancer]]:
    """Two nodes behind one address."""
    with (
        running_node(database_url, directory, {**ENVIRONMENT, **environment}) as one,
        running_node(database_url, directory, {**ENVIRONMENT, **environment}) as other,
    ):
        async with running_balancer(one.port, other.port) as balancer:
            yield [one, other], balancer


async def kill_who_answers(nodes: Sequence[NodeProcess]) -> None:
    """kill -9 of the node that runs the turn."""
    running = [node for node in nodes if await asyncio.to_thread(node.metric, "anynode_turns_running") == 1]
    assert len(running) == 1
    running[0].kill()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", ["react", "assistant-ui", "browser"])
async def test_a_page_goes_on_when_it_is_loaded_again_and_the_node_is_killed_that_answers(
    database_url: str, tmp_path: Path, page: Page, user: str, name: str
) -> None:
    site = EXAMPLES / name
    if name != "browser":
        site = await asyncio.to_thread(project, EXAMPLES / name, tmp_path / name, is_copied=True)
        at = {"VITE_ANYNODE_URL": URL, "VITE_ANYNODE_TOKEN": TOKEN}
        built = await asyncio.to_thread(run_npm, "run", "build", directory=site, environment=at)
        assert built.returncode == 0, built.stdout
        site = site / "dist"
    port = free_port()
    async with two_nodes(database_url, tmp_path, ALLOWED_ORIGINS=f"http://127.0.0.1:{port}") as (nodes, balancer):
        with static_server(site, {URL: balancer.http, TOKEN: token_for(user)}, port) as address:
            named = (
                f"url={balancer.http.replace('http', 'ws')}/ws&token={token_for(user)}" if name == "browser" else "c1"
            )
            shown = SHOWN[name](page)
            await page.goto(f"{address}/#{named}")
            await page.locator("input, textarea").first.fill("Any news?")
            await page.keyboard.press("Enter")
            await expect(shown).to_contain_text("w5 ")
            await page.reload()
            await expect(shown).to_contain_text("w20 ")
            await kill_who_answers(nodes)
            assert "w149" not in await shown.inner_text()
            await expect(shown).to_contain_text("w149")
            assert words(await shown.inner_text()) == WHOLE.split()
            # The chat is in the address: a page that is loaded again shows it again.
            address = page.url
            await page.goto("about:blank")
            await page.goto(address)
            await expect(shown).to_contain_text("w149")
            assert words(await shown.inner_text()) == WHOLE.split()


def words(text: str) -> list[str]:
    """What is said after the question, without what buttons are called."""
    return text.split("Any news?")[-1].replace("Send", "").replace("Stop", "").split()


@pytest.mark.parametrize("name", ["client.py", "responses.py"])
async def test_a_script_goes_on_when_the_node_is_killed_that_answers(
    database_url: str, tmp_path: Path, user: str, name: str
) -> None:
    async with two_nodes(database_url, tmp_path) as (nodes, balancer):
        script = await asyncio.create_subprocess_exec(
            *(sys.executable, "-u", EXAMPLES / name, "Any news?"),
            env={**os.environ, "ANYNODE_URL": balancer.http, "ANYNODE_TOKEN": token_for(user)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert script.stdout is not None
            async with asyncio.timeout(30):
                begun = await script.stdout.readuntil(b"w20 ")
                await kill_who_answers(nodes)
                rest, complaints = await script.communicate()
        finally:
            if script.returncode is None:
                script.kill()
                await script.wait()
    assert complaints == b""
    assert script.returncode == 0
    assert (begun + rest).decode().split() == WHOLE.split()


async def output_of_client(address: str, user: str, question: str) -> tuple[int | None, str, str]:
    """Run client.py to its end; its exit status and what it has said."""
    script = await asyncio.create_subprocess_exec(
        *(sys.executable, "-u", EXAMPLES / "client.py", question),
        env={**os.environ, "ANYNODE_URL": address, "ANYNODE_TOKEN": token_for(user)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(20):
            said, complaints = await script.communicate()
    finally:
        if script.returncode is None:
            script.kill()
            await script.wait()
    return script.returncode, said.decode(), complaints.decode()


async def test_the_script_says_what_is_refused(shared_node: NodeProcess, user: str) -> None:
    refusal = "The message is longer than 65536 bytes.\n"
    assert await output_of_client(shared_node.http, user, "x" * 70_000) == (1, "", refusal)


async def test_the_script_asks_again_where_the_node_could_not_now(database_url: str, tmp_path: Path, user: str) -> None:
    strings = Strings(tmp_path / "strings")
    with running_node(database_url, tmp_path, {**strings.environment, "TURNS_MAX": "1"}) as node:
        async with socket_to(node, user) as socket:
            await socket.ask(script_of(("paced", 20, "w{number} ", 0.05)))
            await socket.until("turn.started")
            assert await output_of_client(node.http, user, script_of(("text", "hello"))) == (0, "hello\n", "")


async def test_the_script_takes_frames_of_any_size(database_url: str, tmp_path: Path, user: str) -> None:
    strings = Strings(tmp_path / "strings")
    with running_node(database_url, tmp_path, strings.environment) as node:
        question = script_of(("huge", '"', 1_000_000))  # twice as long as JSON
        assert await output_of_client(node.http, user, question) == (0, '"' * 1_000_000 + "\n", "")


async def test_the_script_goes_on_from_a_snapshot(database_url: str, tmp_path: Path, user: str) -> None:
    """The script was away until the journal was gone."""
    strings = Strings(tmp_path / "strings")
    question = script_of(("text", "Hear "), ("gate", user), ("text", "this."))
    with running_node(database_url, tmp_path, strings.environment) as node:
        async with running_balancer(node.port) as balancer:
            output = asyncio.create_task(output_of_client(balancer.http, user, question))

            async def has_heard() -> bool:
                return bool(await sql(database_url, "SELECT FROM events WHERE type = 'turn.delta'"))

            await eventually(has_heard)
            balancer.ports.clear()
            balancer.drop()
            strings.open(user)

            async def has_ended() -> bool:
                return bool(await sql(database_url, "SELECT FROM turns WHERE status = 'completed'"))

            await eventually(has_ended)
            await sql(database_url, "DELETE FROM events")
            balancer.ports.append(node.port)
            assert await output == (0, "Hear this.\n", "")


def test_every_one_liner_is_here() -> None:
    assert [line.split()[0] for line in ONE_LINERS] == ["curl", "curl", "npx", "(echo"]


@pytest.mark.parametrize("line", ONE_LINERS, ids=["chat", "useChat", "wscat", "websockets"])
def test_a_one_liner_gets_its_answer(shared_node: NodeProcess, user: str, line: str) -> None:
    path = [str(Path(sys.executable).parent), str(NODE.parent), os.environ["PATH"]]
    if "npx" in line:
        path.insert(0, str(node_modules(EXAMPLES / "wscat") / "node_modules" / ".bin"))
        line = line.replace("npx ", "")
    for old, new in (("http://127.0.0.1:8000", shared_node.http), ("ws://127.0.0.1:8000", shared_node.ws)):
        line = line.replace(old, new)
    typed, keyboard = os.pipe()  # an input without an end, as a terminal's: wscat leaves when it has ended
    try:
        finished = subprocess.run(
            ["bash", "-c", line.replace("/api/dev/", f"/api/{user}/")],
            env={**os.environ, "PATH": ":".join(path), "ANYNODE_TOKEN": token_for(user)},
            stdin=typed,
            capture_output=True,
            text=True,
            timeout=30,
        )
    finally:
        os.close(typed)
        os.close(keyboard)
    assert finished.returncode == 0, finished.stderr
    said = finished.stdout
    if "/api/dev/" in line:
        assert json.loads(said)["response"] == "[1] Why is the sky blue?"
    elif "/api/chat" in line:
        deltas = re.findall(r'"type":"text-delta".*?"delta":"(.*?)"', said)
        assert "".join(deltas) == "[1] Why is the sky blue?"
        assert said.endswith("data: [DONE]\n\n")
    else:
        assert '"turn.completed"' in said
        assert '"content":"[1] Why is the sky blue?"' in said


@pytest.mark.parametrize(("package", "answers"), [("ai", 2), ("ai6", 1), ("ai5", 1)])
def test_the_lines_of_the_documentation_get_their_answers(
    shared_node: NodeProcess, tmp_path: Path, user: str, package: str, answers: int
) -> None:
    sources = project(TOP / "tests" / "kit" / "stock", tmp_path / "stock")
    environment = {"ANYNODE_URL": shared_node.http, "ANYNODE_TOKEN": token_for(user), "AI": package}
    finished = run_node("documented.mjs", directory=sources, environment=environment)
    assert finished.stdout.splitlines() == ["[1] Are you there?"] * answers
