"""The passages of a stage, cut once and kept below <run>/prepared/. Called by training on every rank."""

import hashlib
import json
from collections import Counter
from pathlib import Path

from toolkit.data import stdlib_corpus
from toolkit.data.faults import keep_skipped, say_skipped, skipping
from toolkit.data.spans import PassageStore, write_store
from toolkit.data.texts import of_groups, passage_texts
from toolkit.files import replacing_folder
from toolkit.prepare.sources import KnownSource, check_unchanged, known_sources
from toolkit.ranks.together import open_everywhere, together
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.sources import StdlibSource
from toolkit.recipe.texts import PassagesData, TextsData


def prepare_passages(data: PassagesData, run: Path) -> PassageStore:
    """The passages of a stage's sources, cut and stored once below `run`, which all nodes must see.

    Raises:
        RecipeError: for malformed or empty data, the same on every rank.
    """

    def write() -> str:
        known = known_sources(data.sources, run.parent / "prepared")
        folder = run / "prepared" / f"passages_{data_digest(data, known)}"
        if not folder.is_dir():
            counts: Counter[str] = Counter()
            skipped = skipping(data.faulty_rows)
            form = "groups" if any(of_groups(source) for source in data.sources) else "documents"
            with replacing_folder(folder) as work:
                write_store(passage_texts(data, counts, skipped), work, form)
                if not counts["passages"]:
                    raise RecipeError(f"data.sources: no text in {counts['rows']} rows; name a source that holds some")
                check_unchanged(known)
                keep_skipped(skipped, work)
            _announce(data, counts, PassageStore.open(folder))
        say_skipped(folder)
        return str(folder)

    return open_everywhere(Path(together(write)), PassageStore.open)


def data_digest(data: TextsData, known: list[KnownSource]) -> str:
    """16 hex digits of what the sources hold, wherever they lie, and of how it is read and cut."""
    sources = [[source.model_dump(mode="json", exclude={"folder"}), content] for source, _, content in known]
    settings = data.model_dump(mode="json", include={"passages", "faulty_rows"})
    return hashlib.sha256(json.dumps([settings, sources]).encode()).hexdigest()[:16]


def _announce(data: TextsData, counts: Counter[str], store: PassageStore) -> None:
    library = stdlib_corpus.summary() if any(isinstance(source, StdlibSource) for source in data.sources) else {}
    of_library = "".join(f"; {key.replace('_', ' ')} {value}" for key, value in library.items())
    print(
        f"data: {counts['rows']:,} rows, {counts['empty']:,} of them without text; "
        f"{store.meta['documents']:,} documents, {len(store):,} passages, digest {store.digest}{of_library}",
        flush=True,
    )
