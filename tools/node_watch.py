"""What the launchers of a run on several machines say to each other while it goes on (they met in tools/nodes.py).

Both ends of a connection send a line every half second. So a launcher that was killed is noticed by its closed
connection, a machine that is lost by its silence, and a failure anywhere is told everywhere: node 0 passes it on.
"""

import signal
import socket
import sys
import threading
import time
from _thread import interrupt_main
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from tools.nodes import BEAT_S, SILENCE_S, Over, Peer, Place

FIRST = "first"  # in a launcher's directory of failures: the exit code of the first process to fail


class Watch:
    """While the processes of this node run: tells the other nodes when one has failed, and ends them when another node
    is over. A context manager; `over` is what another node's end was, or None.

    `failures` is the directory where a process leaves the exit code of the first failure in the file FIRST; for the
    end of another node its code is written there, so that processes that lost touch with it know why.
    """

    def __init__(self, place: Place, peers: list[Peer], failures: Path, silence_s: float = SILENCE_S) -> None:
        self.over: Over | None = None
        self._place, self._peers, self._failures, self._silence_s = place, peers, failures, silence_s
        self._told = False  # the others know that this node is over
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

    def leave(self, code: int) -> None:
        """Tells the others that this node has ended, with exit code 0 or why not, and closes the connections."""
        for peer in self._peers:
            peer.part({"over": astuple(self.over or self._own_end(code))} if code else {"bye": 0})

    def _own_end(self, code: int) -> Over:
        how = "was stopped" if code > 128 else "failed"
        return Over(self._place.node, code, f"node {self._place.node} ({socket.gethostname()}) {how}, exit code {code}")

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._tell_failure()
            for peer in self._peers:
                peer.send({"beat": 0})
                self._listen_to(peer)
            self._peers = [peer for peer in self._peers if not peer.closed]
            if self.over and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                interrupt_main(signal.SIGTERM)  # elastic's handler, there once it has started them, ends the processes
                return

    def _tell_failure(self) -> None:
        """At once, for elastic may take long to end the other processes here."""
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
            peer.closed = True
        elif overs:
            self._end(overs[0], peer)
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
        self.over = over
        print(f"ressl: error: {over.text}", file=sys.stderr, flush=True)
        for peer in self._peers:
            if peer is not source:
                peer.send({"over": astuple(over)})
        with suppress(FileExistsError), (self._failures / FIRST).open("x") as file:
            file.write(str(over.code))
