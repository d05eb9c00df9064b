"""Ctrl-C ends what runs unless it is ignored, and what is printed never fails for want of a letter."""

import io
import signal
import sys

import pytest
from rich.console import Console

from tools.terminal import plain_console, prepare_terminal


@pytest.fixture
def _signals():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (signal.SIG_DFL, signal.default_int_handler),
        (signal.SIG_IGN, signal.SIG_IGN),
        (signal.default_int_handler, signal.default_int_handler),
    ],
    ids=["not yet", "ignored", "already"],
)
def test_ctrl_c_is_an_interrupt_unless_it_is_ignored(before, after):
    signal.signal(signal.SIGINT, before)
    prepare_terminal()
    assert signal.getsignal(signal.SIGINT) == after


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_letter_that_the_terminal_lacks_is_a_question_mark(monkeypatch, encoding):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    prepare_terminal()
    print("f\u00fcr \u6f22\udce9", file=sys.stderr)
    Console().print("f\u00fcr \u6f22\udce9")
    expected = {"ascii": b"f?r ??\n", "latin-1": b"f\xfcr ??\n", "utf-8": "f\u00fcr \u6f22?\n".encode()}
    for stream in streams.values():
        stream.flush()
        assert stream.buffer.getvalue() == expected[encoding]


def test_brackets_are_printed_as_they_are(capsys):
    plain_console().print("a [bold]path[/] 123")
    assert capsys.readouterr().out == "a [bold]path[/] 123\n"
