"""Runs that are told to stop: SIGTERM, as schedulers send it before they kill."""

import contextlib
import itertools
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


class StopAsked:
    """Whether SIGTERM has come, asked wherever a run can stop: ``asked()``.

    Of several processes any may be told; all then stop at one place, as JAX's
    preemption service finds it. So all ask at the same places, as often. A scheduler
    that sends it twice changes nothing, and Ctrl-C ends a run at once, as ever.

    Example:
        >>> asked = StopAsked()
        >>> with asked.heeded():
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print(asked())
        True
    """

    def __init__(self):
        """Nothing has come yet."""
        self._told = False

    def __call__(self) -> bool:
        """Whether to stop here."""
        if not self._told and jax.distributed.is_initialized():
            # The service finds the next place by its number: they rise one by one.
            self._told = multihost_utils.reached_preemption_sync_point(next(_PLACES))
        return self._told

    def raised(self, when: str) -> None:
        """Raises ``Stopped``, which says when, if it has come."""
        if self():
            raise Stopped(when)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """For as long as the context, SIGTERM stops the run at the next such place.

        Of several processes that holds everywhere: the service has taken the signal.
        """
        if jax.distributed.is_initialized():
            yield
            return
        with _on_sigterm(self._tell):
            yield

    def _tell(self, *_: object) -> None:
        self._told = True


_PLACES = itertools.count(1)  # of all runs of this process


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
