"""The command `anynode` as people run it: what it refuses, what it prints, and what it leaves behind."""

from __future__ import annotations

import asyncio
import secrets
import signal
import socket
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import jwt
import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest

from tests.kit.command_line import COMMAND, GOOD, anynode, assert_refused_in_one_line, environment, wait_until
from tests.kit.dev import Dev, conversations, processes_that_mention, running_dev
from tests.kit.harness import SECRET, NodeProcess, free_port, running_node, sql, with_database

# What `anynode serve` refuses.

REFUSALS: Mapping[str, tuple[Mapping[str, str], tuple[str, ...]]] = {
    "a missing secret": ({"JWT_SECRET": ""}, ("JWT_SECRET", "32")),
    "a weak secret": ({"JWT_SECRET": "x" * 31}, ("JWT_SECRET", "31", "32")),
    "a missing database": ({"DATABASE_URL": ""}, ("DATABASE_URL",)),
    "a foreign database": ({"DATABASE_URL": "mysql://root@127.0.0.1/db"}, ("DATABASE_URL", "postgresql://")),
    "a database that is no URL": ({"DATABASE_URL": "anynode.db"}, ("DATABASE_URL",)),
    "a database URL without a name": ({"DATABASE_URL": "postgresql://u:pa55word@127.0.0.1"}, ("DATABASE_URL",)),
    "an unknown agent": ({"AGENT": "oracle"}, ("AGENT", "oracle")),
    "an agent in no module": ({"AGENT": "no_such_module:answer"}, ("AGENT", "no_such_module")),
    "an agent that is not in its module": ({"AGENT": "tests.agents.scripted:nobody"}, ("AGENT", "nobody")),
    "an agent that is none": ({"AGENT": "tests.agents.scripted:script_of"}, ("AGENT", "script_of")),
    "a number that is none": ({"LEASE_SECONDS": "soon"}, ("LEASE_SECONDS", "a number from 1 to 300")),
    "a number that is no finite one": ({"LEASE_SECONDS": "nan"}, ("LEASE_SECONDS", "from 1 to 300")),
    "a number out of range": ({"PORT": "65536"}, ("PORT", "from 0 to 65535")),
    "a wildcard for all names": ({"ALLOWED_ORIGINS": "https://*.com"}, ("ALLOWED_ORIGINS", "wildcard")),
    "any origin": ({"ALLOWED_ORIGINS": "*"}, ("ALLOWED_ORIGINS", "origins such as")),
    "a key set that is no URL": ({"JWT_SECRET": "", "JWT_JWKS_URL": "keys.json"}, ("JWT_JWKS_URL",)),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_serve_refuses_in_one_line(database_url: str, refusal: str) -> None:
    settings, words = REFUSALS[refusal]
    result = anynode("serve", **{**GOOD, "DATABASE_URL": database_url, **settings})
    assert_refused_in_one_line(result, *words)
    assert "pa55word" not in result.stderr


def test_serve_does_not_show_a_weak_secret(database_url: str) -> None:
    result = anynode("serve", **{**GOOD, "DATABASE_URL": database_url, "JWT_SECRET": "hunter2"})
    assert "hunter2" not in result.stderr


def test_serve_starts_without_a_database_and_says_so(tmp_path: Path) -> None:
    url = f"postgresql://user:pa55word@127.0.0.1:{free_port()}/anynode"
    with running_node(url, tmp_path, until="/livez") as node:
        assert node.stop() == 0
        [warning] = [line for line in node.log.read_text().splitlines() if " INFO " not in line]
    assert "WARNING" in warning
    assert "DATABASE_URL" in warning
    assert "pa55word" not in warning


def test_serve_refuses_a_database_that_does_not_exist(postgres_url: str) -> None:
    result = anynode("serve", **GOOD, DATABASE_URL=with_database(postgres_url, "nowhere"))
    assert_refused_in_one_line(result, "DATABASE_URL", "nowhere")


def test_serve_refuses_a_port_that_is_taken(database_url: str) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = anynode("serve", **{**GOOD, "DATABASE_URL": database_url, "PORT": port})
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert port in result.stderr


@pytest.fixture
def empty_database_url(postgres_url: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    asyncio.run(sql(postgres_url, f"CREATE DATABASE {name}"))
    yield with_database(postgres_url, name)
    asyncio.run(sql(postgres_url, f"DROP DATABASE {name} WITH (FORCE)"))


def test_serve_on_a_schema_that_is_behind_says_what_to_run(empty_database_url: str) -> None:
    result = anynode("serve", **GOOD, DATABASE_URL=empty_database_url)
    assert_refused_in_one_line(result, "anynode migrate")


# migrate


def test_migrate_brings_the_schema_up_to_date_and_then_has_nothing_to_do(empty_database_url: str) -> None:
    first = anynode("migrate", DATABASE_URL=empty_database_url)
    assert first.returncode == 0, first.stderr
    assert "0001_initial" in first.stdout
    second = anynode("migrate", DATABASE_URL=empty_database_url)
    assert second.returncode == 0, second.stderr
    assert "up to date" in second.stdout
    assert asyncio.run(sql(empty_database_url, "SELECT count(*) FROM conversations"))[0]["count"] == 0


def test_five_migrations_at_once_all_succeed(empty_database_url: str) -> None:
    processes = [
        subprocess.Popen(
            [*COMMAND, "migrate"],
            env=environment(DATABASE_URL=empty_database_url),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(5)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 5, outputs
    assert len([output for output in outputs if "0001_initial" in output]) == 1


def test_migrate_refuses_in_one_line_without_a_database() -> None:
    assert_refused_in_one_line(anynode("migrate"), "DATABASE_URL")


# token


def test_a_printed_token_opens_a_node(shared_node: NodeProcess, user: str) -> None:
    result = anynode("token", "--user", user, JWT_SECRET=SECRET)
    assert result.returncode == 0, result.stderr
    assert conversations(shared_node.http, result.stdout.strip()) == []


def test_a_printed_token_says_who_for_whom_and_for_how_long() -> None:
    result = anynode(
        "token", "--user", "grace", "--ttl", "15m", JWT_SECRET=SECRET, JWT_AUDIENCE="aud", JWT_ISSUER="iss"
    )
    claims = jwt.decode(result.stdout.strip(), SECRET, algorithms=["HS256"], audience="aud", issuer="iss")
    assert claims["sub"] == "grace"
    assert int(claims["exp"] - claims["iat"]) == 15 * 60


def test_a_printed_token_tells_an_address_if_one_is_given() -> None:
    for arguments, told in (((), None), (("--email", "grace@example.org"), "grace@example.org")):
        printed = anynode("token", "--user", "grace", *arguments, JWT_SECRET=SECRET).stdout.strip()
        claims = jwt.decode(printed, SECRET, algorithms=["HS256"], audience="anynode", issuer="anynode")
        assert claims.get("email") == told


def test_a_printed_token_carries_limits_if_some_are_given() -> None:
    for arguments, told in (((), None), (("--limits", '{"turns": 5}'), {"turns": 5})):
        printed = anynode("token", "--user", "grace", *arguments, JWT_SECRET=SECRET).stdout.strip()
        claims = jwt.decode(printed, SECRET, algorithms=["HS256"], audience="anynode", issuer="anynode")
        assert claims.get("anynode_limits") == told


@pytest.mark.parametrize("limits", ["", "turns", '{"turns": -1}', "[]", "null"])
def test_token_refuses_limits_that_no_node_would_take(limits: str) -> None:
    result = anynode("token", "--user", "grace", "--limits", limits, JWT_SECRET=SECRET)
    assert_refused_in_one_line(result, "--limits")


@pytest.mark.parametrize("email", ["", "grace", "a@b@c", "x" * 253 + "@b"])
def test_token_refuses_an_address_that_would_not_be_stored(email: str) -> None:
    result = anynode("token", "--user", "grace", "--email", email, JWT_SECRET=SECRET)
    assert_refused_in_one_line(result, "--email")


@pytest.mark.parametrize("arguments", [("--user", ""), ("--user", "a\nb"), ("--user", "x" * 256)])
def test_token_refuses_a_user_that_is_none(arguments: tuple[str, ...]) -> None:
    assert_refused_in_one_line(anynode("token", *arguments, JWT_SECRET=SECRET), "--user")


@pytest.mark.parametrize("ttl", ["0", "-1", "forever", "11y", "", "100000d"])
def test_token_refuses_a_duration_that_is_none(ttl: str) -> None:
    result = anynode("token", "--user", "ada", "--ttl", ttl, JWT_SECRET=SECRET)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "--ttl" in result.stderr


# chat


def test_chat_answers_a_line_of_its_input_after_another(shared_node: NodeProcess, user: str) -> None:
    token = anynode("token", "--user", user, JWT_SECRET=SECRET).stdout.strip()
    result = anynode("chat", "--url", shared_node.http, "--token", token, stdin="hello there\n\nand again\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[1] hello there\n[3] and again\n"


def test_chat_with_a_bad_token_says_so_and_fails(shared_node: NodeProcess) -> None:
    result = anynode("chat", "--url", shared_node.http, "--token", "nonsense", stdin="hello\n")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "token" in result.stderr


# dev


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass


def chat_with(dev: Dev, data_directory: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    settings = {"PORT": str(dev.ports[0])}
    return anynode("chat", "--data-dir", str(data_directory), stdin="".join(f"{line}\n" for line in lines), **settings)


def test_dev_says_where_to_go_and_answers_there(data_directory: Path) -> None:
    with running_dev(data_directory) as dev:
        said = dev.output.read_text()
        assert f"{dev.urls[0]}/#token={dev.token}" in said
        assert f"anynode chat --url {dev.urls[0]}" in said
        assert f"useChat            {dev.urls[0].replace('http', 'ws')}/api/chat" in said
        assert "load balancer" not in said
        assert "OPENAI_API_KEY" in said
        with urllib.request.urlopen(dev.urls[0], timeout=10) as page:
            assert b"<html" in page.read().lower()
        result = chat_with(dev, data_directory, "hello there")
        assert (result.returncode, result.stdout) == (0, "[1] hello there\n"), result.stderr
        assert [listed["title"] for listed in conversations(dev.urls[0], dev.token)] == ["hello there"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_dev_leaves_no_process(data_directory: Path, number: signal.Signals) -> None:
    with running_dev(data_directory, nodes=2) as dev:
        family = dev.family()
        assert len(family) > 4  # itself, two nodes, the postmaster and its children
        assert {p.pid for p in processes_that_mention(data_directory)} == {p.pid for p in family}
        dev.process.send_signal(number)
        assert dev.process.wait(30) == 0
        assert not psutil.wait_procs(family, timeout=10)[1]
        assert not processes_that_mention(data_directory)
        assert "Traceback" not in dev.output.read_text()


def test_sigint_in_the_middle_of_an_answer_leaves_no_process(data_directory: Path) -> None:
    with running_dev(data_directory, ECHO_TOKENS="100000", ECHO_TOKENS_PER_SECOND="10") as dev:
        chat = subprocess.Popen(
            [*COMMAND, "chat", "--data-dir", str(data_directory)],
            env=environment(PORT=str(dev.ports[0])),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert chat.stdin is not None
            assert chat.stdout is not None
            chat.stdin.write(b"go\n")
            chat.stdin.flush()
            assert chat.stdout.read(3) == b"w0 "
            family = dev.family()
            dev.process.send_signal(signal.SIGINT)
            assert dev.process.wait(30) == 0
            assert not psutil.wait_procs(family, timeout=10)[1]
        finally:
            chat.kill()
            chat.communicate()


def test_after_a_kill_of_everything_the_next_start_has_the_conversations(data_directory: Path) -> None:
    with running_dev(data_directory) as dev:
        assert chat_with(dev, data_directory, "remember me").returncode == 0
        token = dev.token
        kill_all(dev.family())
        dev.process.wait()
        wait_until(lambda: not processes_that_mention(data_directory))
    with running_dev(data_directory) as dev:
        assert [listed["title"] for listed in conversations(dev.urls[0], token)] == ["remember me"]
        assert chat_with(dev, data_directory, "hello").stdout == "[1] hello\n"


def test_the_node_of_a_killed_dev_ends_by_itself_and_the_next_start_adopts_its_postgres(data_directory: Path) -> None:
    with running_dev(data_directory) as dev:
        assert chat_with(dev, data_directory, "remember me").returncode == 0
        node = dev.node(dev.ports[0])
        token = dev.token
        dev.process.kill()
        dev.process.wait()
        wait_until(lambda: not node.is_running() or node.status() == psutil.STATUS_ZOMBIE)
    with running_dev(data_directory) as dev:
        assert [listed["title"] for listed in conversations(dev.urls[0], token)] == ["remember me"]
        dev.process.send_signal(signal.SIGINT)
        assert dev.process.wait(30) == 0
    assert not processes_that_mention(data_directory)


def test_dev_with_two_nodes_survives_the_kill_of_one(data_directory: Path) -> None:
    with running_dev(data_directory, nodes=2) as dev:
        assert chat_with(dev, data_directory, "before").stdout == "[1] before\n"
        dev.node(dev.ports[0]).kill()
        wait_until(lambda: f"the node on port {dev.ports[0]} ended" in dev.output.read_text())
        both = [argument for url in dev.urls for argument in ("--url", url)]
        result = anynode("chat", "--data-dir", str(data_directory), *both, stdin="after\n")
        assert (result.returncode, result.stdout) == (0, "[1] after\n"), result.stderr
        assert {listed["title"] for listed in conversations(dev.urls[1], dev.token)} == {"before", "after"}
        assert dev.process.poll() is None


def test_dev_ends_with_an_error_when_all_of_its_nodes_are_dead(data_directory: Path) -> None:
    with running_dev(data_directory) as dev:
        dev.node(dev.ports[0]).kill()
        assert dev.process.wait(30) == 2
        assert "Traceback" not in dev.output.read_text()
    assert not processes_that_mention(data_directory)


def test_dev_refuses_a_taken_port_in_one_line_and_leaves_no_process(data_directory: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = anynode("dev", "--data-dir", str(data_directory), PORT=port)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert port in result.stderr
    assert not processes_that_mention(data_directory)


def test_the_data_directory_is_its_owners_alone(data_directory: Path) -> None:
    with running_dev(data_directory):
        assert data_directory.stat().st_mode & 0o077 == 0
        assert (data_directory / "jwt_secret").stat().st_mode & 0o077 == 0


def test_dev_takes_a_secret_from_the_environment(data_directory: Path) -> None:
    secret = secrets.token_urlsafe(48)
    with running_dev(data_directory, JWT_SECRET=secret) as dev:
        token = anynode("token", "--user", "dev", JWT_SECRET=secret).stdout.strip()
        assert conversations(dev.urls[0], token) == []
