"""Any OpenAI-compatible chat server as an engine: many requests under way, retries, JSON where it holds to it.

Called by whatever generates texts. The network is the address that the command names, and nothing else: proxies of the
environment are not used, redirects are not followed, and the key goes nowhere but into the requests.
"""

import asyncio
import random
import resource
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
from openai import APIError, APIStatusError, AsyncOpenAI, OpenAI

from toolkit.generate.chat import FORMS, chat_body, read_completion
from toolkit.generate.failures import FirstFailures
from toolkit.generate.flags import REQUEST_SECONDS
from toolkit.generate.requests import Answer, Engine, Request, Sampling
from toolkit.generate.server_address import KEY_VARIABLE, checked_address, is_local, key_of, unused_proxy
from toolkit.generate.server_faults import Fault, Kind, Place, fault_of, words_of
from toolkit.generate.under_way import UnderWay
from toolkit.ranks.last_words import notice
from toolkit.recipe.errors import RecipeError, one_line

CONNECT_SECONDS = 10.0
TRIES = 5
"""How often a request is sent that the server answers with an error of its own, or with a closed connection."""
GIVEN_UP = 8
"""So many requests in a row that failed TRIES times each end the run."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between two tries; each is about twice the one before."""
LONGEST_WAIT = 3600.0
"""A server that asks to wait longer (a daily quota) ends the run."""
MOST = 1000
"""Requests under way at most, if the limit of open files allows it."""
_SECONDS_TO_SAY = 10.0  # a server that is silent for longer is spoken of


def server_engine(
    url: str,
    model: str | None,
    sampling: Sampling,
    *,
    key_variable: str | None = None,
    succeeded: bool = False,
    timeout: float = REQUEST_SECONDS,
    patience: float = 300.0,
    say: Callable[[str], None] = notice,
) -> Engine:
    """The engine of a chat server; asks it once which models it has.

    Args:
        url: as "http://host:8000/v1".
        model: may be None where the server lists exactly one.
        key_variable: environment variable that holds the key; None: OPENAI_API_KEY, which may be absent.
        succeeded: some request of an earlier start was answered, so failures of this one are those of its requests.
        timeout: seconds for one answer.
        patience: seconds without any answer, but with errors, after which the run ends.
        say: takes one line at a time.

    Raises:
        RecipeError: in one line, if the address or the key cannot be right, the server cannot be reached, or does not
            say which model is meant.
    """
    url = checked_address(url)
    key = key_of(key_variable)
    place = Place(url, model or "", [], key, key_variable or KEY_VARIABLE, timeout)
    if line := unused_proxy(url):
        say(f"{url}: {line}")
    if key and urlsplit(url).scheme == "http" and not is_local(url):
        say(f"warning: {url}: the key of {place.key_variable} travels unencrypted; write https:// if the server can")
    cards = _models(place)
    place = place._replace(listed=[card["id"] for card in cards])
    if model is None:
        if len(cards) != 1:
            named = f"it has {', '.join(place.listed[:8])}" if cards else "it lists no model"
            raise RecipeError(f"{url}: name the model with --model; {named}")
        place = place._replace(model=place.listed[0])
    card = next((card for card in cards if card.get("id") == place.model), {})
    return _Server(place, card, sampling, patience, succeeded, say)


