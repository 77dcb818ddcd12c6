"""The engine of chat servers against a stub in a thread: what it asks, waits for, gives up and says."""

import json
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
from openai import APIConnectionError
from stub_server import (
    TOO_LONG,
    UNKNOWN_MODEL,
    Reply,
    StubServer,
    closed,
    completion,
    cut_off,
    failure,
    no_format,
    slow,
    too_many,
)

from toolkit.generate import server
from toolkit.generate.requests import Answer, Request, Sampling
from toolkit.generate.server import TRIES, server_engine
from toolkit.generate.server_faults import Kind, Place, fault_of
from toolkit.generate.under_way import FIRST
from toolkit.recipe.errors import RecipeError

SAMPLING = Sampling(max_tokens=50, temperature=0.7, top_p=0.9)
SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
KEY = "sk-not-to-be-seen"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.01)


def requests(number: int, schema: dict[str, Any] | None = SCHEMA) -> list[Request]:
    return [Request(f"r{i}", "be good", f"text {i}", schema, 100 + i) for i in range(number)]


def asked(stub: StubServer, number: int, **settings: Any) -> tuple[dict[str, Answer], list[str]]:
    """What the stub answered to so many requests, by name, and what was said."""
    said: list[str] = []
    engine = server_engine(stub.url, settings.pop("model", None), SAMPLING, say=said.append, **settings)
    found = list(engine.answers(requests(number)))
    assert len({answer.name for answer in found}) == len(found)
    return {answer.name: answer for answer in found}, said


