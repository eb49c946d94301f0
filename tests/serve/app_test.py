"""The server's application without a server: what it answers, and what it refuses."""

import asyncio
import dataclasses
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import special

import efflm
from efflm.infer.generate import generate
from efflm.serve import app as module
from efflm.serve.app import BODY, application
from efflm.serve.requests import parse
from efflm.serve.writer import Part, Writer
from efflm.text import tokenizer
from tests import tiny
from tests.infer.speculative_test import half_right, varied

CHAT = "/v1/chat/completions"
SAID = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def writer():
    words = tokenizer.train(["the cat sat on the mat, the dog did not ünd 😀 "] * 20, 300)
    template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}\n{% endfor %}a"
    words = dataclasses.replace(words, template=template, where="tiny")
    return Writer("tiny", varied(tiny.LLAMA), words, None, 4, limit=40)


def run(work):
    """What it gives; a failure where it waits for ever."""
    return asyncio.run(asyncio.wait_for(work, 60))


async def send_to(app, path, body=None, method="POST", kind=b"application/json", leave=None, parts=1):
    """One request: status, headers and body of the answer. leave: an event at which the client hangs up."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = -(-len(body) // parts) or 1
    chunks = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    coming = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    coming[-1]["more_body"] = False
    got = []

    async def receive():
        if coming:
            return coming.pop(0)
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        got.append(message)

    await app({"type": "http", "path": path, "method": method, "headers": [(b"content-type", kind)]}, receive, send)
    if not got:
        return None
    assert [message.get("more_body", False) for message in got[1:]] == [True] * (len(got) - 2) + [False]
    headers = {name.decode(): value.decode() for name, value in got[0]["headers"]}
    return got[0]["status"], headers, b"".join(message["body"] for message in got[1:])


def ask(writer, path="/v1/completions", waiting=4, **body):
    status, headers, answer = run(send_to(application(writer, waiting), path, body))
    assert status == 200, answer
    if headers["content-type"] == "application/json":
        return json.loads(answer)
    *events, last, end = answer.decode().split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def plain(writer, prompt, **how):
    return efflm.generate(writer.model, writer.tokenizer, prompt, **how)


def test_a_completion_is_what_generate_writes_streamed_or_not(writer):
    texts, how = ["the cat", "ünd"], {"max_tokens": 12, "temperature": 0}
    whole = plain(writer, texts, **how)
    found = ask(writer, prompt=texts, model="tiny", **how)
    assert [choice["text"] for choice in found["choices"]] == whole
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    assert {choice["finish_reason"] for choice in found["choices"]} == {"length"}
    ids = [writer.tokenizer.encode(text) for text in texts]
    assert found["usage"] == {
        "prompt_tokens": sum(map(len, ids)),
        "completion_tokens": 24,
        "total_tokens": sum(map(len, ids)) + 24,
    }
    assert [choice["text"] for choice in ask(writer, prompt=ids, **how)["choices"]] == whole
    assert ask(writer, prompt=ids[0], **how)["choices"][0]["text"] == whole[0]
    *events, last = ask(writer, prompt=texts, stream=True, stream_options={"include_usage": True}, **how)
    assert (last["usage"], last["choices"]) == (found["usage"], [])
    for i, text in enumerate(whole):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == i]
        assert "".join(choice["text"] for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["length"]
    (cut,) = ask(writer, prompt="the cat", stop=["never", whole[0][4:6]], **how)["choices"]
    assert (cut["text"], cut["finish_reason"]) == (whole[0].split(whole[0][4:6])[0], "stop")
    drafted = dataclasses.replace(writer, draft=half_right(writer.model))
    assert ask(drafted, prompt="the cat", **how)["choices"][0]["text"] == whole[0]


def test_what_is_drawn_follows_seed_and_temperature(writer):
    how = {"max_tokens": 12, "temperature": 1.5, "top_p": 0.9, "top_k": 50}
    drawn = [ask(writer, prompt="the", seed=seed, **how)["choices"][0]["text"] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] == plain(writer, "the", seed=3, **how) != drawn[2]
    unseeded = {ask(writer, prompt="the", max_tokens=12)["choices"][0]["text"] for _ in range(3)}
    assert len(unseeded) > 1


def test_a_chat_goes_through_the_template(writer):
    text = plain(writer, "ucat\na", max_tokens=9)
    found = ask(writer, CHAT, messages=[{"role": "user", "content": "cat"}], max_completion_tokens=9, temperature=0)
    assert found["object"] == "chat.completion"
    assert found["choices"][0]["message"] == {"role": "assistant", "content": text}
    parts = [{"type": "text", "text": "c"}, {"type": "text", "text": "at"}]
    first, *events = ask(
        writer, CHAT, messages=[{"role": "user", "content": parts}], max_tokens=9, temperature=0, stream=True
    )
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert ask(writer, CHAT, messages=SAID, temperature=0)["usage"]["completion_tokens"] == 40  # its limit


@pytest.mark.parametrize("count", [0, 1])
def test_an_echo_has_the_log_probabilities_that_evaluations_add_up(writer, count):
    ids = writer.tokenizer.encode("the cat sat ünd")
    asked = {"max_tokens": count, "temperature": 0, "logprobs": 1, "echo": True}
    (choice,) = ask(writer, prompt=[ids], **asked)["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "the cat sat ünd" + (plain(writer, "the cat sat ünd", max_tokens=1) if count else "")
    log = special.log_softmax(np.float64(tiny.logits(writer.model, np.asarray([ids])))[0], axis=-1)
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert {len(each) for each in told.values()} == {len(ids) + count}
    for place, (token, value, top) in enumerate(zip(ids[1:], told["token_logprobs"][1:], told["top_logprobs"][1:])):
        assert value == pytest.approx(log[place, token], abs=1e-5)
        assert (max(top.values()) == value) == (log[place].argmax() == token)  # how lm-eval tells a greedy token
        assert max(top.values()) == pytest.approx(log[place].max(), abs=1e-5)
    (choice,) = ask(writer, prompt="the cat", max_tokens=3, temperature=0, logprobs=5)["choices"]
    assert [max(top.values()) for top in choice["logprobs"]["top_logprobs"]] == choice["logprobs"]["token_logprobs"]
    assert len(choice["logprobs"]["tokens"]) == 3


def test_a_stop_token_has_its_log_probability_too(writer):
    """lm-eval leaves out the last entry, as that of the one token it let be written, whatever that is."""
    ids = writer.tokenizer.encode("the cat sat ünd")
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    (free,) = ask(writer, prompt=[ids], **asked)["choices"]
    ((next_id,),) = generate(writer.model, [ids], 1)
    words = dataclasses.replace(writer.tokenizer, extra_stops=(next_id,))
    (ended,) = ask(dataclasses.replace(writer, tokenizer=words), prompt=[ids], **asked)["choices"]
    assert ended["logprobs"] == free["logprobs"]
    assert (ended["text"], ended["finish_reason"]) == ("the cat sat ünd", "stop")


BAD = {
    "the body is not JSON": [b"{", b"", b"\xff", b"[" * 100_000, b'{"prompt": "a", "temperature": NaN}'],
    "the body must be a JSON object": [b"[]", b"3"],
    "prompt must be": [
        {},
        {"prompt": 3},
        {"prompt": []},
        {"prompt": [True]},
        {"prompt": [[1], "a", 2]},
        {"prompt": [-1]},
    ],
    "prompt has 129 entries": [{"prompt": ["a"] * 129}],
    "token 300 is not in the model's vocabulary of 300": [{"prompt": [300]}],
    "max_tokens is 1000000, but this server writes at most 40": [{"prompt": "a", "max_tokens": 1_000_000}],
    "max_tokens is 21, but this server writes at most 40": [{"prompt": ["a", "b"], "max_tokens": 21}],
    "max_length is 64": [{"prompt": [5] * 60, "max_tokens": 5}],
    "max_tokens is 0, but must be at least 1": [{"prompt": "a", "max_tokens": 0}],
    "max_tokens is 'many', but must be a whole number": [{"prompt": "a", "max_tokens": "many"}],
    "temperature is": [{"prompt": "a", "temperature": value} for value in (-1, True, "0")]
    + [b'{"temperature": 1e999}'],
    "top_p is 0": [{"prompt": "a", "top_p": 0}],
    "seed is -1": [{"prompt": "a", "seed": -1}],
    "stop must be": [{"prompt": "a", "stop": value} for value in (3, [3], {"a": 1})],
    "stop has 17 entries": [{"prompt": "a", "stop": ["x"] * 17}],
    "n is 2, which is not supported": [{"prompt": "a", "n": 2}],
    "logit_bias is {'5': 100}": [{"prompt": "a", "logit_bias": {"5": 100}}],
    "colour is 'red', which is not": [{"prompt": "a", "colour": "red"}],
    "logprobs is 6": [{"prompt": "a", "logprobs": 6}],
    "logprobs cannot be streamed": [{"prompt": "a", "logprobs": 1, "stream": True}],
    "half of a surrogate pair": [{"prompt": "a\ud83d"}],
}
BAD_CHATS = {
    "messages must be": [{}, {"messages": []}, {"messages": "hi"}],
    "messages[0] must be an object": [{"messages": ["hi"]}],
    "messages[0].content must be text": [
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [1]}]},
    ],
    "messages[0].tool_calls is not supported": [{"messages": [{"role": "a", "content": "b", "tool_calls": [1]}]}],
    "logprobs is not supported in a chat": [{"messages": SAID, "logprobs": True}],
    "echo is True, which is not supported": [{"messages": SAID, "echo": True}],
}


@pytest.mark.parametrize(("path", "bad"), [("/v1/completions", BAD), (CHAT, BAD_CHATS)], ids=["completions", "chat"])
def test_bad_requests_are_refused_in_one_line_of_openais_form(writer, path, bad):
    app = application(writer, 4)
    for message, bodies in bad.items():
        for body in bodies:
            status, _, answer = run(send_to(app, path, body))
            error = json.loads(answer)["error"]
            assert message in error["message"], body
            assert "\n" not in error["message"]
            assert (status, error["type"], set(error)) == (
                400, "invalid_request_error", {"message", "type", "param", "code"}
            )  # fmt: skip


def test_fields_that_ask_for_nothing_are_taken():
    body = {
        "prompt": "a",
        "n": 1,
        "best_of": None,
        "user": "me",
        "logit_bias": {},
        "presence_penalty": 0.0,
        "top_p": None,
    }
    assert parse(json.dumps(body).encode(), chat=False).prompts == ("a",)


def test_other_paths_methods_kinds_and_sizes_are_told(writer):
    app = application(writer, 4)
    get = lambda path, method="GET": run(send_to(app, path, b"", method))
    assert json.loads(get("/health")[2]) == {"status": "ok"}
    assert json.loads(get("/v1/models")[2])["data"][0]["id"] == "tiny"
    assert get("/v1/nothing")[0] == 404
    status, headers, _ = get("/v1/completions")
    assert (status, headers["allow"]) == (405, "POST")
    of = lambda body, **how: run(send_to(app, "/v1/completions", body, **how))
    assert of({"prompt": "a"}, kind=b"text/plain")[0] == 415
    assert of({"prompt": "a", "model": "other"})[0] == 404
    status, _, answer = of(b"x" * (10 << 20), parts=100)
    assert status == 413
    assert f"has {10 << 20} bytes, but may have {BODY}" in json.loads(answer)["error"]["message"]


class Slow:
    """A writer whose every part waits to be let through."""

    name, limit = "slow", 99

    def __init__(self):
        self.gate, self.log = threading.Semaphore(0), []

    def write(self, request):
        name = request.prompts[0]

        def parts():
            try:
                for i in range(3):
                    self.gate.acquire()
                    self.log.append(f"{name}{i}")
                    yield Part(0, "x", end="stop" if i == 2 else None)
            finally:
                self.log.append(f"{name} closed")

        return parts()


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def test_requests_have_their_turns_in_order_and_too_many_are_told_to_come_back():
    async def all_at_once():
        slow = Slow()
        app = application(slow, waiting=2)
        ask = lambda name, **how: asyncio.create_task(send_to(app, "/v1/completions", {"prompt": name}, **how))
        leave = asyncio.Event()
        first, second, third = ask("a"), ask("b", leave=leave), ask("c")
        await asyncio.sleep(0.05)
        status, headers, answer = await ask("d")
        assert (status, headers["retry-after"]) == (429, "5")
        assert json.loads(answer)["error"]["type"] == "rate_limit_error"
        leave.set()  # the one that hangs up while it waits makes room
        assert await second is None
        fourth = ask("e")
        slow.gate.release(9)
        assert [(await each)[0] for each in (first, third, fourth)] == [200] * 3
        assert slow.log == [line for name in "ace" for line in (f"{name}0", f"{name}1", f"{name}2", f"{name} closed")]

    run(all_at_once())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_stops_its_text_at_the_next_token(stream):
    async def left():
        slow, leave = Slow(), asyncio.Event()
        app = application(slow, waiting=2)
        body = {"prompt": "a", "stream": stream}
        leaving = asyncio.create_task(send_to(app, "/v1/completions", body, leave=leave))
        slow.gate.release()
        await until(lambda: slow.log)
        await asyncio.sleep(0.05)  # it is at the second part now
        leave.set()
        other = asyncio.create_task(send_to(app, "/v1/completions", {"prompt": "b"}))
        await asyncio.sleep(0.05)
        slow.gate.release(4)
        assert (await other)[0] == 200
        assert slow.log == ["a0", "a1", "a closed", "b0", "b1", "b2", "b closed"]
        with pytest.raises(AssertionError):  # the stream was left unfinished, or nothing was sent
            assert await leaving is not None

    run(left())


@pytest.mark.parametrize("stream", [False, True])
def test_our_own_mistakes_are_told_without_the_text_and_the_next_request_is_served(stream, capsys):
    def write(request):
        if request.prompts == ("good",):
            return (Part(0, "x", end="stop") for _ in range(1))

        def parts():
            yield Part(0, "x")
            raise RuntimeError(f"cannot write {request.prompts}")

        return parts()

    app = application(SimpleNamespace(name="broken", limit=9, write=write), 2)

    async def both():
        first = await send_to(app, "/v1/completions", {"prompt": "secret", "stream": stream})
        return first, await send_to(app, "/v1/completions", {"prompt": "good"})

    (status, _, answer), (other, *_) = run(both())
    assert (status, other) == (200 if stream else 500, 200)
    assert '"server_error"' in answer.decode().split("\n\n")[-2 if stream else 0]
    err = capsys.readouterr().err
    assert "RuntimeError" in err
    assert "secret" not in err + answer.decode()


def test_a_client_that_sends_nothing_is_told(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.01)

    async def silent():
        got = []

        async def send(message):
            got.append(message)

        scope = {"type": "http", "path": CHAT, "method": "POST", "headers": [(b"content-type", b"application/json")]}
        await application(Slow(), 1)(scope, asyncio.Event().wait, send)
        return got[0]["status"]

    assert run(silent()) == 408
