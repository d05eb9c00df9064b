"""What the launchers of a run on several machines say to each other while it goes on (they met in tools/nodes.py).

Both ends of a connection send a line every half second. So a launcher that was killed is noticed by its closed
connection, a machine that is lost by its silence, and a failure anywhere is told everywhere: node 0 passes it on.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from tools.nodes import BEAT_S, SILENCE_S, Over, Peer, Place

FIRST = "first"  # in a launcher's directory of failures: the exit code of the first process to fail
STOPPED, AT_ONCE = 75, 130  # exit codes of a run that was asked to stop, and of one that was ended at once
HOW = {STOPPED: "was stopped before the first step: nothing to save", AT_ONCE: "was ended at once"}


class Watch:
    """While the processes of this node run: tells the other nodes when one has failed, and hears when another node is
    over. A context manager; `over` is what another node's end was, or None: the processes here must end then.

    `failures` is the directory where a process leaves the exit code of the first failure in the file FIRST; for the
    end of another node its code is written there, so that processes that lost touch with it know why.
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
        how = HOW.get(code, f"failed, exit code {code}")
        return Over(self._place.node, code, f"node {self._place.node} ({socket.gethostname()}) {how}")

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
        first = self._failures / FIRST
        code = first.read_text() if first.exists() and not self._told and not self.over else ""
        if code:
            self._told = True
            for peer in self._peers:
                peer.send({"over": astuple(self._own_end(int(code)))})

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
            self._end(Over(peer.node, 4, f"{peer} was lost: its launcher was killed, or the network failed"), peer)
        elif time.monotonic() - peer.heard > self._silence_s:
            self._end(Over(peer.node, 4, f"{peer} was lost: not heard of for {self._silence_s:g} s"), peer)
        if peer.closed:
            peer.connection.close()

    def _end(self, over: Over, source: Peer) -> None:
        source.closed = True
        if self.over or self._told:
            return
        for peer in self._peers:
            if peer is not source:
                peer.send({"over": astuple(over)})
        with suppress(FileExistsError), (self._failures / FIRST).open("x") as file:
            file.write(str(over.code))
        self.over = over
