"""The export experiment from its flags to its file, and what it sends to the hub."""

import huggingface_hub
import numpy as np
import pytest

import efflm
from efflm.cli.flags import launch
from efflm.config import InputError
from efflm.formats import efflm_file
from efflm.text import tokenizer
from experiments import export
from tests import tiny
from tests.formats.gguf_export_test import LLAMA


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A file of a compressed model of efflm's, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer.train(["the cat sat on the mat, the dog did not ünd 😀 "] * 20, 300).save(folder / "tokenizer.json")
    small = efflm.compress(tiny.model(LLAMA), "w8a16")
    efflm_file.save(folder / "a.safetensors", small, small.about)
    return folder / "a.safetensors"


def run(*argv):
    launch(export.main, export.__doc__, ["x", *argv], run=export.Run())


def test_a_file_is_written_and_said_to_be(model, tmp_path, capsys):
    run(f"--model={model}", f"--out={tmp_path / 'new' / 'a.gguf'}", "--nocheck")
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'new' / 'a.gguf'}\n"
    assert "every number of the file is that of the model" in err
    assert "llama.cpp" not in err
    again, _ = efflm.load(tmp_path / "new" / "a.gguf")
    wanted = np.asarray(efflm.ops.dequantize(efflm.load(model)[0].params["embedding"]))
    np.testing.assert_allclose(again.params["embedding"], wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "out is empty: give --out"),
        (
            ["--out=a.gguf", "--format=onnx"],
            "--format is 'onnx': choose efflm, coded, huggingface, compressed-tensors, gguf",
        ),
        (["--out=a.gguf", "--kind=Q2_K"], "kind is 'Q2_K', but must be one of F32"),
        (["--out=a.gguf", "--push=me"], "'me' names no model of the hub: give org/name"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(model, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(f"--model={model}", *flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_pushed_is_what_was_written(model, tmp_path, monkeypatch, capsys):
    sent = []

    class Hub:
        def create_repo(self, name, exist_ok):
            assert exist_ok
            return f"hub/{name}"

        def upload_file(self, repo_id, path_or_fileobj, path_in_repo):
            sent.append((repo_id, path_or_fileobj, path_in_repo))

        def upload_folder(self, repo_id, folder_path):
            sent.append((repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    run(f"--model={model}", f"--out={tmp_path / 'a.gguf'}", "--nocheck", "--push=org/name")
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "a.gguf"), "hub/org/name"]
    run(f"--model={model}", f"--out={tmp_path / 'own'}", "--format=efflm", "--push=org/name")
    card = tmp_path / "a.gguf.md"
    assert sent[:2] == [("org/name", tmp_path / "a.gguf", "a.gguf"), ("org/name", card, "README.md")]
    assert sent[2:] == [("org/name", tmp_path / "own")]
    for words in ("every number of the file is that of the model", "experiments.export", "| Quantize |"):
        assert words in card.read_text()


def test_a_hub_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"cannot be sent to org/name on the Hugging Face hub .*log in with"):
        export.hub.push(tmp_path, "org/name")
