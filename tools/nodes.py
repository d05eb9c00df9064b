"""How the launchers of a run on several machines, its nodes, find each other.

Node 0 listens at the rendezvous address; each other node keeps one connection to it, on which both send lines of JSON.
What they say while the run goes on is in tools/node_watch.py.
"""

import errno
import hashlib
import json
import re
import socket
import sys
import time
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from typing import Any

from ressl.config_file import ConfigError
from ressl.runtime import MachineError

HELLO_S = 5.0  # for a greeting, for its answer, and for whatever else is awaited of a node that is there
BEAT_S = 0.5  # between two signs of life
SILENCE_S = 30.0  # after which a node counts as lost

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """This machine among those of the run: `node` of `nodes`, and where node 0 listens."""

    nodes: int
    node: int
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Over:
    """Why the run is over: which node ended it, with what exit code, and what is said of it on the others."""

    node: int
    code: int
    text: str
    lost: bool = False  # a process, or the node, through nothing of its own


def check_nodes(nodes: int, node_rank: int, rendezvous: str | None, ranks: int) -> None:
    """Raises ConfigError unless --nodes, --node-rank and --rendezvous fit together. `ranks` are those of one node, 0
    where neither --gpus nor --processes is given. With one node the other two may stand, and do nothing."""
    if nodes < 1:
        raise ConfigError(f"--nodes {nodes}: expected 1 or more")
    if not 0 <= node_rank < nodes:
        missing = "; --nodes is missing" if nodes == 1 else ""
        raise ConfigError(
            f"--node-rank {node_rank}: the nodes of --nodes {nodes} are numbered 0 to {nodes - 1}{missing}"
        )
    if rendezvous is not None:
        _split(rendezvous)
    if nodes == 1:
        return
    if not ranks:
        raise ConfigError(f"--nodes {nodes} needs --gpus or --processes: the number of processes on each node")
    if rendezvous is None:
        raise ConfigError(f"--nodes {nodes} needs --rendezvous HOST:PORT: node 0's name and a free port there")


def place_of(nodes: int, node_rank: int, rendezvous: str) -> Place:
    """Raises ConfigError if `rendezvous` is not HOST:PORT."""
    return Place(nodes, node_rank, *_split(rendezvous))


def _split(rendezvous: str) -> tuple[str, int]:
    found = re.fullmatch(r"([\w.-]+):(\d{1,5})", rendezvous, flags=re.ASCII)
    if not found or not 1 <= int(found[2]) <= 65535:
        raise ConfigError(f"--rendezvous {rendezvous}: expected HOST:PORT, such as node0:29400 (port 1 to 65535)")
    return found[1], int(found[2])


def say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"ressl: {text}", file=sys.stderr, flush=True)


# --- a connection ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Peer:
    """Another launcher. `heard` is the time.monotonic() of its last word; `closed`: it will say no more."""

    node: int
    name: str
    connection: socket.socket
    heard: float = field(default_factory=time.monotonic)
    closed: bool = False
    _rest: bytes = b""

    def __str__(self) -> str:
        return f"node {self.node} ({self.name})"

    def send(self, message: Message) -> None:
        """What cannot be sent is noticed when the connection is read."""
        with suppress(OSError):
            self.connection.settimeout(HELLO_S)
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> list[Message]:
        """The messages that have come within `seconds`, or nothing. What is not of our making closes the connection."""
        messages: list[Message] = []
        try:
            self.connection.settimeout(max(seconds, 1e-3))
            data = self.connection.recv(65536)
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if not isinstance(message, dict):
                    raise ValueError
                messages.append(message)
            self.closed = not data or len(self._rest) > 65536
            self.heard = time.monotonic()
        except TimeoutError:
            pass
        except (OSError, ValueError):
            self.closed = True
        return messages

    def answer(self) -> list[Message]:
        """The next messages, or nothing after HELLO_S."""
        deadline, messages = time.monotonic() + HELLO_S, list[Message]()
        while not messages and not self.closed and time.monotonic() < deadline:
            messages = self.receive(deadline - time.monotonic())
        return messages

    def part(self, message: Message) -> None:
        """Sends a last message and waits until the other has read it: closed at once, it could be lost on the way."""
        self.send(message)
        try:
            self.connection.shutdown(socket.SHUT_WR)
        except OSError:
            self.closed = True
        deadline = time.monotonic() + HELLO_S
        while not self.closed and time.monotonic() < deadline:
            self.receive(0.1)
        self.connection.close()


