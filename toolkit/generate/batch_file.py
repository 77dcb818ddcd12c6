"""Requests in files of OpenAI's batch format, and their answers read back: for nodes without a path to a server.

Called by whatever generates texts. `vllm run-batch -i FILE -o ANSWERS --model M` and OpenAI's batches answer them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.files import expanded, sync
from toolkit.generate.chat import FORMS, chat_body, read_completion
from toolkit.generate.failures import SHORTER, TOO_LONG, is_too_long
from toolkit.generate.requests import Answer, Engine, Request, Sampling
from toolkit.generate.written import writing
from toolkit.ranks.last_words import notice
from toolkit.recipe.errors import RecipeError, one_line

MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000
"""Of one file, at OpenAI; vllm run-batch takes any number."""
_URL = "/v1/chat/completions"


def batch_engine(
    path: str | Path,
    model: str,
    sampling: Sampling,
    *,
    per_file: int = MOST_REQUESTS,
    form: str = FORMS[0],
    say: Callable[[str], None] = notice,
) -> Engine:
    """The engine whose answers come from the files of a folder, and whose other requests go into files there.

    In a folder the files of requests are requests_00001.jsonl and so on, and every other *.jsonl holds answers. For the
    path of a file NAME.jsonl they are NAME_requests_00001.jsonl and the other NAME_*.jsonl beside it. A file of
    requests waits until one of them is answered; what is then missing of it is written again, into a new file.

    Args:
        path: a folder, which is made, or the path of a file that ends in .jsonl, which is not.
        per_file: requests of one file, MOST_REQUESTS at most.
        form: how a model is held to JSON, one of toolkit.generate.chat.FORMS.

    Raises:
        RecipeError: for another number, or a file in place of the folder.
    """
    place = expanded(path)
    folder, stem = (place.parent, f"{place.stem}_") if place.suffix == ".jsonl" else (place, "")
    if not 1 <= per_file <= MOST_REQUESTS:
        raise RecipeError(f"{place}: {per_file:,} requests a file; write 1 to {MOST_REQUESTS:,}")
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder}: is a file; name a folder, or a file that ends in .jsonl")
    return _Batches(_Files(folder, stem), model, sampling, per_file, form, say)


class _Files(NamedTuple):
    """Where the files are: of requests, and of answers."""

    folder: Path
    stem: str  # with which all their names begin; may be empty

    def requests(self, number: int) -> Path:
        return self.folder / f"{self.stem}requests_{number:05d}.jsonl"

    def of_requests(self) -> list[Path]:
        return sorted(self.folder.glob(f"{escape(self.stem)}requests_[0-9]*.jsonl"))

    def of_answers(self) -> list[Path]:
        return sorted({*self.folder.glob(f"{escape(self.stem)}*.jsonl")} - {*self.of_requests()})


class _Written(NamedTuple):
    file: str  # the last one
    digest: bytes  # of the request's body
    times: int


class _Found(NamedTuple):
    """Where the answer to a request is."""

    path: Path
    offset: int
    failed: bool


class _Batches:
    def __init__(
        self, files: _Files, model: str, sampling: Sampling, per_file: int, form: str, say: Callable[[str], None]
    ) -> None:
        self._files, self._folder, self._model, self._sampling = files, files.folder, model, sampling
        self._per_file, self._form, self._say = per_file, form, say
        self._names: set[str] = set()  # that the answers give for the model

    def describe(self) -> dict[str, Any]:
        """The model asked for, and the names that the answers gave for it."""
        return {"engine": "batch file", "model": self._model, "answered_as": sorted(self._names)}

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """See Engine: those that are there; the other requests are written, and stay unanswered in this run.

        Raises:
            RecipeError: for files that cannot be read or are of another run, or if all answers are failures.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        written = self._written()
        found, done = self._found(written)
        if found and all(one.failed for one in found.values()):
            name, first = next(iter(found.items()))
            reason = self._answer(name, first).failed
            fix = f"{SHORTER}, and choose another folder" if reason.startswith(TOO_LONG) else "mend what it says"
            raise RecipeError(
                f"{first.path}: not one of {len(found):,} requests is answered; the first: {reason}; {fix}"
            )
        read, missing, waiting = 0, 0, set[str]()
        writer = _Writer(self._files, self._per_file)
        for request in requests:
            body = chat_body(request, self._model, self._sampling, self._form)
            before = written.get(request.name)
            if before is not None and before.digest != _digest(body):
                raise RecipeError(
                    f"{self._folder / before.file}: {one_line(request.name, 80)} was written with another text, model "
                    "or sampling; choose another folder, or delete this one"
                )
            if before is not None and request.name in found:
                read += 1
                yield self._answer(request.name, found[request.name])
            elif before is not None and before.file not in done:
                waiting.add(before.file)
            else:
                missing += before is not None
                writer.add(request.name, body)
        writer.close()
        self._say_what_is_next(read, missing, writer, sorted(waiting))

    def _answer(self, name: str, found: _Found) -> Answer:
        with found.path.open("rb") as file:
            file.seek(found.offset)
            line = json.loads(file.readline())
        if found.failed:
            text = _error(line)
            return Answer(name, "", False, 0, 0, f"{TOO_LONG} ({text})" if is_too_long(text) else text)
        body = line["response"]["body"]
        if isinstance(body.get("model"), str):
            self._names.add(one_line(body["model"], 200))
        return read_completion(name, body)

    def _written(self) -> dict[str, _Written]:
        """What the files of requests hold, by name; a file that was being written at a kill goes."""
        for leftover in self._folder.glob(f".{escape(self._files.stem)}requests_*.writing"):
            leftover.unlink()
        known: dict[str, _Written] = {}
        for path in self._files.of_requests():
            for _, line in _lines(path):
                try:
                    name, body = line["custom_id"], line["body"]
                except KeyError:
                    raise RecipeError(f"{path}: holds no requests; give it another name, or take it away") from None
                times = known[name].times if name in known else 0
                known[name] = _Written(path.name, _digest(body), times + 1)
        return known

    def _found(self, written: dict[str, _Written]) -> tuple[dict[str, _Found], set[str]]:
        """Where each answer is, and the files of requests that something was answered of; what is unknown, doubled or
        failed at the server is counted and said."""
        found: dict[str, _Found] = {}
        unknown: list[str] = []
        lines = Counter[str]()
        doubled = again = 0
        reason = ""  # of the first of these
        for path in self._files.of_answers():
            for offset, line in _lines(path):
                name = line.get("custom_id")
                if not isinstance(name, str) or name not in written:
                    unknown.append(str(name))
                    continue
                lines[name] += 1
                outcome = _outcome(line)
                if outcome == "again":
                    again, reason = again + 1, reason or _error(line)
                    continue
                before = found.get(name)
                doubled += before is not None
                if before is None or (before.failed and outcome == "good"):
                    found[name] = _Found(path, offset, outcome == "failed")
        self._say_counts(unknown, doubled, again, reason)
        return found, {written[name].file for name, count in lines.items() if count >= written[name].times}

    def _say_counts(self, unknown: list[str], doubled: int, again: int, reason: str) -> None:
        counts = []
        if unknown:
            counts.append(f"{len(unknown):,} with an id that no request has ({one_line(unknown[0], 60)}), not used")
        if doubled:
            counts.append(f"{doubled:,} for a request that has one already, not used")
        if again:
            counts.append(f"{again:,} with an error of the server's own ({one_line(reason, 120)}), not used")
        if counts:
            self._say(f"{self._folder}: answers {'; '.join(counts)}")

    def _say_what_is_next(self, read: int, missing: int, writer: "_Writer", waiting: list[str]) -> None:
        parts = [f"{read:,} answers read"]
        if waiting:
            parts.append(f"{', '.join(waiting[:3])}{', ...' if len(waiting) > 3 else ''} not answered yet")
        if writer.count:
            again = f" ({missing:,} of them again: their file is answered without them)" if missing else ""
            parts.append(f"{writer.count:,} requests written to {', '.join(writer.files[:3])}{again}")
        self._say(f"{self._folder}: {'; '.join(parts)}")
        if files := writer.files or waiting:
            answers = files[0].replace("requests_", "answers_")
            self._say(
                f"next, for each file: vllm run-batch -i {self._folder / files[0]} -o {self._folder / answers} --model "
                f"{self._model}; then give the same command again"
            )