class _Server:
    def __init__(
        self,
        place: Place,
        card: dict[str, Any],
        sampling: Sampling,
        patience: float,
        succeeded: bool,
        say: Callable[[str], None],
    ) -> None:
        self._place, self._card, self._sampling, self._patience, self._say = place, card, sampling, patience, say
        self._names: list[str] = []  # that the server's answers give for the model
        self._form, self._proven = FORMS[0], False  # of the answers; proven by the first that has a schema
        self._has_answered = False
        self._tokens_key = "max_tokens"
        self._most = min(MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._under_way = UnderWay(self._most, time.monotonic)
        self._first_failures = FirstFailures(place.url, succeeded)
        self._flying = 0
        self._resume_at = 0.0  # nothing is sent before
        self._silent_since: float | None = None  # the first error since the last answer
        self._spoken_of = False
        self._failed_in_a_row = 0  # by errors of the server's own

    def describe(self) -> dict[str, Any]:
        """The address, the model asked for, what is listed of it, the names its answers gave, and their form."""
        listed = {key: value for key, value in self._card.items() if key != "created"}
        return {
            "engine": "server",
            "url": self._place.url,
            "model": self._place.model,
            "listed_as": listed,
            "answered_as": sorted(self._names),
            "response_format": self._form if self._proven else None,
        }

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """See Engine; the first request goes alone, and shows what the server takes.

        Raises:
            RecipeError: in one line, if the server stays away or nothing can be right; all answers were given before.
        """
        return self._first_failures.passed_on(self._answers(iter(requests)))

    def _answers(self, requests: Iterator[Request]) -> Generator[Answer]:
        tasks: set[asyncio.Task[Answer]] = set()
        drawn_all = False
        with asyncio.Runner() as runner:  # it runs while this generator is asked for the next answer
            client = AsyncOpenAI(**_settings(self._place), http_client=_network(httpx2.AsyncClient, self._place.url))
            try:
                while tasks or not drawn_all:
                    while not drawn_all and len(tasks) < self._under_way.limit:
                        request = next(requests, None)
                        drawn_all = request is None
                        if request is not None:
                            tasks.add(runner.get_loop().create_task(self._answer(client, request)))
                    if not tasks:
                        break
                    done, tasks = runner.run(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))
                    errors = [error for task in done if (error := task.exception()) is not None]
                    yield from (task.result() for task in done if task.exception() is None)
                    if errors:
                        raise errors[0]
            finally:
                for task in tasks:
                    task.cancel()
                runner.run(_ended(tasks, client))

    async def _answer(self, client: AsyncOpenAI, request: Request) -> Answer:
        form, tries, times_busy = self._form, 0, 0
        while True:
            form = self._form if self._proven else form
            await self._turn()
            sent = time.monotonic()
            outcome = await self._send(client, request, form)
            if isinstance(outcome, Answer):
                self._succeeded(outcome, request, form)
                return outcome
            match outcome.kind:
                case Kind.RUN:
                    raise RecipeError(f"{self._place.url}: {outcome.text}")
                case Kind.FORM if (simpler := self._simpler(form, request, outcome)) is not None:
                    form = simpler
                case Kind.REQUEST | Kind.FORM:
                    self._silent_since = None
                    return _failed(request, outcome.text)
                case Kind.BUSY:
                    self._speak(self._under_way.refused(sent))
                    times_busy += 1
                    await self._pause(outcome, times_busy, everyone=True)
                case Kind.AGAIN:
                    if outcome.text.startswith("no answer within"):
                        self._speak(self._under_way.refused(sent))
                    tries += 1
                    if tries >= TRIES and await self._is_alive(client):
                        return self._given_up(request, outcome)
                    await self._pause(outcome, tries, everyone=False)

    async def _turn(self) -> None:
        """Wait until there is room for one more request."""
        while (pause := self._resume_at - time.monotonic()) > 0 or self._flying >= self._under_way.limit:
            await asyncio.sleep(max(0.02, min(pause, 1.0)))

    async def _send(self, client: AsyncOpenAI, request: Request, form: str) -> Answer | Fault:
        body = chat_body(request, self._place.model, self._sampling, form)
        body[self._tokens_key] = body.pop("max_tokens")
        completion: Any = None
        self._flying += 1
        try:
            completion = await client.post("/chat/completions", cast_to=object, body=body)
            answer = read_completion(request.name, completion)
        except APIError as error:
            return fault_of(error, self._place)
        except (ValueError, RecursionError) as error:  # no JSON, or another one, perhaps with an error in it
            has_said = isinstance(completion, dict) and completion.get("error")
            what = words_of(completion, self._place.key) if has_said else _first_words(error)
            return Fault(Kind.AGAIN, f"answers with something else than a completion ({what})")
        finally:
            self._flying -= 1
        assert isinstance(completion, dict)
        named = completion.get("model")
        if isinstance(named, str) and (name := one_line(named, 200)) not in self._names:
            self._names.append(name)
        return answer

    def _succeeded(self, answer: Answer, request: Request, form: str) -> None:
        self._silent_since, self._spoken_of, self._failed_in_a_row = None, False, 0
        self._speak(self._under_way.answered(answer.tokens or 1 + len(answer.text) // 4))
        if not self._has_answered and self._place.listed and self._place.model not in self._place.listed:
            has = ", ".join(self._place.listed[:8])
            self._speak(f"warning: {self._place.url} answers as {self._place.model}, but lists {has}; see which it is")
        self._has_answered = True
        if self._proven or request.schema is None:
            return
        self._proven, self._form = True, form
        if form != FORMS[0]:
            other = "response_format json_object" if form == "json_object" else "no response_format"
            self._speak(f"{self._place.url} does not take response_format json_schema; it is asked with {other}")

    def _simpler(self, form: str, request: Request, fault: Fault) -> str | None:
        """The next form to try after an error that may be due to this one; None if there is none."""
        if self._proven:
            return None
        if self._tokens_key == "max_tokens" and "max_completion_tokens" in fault.text:  # of OpenAI's newer models
            self._tokens_key = "max_completion_tokens"
            return form
        if request.schema is None or form == FORMS[-1]:
            return None
        return FORMS[FORMS.index(form) + 1]

    async def _pause(self, fault: Fault, tries: int, everyone: bool) -> None:
        """Wait before the next try; RecipeError if the server has been away for too long."""
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        silent = now - max(self._silent_since, self._resume_at)
        if silent > self._patience or fault.wait > LONGEST_WAIT:
            asks = fault.wait > LONGEST_WAIT
            state = f"asks to wait for {fault.wait:,.0f} s" if asks else f"has not answered for {silent:,.0f} s"
            raise RecipeError(
                f"{self._place.url}: {state}: {fault.text}; what was finished is kept, and the same command "
                "goes on when the server is there"
            )
        seconds = fault.wait or min(FIRST_PAUSE * 2 ** (tries - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        if everyone and fault.wait:
            self._resume_at = max(self._resume_at, now + fault.wait)
        if not self._spoken_of and (seconds > _SECONDS_TO_SAY or silent > _SECONDS_TO_SAY):
            self._spoken_of = True
            when = f"in {fault.wait:,.0f} s, as it asks" if fault.wait else f"for up to {self._patience:g} s"
            self._speak(f"{self._place.url}: {fault.text}; it is asked again {when}")
        await asyncio.sleep(seconds)

    async def _is_alive(self, client: AsyncOpenAI) -> bool:
        """Whether the server answers at all, so that the request may be at fault; unknown where it never listed."""
        if not self._place.listed:
            return True
        try:
            await client.get("/models", cast_to=object, options={"timeout": CONNECT_SECONDS})
        except (APIError, ValueError, RecursionError):
            return False
        return True

    def _given_up(self, request: Request, fault: Fault) -> Answer:
        """A request that failed TRIES times; RecipeError if it was so with every one of the last."""
        self._silent_since = None
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= GIVEN_UP:
            raise RecipeError(
                f"{self._place.url}: {GIVEN_UP} requests in a row failed {TRIES} times each: {fault.text}; see what "
                "the server logs; what was finished is kept"
            )
        return _failed(request, f"failed {TRIES} times: {fault.text}")

    def _speak(self, line: str) -> None:
        if line:
            self._say(line)


async def _ended(tasks: set[asyncio.Task[Answer]], client: AsyncOpenAI) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()


def _failed(request: Request, reason: str) -> Answer:
    return Answer(request.name, "", False, 0, 0, reason)


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


def _network(kind: Any, url: str) -> Any:
    """A client of the library below openai's: no proxies, no redirects; SSL_CERT_FILE and SSL_CERT_DIR are heeded."""
    tls = urlsplit(url).scheme == "https"
    return kind(
        trust_env=False,
        follow_redirects=False,
        verify=httpx2.create_ssl_context(trust_env=True) if tls else False,  # reading all authorities takes 0.1 s
        limits=httpx2.Limits(max_connections=MOST, max_keepalive_connections=MOST),
    )


def _settings(place: Place) -> dict[str, Any]:
    """Of both clients of openai; the retries are ours, since they decide how many requests are under way."""
    timeout = httpx2.Timeout(place.timeout, connect=CONNECT_SECONDS, pool=None)
    return {
        "base_url": place.url,
        "api_key": place.key or "none",  # the library wants some text
        "admin_api_key": "",  # else of the environment
        "max_retries": 0,
        "timeout": timeout,
    }


def _models(place: Place) -> list[dict[str, Any]]:
    """What the server lists; empty if it fails to, but the model is named: the first request then shows what it is."""
    with OpenAI(**_settings(place), http_client=_network(httpx2.Client, place.url)) as client:
        try:
            listed = client.get("/models", cast_to=object, options={"timeout": 6 * CONNECT_SECONDS})
            found = listed["data"] if isinstance(listed, dict) else None
        except APIError as error:
            fault = fault_of(error, place._replace(timeout=6 * CONNECT_SECONDS))
            if place.model and isinstance(error, APIStatusError) and (fault.kind is not Kind.RUN or _is_404(fault)):
                return []
            raise RecipeError(f"{place.url}: {fault.text}") from None
        except (ValueError, KeyError, RecursionError):
            found = None
    if not isinstance(found, list) or not all(isinstance(card, dict) for card in found):
        v1 = "" if place.url.endswith("/v1") else f"; write --server {place.url}/v1"
        raise RecipeError(f"{place.url}: answers, but not as an OpenAI-compatible server{v1}")
    return [_card(card) for card in found]


def _card(card: dict[str, Any]) -> dict[str, Any]:
    """What is listed of a model, as far as it is text or a number, in texts that every file takes."""
    found = {one_line(key, 60): value for key, value in card.items() if isinstance(value, str | int)}
    return {key: one_line(value) if isinstance(value, str) else value for key, value in found.items()} | {
        "id": one_line(card.get("id"))
    }


def _is_404(fault: Fault) -> bool:
    return fault.text.startswith("HTTP 404")
