"""The flags of all experiments that are paths: ~ is the user's home in each, and a folder of that name in none."""

import dataclasses
import importlib
import pkgutil
import typing
from pathlib import Path

import numpy as np
import pytest

import efflm
import experiments
from efflm.cli import flags
from efflm.config import InputError
from experiments import limits
from tests import gguf_files

# Of the flags that are text, those that are no path. One more is a path unless it is listed here.
WORDS = {
    "recipe", "chains", "orders", "optimizers", "multipliers", "profile_steps",  # names
    "phases", "precisions", "prompts", "batches", "contexts", "policies", "bits", "groups", "layers", "ahead",  # lists
    "prompt", "system", "stop", "peer", "scope", "pattern", "hardware", "coordinator", "wandb",
    "format", "kind", "push",  # of an export
    "loss", "flips", "bytes",  # of a budget
    "claims", "budget", "row",  # of claims
    "host",  # of a server
    "domains", "models",  # several that hold paths: see below
}  # fmt: skip


def groups():
    """(module, dataclass) of every group of flags."""
    for found in pkgutil.iter_modules(experiments.__path__):
        module = importlib.import_module(f"experiments.{found.name}")
        for kind in vars(module).values():
            fields = dataclasses.fields(kind) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else ()
            if any("help" in field.metadata for field in fields):
                yield module, kind


TEXT = sorted(
    {
        (module.__name__, kind.__name__, field.name, field.metadata.get("path", False), kind)
        for module, kind in groups()
        for field in dataclasses.fields(kind)
        if typing.get_type_hints(kind)[field.name] is str
    },
    key=lambda found: found[:3],
)


def test_every_flag_of_text_is_known_as_a_path_or_as_none():
    assert len(TEXT) > 60
    published = ("experiments.plan", "Run", "model")  # a name in a table of the plan's
    for *where, path, _ in TEXT:
        assert path == (where[2] not in WORDS and tuple(where) != published), where


@pytest.mark.parametrize("found", [each for each in TEXT if each[3]], ids=lambda found: "-".join(found[:3]))
def test_a_path_may_begin_at_home(found, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    _, _, name, _, kind = found
    got = lambda value: flags.parse(["x", f"--{name}={value}"], run=kind)["run"][name]
    assert got("~/a b/[c]") == f"{tmp_path}/a b/[c]"
    assert got("~") == str(tmp_path)
    for kept in ("a/~/b", "./~", "a~", "", "/x", "smollm2", "org/name"):
        assert got(kept) == kept
    with pytest.raises(InputError, match=f"--{name}=~nobody-of-this-name/x begins with ~.*write ./~nobody"):
        got("~nobody-of-this-name/x")


def test_domains_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = limits.Run(domains="wiki=~/a=b code=stdlib")
    assert run.pairs == {"wiki": f"{tmp_path}/a=b", "code": "stdlib"}
    with pytest.raises(InputError, match="home folder it names is not known"):
        limits.Run(domains="wiki=~nobody-of-this-name/a")


def test_the_functions_of_the_library_take_paths_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    gguf_files.write(tmp_path / "tiny.gguf", gguf_files.weights(np.random.default_rng(0), width=64, hidden=64))
    model, tokenizer = efflm.load("~/tiny.gguf")
    assert efflm.save("~/small", model, tokenizer) == tmp_path / "small" / "model.safetensors"
    assert efflm.load(Path("~/small"))[1].digest == tokenizer.digest
    assert not (tmp_path / "~").exists()
    (tmp_path / "text.txt").write_text("the thing in the tin\n" * 99)
    measured = efflm.measure(model, tokenizer, "~/text.txt", documents=2, tokens=24, speed=False)
    assert str(tmp_path / "text.txt") in str(measured)
    for call in (
        lambda path: efflm.save(path, model, tokenizer),
        efflm.load,
        lambda path: efflm.measure(model, tokenizer, path, speed=False),
        lambda path: efflm.compress(model, "gptq4", path, tokenizer),
    ):
        with pytest.raises(InputError, match="home folder it names is not known"):
            call("~nobody-of-this-name/x")
