"""A request as the body of an OpenAI-compatible chat, and the completion that comes back as an answer.

Called by the server engine and by the batch files.
"""

from typing import Any

from toolkit.generate.requests import Answer, Request, Sampling
from toolkit.recipe.errors import one_line

FORMS = ("json_schema", "json_object", "none")
"""How a server is told that the answer is JSON, the strictest first."""
_TEXT_PARTS = ("text", "output_text")  # of a message; others are thoughts, refusals, sound
_MOST_TOKENS = 10**9  # of one call; whoever says more counts something else


def messages(request: Request) -> list[dict[str, str]]:
    """The chat of a request; an empty system text is left out."""
    system = [{"role": "system", "content": request.system}] if request.system else []
    return [*system, {"role": "user", "content": request.user}]


def chat_body(request: Request, model: str, sampling: Sampling, form: str) -> dict[str, Any]:
    """The body of a chat completion; `form` is one of FORMS."""
    body: dict[str, Any] = {
        "model": model,
        "messages": messages(request),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": request.seed,
    }
    if request.schema is not None and form == "json_schema":
        schema = {"name": "answer", "schema": request.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif request.schema is not None and form == "json_object":
        body["response_format"] = {"type": "json_object"}
    return body


def read_completion(name: str, completion: Any) -> Answer:
    """The answer in a chat completion, as parsed JSON; ValueError for anything else."""
    try:
        choice = completion["choices"][0]
        message, ended = choice["message"], choice.get("finish_reason")
        text, refusal = _content(message.get("content")), message.get("refusal")
        usage = completion.get("usage") or {}
        prompt, tokens = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    except (LookupError, TypeError, AttributeError):
        raise ValueError("is no chat completion") from None
    failed = ""
    if ended == "content_filter":
        failed = "refused by the content filter"
    elif refusal and not text:
        failed = f"refused by the model: {one_line(refusal, 200)}"
    return Answer(name, text, ended == "length", prompt, tokens, failed)


def _content(content: Any) -> str:
    """The text of a message, null as the empty text, or of its parts that are text; TypeError for anything else."""
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        return "".join(part["text"] for part in parts if part.get("type", "text") in _TEXT_PARTS)
    if content is not None and not isinstance(content, str):
        raise TypeError
    return content or ""


def _count(said: Any) -> int:
    """Tokens as a server counts them; 0 where it says nothing that can be so many."""
    return int(said) if isinstance(said, int | float) and 0 <= said <= _MOST_TOKENS else 0
