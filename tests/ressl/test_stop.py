import os
import signal
import threading
import time

import pytest

from ressl.stop import ASKING, AT_ONCE_S, Stop


@pytest.mark.parametrize("sent", ASKING)
def test_a_signal_is_remembered_and_does_nothing_else(sent: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(sent)
    with Stop() as stop:
        assert stop.asked is None
        os.kill(os.getpid(), sent)
        assert stop.asked == sent.name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == sent.name  # the first one is told
    assert signal.getsignal(sent) == before
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_is_answered_where_no_launcher_does(capfd: pytest.CaptureFixture[str]) -> None:
    with Stop(aloud=True):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    said = "ressl: the run finishes its step, saves and ends; Ctrl-C again ends it at once\n"
    assert capfd.readouterr() == ("", said)


def test_a_second_ctrl_c_ends_at_once_but_not_the_same_one_told_twice() -> None:
    """A terminal tells a process, and a launcher may tell it again."""
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == "SIGINT"
        time.sleep(AT_ONCE_S + 0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_was_ignored_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_beside_the_main_thread_nothing_is_caught() -> None:
    found = []

    def work() -> None:
        with Stop() as stop:
            found.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
