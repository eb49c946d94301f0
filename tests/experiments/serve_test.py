"""The server as a process, and clients that behave and that do not."""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import efflm
from efflm.cli.flags import launch
from efflm.formats import efflm_file
from efflm.text import tokenizer
from experiments import serve
from tests import tiny
from tests.infer.speculative_test import varied

SHAPE = dataclasses.replace(tiny.LLAMA, max_length=512)
GROWTH = 64 << 20  # bytes by which the process may grow while it serves


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer.train(["the cat sat on the mat, the dog did not ünd 😀 "] * 20, 300).save(folder)
    efflm_file.save(folder / "model.safetensors", varied(SHAPE), {})
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port=70000"], "--port is 70000, but must be from 0 to 65535"),
        (["--waiting=0"], "--waiting is 0, but must be positive"),
        (["--host=203.0.113.1"], "cannot listen on --host=203.0.113.1 --port=8000"),
        ([], "the server needs uvicorn, which is not installed: run pip install uvicorn"),
    ],
)
def test_what_keeps_it_from_serving_is_one_line(folder, monkeypatch, capsys, flags, message):
    if not flags:
        monkeypatch.setitem(sys.modules, "uvicorn", None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            launch(serve.main, serve.__doc__, ["x", f"--model={folder}", *flags], run=serve.Run())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def resident(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10


@contextlib.contextmanager
def answered(port, **body):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        yield connection.getresponse()


def ask(port, **body):
    with answered(port, **body) as answer:
        return answer.status, json.loads(answer.read())


def hang_up(port):
    """Leave after the first bytes of a stream."""
    with answered(port, prompt="the cat", max_tokens=400, stream=True) as answer:
        assert answer.read(1) == b"d"


@pytest.mark.slow
def test_two_hundred_requests_and_bad_clients_lose_nothing_and_memory_is_bounded(folder):
    """16 at a time; some hang up in the middle, some send 10 MB, some ask for a million tokens."""
    command = [sys.executable, "-m", "experiments.serve", f"--model={folder}", "--port=0", "--max_tokens=400"]
    prompts = [f"the cat{' sat' * (i % 5)}" for i in range(200)]
    want = dict(zip(prompts, efflm.generate(*efflm.load(folder), prompts[:5], max_tokens=20)))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())[1])
            good = lambda prompt: ask(port, prompt=prompt, max_tokens=20, temperature=0)
            list(map(good, prompts[:5]))  # what has to be compiled
            hang_up(port)
            before = resident(process)
            with concurrent.futures.ThreadPoolExecutor(16) as clients:
                answers = [clients.submit(good, prompt) for prompt in prompts[:100]]
                left = [clients.submit(hang_up, port) for _ in range(2)]
                large = clients.submit(ask, port, prompt="x" * (10 << 20))
                many = clients.submit(ask, port, prompt="the cat", max_tokens=1_000_000)
                answers += [clients.submit(good, prompt) for prompt in prompts[100:]]
                answers, _ = [each.result() for each in answers], [each.result() for each in left]
            for prompt, (status, answer) in zip(prompts, answers, strict=True):
                assert (status, answer["choices"][0]["text"]) == (200, want[prompt])
            assert large.result()[0] == 413
            assert "but may have 1048576" in large.result()[1]["error"]["message"]
            assert many.result()[0] == 400
            assert "writes at most 400 tokens" in many.result()[1]["error"]["message"]
            assert resident(process) - before < GROWTH
            with answered(port, prompt="the cat", max_tokens=400, stream=True) as last:
                last.read(1)
                process.send_signal(signal.SIGTERM)  # which answers what has come
                assert last.read().endswith(b"data: [DONE]\n\n")
            assert process.wait(60) == 0
        finally:
            process.kill()