def refused(stub: StubServer, number: int = 3, **settings: Any) -> str:
    with pytest.raises(RecipeError) as error:
        asked(stub, number, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def echo(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"].upper()


def test_every_request_is_answered_once_and_as_it_was_asked():
    with StubServer(echo) as stub:
        found, said = asked(stub, 30)
        assert {name: answer.text for name, answer in found.items()} == {f"r{i}": f"TEXT {i}" for i in range(30)}
        assert found["r3"] == Answer("r3", "TEXT 3", False, 7, 2)
        assert said == [] and len(stub.seen) == 30
        body = next(body for body in stub.seen if body["seed"] == 103)
        assert body == {
            "model": "stub",
            "messages": [{"role": "system", "content": "be good"}, {"role": "user", "content": "text 3"}],
            "max_tokens": 50,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 103,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
            },
        }


def test_no_schema_no_response_format_and_no_system_text_no_message():
    with StubServer() as stub:
        engine = server_engine(stub.url, None, SAMPLING)
        (answer,) = engine.answers([Request("a", "", "text", None, 1)])
        assert answer.text == "an answer"
        assert "response_format" not in stub.seen[0] and len(stub.seen[0]["messages"]) == 1


def test_it_says_which_model_answered():
    with StubServer() as stub:
        engine = server_engine(stub.url + "/", None, SAMPLING)
        list(engine.answers(requests(2)))
        assert engine.describe() == {
            "engine": "server",
            "url": stub.url,
            "model": "stub",
            "listed_as": {"id": "stub", "object": "model", "owned_by": "stub"},
            "answered_as": ["stub-1"],
            "response_format": "json_schema",
        }


def test_answers_that_were_cut_refused_or_lack_a_count():
    with StubServer() as stub:
        stub.script = [
            cut_off("half an"),
            completion("", "content_filter"),
            completion(None, refusal="I will not\nwrite that"),
            completion("no count", usage=None),
            completion(None, "length", reasoning_content="hm"),
            completion([{"type": "thinking", "text": "hm"}, {"type": "text", "text": "in "}, "parts"]),  # as Mistral's
            completion([]),
        ]
        engine = server_engine(stub.url, None, SAMPLING)
        answers = [answer for request in requests(7) for answer in engine.answers([request])]
        assert answers == [
            Answer("r0", "half an", True, 7, 2),
            Answer("r1", "", False, 7, 0, "refused by the content filter"),
            Answer("r2", "", False, 7, 0, "refused by the model: I will not\\nwrite that"),
            Answer("r3", "no count", False, 0, 0),
            Answer("r4", "", True, 7, 0),
            Answer("r5", "in parts", False, 7, 3),
            Answer("r6", "", False, 7, 0),
        ]


# --------------------------------------------------------------------------- how many at a time


def test_requests_are_drawn_as_there_is_room_for_them():
    drawn: list[str] = []

    def lazily() -> Iterator[Request]:
        for request in requests(1000):
            drawn.append(request.name)
            yield request

    with StubServer() as stub:
        answers = server_engine(stub.url, None, SAMPLING).answers(lazily())
        next(answers)
        assert drawn == ["r0"] and stub.most == 1  # the first goes alone
        next(answers)
        assert len(drawn) <= 1 + 2 * FIRST
        answers.close()  # as a consumer that fails: nothing is left behind
        assert len(drawn) <= 1 + 2 * FIRST


def test_the_number_under_way_grows_to_what_the_server_works_on():
    with StubServer(slots=8, seconds=0.05) as stub:
        found, said = asked(stub, 260)
        assert len(found) == 260
        # 8 are worked on and twice as many tried; a step or two more where this machine is slow by chance
        assert 16 <= stub.most <= 64 and len(said) <= 1  # where it is slow, not all come at the same time
        assert all("requests are under way" in line for line in said)


def test_a_server_with_a_limit_is_asked_for_less():
    with StubServer(seconds=0.01) as stub:

        def limited(body: dict[str, Any]) -> str | Reply:
            return too_many("0.01") if stub.now > 6 else echo(body)

        stub.answer = limited
        found, said = asked(stub, 120)
        assert len(found) == 120 and not any(answer.failed for answer in found.values())
        assert sum("refuses" in line for line in said) == 1
        assert stub.most <= 16


def test_the_time_that_a_server_asks_to_wait_is_waited_by_all():
    def answer(body: dict[str, Any]) -> str | Reply:
        first = sum(seen["seed"] == 101 for seen in stub.seen) == 1
        return too_many("0.8") if body["seed"] == 101 and first else echo(body)

    with StubServer(answer, seconds=0.05) as stub:
        found, _ = asked(stub, 60)
    assert len(found) == 60 and len(stub.seen) == 61
    places = [place for place, body in enumerate(stub.seen) if body["seed"] == 101]
    assert places[1] < 30  # but for those that were under way, the others came after it; alone it would be the last


def test_a_server_that_asks_to_wait_for_a_day_ends_the_run():
    with StubServer() as stub:
        stub.script = [completion("one"), too_many("86400")]
        assert "asks to wait for 86,400 s: HTTP 429: Rate limit reached; what was finished" in refused(stub)
    with StubServer(lambda body: failure(429, "You exceeded your quota", code="insufficient_quota")) as stub:
        assert refused(stub).endswith("the account has no quota left: You exceeded your quota")


# --------------------------------------------------------------------------- retries


def test_errors_that_pass_are_not_seen():
    with StubServer(echo) as stub:
        stub.script = [
            completion("TEXT 0"),  # then several are under way
            failure(500, "boom"),
            closed(),
            too_many(),
            failure(503, "Loading model"),
            Reply(200, "<html>not JSON</html>"),
            Reply(200, {"object": "something else"}),
            Reply(200, '{"half": ', (("Content-Type", "application/json"),)),
            failure(502, "bad gateway"),
        ]
        found, said = asked(stub, 12)
        assert {answer.text for answer in found.values()} == {f"TEXT {i}" for i in range(12)}
        assert len(stub.seen) == 12 + 8
        assert said == ["the server refuses 4 requests at a time; 2 are under way"]


def test_an_answer_that_takes_too_long_is_asked_for_again():
    with StubServer(echo) as stub:
        stub.script = [completion("first"), slow("late", 1.5)]
        found, _ = asked(stub, 8, timeout=0.4)
        assert len(found) == 8 and "late" not in {answer.text for answer in found.values()}
        assert len(stub.seen) == 9


def test_a_request_that_always_fails_is_given_up_and_the_others_are_not():
    def answer(body: dict[str, Any]) -> str | Reply:
        return failure(500, "CUDA error") if body["seed"] == 105 else echo(body)

    with StubServer(answer) as stub:
        found, _ = asked(stub, 12)
        assert found["r5"].failed == f"failed {TRIES} times: HTTP 500: CUDA error"
        assert sum(bool(answer.failed) for answer in found.values()) == 1
        assert sum(body["seed"] == 105 for body in stub.seen) == TRIES


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (TOO_LONG["vllm"], "too long for the model's context"),
        (failure(500, "still loading"), f"failed {TRIES} times: HTTP 500: still loading"),
        (
            Reply(200, {"error": {"message": "still loading", "code": 503}}),
            f"failed {TRIES} times: answers with something else than a completion (still loading)",
        ),
        (
            Reply(200, "[" * 100_000, (("Content-Type", "application/json"),)),
            f"failed {TRIES} times: answers with something else than a completion (maximum recursion depth",
        ),
    ],
)
def test_a_server_that_never_answered_drops_nothing(fault, words):
    with StubServer(lambda body: fault) as stub:
        line = refused(stub, 3)
        assert "not one of 3 requests is answered; the first: " in line and words in line
        found, _ = asked(stub, 3, succeeded=True)  # an earlier start had answers: these requests are at fault
        assert len(found) == 3 and all(answer.failed.startswith(words) for answer in found.values())