# --- coming together -------------------------------------------------------------------------------------------------


def gather(place: Place, count: int, settings: str, wait_s: float, restarts: int = 0) -> tuple[list[Peer], int]:
    """Waits until all nodes have come, and returns the connections to them (to node 0 alone on the others), and a free
    port of node 0 for the ranks to meet at.

    Nodes must agree on `count`, the processes of each, on `restarts`, the most there may be, and on `settings`, any
    text; one that does not is refused with a ConfigError there, and may come again. Raises MachineError if some have
    not come within `wait_s` seconds.
    """
    digest = hashlib.sha256(settings.encode()).hexdigest()
    greeting = {"nodes": place.nodes, "node": place.node, "count": count, "restarts": restarts, "settings": digest}
    deadline = time.monotonic() + wait_s
    if place.node:
        peer, port = _join(place, {"ressl": greeting, "name": socket.gethostname()}, deadline, wait_s)
        return [peer], port
    with _listen(place) as listener:
        peers, port = _receive_all(place, greeting, listener, deadline, wait_s), _free_port()
    for peer in peers:
        peer.send({"start": port})
    return peers, port


def reach(place: Place, port: int, wait_s: float) -> None:
    """Waits until node 0 answers at `port`, where the processes will meet; for `wait_s` seconds, then it raises
    MachineError."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((place.host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise MachineError(
                    f"node {place.node}: the nodes met, but not at node 0's port {port}, where the processes meet: "
                    f"{error.strerror or error}; a firewall must let the nodes reach all ports of each other"
                ) from None
            time.sleep(0.1)


def _listen(place: Place) -> socket.socket:
    address = f"{place.host}:{place.port}"
    if not any(_is_here(found) for found in _addresses(place)):
        raise ConfigError(f"--rendezvous {address}: {place.host} is not this machine, but node 0 is started here")
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", place.port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        )
    except OSError as error:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else str(error.strerror)
        raise MachineError(f"--rendezvous {address}: {reason} on this machine: choose another on all nodes") from None


def _addresses(place: Place) -> list[Any]:
    try:
        return socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"--rendezvous {place.host}:{place.port}: {place.host}: {error.strerror}") from None


def _is_here(address: Any) -> bool:
    """Only to an address of its own can a machine bind."""
    family, kind, protocol, _, (host, *_) = address
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.bind((host, 0))
        return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])


def _receive_all(
    place: Place, greeting: Message, listener: socket.socket, deadline: float, wait_s: float
) -> list[Peer]:
    came: dict[int, Peer] = {}
    told: list[int] = []
    listener.settimeout(0.2)
    while len(came) < place.nodes - 1:
        missing = [node for node in range(1, place.nodes) if node not in came]
        if time.monotonic() > deadline:
            text = _who_came(place, missing, wait_s)
            for peer in came.values():
                peer.part({"over": astuple(Over(0, 4, text))})
            raise MachineError(text)
        try:
            _admit(listener.accept()[0], place, greeting, came)
        except TimeoutError:
            if missing != told:
                say(f"node 0 waits at {place.host}:{place.port} up to {wait_s:g} s for {_names(missing)}")
                told = missing
        for node, peer in list(came.items()):
            peer.send({"beat": 0})
            peer.receive(0)
            if peer.closed:
                say(f"{peer} has left")
                del came[node]
    return [came[node] for node in sorted(came)]


def _names(nodes: list[int]) -> str:
    shown = ", ".join(str(node) for node in nodes[:16]) + (", ..." if len(nodes) > 16 else "")
    return f"node{'s' if len(nodes) > 1 else ''} {shown}"


def _who_came(place: Place, missing: list[int], wait_s: float) -> str:
    return (
        f"{place.nodes - len(missing)} of {place.nodes} nodes came within {wait_s:g} s; {_names(missing)} did not: is "
        f"the command started there with its --node-rank and --rendezvous {place.host}:{place.port}, and does a "
        "firewall let it through?"
    )


def _admit(connection: socket.socket, place: Place, greeting: Message, came: dict[int, Peer]) -> None:
    """Takes in a node, or tells it why not. Whoever does not greet as a node does is shown the door."""
    peer = Peer(-1, "", connection)
    first = next(iter(peer.answer()), {})
    theirs = first.get("ressl")
    if not isinstance(theirs, dict) or not isinstance(theirs.get("node"), int):
        connection.close()
        return
    peer.node, peer.name = theirs["node"], str(first.get("name"))
    differing = [key for key in greeting if key != "node" and theirs.get(key) != greeting[key]]
    refusal = ""
    if differing:
        words = {
            "nodes": "--nodes", "count": "--gpus or --processes", "restarts": "--max-restarts",
            "settings": "config or its overrides",
        }  # fmt: skip
        refusal = f"its {' and '.join(words[key] for key in differing)} differ from node 0's"
    elif peer.node in came or not 0 < peer.node < place.nodes:
        refusal = f"there is a node {peer.node} already: give each its own --node-rank"
    if refusal:
        say(f"{peer} was refused: {refusal}")
        peer.part({"refused": refusal})
        return
    peer.send({"welcome": socket.gethostname()})
    came[peer.node] = peer


def _join(place: Place, hello: Message, deadline: float, wait_s: float) -> tuple[Peer, int]:
    address, trouble, told = f"{place.host}:{place.port}", "", False
    _addresses(place)  # a name that does not exist is told at once
    while time.monotonic() < deadline:
        try:
            peer = Peer(0, place.host, socket.create_connection((place.host, place.port), timeout=HELLO_S))
        except OSError as error:
            trouble = error.strerror or str(error)
        else:
            port = _greet(place, peer, hello)
            if port:
                return peer, port
            trouble = "something else answers there"
        if not told:
            say(f"node {place.node} waits up to {wait_s:g} s for node 0 at {address} ({trouble})")
            told = True
        time.sleep(min(BEAT_S, max(0.0, deadline - time.monotonic())))
    raise MachineError(
        f"node {place.node} could not reach node 0 at {address} within {wait_s:g} s ({trouble}): is the command "
        "started there with --node-rank 0, and does a firewall let it through?"
    )


def _greet(place: Place, peer: Peer, hello: Message) -> int:
    """The port that node 0 names when all have come, or 0 if it is not a node 0 that answers. Node 0 gives a sign of
    life all the while, and gives up by itself."""
    peer.send(hello)
    messages, welcome = peer.answer(), False
    try:
        while messages or (welcome and not peer.closed and time.monotonic() - peer.heard < SILENCE_S):
            for message in messages:
                match message:
                    case {"welcome": str(name)}:
                        peer.name, welcome = name, True
                    case {"start": int(port)}:
                        return port
                    case {"refused": str(reason)}:
                        raise ConfigError(f"node 0 ({place.host}) refused this node {place.node}: {reason}")
                    case {"over": [_, _, str(text), _]}:
                        raise MachineError(text)
            messages = peer.receive(BEAT_S)
        if welcome:
            raise MachineError(f"{peer} has left before all nodes had come")
        peer.connection.close()
        return 0
    except (ConfigError, MachineError):
        peer.connection.close()
        raise
