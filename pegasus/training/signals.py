"""Signals that ask a run to save and stop."""
import signal

HANGUP = getattr(signal, "SIGHUP", None)  # which not every system has


class StopSignal:
    """Takes signals that ask to stop.

    asked: the number of the last one, 0 until there is one. agreed: the largest of all
    processes, which then stop after the same step; 0 until there is one.
    """

    def __init__(self):
        self.asked = 0
        self.agreed = 0
        some = [signal.SIGINT, signal.SIGTERM, HANGUP]
        # but for those that whoever started this process wants ignored
        self.wanted = [s for s in some if s and signal.getsignal(s) != signal.SIG_IGN]

    def listen(self) -> None:
        for signum in self.wanted:
            signal.signal(signum, self.receive)

    def receive(self, signum: int, _frame: object) -> None:
        """Note a signal. A second SIGINT or SIGTERM ends the process at once."""
        self.asked = signum
        hangup = signum == HANGUP  # terminals hang up twice
        signal.signal(signum, signal.SIG_IGN if hangup else signal.SIG_DFL)

    def release(self) -> None:
        """Let signals end the process again."""
        for signum in self.wanted:
            interrupt = signum == signal.SIGINT
            handler = signal.default_int_handler if interrupt else signal.SIG_DFL
            signal.signal(signum, handler)
