"""The texts of a stage's sources, one after another: passages with their documents, or whole documents.

Called by what prepares a stage: passages, documents, and the tokenizer of a model that is built.
"""

from collections import Counter
from collections.abc import Iterator

from toolkit.data import stdlib_corpus
from toolkit.data.faults import Skipped
from toolkit.data.records import check_group_sizes, read_source
from toolkit.data.spans import cut
from toolkit.recipe.sources import source_name
from toolkit.recipe.texts import FolderTexts, HubTexts, PassagesData, StdlibTexts, TextsData


def passage_texts(data: PassagesData, counts: Counter[str], skipped: Skipped | None) -> Iterator[tuple[str, int]]:
    """(passage, number of its document) of all sources; the numbers rise by one.

    Raises:
        RecipeError: for a malformed row (unless they are counted in `skipped`), and for sources whose groups differ in
            size.
    """
    document = -1
    sizes: dict[int, str] = {}  # size of groups -> the source that has it
    for source in data.sources:
        previous: str | None = None
        for text_or_group, cut_here, name in _records(source, counts, skipped):
            if of_groups(source) and len(text_or_group) not in sizes:
                sizes[len(text_or_group)] = source_name(source)
                check_group_sizes(sizes)
            passages = _cut(text_or_group[0], data) if cut_here else text_or_group
            if not passages:
                counts["empty"] += 1
                continue
            document += name is None or name != previous
            previous = name
            for passage in passages:
                counts["passages"] += 1
                yield passage, document


def document_texts(data: TextsData, counts: Counter[str], skipped: Skipped | None) -> Iterator[str]:
    """The documents of all sources that hold text, one after another."""
    for source in data.sources:
        if isinstance(source, StdlibTexts):
            for _, text in stdlib_corpus.training_files():
                counts["rows"] += 1
                if text.strip():
                    yield text
                else:
                    counts["empty"] += 1
        else:
            for record in read_source(source, counts, skipped):
                yield record.texts[0]


def of_groups(source: HubTexts | FolderTexts | StdlibTexts) -> bool:
    """Whether the rows of a source are groups of passages."""
    return not isinstance(source, StdlibTexts) and source.format == "groups"


def _records(
    source: HubTexts | FolderTexts | StdlibTexts, counts: Counter[str], skipped: Skipped | None
) -> Iterator[tuple[list[str], bool, str | None]]:
    """(texts, whether to cut them, the document's name) of each row of a source."""
    if isinstance(source, StdlibTexts):
        for _, text in stdlib_corpus.training_files():
            counts["rows"] += 1
            yield [text], True, None
    else:
        for record in read_source(source, counts, skipped):
            yield record.texts, source.format == "documents", record.document


def _cut(text: str, data: PassagesData) -> list[str]:
    assert data.passages is not None  # of documents
    return cut(text, data.passages.unit, data.passages.max_words)
