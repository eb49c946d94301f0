"""What every run does with its directory: check it first, cache compiled programs beside it, write files whole."""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from efflm.config import InputError, require

VECTORS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "bf16", "i8mm")
ROOT = Path(__file__).resolve().parent.parent / "runs"


def require_writable(path: Path, needs: int) -> None:
    """Check, leaving no trace, that `path` is or can become a directory with `needs` bytes free. Raises InputError."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    require(existing.is_dir(), f"{existing} is a file, so {path} cannot be a directory: give another --run_dir")
    require(
        bool(existing.stat().st_mode & 0o222),
        f"{existing} is read-only: give another --run_dir or change its permissions",
    )
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"cannot write into {existing} ({error.strerror}): give another --run_dir") from None
    free = shutil.disk_usage(existing).free
    require(
        free >= needs,
        f"{existing} has {free / 1e6:.0f} MB free, but this run needs about {needs / 1e6:.0f} MB: free some space or "
        "give another --run_dir",
    )


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs in `folder`, for this run and the next; not where JAX_COMPILATION_CACHE_DIR names one."""
    import jax

    if jax.config.jax_compilation_cache_dir:
        return
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")


def machine() -> dict[str, str]:
    """The date, the versions and the hardware that a result was measured with."""
    import jax

    names = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "tokenizers", "safetensors")
    versions = {name: importlib.metadata.version(name) for name in names}
    device = jax.devices()[0]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = {"cpu": _processor(), "cores": str(usable), "device": f"{len(jax.devices())} x {device.device_kind}"}
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": date, "commit": _commit(), "python": platform.python_version(), **versions, **hardware}


def _processor() -> str:
    """Its name, and those of its vector instructions that decide what is fast."""
    found: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    has = [each for each in VECTORS if each in found.get("flags", "").split()]
    return f"{name} ({', '.join(has)})" if has else name


def _commit() -> str:
    """The commit of this code, and whether files differ from it; "unknown" outside of a git repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        run = lambda *args: subprocess.run([*git, *args], capture_output=True, text=True, check=True, timeout=10).stdout
        return run("rev-parse", "--short", "HEAD").strip() + (
            ", changed" if run("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
