"""Models of efflm's own format and the tokenizer beside them: all is written or nothing, and they belong together."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

import efflm
from efflm.compress.step import digest
from efflm.config import InputError
from efflm.formats import efflm_file, huggingface, saved
from efflm.formats.saved import Saved
from efflm.text import tokenizer
from tests import tiny

ONE = tokenizer.train(["the cat sat on the mat\n" * 50], 290)
OTHER = tokenizer.train(["def f(x):\n    return x\n" * 50], 290)


def tokens_of(name: str) -> tokenizer.Tokenizer:
    """The tokenizer with a template of its own and stops, which are files beside it."""
    core = {"one": ONE, "other": OTHER}[name].core
    return tokenizer.Tokenizer(
        core, {"eos_token": "<|endoftext|>"}, extra_stops=(5,), template=f"{name} {{{{ messages }}}}"
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def full_disk(monkeypatch, owner, name, passes):
    """Lets so many calls pass; the next one finds no space left, after half of a file if it writes one."""
    real, calls = getattr(owner, name), []

    def call(*given, **named):
        calls.append(given)
        if len(calls) == passes + 1:
            if name != "replace":
                with given[0].open("wb") as file:
                    file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given, **named)

    monkeypatch.setattr(owner, name, call)


PLACES = [(Path, "write_text", count) for count in range(3)] + [(efflm_file, "save", 0), (efflm_file, "save", 1)]
PLACES += [(Path, "replace", count) for count in range(2, 7)]  # the first two are the weights', within efflm_file.save


@pytest.mark.parametrize(("owner", "name", "passes"), PLACES)
@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_leaves_what_was_there_and_nothing_new(tmp_path, monkeypatch, owner, name, passes, before):
    folder, config = tmp_path / "a" / "models", tiny.LLAMA
    if before:
        files = dict.fromkeys(("a.safetensors", "b.safetensors"), Saved(tiny.model(config), {}))
        saved.save(folder, files, tokens_of("one"))
        (folder / "notes.txt").write_text("mine")
    old, names = content(tmp_path), ("a.safetensors", "b.safetensors")
    files = dict.fromkeys(names, Saved(tiny.model(config, seed=1), {}))
    with monkeypatch.context() as patched:
        full_disk(patched, owner, name, passes)
        with pytest.raises(OSError, match="No space left"):
            saved.save(folder, files, tokens_of("other"))
    assert content(tmp_path) == old
    assert list(tmp_path.iterdir()) == ([tmp_path / "a"] if before else [])
    sizes = saved.save(folder, files, tokens_of("other"))
    assert sizes == {name: (folder / name).stat().st_size for name in names}
    model, read = efflm.load(folder / "a.safetensors")
    assert digest(model) == digest(tiny.model(config, seed=1))
    assert read.same(tokens_of("other"))
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_a_full_disk_is_told_by_save_in_one_line_and_the_old_model_can_be_read(tmp_path, monkeypatch):
    efflm.save(tmp_path / "m", tiny.model(), ONE)
    with monkeypatch.context() as patched:
        full_disk(patched, efflm_file, "save", 0)
        with pytest.raises(InputError, match=r"cannot write .*No space left on device\): give another path"):
            efflm.save(tmp_path / "m", tiny.model(seed=1), OTHER)
    model, read = efflm.load(tmp_path / "m")
    assert (digest(model), read.digest) == (digest(tiny.model()), ONE.digest)


@pytest.mark.parametrize(
    ("name", "passes"), [("write_bytes", 0), ("write_bytes", 1), ("write_text", 0), ("write_text", 2)]
)
def test_a_full_disk_leaves_no_part_of_an_export(tmp_path, monkeypatch, name, passes):
    with monkeypatch.context() as patched:
        full_disk(patched, Path, name, passes)
        with pytest.raises(OSError, match="No space left"):
            huggingface.save(tmp_path / "m", tiny.model(), tokens_of("one"))
    assert not list(tmp_path.iterdir())


def test_a_second_model_leaves_nothing_of_the_first(tmp_path):
    """Its chat template, its stops and its map of special tokens are those of another tokenizer."""
    efflm.save(tmp_path, tiny.model(), tokens_of("one"))
    (tmp_path / "chat_template.jinja").write_text("old")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "the"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<old>": 299}))
    (tmp_path / "notes.txt").write_text("mine")
    efflm.save(tmp_path, tiny.model(), OTHER)
    _, read = efflm.load(tmp_path)
    assert read.same(OTHER)
    assert sorted(content(tmp_path)) == ["model.safetensors", "notes.txt", "tokenizer.json", "tokenizer_config.json"]


def test_a_tokenizer_under_another_name_leaves_alone_what_lies_beside(tmp_path):
    (tmp_path / "generation_config.json").write_text("{}")
    ONE.save(tmp_path / "t.json")
    assert sorted(content(tmp_path)) == ["generation_config.json", "t.json", "t_config.json"]


def test_models_that_need_another_tokenizer_are_not_given_this_one(tmp_path):
    efflm.save(tmp_path / "a.safetensors", tiny.model(), ONE)
    same_tokens = tokenizer.Tokenizer(ONE.core, ONE.names, template="another")
    for tokens in (OTHER, same_tokens):
        with pytest.raises(
            InputError, match=r"holds a\.safetensors, whose tokenizer is another one: give another path"
        ):
            efflm.save(tmp_path / "b.safetensors", tiny.model(), tokens)
    run = tmp_path / "run"
    (run / "checkpoint").mkdir(parents=True)
    ONE.save(run)
    with pytest.raises(InputError, match="holds checkpoint, whose tokenizer is another one"):
        efflm.save(run / "b.safetensors", tiny.model(), OTHER)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds another model \(config\.json\)"):
        efflm.save(theirs / "b.safetensors", tiny.model(), ONE)


def test_a_model_with_the_tokenizer_of_another_is_refused(tmp_path):
    efflm.save(tmp_path / "a", tiny.model(), ONE)
    efflm.save(tmp_path / "b", tiny.model(), OTHER)
    shutil.copy(tmp_path / "b" / "tokenizer.json", tmp_path / "a")
    with pytest.raises(
        InputError, match=rf"was saved with another tokenizer than .*tokenizer\.json.*{ONE.digest}, not"
    ):
        efflm.load(tmp_path / "a")
    ONE.save(tmp_path / "a")
    efflm.load(tmp_path / "a")
