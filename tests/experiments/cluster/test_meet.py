"""Tests that processes which do not come, are there twice or differ are named, in every process and before JAX starts.

Each process is a thread here: they meet through real sockets.
"""

import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from experiments.errors import ConfigError
from experiments.train.cluster import meet as module
from experiments.train.cluster.detect import Member
from experiments.train.cluster.meet import meet
from experiments.train.config import Config, Hardware, Training, address, settings
from tests.support.programs import free_address

LONG = 60.0  # seconds, which no test waits


class Meeting:
    """Lets processes meet at one address, and keeps what came of it for each."""

    def __init__(self, processes: int):
        self.processes, self.address, self.outcomes = processes, free_address(), dict[str, str]()
        self.threads: list[threading.Thread] = []

    def come(
        self, process: int, facts: Mapping[str, Any], timeout: float = LONG, name: str = "", **options: Any
    ) -> None:
        """Starts a process; `options` are those of `meet`, and `processes` where this one expects another number."""
        member = Member(self.address, options.pop("processes", self.processes), process)

        def run() -> None:
            try:
                meet(member, facts, timeout, **options)
                self.outcomes[name or str(process)] = ""
            except ConfigError as error:
                self.outcomes[name or str(process)] = str(error)

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def results(self) -> dict[str, str]:
        """Waits for all of them; returns each one's error, or an empty text."""
        for thread in self.threads:
            thread.join(LONG)
            assert not thread.is_alive(), "hangs"
        return self.outcomes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.1)
    monkeypatch.setattr(module, "GRACE", 1.0)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]], ids=str)
def test_processes_meet_in_any_order(order: list[int]) -> None:
    meeting = Meeting(3)
    for process in order:
        meeting.come(process, {"--seed": 0})
    assert meeting.results() == {"0": "", "1": "", "2": ""}


def test_the_address_is_free_again_at_once() -> None:
    meeting = Meeting(2)
    for process in (0, 1):
        meeting.come(process, {})
    meeting.results()
    with socket.create_server(("", int(meeting.address.rpartition(":")[2]))):
        pass


def differing(meeting: Meeting) -> None:
    meeting.come(0, {"--seed": 0, "--width": 16, "jax": "0.10"})
    meeting.come(1, {"--seed": 1, "--width": 16, "jax": "0.12"})
    meeting.come(2, {"--seed": 0, "--width": 8, "jax": "0.10"})


def twice(meeting: Meeting) -> None:
    meeting.come(0, {})
    meeting.come(1, {})
    meeting.come(1, {}, name="another 1")


def failing(meeting: Meeting) -> None:
    meeting.come(0, {})
    meeting.come(1, {})
    meeting.come(2, {}, failed="no images in /data")


def failing_first(meeting: Meeting) -> None:
    meeting.come(0, {}, failed="no images in /data")
    meeting.come(1, {})
    meeting.come(2, {})


def another_number(meeting: Meeting) -> None:
    meeting.come(0, {})
    meeting.come(1, {}, processes=4)
    meeting.come(2, {})


WRONG = {
    "--seed is 1 in process 1 and 0 in process 0; jax is 0.12 in process 1 and 0.10 in process 0; "
    "--width is 8 in process 2 and 16 in process 0: start all processes with the same": differing,
    "--process-id 1 is there twice": twice,
    "cannot begin: no images in /data": failing,
    "process 0 (": failing_first,
    "process 1 has --processes 4 and process 0 has 3": another_number,
}


@pytest.mark.parametrize("message", WRONG)
def test_every_process_ends_with_what_is_wrong(message: str) -> None:
    meeting = Meeting(3)
    WRONG[message](meeting)
    results = meeting.results()
    assert len(results) == 3
    assert all(message in text for text in results.values()), results


def test_who_is_missing_is_said_again_and_again_and_ends_the_wait(capfd: pytest.CaptureFixture[str]) -> None:
    meeting = Meeting(4)
    meeting.come(0, {}, timeout=1.0)
    meeting.come(2, {}, timeout=1.0)
    results = meeting.results()
    assert results["0"] == results["2"] == "processes 1, 3 of 0 to 3: not there after --join-timeout 1 s"
    assert capfd.readouterr().err.count("process 0: waiting for processes 1, 3 of 0 to 3 (") >= 2


def test_a_process_that_is_killed_while_it_waits_is_missing_again() -> None:
    meeting = Meeting(3)
    meeting.come(0, {}, timeout=2.0)
    host, port = address(meeting.address)
    for _ in range(100):  # until process 0 listens
        try:
            with socket.create_connection((host, port)) as line:
                line.sendall(b'{"process": 1, "processes": 3, "who": "me", "failed": null, "facts": {}}\n')
            break
        except OSError:
            time.sleep(0.02)
    assert meeting.results() == {"0": "processes 1, 2 of 0 to 2: not there after --join-timeout 2 s"}


def test_what_is_no_process_is_ignored() -> None:
    meeting = Meeting(2)
    meeting.come(0, {})
    host, port = address(meeting.address)
    time.sleep(0.2)
    for content in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[]\n", b'{"process": "x"}\n', b"7\n"):
        with socket.create_connection((host, port)) as line:
            line.sendall(content)
    meeting.come(1, {})
    assert meeting.results() == {"0": "", "1": ""}


def nobody(meeting: Meeting) -> None:
    """Leaves the address alone."""


def unknown(meeting: Meeting) -> None:
    meeting.address = "host.invalid:4321"


@pytest.mark.parametrize(("prepare", "message"), [(nobody, "nobody answers"), (unknown, "unknown host")])
def test_nobody_at_the_address(
    prepare: Callable[[Meeting], None], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    meeting = Meeting(2)
    prepare(meeting)
    meeting.come(1, {}, timeout=0.5)
    assert f"process 0 could not be reached at {meeting.address} ({message})" in meeting.results()["1"]
    assert f"process 1: waiting for process 0 at {meeting.address}: {message} (" in capfd.readouterr().err


def test_a_port_that_is_taken_is_named() -> None:
    meeting = Meeting(2)
    with socket.create_server(("", int(meeting.address.rpartition(":")[2]))):
        meeting.come(0, {})
        assert "cannot be opened (" in meeting.results()["0"]


def test_something_else_at_the_address_is_named() -> None:
    meeting = Meeting(2)
    with socket.create_server(("", int(meeting.address.rpartition(":")[2]))):
        meeting.come(1, {}, timeout=0.5)
        assert "answers, but no process of this run" in meeting.results()["1"]


@pytest.mark.parametrize(
    "text",
    ["", "localhost", "localhost:", ":4321", "localhost:99999", "localhost:0", "a b:1", "http://a:1", "::1:4321"],
)
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        address(text)


def test_good_addresses() -> None:
    assert address("node001.cluster:65535") == ("node001.cluster", 65535)
    assert address("[fe80::1]:4321") == ("fe80::1", 4321)


def test_what_processes_must_share_are_the_options_of_the_command_line() -> None:
    """Checks that a process may have its own number and its own place of the data, and nothing else."""
    here = Config(hardware=Hardware(coordinator="a:1", processes=2, process_id=0, heartbeat_timeout=60))
    there = Config(hardware=Hardware(coordinator="b:1", processes=2, process_id=1, heartbeat_timeout=60))
    assert settings(here) == settings(there)
    assert settings(here) != settings(Config(training=Training(batch_size=63)))
    assert {"--batch-size", "--partition", "--out"} <= settings(here).keys()
