"""Lets the processes of a run meet before JAX connects them, at the address at which JAX will listen.

JAX waits in silence for processes that do not come, and where two of them differ in an option it ends in an abort or
hangs. So process 0 first listens there itself: every process, 0 too, sends it one line of JSON and waits. Every ten
seconds it says who is missing. Once all are there it compares them, and sends everybody the verdict.
"""

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from experiments.errors import ConfigError
from experiments.train.cluster.detect import Member
from experiments.train.config import address

EVERY = 10.0  # seconds between two messages of who is missing
GRACE = 10.0  # seconds in which processes that are late still hear why the run does not begin
Hello = dict[str, Any]


def meet(member: Member, facts: Mapping[str, Any], timeout: float, failed: str | None = None) -> None:
    """Returns when all processes are there and agree.

    Args:
        member: which process this one is.
        facts: what must be the same in every process, by the name under which an error mentions it.
        timeout: seconds to wait for the others.
        failed: why this process cannot begin; the others then end with this reason.

    Raises:
        ConfigError: a process is missing, is there twice, cannot begin, or differs from process 0.
    """
    who = f"{socket.gethostname()}, pid {os.getpid()}"
    texts = {name: str(value) for name, value in facts.items()}
    hello = dict(process=member.process_id, processes=member.processes, who=who, failed=failed, facts=texts)
    if verdict := asyncio.run(_meet(member, hello, timeout)):
        raise ConfigError(verdict)


async def _meet(member: Member, hello: Hello, timeout: float) -> str:
    """Listens if this is process 0, and returns the verdict: an error, or an empty text if the run can begin."""
    if member.process_id:
        return await call(member, hello, timeout)
    lobby = Lobby(member, timeout)
    port = address(member.coordinator)[1]
    try:
        server = await asyncio.start_server(lobby.welcome, port=port)
    except OSError as error:
        return (
            f"port {port} of {member.coordinator} cannot be opened ({error.strerror or error}): does another run, or "
            "another process with --process-id 0, use it? Choose another port"
        )
    try:
        verdict = await call(member, hello, timeout)
        with suppress(TimeoutError):
            await asyncio.wait_for(lobby.all_told.wait(), GRACE)
        return verdict
    finally:
        server.close()


class Lobby:
    """Waits for all processes, in process 0, and decides whether the run can begin."""

    def __init__(self, member: Member, timeout: float):
        loop = asyncio.get_running_loop()
        self.member, self.hellos, self.told, self.all_told = member, dict[int, Hello](), set[int](), asyncio.Event()
        self.verdict: asyncio.Future[str] = loop.create_future()
        loop.call_later(timeout, lambda: self.decide(f"{self.missing()}: not there after --join-timeout {timeout:g} s"))

    async def welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one process: enters it, says every ten seconds who is missing, and sends it the verdict."""
        try:
            hello = json.loads(await reader.readline())
            number = int(hello["process"])
            self.enter(number, hello)
            gone = asyncio.ensure_future(reader.read())
            while not self.verdict.done():
                await asyncio.wait({gone, self.verdict}, timeout=EVERY, return_when=asyncio.FIRST_COMPLETED)
                if gone.done() and not self.verdict.done():
                    self.hellos.pop(number, None)  # it was ended: it counts as missing again
                    return
                if not self.verdict.done():
                    await send(writer, waiting=self.missing())
            await send(writer, verdict=self.verdict.result())
            await gone  # it closes first, so that the port is free for JAX at once
            self.told.add(number)
            if len(self.told) == self.member.processes:
                self.all_told.set()
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no process of a run, or one that is gone
        finally:
            writer.close()

    def enter(self, number: int, hello: Hello) -> None:
        """Notes a process, and decides as soon as it is clear whether the run can begin."""
        first = self.hellos.setdefault(number, hello)
        if first is not hello:
            self.decide(f"--process-id {number} is there twice ({first['who']}; {hello['who']}): give each its own")
        elif hello["failed"]:
            self.decide(f"process {number} ({hello['who']}) cannot begin: {hello['failed']}")
        elif hello["processes"] != self.member.processes:
            self.decide(
                f"process {number} has --processes {hello['processes']} and process 0 has {self.member.processes}: "
                "give all the same"
            )
        elif len(self.hellos) == self.member.processes:
            self.decide(differences(self.hellos))

    def decide(self, verdict: str) -> None:
        """Sets the verdict, unless there is one."""
        if not self.verdict.done():
            self.verdict.set_result(verdict)

    def missing(self) -> str:
        """Returns who is missing, in words."""
        count = self.member.processes
        absent = [number for number in range(count) if number not in self.hellos]
        some = ", ".join(map(str, absent[:8])) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
        return f"process{'es' * (len(absent) > 1)} {some} of 0 to {count - 1}"


async def call(member: Member, hello: Hello, timeout: float) -> str:
    """Calls process 0, and returns its verdict; prints who is missing while it waits."""
    began, stranger = time.monotonic(), f"something at {member.coordinator} answers, but no process of this run"
    reader, writer = await reach(member, began, timeout)
    try:
        await send(writer, **hello)
        while True:
            left = began + timeout + GRACE - time.monotonic()
            answer = json.loads(await asyncio.wait_for(reader.readline(), left))
            if "verdict" in answer:
                return str(answer["verdict"])
            say(f"waiting for {answer['waiting']}", member, began, timeout)
    except TimeoutError:
        return f"{stranger}: it said nothing for {timeout + GRACE:g} s"
    except (OSError, ValueError, TypeError, KeyError):
        return f"{stranger}, or process 0 has ended: look for its error, or choose another port"
    finally:
        writer.close()


async def reach(member: Member, began: float, timeout: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connects to process 0 as soon as it listens; prints every ten seconds why it cannot."""
    host, port = address(member.coordinator)
    said = began
    while True:
        try:
            return await asyncio.wait_for(asyncio.open_connection(host, port), EVERY)
        except (OSError, TimeoutError) as error:
            why = "unknown host" if isinstance(error, socket.gaierror) else "nobody answers"
            now = time.monotonic()
            if now - began > timeout:
                raise ConfigError(
                    f"process 0 could not be reached at {member.coordinator} ({why}) within --join-timeout "
                    f"{timeout:g} s: does the address name its machine, and does it run?"
                ) from error
            if now - said >= EVERY or (said == began and why == "unknown host"):
                said = now
                say(f"waiting for process 0 at {member.coordinator}: {why}", member, began, timeout)
            await asyncio.sleep(min(0.2, timeout))


async def send(writer: asyncio.StreamWriter, **message: Any) -> None:
    """Sends one line of JSON."""
    writer.write(json.dumps(message).encode() + b"\n")
    await writer.drain()


def say(text: str, member: Member, began: float, timeout: float) -> None:
    """Prints what this process waits for."""
    waited = f"{time.monotonic() - began:.0f} of {timeout:g} s"
    print(f"process {member.process_id}: {text} ({waited})", file=sys.stderr, flush=True)


def differences(hellos: Mapping[int, Hello]) -> str:
    """Returns what differs between process 0 and the others, or an empty text."""
    first = hellos[0]["facts"]
    found = [
        f"{name} is {facts.get(name)} in process {number} and {first.get(name)} in process 0"
        for number, facts in sorted((number, hello["facts"]) for number, hello in hellos.items())
        for name in unequal(first, facts)
    ]
    more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    return f"{'; '.join(found[:4])}{more}: start all processes with the same" if found else ""


def unequal(one: Mapping[str, str], other: Mapping[str, str]) -> Iterable[str]:
    """Returns the names whose values differ."""
    return [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
