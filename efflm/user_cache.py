"""One folder of the user's own for what can be made again: kernels, compiled programs, measurements, prepared text.

What lies there is loaded as code, or believed as it is. So it is used only where nobody else can have put it: each
folder in it is the user's, and no one else may write into it.
"""

import contextlib
import os
import shlex
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from efflm.config import InputError, require

try:
    import fcntl
except ImportError:  # a system without it
    fcntl = None

REMEDY = "set XDG_CACHE_HOME to a folder of your own, in which efflm keeps what it made"


def folder(name: str = "") -> Path:
    """$XDG_CACHE_HOME/efflm/NAME, or ~/.cache/efflm/NAME; made, with mode 0700, if it is not there.

    Raises InputError if it cannot be made, if it, efflm's own folder above it or a link to one of them is another
    user's or can be written by others, and if everybody may replace what lies in the folder above these.
    """
    asked = Path(os.environ.get("XDG_CACHE_HOME") or "")
    try:
        base = asked if asked.is_absolute() else Path.home() / ".cache"  # a relative one is invalid, says the standard
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_closed(base)
        path = base / "efflm"
        for each in (path, path / name) if name else (path,):
            path = each
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            _require_own(path)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be made ({error.strerror}): {REMEDY}") from None
    except RuntimeError:
        raise InputError(f"the home folder is not known: {REMEDY}") from None
    return path


def is_own(entry: os.stat_result) -> bool:
    """Whether it is this user's, and no one else's to write. Without users, as on Windows, everything is."""
    return not hasattr(os, "getuid") or (entry.st_uid == os.getuid() and not entry.st_mode & 0o022)


def _require_closed(base: Path) -> None:
    """Others who may write into it and remove what is not theirs could put their own folder in the place of ours."""
    mode = base.stat().st_mode
    require(
        not mode & stat.S_IWOTH or bool(mode & stat.S_ISVTX) or not hasattr(os, "getuid"),
        f"{base} can be written by everybody (mode {stat.S_IMODE(mode):04o}), so efflm's caches in it could be "
        f"replaced: run chmod o-w {shlex.quote(str(base))}, or {REMEDY}",
    )


def _require_own(path: Path) -> None:
    found, link = path.stat(), path.lstat()
    require(stat.S_ISDIR(found.st_mode), f"{path} is a file, but must be a folder: remove it, or {REMEDY}")
    if not hasattr(os, "getuid"):
        return
    for entry in (link, found):
        require(
            entry.st_uid == os.getuid(),
            f"{path} belongs to user {entry.st_uid} and not to {os.getuid()}, who runs this, so nothing in it is "
            f"trusted: {REMEDY}",
        )
    require(
        is_own(found),
        f"{path} can be written by others (mode {stat.S_IMODE(found.st_mode):04o}), so nothing in it is trusted: "
        f"remove it, or run chmod -R go-w {shlex.quote(str(path))} if only you wrote into it",
    )


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time makes `path`; the others wait, and then find it made."""
    if fcntl is None:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(f"{path.name}.lock").open("a")
    except OSError:  # nothing can be made there, and it may be made already
        yield
        return
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which makes {path}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


def use_compilation_cache(name: str = "compiled") -> None:
    """Keep compiled programs in this folder of the user's cache, for this run and the next, unless
    JAX_COMPILATION_CACHE_DIR names one. Where the cache is not to be had or not to be trusted, none are kept; nor for
    several devices of a CPU: XLA's runtime can wait for ever in such a program that it has read back."""
    import jax

    if jax.config.jax_compilation_cache_dir or (jax.default_backend() == "cpu" and jax.device_count() > 1):
        return
    try:
        path = folder(name)
    except InputError as error:
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
