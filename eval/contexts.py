"""The contexts with which a contextual retriever is scored: of each collection itself, of another one, or none.

Called by eval.evaluate; every rank calls the same functions, rank 0 writes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from eval.results import context_file, file_name
from toolkit.collectives import on_rank_zero, rank
from toolkit.data.beir import read_beir_texts
from toolkit.files import expanded
from toolkit.models.in_context import Context, InContext, in_context, read_vectors, without_context, write_vectors
from toolkit.models.retriever import Retriever
from toolkit.ranks.together import on_every_rank
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import CORPUS, NONE, EvalContext, EvalSettings
from toolkit.retrieval.context import context_documents, draw, embed_context

_FILE = ".safetensors"


class Contexts:
    """What each collection is read with; embedded once a collection and kept with the result."""

    def __init__(self, retriever: Retriever, wanted: EvalContext | None, folder: Path) -> None:
        """
        Raises:
            RecipeError: for a context of a retriever that reads none, another number of documents than it reads, and a
                folder or file that holds no context, or that of another model.
        """
        self._wanted, self._folder = wanted, folder
        self._documents: list[str] = []  # of the folder that is named
        self._drawn_from = 0
        self._kept: Context | None = None  # of the file that is named
        self._of_prefix: dict[str, Context] = {}
        if wanted is None:
            if retriever.first is not None and not isinstance(retriever.encoder, InContext) and rank() == 0:
                print("note: evaluated without context; eval.context (--context) sets one", flush=True)
            return
        if retriever.first is None:
            raise RecipeError("eval.context: the retriever reads no context; leave the key (--context) out")
        reads = context_documents(retriever)
        if wanted.documents not in (None, reads):
            raise RecipeError(
                f"eval.context.documents: {wanted.documents}, but the model reads {reads} context documents; write "
                f"{reads}, or leave the key out"
            )
        self._count = reads
        if wanted.from_ in (CORPUS, NONE):
            return
        place = expanded(wanted.from_)
        if place.suffix == _FILE:
            self._kept = on_every_rank(lambda: read_vectors(_checked(place), retriever))
        else:
            self._documents = on_every_rank(lambda: self._drawn(place))

    def _drawn(self, place: Path) -> list[str]:
        assert self._wanted is not None
        texts = list(read_beir_texts(_checked(place)).values())
        self._drawn_from = len(texts)
        return draw(texts, len(texts), self._count, self._wanted.seed)

    def bare(self, retriever: Retriever) -> Retriever:
        """The retriever without the context that it was loaded with, where another is asked for."""
        return retriever if self._wanted is None else without_context(retriever)

    def record(self) -> dict[str, Any]:
        """What a result's settings say of it; empty where nothing is asked for."""
        if self._wanted is None:
            return {}
        what = self._kept.digest if self._kept is not None else ""
        if self._documents:  # there may be others under the same name
            what = hashlib.sha256(json.dumps(self._documents).encode()).hexdigest()[:16]
        return {"context": self._wanted.model_dump(exclude={"beside"}) | {"documents": self._count, "content": what}}

    def of(self, name: str, retriever: Retriever, texts: list[str]) -> tuple[Retriever, dict[str, Any]]:
        """A retriever for a collection with its context, and what the collection's record says of that.

        Args:
            retriever: with the collection's prefixes.
            texts: the collection's own documents, or the texts of a task that has none.
        """
        if self._wanted is None or self._wanted.from_ == NONE:
            return retriever, {}
        if self._wanted.from_ == CORPUS:
            chosen = draw(texts, len(texts), self._count, self._wanted.seed)
            context = embed_context(retriever, chosen, name, self._wanted.seed, len(texts))
        else:
            context = self._kept or self._of_folder(retriever)
        path = context_file(self._folder, name)

        def keep() -> None:
            write_vectors(path, context)
            drawn = f"{context.about['documents']:,} documents drawn from {context.about['drawn_from']:,}"
            print(f"{name}: context of {context.about['of']}, {drawn}, digest {context.digest}", flush=True)

        on_rank_zero(keep)
        return in_context(retriever, context), {"context": context.digest}

    def _of_folder(self, retriever: Retriever) -> Context:
        assert self._wanted is not None
        prefix, of = retriever.settings.passage_prefix, file_name(expanded(self._wanted.from_).name)
        if prefix not in self._of_prefix:
            given = (self._documents, of, self._wanted.seed, self._drawn_from)
            self._of_prefix[prefix] = embed_context(retriever, *given)
        return self._of_prefix[prefix]


def check_context(changes: EvalSettings) -> None:
    """RecipeError, before anything is trained or scored, for what `contexts_beside` refuses and for missing files."""
    contexts_beside(changes)
    for place in () if changes.context is None else (changes.context.from_, *changes.context.beside):
        if place not in (CORPUS, NONE):
            _checked(expanded(place))


def _checked(place: Path) -> Path:
    """A context's file, or the corpus that one is drawn from."""
    found = place if place.suffix == _FILE else place / "corpus.jsonl"
    if not found.is_file():
        fix = f"name corpus, none, a folder with a corpus.jsonl, or a {_FILE} file that an evaluation has written"
        raise RecipeError(f"eval.context.from: {found} does not exist; {fix}")
    return found


def label_of(place: str) -> str:
    """How tables call a context."""
    return f"context {place if place in (CORPUS, NONE) else file_name(expanded(place).name)}"


def beside(folder: Path, place: str) -> Path:
    """Where the scores with another context lie, beside a result."""
    return folder.with_name(f"{folder.name}_{file_name(label_of(place))}")


def contexts_beside(changes: EvalSettings) -> list[tuple[str, EvalSettings]]:
    """The other contexts that are asked for, each with the settings of its evaluation."""
    if changes.context is None:
        return []
    labels = [label_of(place) for place in (changes.context.from_, *changes.context.beside)]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise RecipeError(f"eval.context.beside: {twice} is there twice; keep one, or rename a folder")
    alone = changes.context.model_copy(update={"beside": []})
    return [
        (place, changes.model_copy(update={"context": alone.model_copy(update={"from_": place})}))
        for place in changes.context.beside
    ]
