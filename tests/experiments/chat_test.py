"""The chat from its lines to its answers, on a model small enough for a test."""

import dataclasses
import io
import os
import pty
import signal
import subprocess
import sys

import pytest

import efflm
from efflm.cli.flags import launch
from efflm.formats import efflm_file
from efflm.infer import streaming
from efflm.text import tokenizer
from experiments import chat
from tests import tiny
from tests.infer.speculative_test import varied

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}\n{% endfor %}a"


class Stdin(io.TextIOWrapper):
    """What is piped in, in a locale that is not UTF-8."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = tokenizer.train(["the cat sat on the mat, the dog did not ünd 😀 "] * 20, 300)
    dataclasses.replace(words, template=TEMPLATE).save(folder)
    efflm_file.save(folder / "model.safetensors", varied(tiny.LLAMA), {})
    return folder


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    def run(said, *argv):
        monkeypatch.setattr(sys, "stdin", Stdin(io.BytesIO(said.encode()), encoding="latin-1"))
        launch(chat.main, chat.__doc__, ["x", f"--model={folder}", "--max_tokens=8", *argv], run=chat.Run())
        return capsys.readouterr()

    return run


def said(folder, *turns, **how):
    """The answer to turns, which are the user's and the model's in turn."""
    model, words = efflm.load(folder)
    messages = [{"role": "ua"[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return efflm.generate(model, dataclasses.replace(words, template=None), words.chat(messages), max_tokens=8, **how)


def test_an_answer_follows_from_all_turns_until_they_are_forgotten(folder, talk):
    first = said(folder, "the cat")
    second = said(folder, "the cat", first, "ünd")
    assert said(folder, "ünd") != second
    out, err = talk("the cat\n\nünd\r\n/reset\nünd\n/quit\nthe dog\n")
    assert out == f"{first}\n{second}\n{said(folder, 'ünd')}\n"
    assert err == "all turns are forgotten\n"
    assert talk("the cat\n", "--system=ünd").out != f"{first}\n"


def test_the_oldest_turns_are_left_out_and_a_turn_that_never_fits_is_told(folder, talk):
    long = "the cat sat on the mat, " * 3
    out, err = talk(f"{long}\n{long}\n{long * 9}\nthe\n", "--seed=1")
    assert "left out the oldest turns, 1: the model's max_length is 64" in err
    assert "error: this turn takes " in err
    assert "but there is room for 56: shorten it" in err
    assert out.startswith(2 * f"{said(folder, long)}\n")


def test_ctrl_c_stops_an_answer_and_not_the_chat(folder, talk, monkeypatch, capsys):
    seen = []

    def pieces(model, words, ids, *_, **how):
        seen.append(words.decode(ids))
        yield streaming.Piece("the ", [1])
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        yield streaming.Piece("mat", [2], "stop")

    monkeypatch.setattr(streaming, "pieces", pieces)
    monkeypatch.setattr(Stdin, "isatty", lambda _: True)
    typed = iter(["cat", "dog", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert talk("").out == "the \nthe mat\n"
    assert seen == ["ucat\na", "ucat\nathe \nudog\na"]


def test_in_a_terminal_ctrl_c_between_answers_and_prompts_ends_nothing(folder, talk, monkeypatch):
    typed, came = iter(["the cat", "/reset", "the dog", "/quit"]), []

    def called(frame, *_):
        between = frame.f_code.co_name in ("main", "lines", "answer") and frame.f_code.co_filename == chat.__file__
        return line if between else None

    def line(_, event, __):
        if prompted and event == "line":
            came.append(signal.raise_signal(signal.SIGINT))
        return line

    def prompt(_):
        prompted.append(True)
        return next(typed)

    prompted = []
    monkeypatch.setattr(Stdin, "isatty", lambda _: True)
    monkeypatch.setattr("builtins.input", prompt)
    before = sys.gettrace()
    sys.settrace(called)
    try:
        out = talk("").out
    finally:
        sys.settrace(before)
    assert out == f"{said(folder, 'the cat')}\n{said(folder, 'the dog')}\n"
    assert len(came) > 20


@pytest.mark.slow
def test_in_a_terminal_every_ctrl_c_stops_one_answer(folder):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "experiments.chat", f"--model={folder}", "--max_tokens=50", "--temperature=2"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        shown = b""

        def until(words):
            nonlocal shown
            while words not in shown:
                shown += os.read(ours, 4096)
            shown = shown.partition(words)[2]

        until(b"> ")
        for _ in range(3):
            os.write(ours, b"the cat\n")
            until(b"the cat")
            os.kill(process.pid, signal.SIGINT)
            until(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0


def test_a_model_without_a_template_is_refused_with_the_remedy(folder, tmp_path, talk, capsys):
    words = tokenizer.load(folder)
    dataclasses.replace(words, template=None).save(tmp_path)
    efflm_file.save(tmp_path / "model.safetensors", tiny.model(), {})
    for argv, message in {
        f"--model={tmp_path}": "brings no chat template: continue a text with it, by experiments.generate",
        "--max_tokens=64": "max_tokens is 64, but the model's max_length is 64",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            talk("the cat\n", argv)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
