"""What --dry-run says of a stage's data: its rows, the epochs that the steps make of them, one row as tokens."""

import math
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from launcher.ahead import Ahead
from toolkit.data.first_look import FIRST, Look, count_rows
from toolkit.data.pairs import PairPlan
from toolkit.data.spans import cut
from toolkit.data.tokens import tokenize
from toolkit.files import expanded
from toolkit.models.backbone import load_tokenizer
from toolkit.models.vocabulary import model_tokenizer
from toolkit.prepare import TOKENIZER_FILES, base_of_adapter, holds_bare_adapter
from toolkit.recipe import (
    BuildStart,
    ContrastiveObjective,
    EncoderSettings,
    FolderStart,
    HubStart,
    LanguageModelObjective,
    Recipe,
    RecipeError,
    ReContrieverObjective,
    RevelaObjective,
    Stage,
    Start,
    one_line,
)

_HEAD, _TAIL = 160, 60  # characters of a text that are shown
Lines = list[tuple[str, str]]


def data_lines(recipe: Recipe, index: int, found: Ahead) -> Lines:
    """(name, value) of what a stage's sources hold; of a source that could not be looked at, that it was not.

    Raises:
        RecipeError: for sources of fewer rows than a pool takes of them, or a tokenizer that cannot be loaded.
    """
    stage = recipe.stages[index]
    tokenizer = _tokenizer(recipe, index, stage.start)
    counts = [
        count_rows(source) if (index, number) in found.looks else (None, "not counted")
        for number, source in enumerate(stage.data.sources)
    ]
    lines = []
    for number, (count, how) in enumerate(counts):
        name = "data rows" if len(counts) == 1 else f"data rows of source {number}"
        lines.append((name, how if count is None else f"{count:,} ({how})"))
    looks = [found.looks[index, n] for n in range(len(counts)) if (index, n) in found.looks]
    lines.append(("epochs", _epochs(recipe, index, [count for count, _ in counts], looks, tokenizer)))
    if isinstance(tokenizer, str):
        return [*lines, ("example row", f"not shown: {tokenizer}")]
    first = next(((n, each) for (i, n), each in found.looks.items() if i == index and (each.pairs or each.texts)), None)
    if first is None:
        return [*lines, ("example row", "not shown: no row of a local source was looked at")]
    if None in stage.encoder.model_dump(exclude={"append_eos"}).values():
        return [*lines, ("example row", "not shown: the encoder section is not complete without the start model")]
    return [*lines, *_example(recipe, index, *first, tokenizer)]


# --------------------------------------------------------------------------- epochs


def _epochs(recipe: Recipe, index: int, counts: list[int | None], looks: list[Look], tokenizer: Any) -> str:
    stage = recipe.stages[index]
    batch, data = stage.batch, stage.data
    known = [count for count in counts if count is not None]
    if len(known) < len(counts) or len(looks) < len(counts):
        return "not known: not all rows are counted"
    pools = stage.optim.steps * batch.pools_per_step
    if isinstance(stage.objective, ContrastiveObjective):
        sizes = [min(n, s.limit or n) for n, s in zip(known, data.sources, strict=True)]
        weights = [source.weight for source in data.sources if source.weight is not None]
        try:
            plan = PairPlan(sizes, weights or None, batch.pool, data.mix, recipe.seed)
        except RecipeError as error:
            raise RecipeError(f"stages.{index}.{error}") from None
        longest = " of the source that lasts longest" if len(sizes) > 1 else ""
        return f"{pools / plan.pools_per_epoch:.2f}{longest} (more if rows lack a query or positive: they are left out)"
    of_a_row = [_pieces(stage, look, tokenizer) for look in looks]
    if None in of_a_row:
        return "not known: chunks are of tokens, and there is no tokenizer yet"
    pieces = sum(n * (each or 0) for n, each in zip(known, of_a_row, strict=True))
    if not pieces:
        return "not known: the rows looked at hold no text"
    unit = "chunks" if isinstance(stage.objective, ReContrieverObjective) else "passages"
    return (
        f"about {pools * batch.pool / pieces:.2f} (some {pieces:,.0f} {unit}, by the first {FIRST} rows of each file)"
    )


def _pieces(stage: Stage, look: Look, tokenizer: Any) -> float | None:
    """Passages or chunks that the rows looked at have on average; None where only a tokenizer could tell."""
    data, texts = stage.data, [text for record in look.texts for text in record.texts]
    if not texts:
        return 0.0
    if data.crops is not None:
        if isinstance(tokenizer, str):
            return None
        lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        if data.crops.across_documents:
            return sum(lengths) / data.crops.chunk_tokens / len(texts)
        return sum(math.ceil(length / data.crops.chunk_tokens) for length in lengths) / len(texts)
    if data.passages is None:
        return len(texts) / len(look.texts)
    return sum(len(cut(text, data.passages.unit, data.passages.max_words)) for text in texts) / len(texts)