class _Writer:
    """Files of requests that are there whole or not at all; none is made before the first request."""

    def __init__(self, files: _Files, per_file: int) -> None:
        self._files, self._per_file = files, per_file
        self._number = max((int(path.stem.rpartition("_")[2]) for path in files.of_requests()), default=0)
        self._file: Any = None
        self._path = files.folder
        self._held = self._bytes = 0
        self.count, self.files = 0, list[str]()

    def add(self, name: str, body: dict[str, Any]) -> None:
        line = json.dumps({"custom_id": name, "method": "POST", "url": _URL, "body": body}, ensure_ascii=False)
        data = line.encode() + b"\n"
        if self._file is not None and (self._held == self._per_file or self._bytes + len(data) > MOST_BYTES):
            self.close()
        if self._file is None:
            self._number += 1
            self._path = self._files.requests(self._number)
            self._held = self._bytes = 0
        with writing(self._path):
            self._file = self._file or self._work.open("wb")
            self._file.write(data)
        self._held += 1
        self._bytes += len(data)
        self.count += 1

    @property
    def _work(self) -> Path:
        return self._path.with_name(f".{self._path.name}.writing")

    def close(self) -> None:
        if self._file is None:
            return
        with writing(self._path):
            self._file.close()
            sync(self._work)
            self._work.rename(self._path)
            sync(self._files.folder)
        self._file = None
        self.files.append(self._path.name)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with their offsets; a last line without its end, of a file that grows, is left
    out; RecipeError with the line for anything else."""
    offset = 0
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            try:
                line = json.loads(data)
            except (ValueError, RecursionError):
                if not data.endswith(b"\n"):
                    return
                line = None if data.strip() else {}
            if not isinstance(line, dict):
                raise RecipeError(f"{path}: line {number}: is no JSON object; mend it, or take it out")
            if line:
                yield offset, line
            offset += len(data)


def _outcome(line: dict[str, Any]) -> str:
    """What a line of answers is: "good", "failed" (the request's own fault) or "again" (the server's)."""
    response = line.get("response")
    status = response.get("status_code", 200) if isinstance(response, dict) else 0
    status = status if isinstance(status, int) else 0
    body = response.get("body") if isinstance(response, dict) else None
    if not line.get("error") and status == 200 and isinstance(body, dict):
        try:
            read_completion("", body)
        except ValueError:
            return "again"
        return "good"
    return "failed" if 400 <= status < 500 and status not in (401, 403, 404, 408, 429) else "again"


def _error(line: dict[str, Any]) -> str:
    """Why a request has no answer, in one line."""
    response = line.get("response")
    found: Any = line.get("error") or (response.get("body") if isinstance(response, dict) else response)
    while isinstance(found, dict):
        found = found.get("error") or found.get("message") or json.dumps(found)
    return one_line(" ".join(str(found or "no reason is given").split()), 300)


def _digest(body: dict[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()[:16]