@pytest.mark.parametrize("odd", [float("inf"), float("nan"), 10**400, -5, "many", [1], None])
def test_what_a_server_says_of_itself_can_always_be_written_down(odd):
    reply = completion("text", usage={"prompt_tokens": odd, "completion_tokens": 3})
    reply.body["model"] = "half \ud800"
    cards = {"object": "list", "data": [{"id": "half \udc00", "owned_by": "\ud800", "\ud800": 1}]}
    with StubServer(lambda body: reply, models=Reply(200, cards)) as stub:
        engine = server_engine(stub.url, None, SAMPLING)
        (answer,) = engine.answers(requests(1))
        assert answer[1:] == ("text", False, 0, 3, "")
        json.dumps(engine.describe(), ensure_ascii=False).encode()
        assert engine.describe()["answered_as"] == ["half \\ud800"]


def test_a_long_wait_that_the_server_asks_for_is_said(monkeypatch):
    monkeypatch.setattr(server, "_SECONDS_TO_SAY", 0.1)
    with StubServer(echo) as stub:
        stub.script = [too_many("0.6")]
        found, said = asked(stub, 1)
        assert len(found) == 1 and said == [
            f"{stub.url}: HTTP 429: Rate limit reached; it is asked again in 1 s, as it asks"
        ]


def test_a_server_that_only_fails_ends_the_run():
    with StubServer() as stub:
        stub.script = [completion("one")]
        stub.answer = lambda body: failure(500, "the engine is dead")
        assert refused(stub, 50).endswith(
            f"8 requests in a row failed {TRIES} times each: HTTP 500: the engine is dead; see what the server logs; "
            "what was finished is kept"
        )


def test_a_server_that_stays_away_ends_the_run_and_what_was_finished_is_kept():
    said: list[str] = []
    with StubServer(echo) as stub:
        engine = server_engine(stub.url, None, SAMPLING, patience=0.3, say=said.append)
        answers = engine.answers(requests(200))
        kept = [next(answers) for _ in range(20)]
    with pytest.raises(RecipeError) as error:
        kept.extend(answers)
    assert len({answer.name for answer in kept}) == len(kept) >= 20
    line = str(error.value)
    assert (
        line.startswith(f"{stub.url}: has not answered for 0 s: cannot be reached (") and "Connection refused" in line
    )
    assert line.endswith("what was finished is kept, and the same command goes on when the server is there")


def test_a_server_that_comes_back_is_gone_on_with(monkeypatch):
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.2)
    first = StubServer(echo)
    with first as stub:
        engine = server_engine(stub.url, None, SAMPLING, patience=20)
        answers = engine.answers(requests(60))
        kept = [next(answers) for _ in range(20)]
        port = stub._server.server_port
    with StubServer(echo, port=port):
        kept.extend(answers)
    assert sorted(answer.text for answer in kept) == sorted(f"TEXT {i}" for i in range(60))


# --------------------------------------------------------------------------- what a server takes


@pytest.mark.parametrize(
    ("known", "form", "words"),
    [(("json_object",), "json_object", "response_format json_object"), ((), "none", "no response_format")],
)
def test_a_server_without_json_schema_is_asked_without_it(known, form, words):
    def answer(body: dict[str, Any]) -> str | Reply:
        kind = body.get("response_format", {}).get("type")
        return no_format(kind) if kind is not None and kind not in known else echo(body)

    with StubServer(answer) as stub:
        said: list[str] = []
        engine = server_engine(stub.url, None, SAMPLING, say=said.append)
        assert len(list(engine.answers(requests(20)))) == 20
        assert said == [f"{stub.url} does not take response_format json_schema; it is asked with {words}"]
        refusals = sum(body.get("response_format", {}).get("type") not in (*known, None) for body in stub.seen)
        assert refusals == 2 - len(known)  # once, by the first request
        assert engine.describe()["response_format"] == form


