"""A chat server in a thread with scripted answers: what an OpenAI-compatible server may say, well or not.

`with StubServer(answer) as stub:` answers at stub.url. `answer` gets the body of a request and returns a text or a
Reply; the replies in stub.script are given first, one a request.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self


class Reply(NamedTuple):
    """What is sent back."""

    status: int
    body: Any  # JSON, or a text that is sent as it is
    headers: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0  # before it
    broken_off: bool = False  # half of the body, then the connection is closed


def completion(text: str | list[Any] | None, finish: str = "stop", **more: Any) -> Reply:
    """A chat completion; `more` are keys of its message, or usage=None."""
    words = text.split() if isinstance(text, str) else text or []
    usage = {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 0}
    usage = more.pop("usage", usage)
    message = {"role": "assistant", "content": text} | more
    choice = {"index": 0, "message": message, "finish_reason": finish}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "stub-1", "choices": [choice]}
    return Reply(200, body | ({"usage": usage} if usage else {}))


def cut_off(text: str) -> Reply:
    return completion(text, "length")


def slow(text: str, seconds: float) -> Reply:
    return completion(text)._replace(seconds=seconds)


def closed() -> Reply:
    return completion("never whole")._replace(broken_off=True)


def failure(status: int, message: str, **more: Any) -> Reply:
    """An error in the form of OpenAI; `more` are keys of the error."""
    return Reply(status, {"error": {"message": message, "type": "error", "param": None, "code": None} | more})


def too_many(after: str | None = None) -> Reply:
    return failure(429, "Rate limit reached")._replace(headers=(("Retry-After", after),) if after else ())


def no_format(kind: str = "json_schema") -> Reply:
    return failure(400, f"response_format {kind} is not supported", param="response_format")


TOO_LONG = {  # as the servers word it
    "vllm": failure(
        400,
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4200 in the messages, "
        "800 in the completion). Please reduce the length of the messages or completion.",
        code=400,
    ),
    "vllm_top": Reply(
        400,
        {
            "object": "error",
            "message": "'max_tokens' or 'max_completion_tokens' is too large: 5000. This model's maximum context "
            "length is 4096 tokens and your request has 100 input tokens (5000 > 4096 - 100).",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
    ),
    "openai": failure(
        400,
        "This model's maximum context length is 4096 tokens. However, your messages resulted in 5000 tokens.",
        code="context_length_exceeded",
    ),
    "llama_cpp": failure(
        400,
        "request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it",
        code=400,
        type="exceed_context_size_error",
        n_prompt_tokens=5000,
        n_ctx=4096,
    ),
    "sglang": Reply(
        400,
        {
            "object": "error",
            "message": "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
            "type": "BadRequest",
            "code": 400,
        },
    ),
}
UNKNOWN_MODEL = {
    "vllm": failure(404, "The model `other` does not exist.", type="NotFoundError", code=404),
    "openai": failure(404, "The model `other` does not exist or you do not have access to it", code="model_not_found"),
    "ollama": failure(404, 'model "other" not found, try pulling it first', type="api_error"),
    "transformers": Reply(400, {"detail": "Server is pinned to 'stub'; requested 'other'."}),
}

Answering = Callable[[dict[str, Any]], str | Reply]


class StubServer:
    """Use it as a context manager. What it has seen stays readable after the end."""

    def __init__(
        self,
        answer: Answering = lambda body: "an answer",
        *,
        models: tuple[str, ...] | Reply = ("stub",),
        key: str = "",
        slots: int = 0,
        seconds: float = 0.0,
        port: int = 0,
    ) -> None:
        """
        Args:
            models: what it lists, or what it says in place of a list.
            key: wanted of every request; "": none.
            slots: so many requests are worked on at a time, the others wait; 0: all.
            seconds: that each takes.
            port: 0: one that is free.
        """
        self.answer, self.models, self.key, self.seconds = answer, models, key, seconds
        self._port = port
        self.script: list[Reply] = []
        self.seen: list[dict[str, Any]] = []  # bodies of the chats, in the order of their coming
        self.headers: list[dict[str, str]] = []  # of every request, names in lower case
        self.now, self.most = 0, 0  # chats under way
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(slots) if slots else nullcontext()

    def __enter__(self) -> Self:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                stub._connections.append(self.connection)

            def do_GET(self) -> None:
                stub._note(self)
                send(self, stub._refused(self) or stub._list(self.path))

            def do_POST(self) -> None:
                stub._note(self)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    stub.now += 1
                    stub.most = max(stub.most, stub.now)
                reply = stub._refused(self) or stub._chat(self.path, body)
                with stub._lock:  # before it is sent: the next request may come at once
                    stub.now -= 1
                send(self, reply)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that went away

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in self._connections:  # or their threads would go on answering
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        return f"{self.host}/v1"

    def _note(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})

    def _refused(self, handler: BaseHTTPRequestHandler) -> Reply | None:
        if not self.key or handler.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        shown = handler.headers.get("Authorization", "")
        return failure(401, f"Incorrect API key provided: {shown}.", code="invalid_api_key")

    def _list(self, path: str) -> Reply:
        if path != "/v1/models":
            return Reply(404, {"detail": "Not Found"})
        if isinstance(self.models, Reply):
            return self.models
        cards = [{"id": name, "object": "model", "created": 1, "owned_by": "stub"} for name in self.models]
        return Reply(200, {"object": "list", "data": cards})

    def _chat(self, path: str, body: dict[str, Any]) -> Reply:
        if path != "/v1/chat/completions":
            return Reply(404, {"detail": "Not Found"})
        with self._lock:
            self.seen.append(body)
            scripted = self.script.pop(0) if self.script else None
        with self._slots:
            time.sleep(self.seconds)
            reply = scripted if scripted is not None else self.answer(body)
            reply = completion(reply) if isinstance(reply, str) else reply
            time.sleep(reply.seconds)
        return reply


def send(handler: BaseHTTPRequestHandler, reply: Reply) -> None:
    """Write a reply at one go: a second packet would wait for the first to be acknowledged."""
    is_text = isinstance(reply.body, str)
    data = (reply.body if is_text else json.dumps(reply.body)).encode()
    head = {"Content-Type": "text/html" if is_text else "application/json", "Content-Length": str(len(data))}
    lines = [
        f"HTTP/1.1 {reply.status} Said",
        *(f"{name}: {value}" for name, value in (head | dict(reply.headers)).items()),
    ]
    whole = ("\r\n".join(lines) + "\r\n\r\n").encode() + (data[: len(data) // 2] if reply.broken_off else data)
    handler.wfile.write(whole)
    if reply.broken_off:
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)
