"""README.md of an export: what the model is, how it was made, how to load it, what it scores.

Called by export (model_card) and, after the evaluation, by training or the launcher (add_scores).
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from toolkit.files import replace_text
from toolkit.recipe.context import ContextSettings
from toolkit.recipe.models import EncoderSettings

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "sentence-transformers")
SCORES = "## Scores\n"


def model_card(
    folder: Path,
    card: dict[str, Any],
    settings: EncoderSettings,
    options: dict[str, Any],
    base: str,
    adapter: bool,
    loader: str = "AutoModel",
    context: ContextSettings | None = None,
) -> str:
    """The text of README.md.

    Args:
        folder: where the export will lie; named in the snippets.
        card: recipe, recipe_digest, stage, method, method_card, data, data_digest, steps, rows_seen, tokens_seen,
            command, seed.
        settings: the encoder's.
        options: of the loader; "dtype" is the number format of the weights.
        base: folder or hub id of the model it was trained from.
        adapter: whether the folder holds an adapter or full weights.
        loader: class of transformers that reads it.
        context: how a retriever in two stages reads its context; None for any other.
    """
    parts = [
        _front_matter(card, base, adapter),
        f"# {card['recipe']}, stage {card['stage']}\n",
        "A dense retriever: it turns a query or a passage into one vector; "
        f"{'their cosine' if settings.normalize else 'their inner product'} says how well they match.\n",
        _facts(card, options["dtype"], base, adapter),
        _loading(folder, base, options, adapter, loader)
        if context is None
        else _loading_with_context(folder, base, context),
        _settings(settings),
    ]
    return "\n".join(parts)


def add_scores(folder: Path, scores: dict[str, dict[str, float]], baseline: dict[str, dict[str, float]] | None) -> None:
    """Write the evaluation's table at the end of an export's model cards, in place of an earlier one.

    Args:
        folder: the export; the card of its merged/ folder, if there is one, gets the table too.
        scores: suite -> metric -> value.
        baseline: the same for the model it is compared with; missing values stay empty.
    """
    metrics = list(dict.fromkeys(metric for row in scores.values() for metric in row))
    lines = [SCORES, "| suite | model | " + " | ".join(metrics) + " |", "|---|---|" + "---|" * len(metrics)]
    for suite, row in scores.items():
        lines.append(_score_row(suite, "this model", row, metrics))
        if baseline is not None and suite in baseline:
            lines.append(_score_row(suite, "before training", baseline[suite], metrics))
    for path in (folder / "README.md", folder / "merged" / "README.md"):
        if path.is_file():
            text = path.read_text(encoding="utf-8").partition(SCORES)[0].rstrip("\n")
            replace_text(path, text + "\n\n" + "\n".join(lines) + "\n")


def _score_row(suite: str, model: str, row: dict[str, float], metrics: list[str]) -> str:
    values = [f"{row[metric]:.4f}" if metric in row else "" for metric in metrics]
    return f"| {suite} | {model} | " + " | ".join(values) + " |"


def _front_matter(card: dict[str, Any], base: str, adapter: bool) -> str:
    """YAML; strings are written as JSON, which YAML contains. A base in a folder has no name the hub would know."""
    lines = ["library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
    if not Path(base).is_absolute():
        lines += [f"base_model: {json.dumps(base)}", f"base_model_relation: {'adapter' if adapter else 'finetune'}"]
    tags = ["sentence-transformers", "feature-extraction", "dense-retrieval", card["method"]] + ["peft"] * adapter
    lines += ["tags:"] + [f"- {json.dumps(tag)}" for tag in tags]
    return "\n".join(["---", *lines, "---", ""])


def _facts(card: dict[str, Any], dtype: str, base: str, adapter: bool) -> str:
    rows = {
        "Base model": f"`{base}`",
        "Weights": f"{'LoRA adapter of the base model' if adapter else 'full'}, {dtype}",
        "Method": card["method_card"],
        "Recipe": f"{card['recipe']}, digest `{card['recipe_digest']}`",
        "Data": f"{card['data']}, digest `{card['data_digest']}`",
        "Seed": card["seed"],
        "Optimizer steps": f"{card['steps']:,}",
        "Rows seen": f"{card['rows_seen']:,}",
        "Tokens seen": f"{card['tokens_seen']:,}",
        "Command": f"`{card['command']}`",
        "Versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }
    return "## How it was made\n\n" + _table(rows)


def _loading(folder: Path, base: str, options: dict[str, Any], adapter: bool, loader: str) -> str:
    more = "".join(f", {name}={value!r}" for name, value in options.items()).replace("'", '"')
    peft = [
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f"base = {loader}.from_pretrained({json.dumps(base)}{more})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(str(folder))})",
    ]
    plain = [
        f"from transformers import {loader}",
        "",
        f"model = {loader}.from_pretrained({json.dumps(str(folder))}{more})",
    ]
    return "\n".join(
        [
            "## How to load it\n",
            "With sentence-transformers (prefixes, pooling, end token and normalisation are set):\n",
            "```python",
            "from sentence_transformers import SentenceTransformer",
            "",
            f"model = SentenceTransformer({json.dumps(str(folder))})",
            'queries = model.encode_query(["how do I open a file"])',
            'passages = model.encode_document(["open(path) returns a file object"])',
            "```\n",
            f"With {'peft' if adapter else 'transformers'} (token states only; pooling and prefixes are yours):\n",
            "```python",
            *(peft if adapter else plain),
            "```\n",
            "Evaluate it on a folder in BEIR layout or an mteb retrieval task:\n",
            "```",
            f"python -m eval.run {folder} --suite FOLDER_OR_NAME",
            "```\n",
        ]
    )


def _loading_with_context(folder: Path, base: str, context: ContextSettings) -> str:
    documents, place = context.size // context.vectors_per_document, json.dumps(str(folder))
    return "\n".join(
        [
            "## How to load it\n",
            f"Texts are read with a context: vectors of {documents:,} documents of the collection that is searched, "
            "the same for its queries and its passages. They may be drawn from it with replacement. Without a context "
            "null vectors stand in its place.\n",
            "With sentence-transformers, and this toolkit installed (prefixes, pooling and normalisation are set):\n",
            "```python",
            "import random",
            "",
            "from toolkit.retrieval.sentence_module import sentence_transformer",
            "",
            f"model = sentence_transformer({place})",
            "collection = [...]  # the texts of all passages",
            "model[0].set_context(random.choices(collection, k=model[0].context_documents))",
            'queries = model.encode_query(["how do I open a file"])',
            'passages = model.encode_document(["open(path) returns a file object"])',
            "model[0].write_context()  # into this folder, which is then loaded with it",
            "```\n",
            f"The base is `{base}`. The first stage, which reads the context documents, lies in `first/`.\n",
            "Evaluate it on a folder in BEIR layout or an mteb retrieval task, with context and without:\n",
            "```",
            f"python -m eval.run {folder} --suite FOLDER_OR_NAME --context corpus --context none",
            "```\n",
        ]
    )


def _settings(settings: EncoderSettings) -> str:
    rows = {name: f"`{json.dumps(value, ensure_ascii=False)}`" for name, value in settings.model_dump().items()}
    return "## Settings\n\n" + _table(rows)


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""])
