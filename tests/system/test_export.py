"""`anynode export`: all that is stored of one user, as JSON Lines, and nothing of anybody else."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import stat
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.agents.scripted import eventually, script_of
from tests.kit.command_line import COMMAND, REPOSITORY, anynode, environment, wait_until
from tests.kit.harness import NodeProcess, sql, token_for
from tests.kit.rest import rest_to

Record = dict[str, Any]


def export(database_url: str, user: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return anynode("export", "--user", user, *arguments, DATABASE_URL=database_url)


def exported(database_url: str, user: str) -> list[Record]:
    """The records of an export that succeeds without another word."""
    result = export(database_url, user)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("\n")
    return [json.loads(line) for line in result.stdout.split("\n")[:-1]]  # texts may have other ends of lines in them


@contextmanager
def exporting(database_url: str, user: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """An export that runs; killed at the end."""
    process = subprocess.Popen(
        [*COMMAND, "export", "--user", user, *arguments],
        env=environment(DATABASE_URL=database_url),
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def held_up(database_url: str) -> Iterator[None]:
    """Let nobody read messages while the context lasts."""
    loop = asyncio.new_event_loop()
    connection = loop.run_until_complete(asyncpg.connect(database_url))
    try:
        loop.run_until_complete(connection.execute("BEGIN; LOCK TABLE messages"))
        yield
    finally:
        loop.run_until_complete(connection.close())
        loop.close()


def waits_for_a_lock(database_url: str) -> bool:
    statement = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return bool(asyncio.run(sql(database_url, statement)))


def of(records: Sequence[Record], type: str, *fields: str) -> list[Any]:
    """What the records of a type have in their fields."""
    return [tuple(record[field] for field in fields) for record in records if record["type"] == type]


async def test_all_that_is_stored_of_a_user_is_exported_in_order(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    talks = script_of(
        ("call", "call-1", "search", {"query": "föö ☃"}),
        ("result", "call-1", "search", "nothing"),
        ("step",),
        ("text", "I found nothing"),
        ("usage", 3, 4, "scripted"),
    )
    fails = script_of(("text", "half "), ("agent_error", "The model is away.", False))
    async with rest_to(node, user, token=token_for(user, email="ada@example.org")) as rest:
        plain = {"title": "föö ☃", "system_prompt": "Be brief.", "metadata": {"a": [1, None, "\u2028"]}}
        first = await rest.create(client_id=f"chat-{user}", **plain)
        second = await rest.create()
        answer = (await rest.proceed(first, talks, message_id=f"m-{user}")).expect(200)
        failed = await rest.proceed(first, fails)
        assert failed.status >= 500
        regenerated = (
            await rest.post(f"/conversations/{second}/continue", {"content": script_of(("text", "a"))})
        ).expect(200)
        (await rest.post(f"/conversations/{second}/regenerate", {})).expect(200)
        conversations = {each["id"]: each for each in (await rest.get("/conversations")).expect(200)["conversations"]}
        messages = {id: await rest.messages(id) for id in (first, second)}
    async with rest_to(node, f"{user}-other") as rest:
        (await rest.proceed(await rest.create(title="not ada's"), script_of(("text", "secret")))).expect(200)

    async def is_written() -> bool:
        (row,) = await sql(module_database_url, "SELECT email FROM users WHERE id = $1", user)
        return row["email"] is not None

    await eventually(is_written)
    records = await asyncio.to_thread(exported, module_database_url, user)

    assert records[0].keys() == {"type", "id", "email", "created_at"}
    assert of(records, "user", "id", "email") == [(user, "ada@example.org")]
    types = [record["type"] for record in records]
    assert types == [
        *("user", "conversation", "turn", "turn", *["message"] * 6),
        *("conversation", "turn", "turn", *["message"] * 3),
    ]
    for record in records[1:]:
        assert record.get("conversation_id", record["id"]) == (first if records.index(record) < 10 else second)
    for record in (record for record in records if record["type"] == "conversation"):
        shown = conversations[record["id"]]
        for name in ("client_id", "title", "system_prompt", "metadata"):
            assert record[name] == shown[name], name
        for name in ("created_at", "updated_at"):
            assert datetime.fromisoformat(record[name]) == datetime.fromisoformat(shown[name])
    for id, shown in messages.items():
        found = [record for record in records if record["type"] == "message" and record["conversation_id"] == id]
        for record, message in zip(found, shown, strict=True):
            for name in message.keys() - {"created_at"}:
                assert record[name] == message[name], name
            assert datetime.fromisoformat(record["created_at"]) == datetime.fromisoformat(message["created_at"])
    (call,) = next(record["tool_calls"] for record in records if record.get("tool_calls"))
    assert json.loads(call["function"]["arguments"]) == {"query": "föö ☃"}
    assert of(records, "message", "role", "status", "message_id")[0] == ("user", "completed", f"m-{user}")
    assert [status for (status,) in of(records, "message", "status")][-3:] == ["completed", "superseded", "completed"]
    assert of(records, "turn", "id", "status")[0] == (answer["turn_id"], "completed")
    (done, broken, *_) = [record for record in records if record["type"] == "turn"]
    assert (done["usage"]["input_tokens"], done["usage"]["model"], done["error"]) == (3, "scripted", None)
    assert (broken["status"], broken["error"]["message"]) == ("failed", "The model is away.")
    assert datetime.fromisoformat(done["created_at"]) <= datetime.fromisoformat(done["finished_at"])
    assert regenerated["turn_id"] in [id for (id,) in of(records, "turn", "id")]


MANY = """
INSERT INTO users (id) VALUES ('ada'), ('bob');
INSERT INTO conversations (id, user_id, created_at)
    SELECT md5('c' || n)::uuid, CASE WHEN n % 2 = 0 THEN 'ada' ELSE 'bob' END, '2026-01-01'::timestamptz
        + make_interval(secs => n / 10) FROM generate_series(0, 501) n;