def test_openais_newer_name_of_max_tokens():
    def answer(body: dict[str, Any]) -> str | Reply:
        if "max_tokens" in body:
            wrong = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'"
            return failure(400, f"{wrong} instead.", code="unsupported_parameter", param="max_tokens")
        return completion(f"{body['max_completion_tokens']} {body['response_format']['type']}")

    with StubServer(answer) as stub:
        found, said = asked(stub, 5)
        assert {answer.text for answer in found.values()} == {"50 json_schema"} and said == []
        assert len(stub.seen) == 6


@pytest.mark.parametrize("style", TOO_LONG)
def test_a_request_that_is_too_long_is_an_answer_that_says_so(style):
    def answer(body: dict[str, Any]) -> str | Reply:
        return TOO_LONG[style] if body["seed"] in (100, 104) else echo(body)  # the first of all, too

    with StubServer(answer) as stub:
        found, said = asked(stub, 8)
        assert {name for name, answer in found.items() if answer.failed} == {"r0", "r4"}
        assert found["r4"].failed.startswith("too long for the model's context (") and "4096" in found["r4"].failed
        assert said == [] and len(stub.seen) == 8 + 0


@pytest.mark.parametrize("number", [3, 100])
def test_requests_that_are_all_too_long_are_a_mistake_of_the_command(number):
    with StubServer(lambda body: TOO_LONG["vllm"]) as stub:
        line = refused(stub, number)
        assert (
            "not one of" in line and "maximum context length is 4096 tokens" in line and "4200 in the messages" in line
        )
        assert line.endswith(
            "lower --max-tokens, use a template or examples of fewer words, or give the model a longer context"
        )
        assert len(stub.seen) <= 20


def test_a_request_that_the_content_filter_refuses_is_an_answer_that_says_so():
    filtered = failure(400, "The response was filtered due to the prompt", code="content_filter")

    with StubServer(lambda body: filtered if body["seed"] == 102 else echo(body)) as stub:
        found, _ = asked(stub, 5)
        assert found["r2"].failed == "refused by the content filter (The response was filtered due to the prompt)"


# --------------------------------------------------------------------------- errors of one line


def test_a_server_that_is_not_there():
    with StubServer() as stub:
        pass
    line = refused(stub)
    assert line.startswith(f"{stub.url}: cannot be reached (") and "refused" in line
    assert line.endswith("see that it is up, and that host and port are right")


@pytest.mark.parametrize("style", UNKNOWN_MODEL)
def test_an_unknown_model_and_those_that_there_are(style):
    with StubServer(lambda body: UNKNOWN_MODEL[style], models=("stub", "larger")) as stub:
        line = refused(stub, model="other")
        assert line.startswith(
            f"{stub.url}: does not know the model 'other'; it has stub, larger: name it with --model"
        )


def test_a_server_that_answers_by_any_name_is_not_believed_in_silence():
    with StubServer() as stub:
        _, said = asked(stub, 5, model="other")
        assert said == [f"warning: {stub.url} answers as other, but lists stub; see which it is"]


def test_no_model_is_named():
    with StubServer(models=("a", "b")) as stub:
        assert refused(stub) == f"{stub.url}: name the model with --model; it has a, b"
    with StubServer(models=()) as stub:
        assert refused(stub) == f"{stub.url}: name the model with --model; it lists no model"


