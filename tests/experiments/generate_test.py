"""The generate experiment from its flags to its streams, on a model small enough for a test."""

import io
import json
import os
import re
import signal
import sys

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflm.cli import run_directory
from efflm.cli.flags import launch
from efflm.evaluate import compiling
from efflm.formats import efflm_file
from efflm.infer import streaming
from efflm.infer.generate import generate as write
from efflm.model import LanguageModel
from efflm.text import tokenizer
from experiments import generate
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model file of efflm's, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    words = tokenizer.train(["the cat sat on the mat, the dog did not ünd 😀 "] * 20, 300)
    words.save(folder / "tokenizer.json")
    efflm_file.save(folder / "model.safetensors", tiny.model(), {})
    return folder


@pytest.fixture
def loaded(folder):
    model, _ = efflm_file.load(folder / "model.safetensors")
    return LanguageModel(model.config, model.params), tokenizer.load(folder / "tokenizer.json")


def stdin(content):
    """What is piped in, in a locale that is not UTF-8."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="latin-1")


def run(folder, monkeypatch, tmp_path, *argv):
    monkeypatch.setattr(run_directory, "ROOT", tmp_path)
    launch(generate.main, generate.__doc__, ["x", f"--model={folder / 'model.safetensors'}", *argv],
           run=generate.Run())  # fmt: skip


def test_the_text_is_on_stdout_and_the_times_on_stderr(folder, loaded, monkeypatch, tmp_path, capsys):
    model, words = loaded
    run(folder, monkeypatch, tmp_path, "--prompt=the cat", "--max_tokens=20")
    out, err = capsys.readouterr()
    (ids,) = write(model, [words.encode("the cat")], 20, stops=words.stops)
    decode = words.stream()
    assert out == "the cat" + decode(ids) + decode([], final=True) + "\n"
    assert "first token after" in err
    assert "19 more at" in err
    assert "compiling took" in err
    monkeypatch.setattr(sys, "stdin", stdin(b"the cat"))
    run(folder, monkeypatch, tmp_path, "--prompt=-", "--max_tokens=20")
    assert capsys.readouterr().out == out
    monkeypatch.setattr(sys, "stdin", stdin(b"the\r\ncat\r"))
    run(folder, monkeypatch, tmp_path, "--prompt=-", "--max_tokens=1")
    assert capsys.readouterr().out.startswith("the\r\ncat\r")  # line ends are part of a text
    part = out[10:14]
    run(folder, monkeypatch, tmp_path, "--prompt=the cat", "--max_tokens=20", f"--stop={part}")
    assert capsys.readouterr().out == "the cat" + out[7 : out.index(part, 7)] + "\n"


def test_a_draft_changes_no_text_and_its_share_is_told(folder, monkeypatch, tmp_path, capsys):
    flags = ["--prompt=the cat", "--max_tokens=20"]
    run(folder, monkeypatch, tmp_path, *flags)
    alone = capsys.readouterr().out
    run(folder, monkeypatch, tmp_path, *flags, f"--draft={folder / 'model.safetensors'}", "--ahead=3")
    out, err = capsys.readouterr()
    assert out == alone
    assert "proposed 15 tokens, of which 15 stayed (100%); 5 passes of" in err
    other = tmp_path / "other"
    other.mkdir()
    tokenizer.train(["quite other words, of another text "] * 20, 300).save(other / "tokenizer.json")
    efflm_file.save(other / "model.safetensors", tiny.model(), {})
    with pytest.raises(SystemExit):
        run(folder, monkeypatch, tmp_path, *flags, f"--draft={other / 'model.safetensors'}")
    assert "the draft's tokenizer is" in capsys.readouterr().err


def test_a_seed_draws_the_same_again(folder, monkeypatch, tmp_path, capsys):
    def drawn(seed):
        run(folder, monkeypatch, tmp_path, "--prompt=the", "--max_tokens=12", "--temperature=1.2", "--top_k=50",
            f"--seed={seed}")  # fmt: skip
        return capsys.readouterr().out

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_reader_that_leaves_is_no_error(folder, monkeypatch, tmp_path, capfd):
    read, wrote = os.pipe()
    os.close(read)
    with os.fdopen(wrote, "w") as broken, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", broken)
        run(folder, patched, tmp_path, "--prompt=the", "--max_tokens=4")
    assert "first token after" in capfd.readouterr().err


def test_chat_goes_through_the_template(folder, loaded, monkeypatch, tmp_path, capsys):
    _, words = loaded
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    config = folder / "tokenizer_config.json"
    kept = config.read_text()
    config.write_text(json.dumps(json.loads(kept) | {"chat_template": template}))
    try:
        seen = []
        monkeypatch.setattr(streaming, "pieces", lambda model, tokens, ids, *rest, **how: seen.append(ids) or iter([]))
        run(folder, monkeypatch, tmp_path, "--chat", "--system=the", "--prompt=cat")
        assert words.decode(seen[0]) == "[system] the\n[user] cat\n[assistant]"
        assert "cat" not in capsys.readouterr().out
    finally:
        config.write_text(kept)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chat", "--prompt=hi"], "no chat template"),
        (["--prompt=hi", "--system=you"], "system is for --chat"),
        (["--chat"], "the prompt is empty"),
        (["--prompt=hi", "--max_tokens=0"], "max_tokens is 0"),
        (["--prompt=hi", "--top_p=0"], "top_p is 0"),
        (["--prompt=hi", "--max_tokens=64"], "max_length is 64"),
        (["--prompt=hi", "--model=/nowhere.gguf"], "no model at /nowhere.gguf"),
        (["--prompt=a\udcff"], "--prompt is not UTF-8 (byte 0xff at character 1)"),
        (["--prompt=hi", "--top_k=2147483648"], "--top_k is 2147483648, but must be from 1 to 2147483647"),
        (["--prompt=hi", "--seed=18446744073709551616"], "--seed is 18446744073709551616, but must lie within 64 bits"),
        (["--prompt=hi", "--ahead=0"], "--ahead is 0, but must be positive"),
        (["--prompt=hi", "--seed=-1"], "--seed is -1, but must be from 0 to 4294967295"),
    ],
)
def test_bad_input_is_one_line(folder, monkeypatch, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(folder, monkeypatch, tmp_path, *flags)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]


def test_stdin_that_is_no_text_is_one_line(folder, monkeypatch, tmp_path, capsys):
    for piped, message in ((stdin(b"hello \xff"), "byte 0xff at offset 6"), (None, "is closed")):
        monkeypatch.setattr(sys, "stdin", piped)
        with pytest.raises(SystemExit) as stopped:
            run(folder, monkeypatch, tmp_path, "--prompt=-")
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --prompt=- reads stdin, which ")
        assert message in line


def test_ctrl_c_leaves_the_text_and_one_line(folder, monkeypatch, tmp_path, capfd):
    def pieces(*_, **how):
        yield streaming.Piece("a", [66])
        os.kill(os.getpid(), signal.SIGINT)
        yield streaming.Piece("b", [66])

    monkeypatch.setattr(streaming, "pieces", pieces)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            run(folder, monkeypatch, tmp_path, "--prompt=the")
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    out, err = capfd.readouterr()
    assert out.startswith("the")
    assert err.splitlines()[1:] == ["stopped by Ctrl-C: what was written until now stays"]


def test_times_leave_compiling_out(compiled):
    compiled((9.0, 10.25), (10.5, 12.75), (14.5, 16.5))
    words = generate.timing([10.0, 13.0, 14.0, 17.0], [0, 1, 9, 17], 5, compiling.clock())
    assert words == (
        "first token after 0.50 s (5 in the prompt); 16 more at 8.0 tokens/s; compiling took 4.5 s beside that"
    )
    assert generate.timing([10.0], [0], 5, compiling.clock()) == "nothing was written"


@pytest.fixture
def compiled(monkeypatch):
    """Tells the clock that programs were compiled, from and until these times."""
    spans = []

    def register(listen):
        for start, end in spans:
            monkeypatch.setattr(compiling.time, "perf_counter", lambda end=end: end)
            listen("/jax/core/compile/backend", end - start)
            listen("/jax/elsewhere", 100.0)

    monkeypatch.setattr(compiling.jax.monitoring, "register_event_duration_secs_listener", register)
    return lambda *new: spans.extend(new)


def test_nested_compiling_counts_once(compiled):
    compiled((4.0, 5.0), (3.0, 6.0), (7.0, 9.0))  # (4, 5) lies in (3, 6), and (7, 9) is apart
    clock = compiling.clock()
    assert clock(0.0, 10.0) == (5.0, 5.0)
    assert clock(3.5, 8.0) == (3.5, 1.0)


@given(st.lists(st.tuples(st.floats(-5, 20), st.floats(0, 10)), max_size=6), st.floats(0, 10), st.floats(0, 5))
def test_no_time_is_negative_whatever_was_compiled_and_when(spans, start, seconds):
    """Before the generation began too, as when its prompt was encoded."""
    with pytest.MonkeyPatch.context() as patch:
        compiled = [(begin, begin + length) for begin, length in sorted(spans, key=sum)]

        def register(listen):
            for begin, end in compiled:
                patch.setattr(compiling.time, "perf_counter", lambda end=end: end)
                listen("/jax/core/compile/backend", end - begin)

        patch.setattr(compiling.jax.monitoring, "register_event_duration_secs_listener", register)
        clock = compiling.clock()
        assert min(clock(start, start + seconds)) >= 0
        assert sum(clock(start, start + seconds)) == pytest.approx(seconds)
        assert "-" not in generate.timing([start, start + seconds, start + seconds], [0, 1, 9], 3, clock)


def test_what_was_compiled_before_the_generation_is_not_its(folder, monkeypatch, tmp_path, capsys):
    """The key of the seed, among others, is made while the input is checked."""
    before = streaming.pieces

    def pieces(*arguments, **how):
        jax.block_until_ready(jax.jit(lambda x: jnp.sort(jnp.sin(x) @ x))(jnp.ones((7, 7))))
        return before(*arguments, **how)

    monkeypatch.setattr(streaming, "pieces", pieces)
    run(folder, monkeypatch, tmp_path, "--prompt=the", "--max_tokens=2")
    assert re.search(r"first token after \d+\.\d+ s", capsys.readouterr().err)