# --------------------------------------------------------------------------- one row as the model sees it


def _tokenizer(recipe: Recipe, index: int, start: Start) -> Any:
    """The tokenizer that a start has on this machine, or why there is none."""
    match start:
        case BuildStart():
            return "the tokenizer is trained with the stage"
        case "previous":
            return _tokenizer(recipe, index - 1, recipe.stages[index - 1].start)
        case HubStart():
            kept = try_to_load_from_cache(start.hub, "tokenizer.json")
            if not isinstance(kept, str):
                return f"the tokenizer of {start.hub} is not in the local cache"
            folder = Path(kept).parent
        case FolderStart():
            folder = expanded(start.folder)
            if holds_bare_adapter(folder):
                base = base_of_adapter(folder)
                start = FolderStart(folder=base) if Path(base).is_absolute() else HubStart(hub=base)
                return _tokenizer(recipe, index, start)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return f"{folder} holds no tokenizer"
    try:
        return model_tokenizer(folder) if (folder / "config.json").is_file() else load_tokenizer(folder)
    except (ValueError, OSError) as error:
        raise RecipeError(one_line(f"stages.{index}.start: {error}")) from None


def _example(recipe: Recipe, index: int, number: int, look: Look, tokenizer: Any) -> Lines:
    """The texts of one row of a source as they go into the models."""
    stage = recipe.stages[index]
    objective, encoder, source = stage.objective, stage.encoder_settings, stage.data.sources[number]
    prefix = encoder.query_prefix if source.query_prefix is None else source.query_prefix
    of_passages = encoder.passage_prefix if source.passage_prefix is None else source.passage_prefix
    if isinstance(objective, ContrastiveObjective):
        pair = next((each for each in look.pairs if each.negatives), look.pairs[0])
        lines = [_as_tokens("query", tokenizer, pair.query, prefix, encoder)]
        lines.append(_as_tokens("positive", tokenizer, pair.positives[0], of_passages, encoder))
        if stage.data.negatives and pair.negatives:
            lines.append(_as_tokens("negative", tokenizer, pair.negatives[0], of_passages, encoder))
        elif stage.data.negatives:
            why = "mined before the stage trains" if stage.data.mine else "none in the rows looked at"
            lines.append(("example negative", why))
        return lines
    text = next((text for record in look.texts for text in record.texts), "")
    if stage.data.passages is not None:
        text = cut(text, stage.data.passages.unit, stage.data.passages.max_words)[0]
    if isinstance(objective, LanguageModelObjective):
        return [_shown("passage", tokenizer, *_plain(tokenizer, text, objective.max_tokens))]
    if isinstance(objective, ReContrieverObjective):
        ids, longest = tokenizer(text, add_special_tokens=False)["input_ids"], stage.data.crops
        return [_shown("chunk", tokenizer, ids[: longest.chunk_tokens if longest else None], len(ids))]
    lines = [_as_tokens("query", tokenizer, text, prefix, encoder, objective.half_query)]
    lines.append(_as_tokens("passage", tokenizer, text, of_passages, encoder))
    return [*lines, _read_by_model(recipe, index, objective, text)]


def _read_by_model(recipe: Recipe, index: int, objective: RevelaObjective, text: str) -> tuple[str, str]:
    """Revela's language model has a tokenizer of its own."""
    reader = _tokenizer(recipe, index, objective.language_model.start)
    if isinstance(reader, str):
        return "example for language model", f"not shown: {reader}"
    return _shown("for language model", reader, *_plain(reader, text, objective.language_model.max_tokens))


def _as_tokens(
    name: str, tokenizer: Any, text: str, prefix: str, encoder: EncoderSettings, half: bool = False
) -> tuple[str, str]:
    """A text as the retriever gets it."""
    limits = (encoder.max_tokens, 10**9)
    kept, whole = (tokenize(tokenizer, [text], prefix, most, encoder.append_eos, half)[0] for most in limits)
    return _shown(name, tokenizer, kept, len(whole))


def _plain(tokenizer: Any, text: str, longest: int) -> tuple[list[int], int]:
    """Ids of a text for a language model, which gets no end token, and how many they are uncut."""
    kept, whole = (tokenize(tokenizer, [text], "", most, append_eos=False)[0] for most in (longest, 10**9))
    return kept, len(whole)


def _shown(name: str, tokenizer: Any, ids: list[int], uncut: int) -> tuple[str, str]:
    text = one_line(tokenizer.decode(ids))
    if len(text) > _HEAD + _TAIL:
        text = f"{text[:_HEAD]} [...] {text[-_TAIL:]}"
    count = f"{len(ids)} tokens" if len(ids) == uncut else f"{len(ids)} of {uncut} tokens"
    return f"example {name}", f"{count}: {text}"
