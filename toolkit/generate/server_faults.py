"""What the errors of a chat server mean: wait and ask again, give this request up, or end the run; each in one line.

Called by the server engine.
"""

import math
import os
import re
import ssl
import time
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any, NamedTuple

from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError

from toolkit.generate.failures import TOO_LONG, is_too_long
from toolkit.recipe.errors import one_line

_MODEL = re.compile(r"model.{0,80}(not exist|not found|unknown|pinned)|pinned to|no such model", re.I | re.S)
_TOKENS_KEY = re.compile(r"max_completion_tokens", re.I)
_FILTER = re.compile(r"content.?(filter|policy|management)|responsible ai", re.I)


class Kind(Enum):
    """What is done about an error."""

    BUSY = "wait and send fewer at a time"
    AGAIN = "wait and send it again, a few times"
    REQUEST = "this request is at fault"
    FORM = "it may be a setting of the request that this server does not know"
    RUN = "the run ends"


class Fault(NamedTuple):
    """An error of a server, sorted."""

    kind: Kind
    text: str  # in one line; without the key
    wait: float = 0.0  # seconds that the server asks to wait; 0: it says nothing


class Place(NamedTuple):
    """What an error message says of the server that was asked."""

    url: str
    model: str
    listed: list[str]  # models that the server says it has
    key: str  # never shown
    key_variable: str
    timeout: float


def fault_of(error: APIError, place: Place) -> Fault:
    """What an error of the openai library means."""
    if isinstance(error, APITimeoutError):
        if _causes(error) & {"ConnectTimeout"}:
            return Fault(Kind.AGAIN, "cannot be reached (no connection in time); see that its host is up and open")
        slow = ", or is slow: raise --request-timeout" if place.listed else ""  # it has told its models in time
        return Fault(
            Kind.AGAIN, f"no answer within {place.timeout:g} s; the server is overloaded, or stands still{slow}"
        )
    if isinstance(error, APIConnectionError):
        return _of_connection(error)
    if not isinstance(error, APIStatusError):
        return Fault(Kind.AGAIN, f"answers with something else than a completion ({said(error, place.key)})")
    return _of_status(error, place)


def said(error: APIError, key: str, longest: int = 300) -> str:
    """What a server says in an error, in one line and without the key."""
    return words_of(error.body or error.message, key, longest)


def words_of(body: Any, key: str, longest: int = 300) -> str:
    """What a body says, in one line and without the key: its message where it is an error in the form of OpenAI."""
    if isinstance(body, dict):
        inner = body.get("error", body)
        body = inner.get("message") or inner.get("detail") or inner if isinstance(inner, dict) else inner
    text = " ".join(str(body).split())
    return one_line(text.replace(key, "***") if key else text, longest)


def _causes(error: BaseException) -> set[str]:
    """Names of the exceptions behind an error."""
    found: set[str] = set()
    cause: BaseException | None = error
    while cause is not None:
        found |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    return found


def _of_connection(error: APIConnectionError) -> Fault:
    reason, inner = "", error.__cause__ or error.__context__
    while inner is not None:
        if isinstance(inner, ssl.SSLCertVerificationError):
            fix = "set SSL_CERT_FILE to the file of its authority"
            return Fault(Kind.RUN, f"its TLS certificate is not trusted ({inner.verify_message}); {fix}")
        if isinstance(inner, ssl.SSLError):
            return Fault(Kind.RUN, f"does not speak TLS ({inner.reason}); write http:// for a server without it")
        number = inner.errno if isinstance(inner, OSError) else None
        own = os.strerror(number) if number is not None and number > 0 else str(inner)
        reason = own or reason or type(inner).__name__  # the innermost knows most
        inner = inner.__cause__ or inner.__context__
    reason = one_line(" ".join(reason.split()), 200)
    if "ConnectError" in _causes(error):
        return Fault(Kind.AGAIN, f"cannot be reached ({reason}); see that it is up, and that host and port are right")
    return Fault(Kind.AGAIN, f"closed the connection before the answer was there ({reason})")


def _of_status(error: APIStatusError, place: Place) -> Fault:
    status, text = error.status_code, said(error, place.key)
    match status:
        case 401 | 403:
            return Fault(Kind.RUN, _of_key(status, text, place))
        case 429 if error.code == "insufficient_quota":
            return Fault(Kind.RUN, f"the account has no quota left: {text}")
        case 429 | 503:
            return Fault(Kind.BUSY, f"HTTP {status}: {text}", retry_after(error))
        case 404:
            return Fault(Kind.RUN, _not_found(text, place))
        case 400 | 413 | 422:
            return _of_request(error, text, place)
        case _ if 300 <= status < 400:
            where = words_of(error.response.headers.get("location", "elsewhere"), place.key, 200)
            return Fault(Kind.RUN, f"sends to {where} (HTTP {status}); name that address in --server")
        case _ if status >= 500 or status in (408, 409, 425):
            return Fault(Kind.AGAIN, f"HTTP {status}: {text}", retry_after(error))
        case _:
            return Fault(Kind.REQUEST, f"HTTP {status}: {text}")


def _of_key(status: int, text: str, place: Place) -> str:
    if not place.key:
        return (
            f"wants a key (HTTP {status}); put it into the environment variable {place.key_variable}, or name the "
            "variable that holds it with --key-variable"
        )
    if status == 401:  # what the server says may show parts of the key
        return f"refuses the key of the environment variable {place.key_variable} (HTTP 401); put the right one there"
    return f"does not let the key of {place.key_variable} use {place.model} (HTTP 403: {text})"


def _not_found(text: str, place: Place) -> str:
    if _MODEL.search(text) or place.listed:
        return unknown_model(place)
    if not place.url.rstrip("/").endswith("/v1"):
        return f"has no chat completions there (HTTP 404); write --server {place.url.rstrip('/')}/v1"
    return f"HTTP 404: {text}; see that it is an OpenAI-compatible chat server, and that the model's name is right"


def unknown_model(place: Place) -> str:
    """That the server does not have the model, and those that it has."""
    shown = ", ".join(place.listed[:8]) + (", ..." if len(place.listed) > 8 else "")
    has = f"it has {shown}" if place.listed else "it lists none"
    return f"does not know the model {place.model!r}; {has}: name it with --model"


def _of_request(error: APIStatusError, text: str, place: Place) -> Fault:
    code = " ".join(str(part) for part in (error.code, error.type) if part)
    if _TOKENS_KEY.search(text) and "not supported" in text:
        return Fault(Kind.FORM, f"HTTP {error.status_code}: {text}")
    if "context_length_exceeded" in code or "exceed_context_size" in code or is_too_long(text):
        return Fault(Kind.REQUEST, f"{TOO_LONG} ({text})")
    if "content_filter" in code or "content_policy" in code or _FILTER.search(text):
        return Fault(Kind.REQUEST, f"refused by the content filter ({text})")
    if error.status_code == 400 and _MODEL.search(text):
        return Fault(Kind.RUN, f"{unknown_model(place)} ({text})")
    return Fault(Kind.FORM, f"HTTP {error.status_code}: {text}")


def retry_after(error: APIStatusError) -> float:
    """Seconds that a server asks to wait, from Retry-After as a number or a date; 0 if it says nothing useful."""
    value = error.response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
