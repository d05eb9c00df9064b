"""What the launchers of a run on several machines say to each other while it goes on (they met in tools/nodes.py).

Both ends of a connection send a line every half second. So a launcher that was killed is noticed by its closed
connection, a machine that is lost by its silence, and a failure anywhere is told everywhere: node 0 passes it on.
"""

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

from tools.early import AT_ONCE, STOPPED
from tools.nodes import BEAT_S, SILENCE_S, Over, Peer, Place

FIRST = "first"  # in a launcher's directory of failures: the mark of the first process to fail
HOW = {STOPPED: "was stopped before the first step: there is nothing new to save", AT_ONCE: "was ended at once"}


@dataclass(frozen=True, slots=True)
class Mark:
    """How the first process failed: with what exit code; whether it was `lost`, through nothing of its own; and what is
    still to be said of it. A process that ended by itself has said why."""

    code: int
    lost: bool = False
    text: str = ""


def leave_mark(failures: Path, mark: Mark) -> bool:
    """Whether it is the first."""
    try:
        with (failures / FIRST).open("x") as file:
            file.write("\n".join([str(mark.code), "lost" if mark.lost else "", mark.text]))
        return True
    except FileExistsError:
        return False


def read_mark(failures: Path) -> Mark | None:
    """None where there is none, or a process was ended amid leaving it."""
    try:
        code, lost, text = ((failures / FIRST).read_text() + "\n\n").split("\n")[:3]
        return Mark(int(code), bool(lost), text)
    except (FileNotFoundError, ValueError):
        return None


class Watch:
    """While the processes of this node run: tells the other nodes when one has failed, and hears when another node is
    over. A context manager; `over` is what another node's end was, or None: the processes here must end then.

    `failures` is the directory where a process leaves the mark of the first failure; for the end of another node one
    is left there, so that processes that lost touch with it know why.
    """

    def __init__(self, place: Place, peers: list[Peer], failures: Path, silence_s: float = SILENCE_S) -> None:
        self.over: Over | None = None
        self._place, self._peers, self._failures, self._silence_s = place, peers, failures, silence_s
        self._told = False  # the others know that this node is over
        self._well = threading.Event()  # the processes of this node have ended, and well
        self._all_well = threading.Event()
        self._done: set[int] = set()  # nodes of which that is known
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        for peer in self._peers:
            peer.heard = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for_others(self, hurry: Callable[[], bool]) -> None:
        """When the processes here have ended well: until they have on all nodes, or `over`. So nodes end alike, and
        processes elsewhere still find what node 0 serves to them."""
        self._well.set()
        while not self.over and not self._all_well.wait(0.1) and not hurry():
            pass

    def leave(self, code: int, *, well: bool) -> None:
        """Tells the others that this node has ended, well or why not, and closes the connections."""
        for peer in self._peers:
            peer.part({"bye": 0} if well else {"over": astuple(self.over or self._own_end(code))})

    def _own_end(self, code: int) -> Over:
        mark = read_mark(self._failures)
        if mark is None or mark.code != code:
            mark = Mark(code)
        here = f"node {self._place.node} ({socket.gethostname()})"
        told = f"{here}: {mark.text}" if mark.text else f"{here} {HOW.get(code, f'failed, exit code {code}')}"
        return Over(self._place.node, code, told, mark.lost)

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._tell_failure()
            for peer in self._peers:
                # node 0 says it last, in leave()
                peer.send({"bye": 0} if self._place.node and self._well.is_set() else {"beat": 0})
                self._listen_to(peer)
            self._peers = [peer for peer in self._peers if not peer.closed]
            if self.over:
                return
            if self._well.is_set() and all(peer.node in self._done for peer in self._peers):
                self._all_well.set()

    def _tell_failure(self) -> None:
        """At once, for it may take long to end the other processes here."""
        mark = None if self._told or self.over else read_mark(self._failures)
        if mark:
            self._told = True
            for peer in self._peers:
                peer.send({"over": astuple(self._own_end(mark.code))})

    def _listen_to(self, peer: Peer) -> None:
        messages = peer.receive(0)
        overs = [Over(*message["over"]) for message in messages if "over" in message]
        if any("bye" in message for message in messages):
            self._done.add(peer.node)
        if overs:
            self._end(overs[0], peer)
        elif peer.node in self._done:  # what becomes of its launcher now is nothing to us
            pass
        elif peer.closed:
            text = f"{peer} was lost: its launcher was killed, or the network failed"
            self._end(Over(peer.node, 4, text, lost=True), peer)
        elif time.monotonic() - peer.heard > self._silence_s:
            text = f"{peer} was lost: not heard of for {self._silence_s:g} s"
            self._end(Over(peer.node, 4, text, lost=True), peer)
        if peer.closed:
            peer.connection.close()

    def _end(self, over: Over, source: Peer) -> None:
        source.closed = True
        if self.over or self._told:
            return
        for peer in self._peers:
            if peer is not source:
                peer.send({"over": astuple(over)})
        leave_mark(self._failures, Mark(over.code, over.lost))
        self.over = over
