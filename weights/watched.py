"""A file that somebody else may change: known by what it was at first, and refused once it differs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from weights.errors import UserError
from weights.files import regular


class Version(NamedTuple):
    """What tells one state of a file from another, as far as the file system says."""

    device: int
    inode: int
    size: int
    time: int  # of its last change, in ns

    @classmethod
    def of(cls, status: os.stat_result) -> Version:
        """The version that a `stat` tells of."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class Watched:
    """A plain file and its version. It is held open by nobody: a tree may have more files than a process may open.

    Without a `version` it is what lies there now. Then raises `OSError` where there is no file, `UserError` for a
    folder, a pipe or a device.
    """

    def __init__(self, path: Path, version: Version | None = None) -> None:
        self.path, self._absolute = path, path.absolute()  # the process may change its folder
        self.version = version or Version.of(regular(path).stat())

    def check(self) -> None:
        """Raise `UserError` where the file is gone, was replaced or was written since."""
        try:
            self.hold(Version.of(self._absolute.stat()))
        except OSError as error:
            raise self._not_there(error) from None

    def hold(self, now: Version) -> None:
        """Raise `UserError` for any other version."""
        if now != self.version:
            size, opened = now.size, self.version.size
            sizes = f" ({opened:,} bytes then, {size:,} now)" if size != opened else ""
            raise UserError(f"{self.path}: changed while it was in use{sizes}; run again when it is complete")

    @contextmanager
    def opened(self) -> Iterator[int]:
        """The open file, for reading. What was read is sound if the block ends without a `UserError`."""
        try:
            # Without waiting: a pipe may lie there by now, and nobody may ever write to it.
            file = os.open(self._absolute, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise self._not_there(error) from None
        try:
            self.hold(Version.of(os.fstat(file)))
            yield file
            self.hold(Version.of(os.fstat(file)))
        except EOFError:
            self.hold(Version.of(os.fstat(file)))
            raise UserError(f"{self.path}: ends before its {self.version.size:,} bytes") from None
        except OSError as error:
            raise UserError(f"{self.path}: not readable: {error.strerror}") from None
        finally:
            os.close(file)

    def _not_there(self, error: OSError) -> UserError:
        if isinstance(error, FileNotFoundError):
            return UserError(f"{self.path}: is gone since it was opened: {error.strerror}")
        return UserError(f"{self.path}: {error.strerror}")


def begun(path: Path, version: Version | None, count: int) -> tuple[Watched, bytes]:
    """A file and its first bytes, fewer where it ends before.

    Raises `UserError` where it is missing, is none or is no longer of `version`.
    """
    try:
        file = Watched(path, version)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    with file.opened() as opened:
        return file, os.pread(opened, count, 0)
