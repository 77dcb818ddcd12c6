"""Documents of a stage as token ids, which crops are cut from; cached by content in <run>/../prepared for all runs.

Called by training on every rank: rank 0 does the work, and if it fails every rank raises the same RecipeError.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from toolkit.data.faults import keep_skipped, say_skipped, skipping
from toolkit.data.texts import document_texts
from toolkit.files import placing_folder
from toolkit.methods.recontriever.crops import CropStore, write_documents
from toolkit.models.vocabulary import model_tokenizer
from toolkit.prepare.models import ids_digest
from toolkit.prepare.sources import KnownSource, check_unchanged, known_sources
from toolkit.ranks.together import open_everywhere, together
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.texts import TextsData

_TEXTS_AT_ONCE, _CHARACTERS_AT_ONCE = 1024, 4_000_000


def prepare_crops(data: TextsData, tokenizer_folder: Path, run: Path) -> CropStore:
    """The documents of a stage's sources, tokenized and stored once below `run`'s parent, which all nodes must see.

    `tokenizer_folder` is that of the model: config.json tells which ids have an embedding. The
    cache is keyed by what the sources hold, wherever they lie.

    Raises:
        RecipeError: for malformed or empty data, files that change while they are read, or a tokenizer that does not
            load; the same on every rank.
    """

    def write() -> str:
        cache = run.parent / "prepared"
        known = known_sources(data.sources, cache)
        folder = cache / f"crops_{_digest(known, data.faulty_rows, tokenizer_folder)}"
        if not folder.is_dir():
            _write(data, known, tokenizer_folder, folder)
        say_skipped(folder)
        return str(folder)

    return open_everywhere(Path(together(write)), CropStore.open)


def _write(data: TextsData, known: list[KnownSource], tokenizer_folder: Path, folder: Path) -> None:
    try:
        tokenizer = model_tokenizer(tokenizer_folder)
    except ValueError as error:
        raise RecipeError(f"start: {error}") from None
    counts: Counter[str] = Counter()
    skipped = skipping(data.faulty_rows)
    with placing_folder(folder) as work:
        write_documents(_tokenized(document_texts(data, counts, skipped), tokenizer), work)
        meta = CropStore.open(work).meta
        if not meta["documents"]:
            raise RecipeError(f"data.sources: no text in {counts['rows']} rows; name a source that holds some")
        check_unchanged(known)
        keep_skipped(skipped, work)
    print(
        f"data: {counts['rows']:,} rows, {counts['empty']:,} of them without text; "
        f"{meta['documents']:,} documents, {meta['tokens']:,} tokens, digest {meta['digest']}",
        flush=True,
    )


def _tokenized(texts: Iterable[str], tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    """Each text with its ids, however long, without special ids; so many at once that the tokenizer uses all cores."""
    held: list[str] = []
    characters = 0
    for text in texts:
        held.append(text)
        characters += len(text)
        if len(held) == _TEXTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield from _with_ids(held, tokenizer)
            held, characters = [], 0
    if held:
        yield from _with_ids(held, tokenizer)


def _with_ids(texts: list[str], tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    # verbose=False: no warning that a document is longer than the model's input; only crops of it are ever read.
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return zip(texts, encoded["input_ids"], strict=True)


def _digest(known: list[KnownSource], faulty_rows: str, tokenizer_folder: Path) -> str:
    """16 hex digits of what decides the store: what the sources hold and how it is read, the tokenizer's files
    and how many ids have an embedding."""
    sources = [[source.model_dump(mode="json", exclude={"folder"}), content] for source, _, content in known]
    parts = [sources, faulty_rows, ids_digest(tokenizer_folder)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
