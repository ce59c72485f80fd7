"""The lock in a run's folder, which one process holds at a time."""

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from alexnet_repro.errors import InUse

LEASE = 30.0  # seconds after which a lock that its owner did not renew is free


def locked(run: Path) -> SoftFileLease:
    """Take the lock of a run's folder, which holds between machines, too.

    The owner renews the lock every few seconds. A process that died loses it: at once on the same machine, and after
    LEASE seconds on another one. Raises InUse if another process holds it.
    """
    lock = SoftFileLease(run / "lock", lease_duration=LEASE, on_compromise=_lost_lock, thread_local=False)
    try:
        lock.acquire(timeout=0)
        return lock
    except Timeout:
        owner = owner_of(run / "lock")
    if not owner:  # it has just ended, or it died before it wrote its name
        with suppress(FileNotFoundError):
            if time.time() - (run / "lock").stat().st_mtime > LEASE:
                (run / "lock").unlink()
        try:
            lock.acquire(timeout=5)
            return lock
        except Timeout:
            owner = owner_of(run / "lock")
    pid, host = owner or ("?", socket.gethostname())
    if host != socket.gethostname():
        print(f"{run} is in use by process {pid} on {host}; waiting {LEASE + 5:.0f} s in case that one died")
        try:
            lock.acquire(timeout=LEASE + 5, poll_interval=1)
            return lock
        except Timeout:
            pass
    raise InUse(
        f"{run} is in use by process {pid} on {host}", "wait until it ends, or choose another folder with run=PATH"
    )


def owner_of(lock: Path) -> tuple[str, str] | None:
    """Return the process number and the host that a lock of filelock names, or None if there is no such lock."""
    try:
        fields = dict(line.partition("=")[::2] for line in lock.read_text().splitlines())
        return fields["pid"], fields["host"]
    except (OSError, ValueError, KeyError):
        return None


def is_alive(owner: tuple[str, str]) -> bool:
    """Return whether the owner of a lock may be running, which only its own machine can tell."""
    pid, host = owner
    if host != socket.gethostname() or not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # a process of another user
    return True


def _lost_lock(loss: LeaseCompromise) -> None:
    if loss.reason == "refresh-failed":
        print(f"error: {loss.lock_file} cannot be renewed ({loss.error}); this run stops", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)  # saves the run, if its folder can be written
        return
    print(f"error: {loss.lock_file} was removed or taken over ({loss.reason}); this process ends", file=sys.stderr)
    os._exit(1)  # without saving, since the folder may belong to another process now
