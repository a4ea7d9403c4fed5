"""Runs that are told to stop: SIGTERM, as schedulers send it before they kill."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Stopped(SystemExit):
    """A run was told to stop and can go on; its exit status is 0.

    Like ``SystemExit`` it passes through what catches ordinary exceptions.
    """

    def __init__(self, when: str):
        """See the class; ``when`` says where it stands."""
        super().__init__(0)
        self.when = when

    def __str__(self) -> str:
        """What a user reads."""
        return f"stopped by SIGTERM {self.when}; the same command goes on from there"


@contextlib.contextmanager
def stop_asked() -> Iterator[Callable[[int], bool]]:
    """Heeds SIGTERM for as long as the context: at the next step, not at once.

    Of several processes any may be told; all then stop at one step, as JAX's
    preemption service finds it. A scheduler that sends it twice changes nothing, and
    Ctrl-C ends a run at once, as ever.

    Yields:
        ``asked(step)``, to be called after every update: whether to save and stop
        after this one.

    Example:
        >>> with stop_asked() as asked:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print(asked(7))
        True
    """
    if jax.distributed.is_initialized():  # its service has taken the signal
        yield multihost_utils.reached_preemption_sync_point
        return
    told: list[int] = []
    with _on_sigterm(lambda *_: told.append(1)):
        yield lambda step: bool(told)


@contextlib.contextmanager
def stops_at_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise ``Stopped`` where there is nothing to save.

    Raises:
        Stopped: when the signal comes.
    """

    def stop(*_):
        raise Stopped("outside of the training loop")

    with _on_sigterm(stop):
        yield


@contextlib.contextmanager
def _on_sigterm(handler: Callable[..., object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread heed signals
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
