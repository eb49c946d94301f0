"""Serve a model by OpenAI's API: /v1/completions and /v1/chat/completions, streamed or not, /v1/models and /health.

    bash launch/run.sh experiments.serve --model=smollm2 --port=8000
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}'

Expect one line with the address once the model is loaded, and then a line for each request, without its text. Requests
are answered one after the other, first come first served; one that finds --waiting others waiting is told to come back
(429). Ctrl-C or SIGTERM answers what has come and ends. Without --host only this machine is served; there is no
password. The server needs one more package: pip install uvicorn.
"""

import dataclasses
import signal
import socket
from pathlib import Path

import jax

from efflm import ops, user_cache
from efflm.cli.flags import launch
from efflm.config import PRECISION, AskedPrecision, InputError, Stopped, flag, require, require_positive
from efflm.formats import sources
from efflm.formats.sources import KINDS
from efflm.model import require_same_tokenizer
from efflm.serve.app import application
from efflm.serve.writer import Writer

CONNECTIONS = 128  # open at a time
DRAIN = 60  # seconds that SIGTERM leaves to requests that have come


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    model: str = flag("smollm2", KINDS, path=True)
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's")
    port: int = flag(8000, "port to listen on; 0: a free one")
    max_tokens: int = flag(1024, "tokens to write for one request at most")
    waiting: int = flag(32, "requests that may wait for their turn")
    draft: str = flag("", "a smaller model that proposes tokens, by the same tokenizer", path=True)
    ahead: int = flag(4, "tokens that the draft proposes at a time")
    precision: AskedPrecision = flag("", PRECISION)

    def __post_init__(self):
        require_positive(self, "max_tokens", "waiting", "ahead")
        require(0 <= self.port < 1 << 16, f"port is {self.port}, but must be from 0 to 65535")


def main(run: Run) -> None:
    def stop(*_) -> None:
        raise Stopped("stopped: what had come was answered")

    signal.signal(signal.SIGTERM, stop)  # the server drains first, then raises it again
    try:
        import uvicorn
    except ImportError:
        raise InputError("the server needs uvicorn, which is not installed: run pip install uvicorn") from None
    try:
        family = socket.AF_INET6 if ":" in run.host else socket.AF_INET
        listening = socket.create_server((run.host, run.port), family=family)
    except OSError as error:
        raise InputError(f"cannot listen on --host={run.host} --port={run.port}: {error.strerror or error}") from None
    loaded = sources.load(run.model, precision=run.precision)
    draft = sources.load(run.draft, precision=run.precision).model if run.draft else None
    if draft:
        require_same_tokenizer(draft, loaded.model, "draft", "model")
    user_cache.use_compilation_cache()
    jax.block_until_ready([each and ops.prepared(each, jax.default_backend()) for each in (loaded.model, draft)])
    name = Path(run.model).name.removesuffix(".gguf").removesuffix(".safetensors")
    tokenizer = dataclasses.replace(loaded.tokenizer, where=name)  # errors are read elsewhere: they name no path
    app = application(Writer(name, loaded.model, tokenizer, draft, run.ahead, run.max_tokens), run.waiting)
    config = uvicorn.Config(
        app, lifespan="off", ws="none", limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=DRAIN
    )
    address = f"[{run.host}]" if ":" in run.host else run.host
    print(f"{name} is served at http://{address}:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    launch(main, __doc__, run=Run())