INSERT INTO messages (id, conversation_id, user_id, position, role, content)
    SELECT md5('m' || n)::uuid, md5('c0')::uuid, 'ada', n, 'user', repeat('x', n) FROM generate_series(1, 1203) n;
INSERT INTO turns (id, conversation_id, status, node, epoch, lease_expires_at, finished_at)
    SELECT md5('t' || n)::uuid, md5('c0')::uuid, 'completed', 'n', 1, now(), now() FROM generate_series(1, 1001) n;
"""


def test_more_than_a_page_of_each_is_exported_once_and_in_order(database_url: str) -> None:
    for statement in MANY.strip().split(";\n"):
        asyncio.run(sql(database_url, statement))
    records = exported(database_url, "ada")
    own = asyncio.run(
        sql(database_url, "SELECT id::text FROM conversations WHERE user_id = 'ada' ORDER BY created_at, id")
    )
    assert [id for (id,) in of(records, "conversation", "id")] == [row["id"] for row in own]
    assert len(own) == 251
    assert [len(content) for (content,) in of(records, "message", "content")] == list(range(1, 1204))
    turns = [id for (id,) in of(records, "turn", "id")]
    assert turns == sorted(set(turns))
    assert len(turns) == 1001


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_exported(database_url: str, tmp_path: Path) -> None:
    """60 MB of text go through a process whose memory grows by less than a third of that."""

    def peak_kib() -> int:
        code = (
            "import os, resource, sys\n"
            "from anynode.server import cli\n"
            f"sys.argv = ['anynode', 'export', '--user', 'ada', '--force', '--output', {str(tmp_path / 'out')!r}]\n"
            "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        )
        run = subprocess.run(
            [COMMAND[0], "-c", code],
            env=environment(DATABASE_URL=database_url),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        return int(run.stdout)

    asyncio.run(sql(database_url, "INSERT INTO users (id) VALUES ('ada')"))
    asyncio.run(sql(database_url, "INSERT INTO conversations (id, user_id) VALUES (gen_random_uuid(), 'ada')"))
    few = peak_kib()
    asyncio.run(
        sql(
            database_url,
            "INSERT INTO messages (id, conversation_id, user_id, position, role, content) "
            "SELECT gen_random_uuid(), c.id, 'ada', n, 'user', repeat('x', 10000) "
            "FROM conversations c, generate_series(1, 6000) n",
        )
    )
    assert peak_kib() - few < 20_000
    assert (tmp_path / "out").stat().st_size > 60_000_000


def test_an_unknown_user_is_told_in_one_line_and_nothing_is_written(database_url: str, tmp_path: Path) -> None:
    for arguments in ([], ["--output", str(tmp_path / "ada.jsonl")]):
        result = export(database_url, "ada", *arguments)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == "anynode: nothing is stored of the user ada\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def stored(database_url: str) -> str:
    """A database in which ada has a conversation."""
    asyncio.run(sql(database_url, "INSERT INTO users (id) VALUES ('ada')"))
    asyncio.run(sql(database_url, "INSERT INTO conversations (id, user_id) VALUES ($1, 'ada')", uuid.uuid4()))
    return database_url


def test_a_file_that_is_there_is_only_replaced_by_force_and_only_its_owner_may_read_it(
    stored: str, tmp_path: Path
) -> None:
    path = tmp_path / "ada.jsonl"
    path.write_text("mine")
    refused = export(stored, "ada", "--output", str(path))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert len(refused.stderr.splitlines()) == 1
    assert "--force" in refused.stderr
    assert path.read_text() == "mine"
    assert export(stored, "ada", "--output", str(path), "--force").returncode == 0
    assert path.read_text() == export(stored, "ada").stdout
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_is_for_its_owner_alone(stored: str, tmp_path: Path) -> None:
    path = tmp_path / "ada.jsonl"
    result = export(stored, "ada", "--output", str(path))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert path.read_text() == export(stored, "ada").stdout
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_no_file_is_not_replaced_even_by_force(stored: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = export(stored, "ada", "--output", str(pipe), "--force")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert pipe.is_fifo()


def test_a_file_that_cannot_be_made_is_told_in_one_line(stored: str, tmp_path: Path) -> None:
    result = export(stored, "ada", "--output", str(tmp_path / "nowhere" / "ada.jsonl"))
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "ada.jsonl cannot be written: No such file or directory" in result.stderr


def test_an_export_that_is_interrupted_leaves_no_file(stored: str, tmp_path: Path) -> None:
    path = tmp_path / "ada.jsonl"
    with held_up(stored), exporting(stored, "ada", "--output", str(path)) as process:
        wait_until(lambda: waits_for_a_lock(stored))
        assert [file.name.startswith(".anynode-export-") for file in tmp_path.iterdir()] == [True]
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_postgres_does_not_answer_fails_in_one_line_and_leaves_no_file(
    stored: str, tmp_path: Path
) -> None:
    with held_up(stored):
        result = export(stored, "ada", "--output", str(tmp_path / "ada.jsonl"))
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_came_meanwhile_is_not_replaced(stored: str, tmp_path: Path) -> None:
    path = tmp_path / "ada.jsonl"
    with exporting(stored, "ada", "--output", str(path)) as process:
        with held_up(stored):
            wait_until(lambda: any(tmp_path.iterdir()) or process.poll() is not None)
            wait_until(lambda: waits_for_a_lock(stored))
            path.write_text("mine")
        _, said = process.communicate(timeout=20)
    assert process.returncode == 2
    assert len(said.splitlines()) == 1
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_that_has_enough_ends_the_export_without_an_error(database_url: str) -> None:
    for statement in MANY.strip().split(";\n"):
        asyncio.run(sql(database_url, statement))
    with exporting(database_url, "ada") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["type"] == "user"
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr.read() == b""


@pytest.mark.parametrize("user", ["", "x" * 256])
def test_what_is_no_users_id_is_refused(user: str) -> None:
    result = anynode("export", "--user", user, DATABASE_URL="postgresql://127.0.0.1/nowhere")
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert "--user" in result.stderr


def test_progress_is_shown_on_a_terminal(stored: str, tmp_path: Path) -> None:
    """Standard error is one, and standard output is not."""
    ours, theirs = pty.openpty()
    try:
        run = subprocess.run(
            [*COMMAND, "export", "--user", "ada", "--output", str(tmp_path / "ada.jsonl")],
            env=environment(DATABASE_URL=stored, TERM="xterm"),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            timeout=60,
            check=True,
        )
        shown = os.read(ours, 65_536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert run.stdout == b""
    assert "conversations" in shown
    assert "100%" in shown
