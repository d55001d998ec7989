"""Claims: which driver a run belongs to. Each driver claims the next generation; only the newest one may commit. Used by store.py.

    <run>/generations/g0001          one driver's claim: host, process, and a note (trainer puts the run's identity in it)
    <run>/generations/bid-0001-TOKEN      on object stores, which cannot create a file exclusively: who asks for a number

A driver sees the claim before its own and may refuse to follow it. Nothing comes between the two. So all claims of a run say the same of
it, however many drivers start at once. A driver that dies on the way leaves its claim whole or not at all."""

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.storage import Entry, Storage, make_dirs, sync_dir, write_new

CLAIM_PATIENCE_SECONDS = 2.0
"""How long a driver waits for another one that is about to claim the run, before it takes that one for dead."""

_CLAIM = re.compile(r"g(\d{4,})")
_BID = re.compile(r"bid-(\d{4,})-[0-9a-f]{8}")
# Of os.link on file systems that have no hard links.
_WITHOUT_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A driver's claim on the run. If its writing was cut short it says nothing: all but the generation is empty."""

    generation: int
    token: str = ""
    host: str = ""
    pid: int = 0
    note: Mapping[str, Any] = field(default_factory=dict)
    """What its driver said of the run."""

    def encoded(self) -> bytes:
        return json.dumps({"token": self.token, "host": self.host, "pid": self.pid, **({"note": self.note} if self.note else {})}).encode()


Check = Callable[[Claim], None]


class Claims:
    """The claims of one run."""

    def __init__(self, storage: Storage, run: str) -> None:
        self._storage = storage
        self._folder = f"{run}/generations"
        self._tokens: dict[int, str] = {}

    def make(self, note: Mapping[str, Any], check: Check, *, floor: Callable[[], int]) -> int:
        """Claim the next generation and return it. The claim carries `note`, which must be JSON-able. `floor()` is the number to begin
        above where there is no claim.

        `check` gets the claim before this one, and refuses by a ValueError: then nothing is claimed. No claim comes between the two."""
        mine = Claim(generation=0, host=socket.gethostname(), pid=os.getpid(), note=note)
        if not self._storage.is_local:
            return self._bid(mine, check, floor)
        make_dirs(self._storage.at(self._folder))
        while True:
            newest = self.newest()
            if newest:
                check(self._finished(newest))
            generation = 1 + (newest or floor())
            if _create_whole(self._storage.at(f"{self._folder}/g{generation:04d}"), mine.encoded()):
                sync_dir(self._storage.at(self._folder))
                return generation

    def newest(self) -> int:
        """The newest claim, 0 if there is none."""
        return _newest_claim(self._storage.list(self._folder))

    def token(self, generation: int) -> str:
        """The random token of a claim; "" on a local file system."""
        if generation not in self._tokens:
            self._tokens[generation] = self.read(generation).token
        return self._tokens[generation]

    def read(self, generation: int) -> Claim:
        """What the claim of this generation says."""
        return _claim_of(generation, self._storage.read(f"{self._folder}/g{generation:04d}"))

    def _finished(self, generation: int) -> Claim:
        """What a claim says; waits a moment for one that is still being written, where a file system has no hard links."""
        deadline = time.monotonic() + CLAIM_PATIENCE_SECONDS
        while not (claim := self.read(generation)).host and time.monotonic() < deadline:
            time.sleep(CLAIM_PATIENCE_SECONDS / 20)
        return claim

    def _bid(self, mine: Claim, check: Check, floor: Callable[[], int]) -> int:
        # A remote storage has no exclusive create. So write a bid, then list: a driver that sees another bid with its number or a higher
        # one bids again, higher. Of two bidders with the same number the later one sees the earlier, if a listing shows everything written
        # before it (as S3, GCS and Azure do). So each number has one holder. A bid that claims nothing is deleted.
        while True:
            entries = self._storage.list(self._folder)
            newest = _newest_claim(entries)
            generation = 1 + max([newest or floor(), *_bids(entries).values()])
            claim = replace(mine, generation=generation, token=secrets.token_hex(4))
            bid = f"bid-{generation:04d}-{claim.token}"
            self._storage.write_atomic(f"{self._folder}/{bid}", claim.encoded())
            entries = self._storage.list(self._folder)
            if any(number >= generation for other, number in _bids(entries).items() if other != bid):
                self._storage.delete_file(f"{self._folder}/{bid}")
                time.sleep(secrets.randbelow(200) / 1000)
                continue
            try:
                newest = self._wait_for_bidders(generation, entries, check)
                if newest:
                    check(self._finished(newest))
                self._storage.write_atomic(f"{self._folder}/g{generation:04d}", claim.encoded())
                # One that waited in vain for another may not have seen its claim. The later one sees both.
                for unseen in sorted(_claims(self._storage.list(self._folder)) - set(range(newest + 1)) - {generation}):
                    check(self.read(unseen))
            except FileNotFoundError:  # a claim whose driver was refused, and has withdrawn it
                self._withdraw(generation, bid)
                continue
            except BaseException:
                with contextlib.suppress(OSError):  # what stays behind is waited for once
                    self._withdraw(generation, bid)
                raise
            self._tokens[generation] = claim.token
            return generation

    def _withdraw(self, generation: int, bid: str) -> None:
        self._storage.delete_file(f"{self._folder}/g{generation:04d}")
        self._storage.delete_file(f"{self._folder}/{bid}")

    def _wait_for_bidders(self, generation: int, entries: Sequence[Entry], check: Check) -> int:
        """Wait until no lower bid can become a claim that `check` refuses. Returns the newest claim."""
        deadline = time.monotonic() + CLAIM_PATIENCE_SECONDS
        while True:
            newest = _newest_claim(entries)
            open_bids = [bid for bid, number in _bids(entries).items() if newest < number < generation]
            if not any(self._is_refused(bid, check) for bid in open_bids) or time.monotonic() > deadline:
                return newest
            time.sleep(CLAIM_PATIENCE_SECONDS / 20)
            entries = self._storage.list(self._folder)

    def _is_refused(self, bid: str, check: Check) -> bool:
        try:
            check(_claim_of(0, self._storage.read(f"{self._folder}/{bid}")))
        except FileNotFoundError:
            return False
        except ValueError:
            return True
        return False


def _claim_of(generation: int, data: bytes) -> Claim:
    try:
        said = json.loads(data)
        note = said.get("note", {})
        return Claim(generation=generation, token=str(said["token"]), host=str(said["host"]), pid=int(said["pid"]), note=dict(note))
    except (AttributeError, LookupError, TypeError, ValueError):  # cut short
        return Claim(generation=generation)


def _claims(entries: Iterable[Entry]) -> set[int]:
    return {int(match[1]) for entry in entries if (match := _CLAIM.fullmatch(entry.name))}


def _newest_claim(entries: Iterable[Entry]) -> int:
    return max(_claims(entries), default=0)


def _bids(entries: Iterable[Entry]) -> dict[str, int]:
    """Name -> the generation it asks for."""
    return {entry.name: int(match[1]) for entry in entries if (match := _BID.fullmatch(entry.name))}


def _create_whole(path: str, data: bytes) -> bool:
    """Create a local file that nobody ever sees half-written; False if it exists. Its name is durable once the folder is synced."""
    folder, name = os.path.split(path)
    temporary = f"{folder}/.{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    write_new(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return os.stat(temporary).st_nlink == 2  # NFS: done by a request whose answer was lost, and which was sent again
    except OSError as error:
        if error.errno not in _WITHOUT_LINKS:
            raise
        try:
            write_new(path, data)
        except FileExistsError:
            return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return True
