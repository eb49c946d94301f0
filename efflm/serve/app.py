"""OpenAI's API as an ASGI application, for any server of such applications.

One thread writes for one request after the other, first come first served: one keeps a processor busy, several at a
time would each be slower and hold a KV cache of its own. Requests that wait are bounded in number, bodies in bytes and
texts in tokens, and so is memory. Bodies must be declared as JSON, which browsers do not let pages of other sites send.
No text of a request is logged.
"""

import asyncio
import contextlib
import functools
import json
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from efflm.config import InputError
from efflm.serve import requests
from efflm.serve.writer import Answer, Part, Writer

BODY = 1 << 20  # bytes
SECONDS = 30  # for a client to send its request, and to take each message
METHODS = {"/health": "GET", "/v1/models": "GET", "/v1/completions": "POST", "/v1/chat/completions": "POST"}
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Refused(Exception):
    """An error as the client is told it."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = {429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Left(Exception):
    """The client has hung up."""


class Turns:
    """Iterators that are run by one thread, one after the other; at most `most` of them wait, run or are being sent."""

    def __init__(self, most: int):
        self.most, self.inside, self.turn = most, 0, asyncio.Lock()
        self.thread = ThreadPoolExecutor(1, "writer")

    async def run(self, make: Callable[[], Iterator[Part]], receive: Receive) -> AsyncIterator[Part]:
        """What the iterator gives. It is closed, after the item that it is at, when this one is or the client leaves,
        which is Left."""
        if self.inside >= self.most:
            raise Refused(
                429, f"{self.inside} requests are waiting: try again", "rate_limit_exceeded", **{"retry-after": "5"}
            )
        self.inside += 1
        out: asyncio.Queue[Part | Exception | None] = asyncio.Queue()
        tasks = [asyncio.create_task(each) for each in (self._run(make, out), _watch(receive, out))]
        try:
            while (item := await out.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.inside -= 1
            for task in tasks:
                task.cancel()

    async def _run(self, make: Callable[[], Iterator[Part]], out: asyncio.Queue) -> None:
        """The next one has its turn when this one is written, however slowly its client takes it."""
        threaded = functools.partial(asyncio.get_running_loop().run_in_executor, self.thread)
        try:
            async with self.turn:
                items = await threaded(make)
                try:
                    while (item := await threaded(next, items, None)) is not None:
                        out.put_nowait(item)
                finally:
                    self.thread.submit(items.close)
            out.put_nowait(None)
        except Exception as error:
            out.put_nowait(error)


async def _watch(receive: Receive, out: asyncio.Queue) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    out.put_nowait(Left())


class Reply:
    """What is sent to a client: one JSON value, or events until the last."""

    def __init__(self, send: Send):
        self.send, self.begun = send, False

    async def json(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value, allow_nan=False).encode()
        await self._start(status, {"content-type": "application/json", "content-length": str(len(body)), **headers})
        await self._body(body)

    async def event(self, value: Any, last: bool = False) -> None:
        if not self.begun:
            await self._start(200, {"content-type": "text/event-stream", "cache-control": "no-cache"})
        text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        await self._body(f"data: {text}\n\n".encode(), more=not last)

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.begun = True
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _body(self, body: bytes, more: bool = False) -> None:
        async with asyncio.timeout(SECONDS):
            await self.send({"type": "http.response.body", "body": body, "more_body": more})


def application(writer: Writer, waiting: int) -> Callable[[dict[str, Any], Receive, Send], Awaitable[None]]:
    """waiting: requests that may wait while one is written for; one more is told to come back (429)."""
    turns = Turns(waiting + 1)

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        reply = Reply(send)
        try:
            await respond(scope, receive, reply)
        except (Left, TimeoutError):  # nobody takes an answer
            pass
        except Exception as error:
            told = _told(error)
            await (
                reply.event(told.body, last=True) if reply.begun else reply.json(told.body, told.status, **told.headers)
            )

    async def respond(scope: dict[str, Any], receive: Receive, reply: Reply) -> None:
        path = scope["path"]
        if path not in METHODS:
            raise Refused(404, f"there is only {', '.join(METHODS)}", "not_found")
        if scope["method"] != METHODS[path]:
            raise Refused(405, f"{path} takes {METHODS[path]}", allow=METHODS[path])
        if path == "/health":
            return await reply.json({"status": "ok"})
        if path == "/v1/models":
            model = {"id": writer.name, "object": "model", "created": 0, "owned_by": "efflm"}
            return await reply.json({"object": "list", "data": [model]})
        request = requests.parse(await _body(scope, receive), chat=path == "/v1/chat/completions")
        if request.model not in (None, writer.name):
            told = f"the model {request.model!r:.60} is not here: {writer.name!r} is"
            raise Refused(404, told, "model_not_found")
        answer = Answer(request, writer.name)
        async with contextlib.aclosing(turns.run(functools.partial(writer.write, request), receive)) as parts:
            if not request.stream:
                return await reply.json(answer.whole([part async for part in parts]))
            async for part in parts:
                await reply.event(answer.chunk(part))
        if request.usage:
            await reply.event(answer.chunk(None))
        await reply.event("[DONE]", last=True)

    return app


async def _body(scope: dict[str, Any], receive: Receive) -> bytes:
    """What comes is read to its end, and of it no more than BODY bytes kept: a client that is still sending does not
    read what it is told."""
    kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise Refused(415, "the body must be JSON: send it with the header Content-Type: application/json")
    body, size, more = bytearray(), 0, True
    try:
        async with asyncio.timeout(SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Left
                new, more = message.get("body", b""), message.get("more_body", False)
                size += len(new)
                if size <= BODY:
                    body += new
    except TimeoutError:
        raise Refused(408, f"the body did not come within {SECONDS} s") from None
    if size > BODY:
        raise Refused(413, f"the body has {size} bytes, but may have {BODY}: send less at a time")
    return bytes(body)


def _told(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, InputError):
        return Refused(400, str(error))
    where = "".join(traceback.format_tb(error.__traceback__))  # not what the error says, which may quote a request
    print(f"{where}{type(error).__name__}", file=sys.stderr, flush=True)
    return Refused(500, "this is a mistake of the server's, of which its log says more")
