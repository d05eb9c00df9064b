"""Launchers find each other at one address; who does not fit or does not come is named."""

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from ressl.config_file import ConfigError
from ressl.runtime import MachineError
from tools.nodes import Peer, Place, check_nodes, gather, place_of, reach

Gathered = tuple[list[Peer], int]


@pytest.fixture
def port() -> int:
    with socket.create_server(("localhost", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def start(port: int) -> Iterator[Callable[..., Future[Gathered]]]:
    """Starts gather() as one node in a thread."""
    opened: list[Future[Gathered]] = []
    with ThreadPoolExecutor() as threads:

        def begin(
            node: int, nodes: int = 2, *, count: int = 1, settings: str = "a", wait_s: float = 20, restarts: int = 0
        ) -> Future:
            place = Place(nodes, node, "localhost", port)
            opened.append(threads.submit(gather, place, count, settings, wait_s, restarts))
            return opened[-1]

        yield begin
    for found in opened:
        for peer in found.result()[0] if not found.exception() else []:
            peer.connection.close()


def greet(port: int, data: bytes) -> socket.socket:
    """A connection on which `data` was said, to whoever comes to listen at the port."""
    while True:
        try:
            connection = socket.create_connection(("localhost", port), timeout=5)
            connection.sendall(data)
            return connection
        except ConnectionRefusedError:
            time.sleep(0.02)


# --- what is typed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "node_rank", "rendezvous", "ranks", "message"),
    [
        (0, 0, None, 8, "--nodes 0: expected 1 or more"),
        (2, 2, "a:1", 8, "--node-rank 2: the nodes of --nodes 2 are numbered 0 to 1"),
        (2, -1, "a:1", 8, "--node-rank -1: the nodes"),
        (1, 1, "a:1", 8, "are numbered 0 to 0; --nodes is missing"),
        (2, 1, None, 8, "--nodes 2 needs --rendezvous HOST:PORT"),
        (2, 1, "a:1", 0, "--nodes 2 needs --gpus or --processes"),
        (2, 1, "a", 8, "--rendezvous a: expected HOST:PORT"),
        (2, 1, ":29400", 8, "expected HOST:PORT"),
        (2, 1, "a:0", 8, "expected HOST:PORT"),
        (2, 1, "a:65536", 8, "expected HOST:PORT"),
        (2, 1, "a:port", 8, "expected HOST:PORT"),
        (2, 1, "http://a:80", 8, "expected HOST:PORT"),
        (1, 0, "a", 8, "expected HOST:PORT"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    nodes: int, node_rank: int, rendezvous: str | None, ranks: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_nodes(nodes, node_rank, rendezvous, ranks)


def test_options_that_fit_are_taken_and_one_node_needs_none() -> None:
    check_nodes(1, 0, None, 0)
    check_nodes(1, 0, "gpu-01.cluster:29400", 8)  # as a job of one node types it
    check_nodes(2, 1, "10.0.0.7:29400", 8)
    assert place_of(2, 1, "gpu-01.cluster:29400") == Place(2, 1, "gpu-01.cluster", 29400)


# --- who comes -------------------------------------------------------------------------------------------------------


def test_all_nodes_get_the_same_port_and_node_0_has_them_in_order(start: Callable) -> None:
    nodes = {node: start(node, 3) for node in (2, 0, 1)}
    ports = {node: found.result()[1] for node, found in nodes.items()}
    assert ports[0] == ports[1] == ports[2] > 0
    assert [peer.node for peer in nodes[0].result()[0]] == [1, 2]
    assert [peer.node for peer in nodes[1].result()[0]] == [0]


def test_a_node_that_does_not_come_is_named_on_all_others(start: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    zero, one = start(0, 4, wait_s=1.0), start(1, 4)
    for found in (zero, one):
        with pytest.raises(MachineError, match=r"2 of 4 nodes came within 1 s; nodes 2, 3 did not: is the command"):
            found.result()
    assert "up to 1 s for nodes 2, 3\n" in capfd.readouterr().err


def test_node_0_that_does_not_come_is_told(start: Callable, port: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MachineError, match=rf"node 1 could not reach node 0 at localhost:{port} within 0.3 s \(Conn"):
        start(1, wait_s=0.3).result()
    assert f"node 1 waits up to 0.3 s for node 0 at localhost:{port} (Connection refused)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"count": 2}, "its --gpus or --processes differ"),
        ({"restarts": 3}, "its --max-restarts differ"),
        ({"settings": "b"}, "its config or its overrides differ"),
        ({"nodes": 3, "count": 2}, "its --nodes and --gpus or --processes differ"),
    ],
)
def test_a_node_that_differs_is_refused_and_may_come_again(start: Callable, changed: dict, words: str) -> None:
    zero = start(0)
    with pytest.raises(ConfigError, match=rf"node 0 \(localhost\) refused this node 1: {words}"):
        start(1, **changed).result()
    assert start(1).result()[1] == zero.result()[1]


def test_a_second_node_of_the_same_number_is_refused(
    start: Callable, port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    zero, first = start(0, 3), start(1, 3)
    err = ""
    while "for node 2\n" not in err:  # until node 1 is in
        time.sleep(0.02)
        err += capfd.readouterr().err
    with pytest.raises(ConfigError, match="there is a node 1 already: give each its own --node-rank"):
        start(1, 3).result()
    assert start(2, 3).result()[1] == zero.result()[1] == first.result()[1]


def test_strangers_and_a_node_that_leaves_again_do_no_harm(
    start: Callable, port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    zero = start(0, 3)
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"ressl": 1}\n', b'{"ressl": {"node": "1"}}\n'):
        greet(port, words).close()
    greeting = {"nodes": 3, "node": 1, "count": 1, "restarts": 0, "settings": hashlib.sha256(b"a").hexdigest()}
    with greet(port, json.dumps({"ressl": greeting, "name": "fleeting"}).encode() + b"\n") as connection:
        assert b"welcome" in connection.recv(1024)
    err = ""
    while "node 1 (fleeting) has left\n" not in err:
        time.sleep(0.02)
        err += capfd.readouterr().err
    one, two = start(1, 3), start(2, 3)
    assert one.result()[1] == two.result()[1] == zero.result()[1]


# --- the address -----------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_told(start: Callable, port: int) -> None:
    with socket.create_server(("", port)), pytest.raises(MachineError, match=f"localhost:{port}: the port is in use"):
        start(0).result()


def test_node_0_on_another_machine_than_the_address_is_told() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 is not this machine, but node 0 is started here"):
        gather(Place(2, 0, "192.0.2.1", 29400), 1, "", 1)


@pytest.mark.parametrize("node", [0, 1])
def test_a_name_that_does_not_exist_is_told_at_once(node: int) -> None:
    with pytest.raises(ConfigError, match=r"--rendezvous no\.such\.name\.invalid:29400: no\.such"):
        gather(Place(2, node, "no.such.name.invalid", 29400), 1, "", 60)


def test_where_the_processes_meet_is_waited_for_and_told_if_it_cannot_be_reached(port: int) -> None:
    place = Place(2, 1, "localhost", 29400)
    with pytest.raises(
        MachineError, match=rf"nodes met, but not at node 0's port {port}, where .*: Connection refused"
    ):
        reach(place, port, 0.2)
    with ThreadPoolExecutor() as threads:
        reached = threads.submit(reach, place, port, 20)
        time.sleep(0.2)
        assert not reached.done()
        with socket.create_server(("localhost", port)):
            reached.result()


def test_something_else_that_answers_is_told(start: Callable, port: int) -> None:
    with socket.create_server(("localhost", port)) as other:

        def answer() -> None:
            with other.accept()[0] as connection:
                connection.sendall(b"SSH-2.0-server\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(MachineError, match="something else answers there"):
            start(1, wait_s=0.4).result()
        thread.join()
