"""What every run does with its directory: check it first, have it for itself, write files whole and delete only what
is its own."""

import contextlib
import dataclasses
import datetime
import fnmatch
import functools
import glob
import importlib.metadata
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from efflm.config import InputError, require
from efflm.config.written import size
from efflm.parallel import processes
from efflm.user_cache import fcntl

ROOT = Path(__file__).resolve().parents[2] / "runs"
SMALL_FILES = 3_000_000  # bytes: logs, tables, pictures, the page and the tokenizer of a run, at most
VECTORS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "bf16", "i8mm")
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "tokenizers", "safetensors")
LOCK = "run.lock"
_held: set[Path] = set()  # the directories that this process has for itself


def require_writable(path: Path, needs: int, remedy: str = "give another --run_dir") -> None:
    """Check, leaving no trace, that `path` is or can become a directory with `needs` bytes free. Raises InputError,
    with what the caller can do about it."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    require(existing.is_dir(), f"{existing} is a file, so {path} cannot be a directory: {remedy}")
    require(
        bool(existing.stat().st_mode & 0o222),
        f"{existing} is read-only: {remedy}, or change its permissions",
    )
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"cannot write into {existing} ({error.strerror}): {remedy}") from None
    free = shutil.disk_usage(existing).free
    require(
        free >= needs,
        f"{existing} has {size(free)} free, but this run needs about {size(needs)}: free some space or {remedy}",
    )


def locked(main: Callable[..., None]) -> Callable[..., None]:
    """The main of an experiment, with run.run_dir `held`; where that is empty and so by default, nothing is written."""

    @functools.wraps(main)
    def alone(run: Any, *groups: Any, **named: Any) -> None:
        somewhere = run.run_dir or type(run).run_dir
        with held(Path(run.run_dir)) if somewhere else contextlib.nullcontext():
            main(run, *groups, **named)

    return alone


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Have the directory, which is made if need be, for this process; of several that run one program, for process 0.

    The lock is the kernel's, on a file that says who has it, and ends with the process in whatever way that ends. It
    is gone in the end, as is the directory where nothing came into it. Raises InputError if another process has it, or
    a file of that name is no lock of ours.
    """
    path = path.resolve()
    if fcntl is None or path in _held or not processes.is_first():
        yield
        return
    require_writable(path, needs=0)
    with _folder(path):
        handle = _lock(path)
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            (path / LOCK).unlink(missing_ok=True)
            os.close(handle)


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """A folder, made if need be; in the end it and those above it that were made are gone where nothing is in them."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def _lock(path: Path) -> int:
    """An open file, locked where its file system can do that, in which is who we are."""
    file = path / LOCK
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise InputError(
                f"{path} is in use by {_owner(file)}: wait for its end, or give another --run_dir"
            ) from None
        except OSError as error:
            print(
                f"warning: no lock on {path} ({error.strerror}): make sure that no other run writes into it",
                file=sys.stderr,
            )
        with contextlib.suppress(OSError):
            if os.fstat(handle).st_ino == file.stat().st_ino:
                break
        os.close(handle)  # its owner has just deleted it
    if os.pread(handle, 6, 0) not in (b"", b'{"pid"'):
        os.close(handle)
        raise InputError(f"{file} is not a lock that efflm has written: give another --run_dir, or rename it")
    me = {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
    }
    with contextlib.suppress(OSError):  # a full disk: the lock counts, not the words
        os.ftruncate(handle, 0)
        os.write(handle, to_json(me).encode())
    return handle


def _owner(file: Path) -> str:
    try:
        who = json.loads(file.read_text())
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not written it yet
        return "another process"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that is then at `path`: whole or, on any error, not at all. The place is this
    writer's own, so that several may write at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as partial:
        yield partial
        partial.replace(path)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name beside `path` that nobody else has; what is there in the end is deleted, as is what a process that was
    killed has left under such a name and nobody has written to for an hour."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                _delete(left)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
    finally:
        _delete(partial)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    with whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_together(folder: Path, files: Mapping[str, str | Callable[[Path], Any] | None]) -> None:
    """Write files that belong together into `folder`: all of them or, on any error, none, with the folder as it was.

    files: by name their text, or what writes one to the path it is given; None deletes what an earlier set left under
    that name. They are written beside, in a folder of their own, and then renamed in their order: a process that is
    killed meanwhile leaves whole files.
    """
    with _folder(folder), _beside(folder / next(iter(files))) as partial:
        old, placed = partial / "old", []
        old.mkdir(parents=True)
        for name, content in files.items():
            if isinstance(content, str):
                (partial / name).write_text(content, encoding="utf-8")
            elif content is not None:
                content(partial / name)
        try:
            for name, content in files.items():
                placed.append(name)
                _keep(folder / name, old / name)
                if content is None:
                    (folder / name).unlink(missing_ok=True)
                else:
                    (partial / name).replace(folder / name)
        except BaseException:
            for name in placed:
                if os.path.lexists(old / name):
                    (old / name).replace(folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            raise


def _keep(path: Path, beside: Path) -> None:
    """Keep a file, if it is there, under a second name; where the file system cannot do that, under that name alone."""
    if os.path.lexists(path):
        try:
            os.link(path, beside, follow_symlinks=False)
        except (OSError, NotImplementedError):
            path.rename(beside)


def discard(folder: Path, names: Iterable[str]) -> None:
    """Delete what lies in `folder` under these names or patterns, which are those of what the caller writes, and the
    folder itself if that was all. What cannot be deleted stays, as does all else."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if any(fnmatch.fnmatchcase(path.name, name) for name in names):
                _delete(path)
        folder.rmdir()


def write_json(path: Path, value: Any) -> None:
    write_whole(path, to_json(value, indent=1) + "\n")


def to_json(value: Any, **how: Any) -> str:
    """The value as JSON, which has no words for numbers that are not finite: they are null. Dataclasses
    are what their json() says, or their fields. how: as of json.dumps."""
    return json.dumps(_finite(value), allow_nan=False, **how)


def _finite(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = value.json() if hasattr(value, "json") else dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine() -> dict[str, str]:
    """The date, the versions and the hardware that a result was measured with."""
    import jax

    (cpu, has), devices = processor(), jax.devices()
    vectors = ", ".join(each for each in VECTORS if each in has)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "cpu": f"{cpu} ({vectors})" if vectors else cpu,
        "cores": str(usable),
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }


@functools.cache
def processor() -> tuple[str, frozenset[str]]:
    """Its name, and the sets of instructions that it has, as Linux names them (elsewhere none are known)."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    return name, frozenset((found.get("flags") or found.get("Features", "")).split())


def _commit() -> str:
    """The commit of this code, and whether files differ from it; "unknown" where no git repository holds it: one around
    an environment that it is installed in says nothing of it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        run = lambda *args: subprocess.run([*git, *args], capture_output=True, text=True, check=True, timeout=10).stdout
        run("ls-files", "--error-unmatch", Path(__file__).name)
        return run("rev-parse", "--short", "HEAD").strip() + (
            ", changed" if run("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
