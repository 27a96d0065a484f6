"""What a drive would still have if the power went now: what was synced as it is, by fsync or fdatasync."""

import os
import stat
from functools import partial
from pathlib import Path

from offload_rt.checkpoint import whole_folder


class Durable:
    """Notes what every sync of this process finds. `missing` names what has changed, or come, since its last one."""

    def __init__(self, monkeypatch):
        self._synced = {}
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, partial(self._note, getattr(os, name)))

    def at_rename(self, monkeypatch):
        """A list that receives, of each folder that is written whole, what was missing when it got its name."""
        found = []

        def put_in_place(partial, *arguments, real=whole_folder._put_in_place, **keywords):
            found.append(self.missing(partial))
            real(partial, *arguments, **keywords)

        monkeypatch.setattr(whole_folder, "_put_in_place", put_in_place)
        return found

    def missing(self, path):
        """Of the file or folder `path`, and what is in it."""
        here = Path(path)
        inside = [name for entry in here.iterdir() for name in self.missing(entry)] if here.is_dir() else []
        return inside + ([] if self._synced.get(_key(here)) == _content(here) else [here.name])

    def has_name(self, path):
        """Whether `path` is that of what is there now."""
        folder = Path(path).parent
        return self._synced.get(_key(folder), {}).get(Path(path).name) == _key(path)

    def names_in(self, folder):
        """Those that were on the drive when `folder` was synced last."""
        return set(self._synced[_key(folder)])

    def _note(self, real, fd):
        real(fd)
        self._synced[_key(fd)] = _content(Path(f"/proc/self/fd/{fd}"))


def _key(of):
    found = os.stat(of)
    return found.st_dev, found.st_ino, stat.S_IFMT(found.st_mode)


def _content(path):
    return {entry.name: _key(entry) for entry in path.iterdir()} if path.is_dir() else path.read_bytes()
