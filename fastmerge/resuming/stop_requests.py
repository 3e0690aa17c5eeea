"""Ctrl-C and SIGTERM as requests that a run meets at the next step's end, with a checkpoint, instead of in its middle."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_OWN_TO_PYTHON = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Interrupted(KeyboardInterrupt):
    """A run ended at a signal's request.

    Attributes:
        number: The signal's; a process that ends for it exits with 128 + number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class StopRequests:
    """Within this context the first SIGINT or SIGTERM is kept for :meth:`raise_if_any`; a second one acts as ever.

    In a process whose parent sees to its end, where ``ends_by_parent`` is set, a second one does nothing: the first came to
    all processes of a job, and the second is the parent's, which had it too.

    Signals for which the program has a handler of its own are left to it, as are all outside the main thread.

    Args:
        enabled: Whether to.

    Attributes:
        number: The signal that came, or None.
    """

    ends_by_parent = False

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.number: int | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._at_childs_end: Any = None

    def __enter__(self) -> StopRequests:
        if self.enabled and threading.current_thread() is threading.main_thread():
            for number, usual in _OWN_TO_PYTHON.items():
                if signal.getsignal(number) == usual:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._give_back()
        if self._at_childs_end is not None:
            signal.signal(signal.SIGCHLD, self._at_childs_end)
            self._at_childs_end = None

    def raise_if_any(self) -> None:
        """Raises Interrupted where a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        # A DataLoader's workers may have had the signal, too. At their end PyTorch raises an error wherever this process is;
        # when the next batch is asked for, it finds out anyway.
        if self._at_childs_end is None and callable(before := signal.getsignal(signal.SIGCHLD)):
            self._at_childs_end = before
            signal.signal(signal.SIGCHLD, _nothing)
        if not StopRequests.ends_by_parent:
            self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler that lets a signal pass."""
