"""Opens Parquet files wherever they lie, for `inputs` (files of anyone's) and for `plan` and `job` (this package's own), and says apart
what is wrong with them: a storage that does not answer or refuses is an OSError of its own kind, and a file that is damaged a ValueError.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage
from dataio.foreign import open_regular


@contextmanager
def opened_parquet(storage: Storage | None, path: str, name: str, *, fix: str) -> Iterator[pq.ParquetFile]:
    """The Parquet file at a path of this machine, or of `storage`. Within the context, too: ValueError, which says `name` and `fix`, where
    the file is damaged; OSError, StorageOutage or StorageRefused where it cannot be read."""
    is_here = storage is None or storage.is_local
    source: Any = open_regular(path if storage is None else storage.at(path)) if is_here else _Remote(storage, path, name)
    try:
        with source, pq.ParquetFile(source) as file:
            yield file
    except pa.ArrowException as error:
        raise _damaged(error, name, fix) from error
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise  # the storage's; what Arrow says of a damaged file is a bare OSError
        raise _damaged(error, name, fix) from error


def _damaged(error: Exception, name: str, fix: str) -> ValueError:
    said = " ".join(str(error).split())  # Arrow's may have several lines
    return ValueError(f"{name} is no readable Parquet file ({said}); {fix}")


class _Remote(io.RawIOBase):
    """A file of a remote storage whose every read is retried, as the storage's other operations are."""

    def __init__(self, storage: Storage | None, path: str, name: str) -> None:
        assert storage is not None
        self._storage, self._path, self._name = storage, path, name
        self._position = 0
        self._file: Any = None
        self._size = int(self._try(lambda: self._opened().size()))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        count = self._size - self._position if size < 0 else min(size, self._size - self._position)
        data = self._try(lambda: bytes(self._opened().read_at(count, self._position))) if count > 0 else b""
        self._position += len(data)
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()

    def _opened(self) -> Any:
        if self._file is None:
            self._file = self._storage.fs.open_input_file(self._storage.at(self._path))
        return self._file

    def _try(self, operation: Any) -> Any:
        def attempt() -> Any:
            try:
                return operation()
            except OSError:
                self._file = None  # opened again, for the next try
                raise

        return self._storage.retry.call(attempt, self._name)