def test_a_key_that_is_missing_or_wrong(monkeypatch):
    with StubServer(key=KEY) as stub:
        assert refused(stub).endswith(
            "wants a key (HTTP 401); put it into the environment variable OPENAI_API_KEY, or name the variable that "
            "holds it with --key-variable"
        )
        monkeypatch.setenv("OTHER", "sk-wrong")
        line = refused(stub, key_variable="OTHER")
        assert (
            line == f"{stub.url}: refuses the key of the environment variable OTHER (HTTP 401); put the right one there"
        )
        assert refused(stub, key_variable="NONE").startswith(
            "--key-variable NONE: there is no such environment variable"
        )
        monkeypatch.setenv("OTHER", "sk wrong\u00e9")
        assert refused(stub, key_variable="OTHER").startswith(
            "the environment variable OTHER holds what cannot be a key"
        )


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, capsys, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    caplog.set_level("DEBUG")
    echoed = failure(400, f"cannot read this: {KEY}")
    with StubServer(lambda body: echoed if body["seed"] == 103 else "fine", key=KEY) as stub:
        said: list[str] = []
        engine = server_engine(stub.url, None, SAMPLING, say=said.append)
        answers = list(engine.answers(requests(6)))
        assert {headers["authorization"] for headers in stub.headers} == {f"Bearer {KEY}"}
        everything = json.dumps([answers, engine.describe(), said, repr(engine)])
        stub.key = "sk-changed"  # the answer then shows the old one
        stub.answer = lambda body: failure(401, f"Incorrect API key provided: {KEY[:5]}***{KEY[-4:]}")
        everything += refused(stub)
        stub.key, stub.answer = KEY, lambda body: failure(403, f"no access for {KEY}")
        everything += refused(stub)
        stub.answer = lambda body: echoed
        everything += refused(stub, 2)
        stub.answer = lambda body: Reply(200, {"error": {"message": f"no {KEY}", "code": 429}})
        everything += refused(stub, 2)
    everything += "".join(capsys.readouterr()) + caplog.text
    assert KEY not in everything and KEY[-4:] not in everything
    assert "cannot read this: ***" in everything
    with StubServer(lambda body: Reply(307, {}, (("Location", f"/elsewhere?key={KEY}"),))) as stub:
        assert "sends to /elsewhere?key=*** (HTTP 307)" in refused(stub, 1)


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
    with StubServer() as stub:
        asked(stub, 2)
        assert {headers["authorization"] for headers in stub.headers} == {"Bearer none"}


@pytest.mark.parametrize("model", [None, "stub"])
def test_an_address_without_v1(model):
    with StubServer() as stub, pytest.raises(RecipeError, match=f"write --server {stub.url}$"):
        server_engine(stub.host, model, SAMPLING)
    with StubServer(models=Reply(200, "<html>a page</html>")) as stub, pytest.raises(RecipeError) as error:
        server_engine(stub.url, model, SAMPLING)
    assert str(error.value) == f"{stub.url}: answers, but not as an OpenAI-compatible server"


@pytest.mark.parametrize("status", [404, 500, 503])
def test_a_server_that_cannot_list_its_models_will_do_if_one_is_named(status):
    with StubServer(models=failure(status, "Not Found")) as stub:
        found, said = asked(stub, 3, model="stub")
        assert len(found) == 3 and said == []
        assert f"HTTP {status}" in refused(stub)  # without a name


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:8000/v1", "is no address of a server; write it as http://host:8000/v1"),
        ("ftp://host/v1", "is no address of a server"),
        ("http://host:99999/v1", "is no address of a server"),
        (f"http://host:8000/v1?key={KEY}", "http://host:8000/v1: has a part behind ? or #"),
        (
            f"http://user:{KEY}@host/v1",
            "the address holds a password; name the variable with the key by --key-variable",
        ),
    ],
)
def test_an_address_that_is_none(url, words):
    with pytest.raises(RecipeError) as error:
        server_engine(url, None, SAMPLING)
    assert words in str(error.value) and KEY not in str(error.value)


def test_tls_where_there_is_none_and_a_certificate_that_is_not_trusted():
    with StubServer() as stub, pytest.raises(RecipeError) as error:
        server_engine(stub.url.replace("http:", "https:"), None, SAMPLING)
    assert "does not speak TLS" in str(error.value) and "write http://" in str(error.value)
    untrusted = APIConnectionError(request=None)  # pyright: ignore[reportArgumentType]
    untrusted.__cause__ = ssl.SSLCertVerificationError("certificate verify failed")
    untrusted.__cause__.verify_message = "self-signed certificate"
    fault = fault_of(untrusted, Place("https://host/v1", "m", [], "", "K", 1))
    assert fault.kind is Kind.RUN and "not trusted (self-signed certificate); set SSL_CERT_FILE" in fault.text


def test_redirects_are_not_followed_and_proxies_not_used(monkeypatch):
    with StubServer() as other, StubServer(models=Reply(307, {}, (("Location", other.url),))) as stub:
        assert refused(stub).endswith(f"sends to {other.url} (HTTP 307); name that address in --server")
        assert other.headers == []
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with StubServer() as stub:
        assert len(asked(stub, 2)[0]) == 2
        said: list[str] = []
        url = stub.url.replace("127.0.0.1", "0.0.0.0")
        engine = server_engine(url, None, SAMPLING, say=said.append)
        assert len(list(engine.answers(requests(2)))) == 2
        assert said == [
            f"{url}: the proxy of the environment (http_proxy) is not used; requests go straight to the host"
        ]
