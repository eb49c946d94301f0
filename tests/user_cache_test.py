"""The user's cache: private when it is made, refused where others could have put something into it."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from efflm import user_cache
from efflm.config import InputError
from efflm.data import corpora, dataset
from efflm.formats import wheels
from efflm.model import autotune
from efflm.ops.kernels.cpu import build

ROOT = Path(__file__).parent.parent


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0])
def test_it_is_made_for_the_user_alone(base, umask):
    before = os.umask(umask)
    try:
        assert user_cache.folder("kernels") == base / "efflm" / "kernels"
        assert user_cache.folder() == base / "efflm"
    finally:
        os.umask(before)
    assert [mode(path) for path in (base / "efflm", base / "efflm" / "kernels")] == [0o700] * 2
    assert mode(base) & 0o002 == 0
    assert user_cache.folder("kernels") == base / "efflm" / "kernels"  # which is there now


@pytest.mark.parametrize("given", ["", "relative/cache", "~/cache"])
def test_without_an_absolute_xdg_cache_home_it_is_below_the_home(tmp_path, monkeypatch, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.chdir(tmp_path)
    assert user_cache.folder("x") == tmp_path / ".cache" / "efflm" / "x"
    assert [path.name for path in tmp_path.iterdir()] == [".cache"]


def refused(match):
    """What each user of the cache does where it is refused."""
    with pytest.raises(InputError, match=match) as error:
        user_cache.folder("kernels")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=match):
        dataset_cache()
    with pytest.raises(InputError, match=match):
        wheels.fetch(wheels.WHEELS["smollm2"])


dataset_cache = dataset.cache  # as it is outside of the tests


@pytest.mark.parametrize("inner", ["efflm", "efflm/kernels"])
@pytest.mark.parametrize("bits", [0o777, 0o775, 0o757, 0o1777])
def test_one_that_others_can_write_is_refused(base, inner, bits):
    user_cache.folder("kernels")
    (base / inner).chmod(bits)
    with pytest.raises(InputError, match=rf"{inner} can be written by others \(mode {bits:04o}\).*chmod -R go-w"):
        user_cache.folder("kernels")
    (base / inner).chmod(0o755)
    user_cache.folder("kernels")


def test_a_folder_in_which_everybody_can_replace_it_is_refused(base):
    user_cache.folder("kernels")
    base.chmod(0o777)
    refused("cache can be written by everybody .*chmod o-w .*XDG_CACHE_HOME")
    base.chmod(0o1777)  # as /tmp is: others cannot replace what is ours
    user_cache.folder("kernels")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("kind", ["folder", "inner folder", "link", "what a link leads to"])
def test_one_of_another_user_is_refused(base, kind):
    user_cache.folder("kernels")
    target = base / "efflm" / ("kernels" if kind == "inner folder" else "")
    if "link" in kind:
        (base / "efflm").rename(base / "moved")
        target = base / "efflm"
        target.symlink_to(base / "moved")
        assert user_cache.folder("kernels") == base / "efflm" / "kernels"  # the user's own link
    os.chown(target, 12345, -1, follow_symlinks=kind != "link")
    if kind == "inner folder":
        with pytest.raises(InputError, match="kernels belongs to user 12345 and not to 0"):
            user_cache.folder("kernels")
    else:
        refused("efflm belongs to user 12345 and not to 0.*set XDG_CACHE_HOME")


def test_one_that_cannot_be_made_is_refused(base, monkeypatch):
    base.write_text("")
    refused("cache cannot be made.*set XDG_CACHE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    refused("the home folder is not known: set XDG_CACHE_HOME")


def test_measurements_are_neither_read_nor_kept_where_others_can_write(base):
    autotune._keep("key", {"layers": {}})
    assert autotune._kept() == {"key": {"layers": {}}}
    (base / "efflm").chmod(0o777)
    assert autotune._kept() == {}
    autotune._keep("other", {"layers": {}})
    assert "other" not in (base / "efflm" / "autotune.json").read_text()


def test_compiled_programs_are_kept_in_it(base):
    """In a process without JAX_COMPILATION_CACHE_DIR, which names another folder here."""
    program = "import jax\nfrom efflm import user_cache\nuser_cache.use_compilation_cache()\n"
    program += "print(jax.config.jax_compilation_cache_dir)"
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    several, env = env, env | {"XLA_FLAGS": ""}
    run = lambda env=env: subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run().stdout == f"{base}/efflm/compiled\n"
    assert run(several).stdout == "None\n"  # eight devices of a CPU wait for ever in what is read back
    assert mode(base / "efflm" / "compiled") == 0o700
    (base / "efflm" / "compiled").chmod(0o777)
    ended = run()
    assert (ended.returncode, ended.stdout, "chmod -R go-w" in ended.stderr) == (0, "None\n", True)
    user_cache.use_compilation_cache()  # and where it does name one, that counts
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] != f"{base}/efflm/compiled"


def test_kernels_are_not_loaded_from_where_others_can_write(base, capsys):
    folder = user_cache.folder("kernels")
    with build._folder("x.so") as found:
        assert found == folder
    folder.chmod(0o770)
    with build._folder("x.so") as found:
        assert found != folder
        assert mode(found) == 0o700
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("CPU kernels: built for this process alone: ")
    assert "chmod -R go-w" in line
    library = folder / "x.so"
    library.write_bytes(b"code" + build.hashlib.sha256(b"code").digest())
    for bits, whole in ((0o755, True), (0o700, True), (0o775, False), (0o757, False)):
        library.chmod(bits)
        assert build._is_whole(library) == whole


def test_one_prepares_a_text_while_the_others_wait(tmp_path, monkeypatch):
    """As the processes of a host do that shares no disk with process 0."""
    (tmp_path / "text").mkdir()
    for i in range(70):
        (tmp_path / "text" / f"{i}.txt").write_text(f"the river {i} runs\n" * 9)
    at_once, most, made, real = [], [], [], corpora._through_tfds

    def slowly(splits, folder):
        at_once.append(1)
        most.append(len(at_once))
        made.append(not folder.exists())
        found = real(splits, folder)
        at_once.pop()
        return found

    monkeypatch.setattr(corpora, "_through_tfds", slowly)
    found = []
    load = lambda: found.append(corpora.load(str(tmp_path / "text"), tmp_path / "cache"))
    threads = [threading.Thread(target=load) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert (most, sorted(made)) == ([1, 1, 1], [False, False, True])
    assert found[0] == found[1] == found[2]


def test_text_is_prepared_in_a_cache_of_any_name(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(70):
        (tmp_path / "text" / f"{i}.txt").write_text(f"the river {i} runs\n" * 9)
    whole = corpora.load(str(tmp_path / "text"), tmp_path / "plain")
    for name in ("[br]", "a*b", "back\\slash", "ü 文"):
        assert corpora.load(str(tmp_path / "text"), tmp_path / name) == whole
        assert corpora.load(str(tmp_path / "text"), tmp_path / name) == whole
