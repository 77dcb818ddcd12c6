"""The cde method: texts read with a context, against the documents of their pool."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PretrainedConfig

from toolkit.data.first_look import Look
from toolkit.methods.cde.keys import CdeStage
from toolkit.methods.cde.objective import Cde
from toolkit.methods.cde.rows import first_folder, open_feed
from toolkit.methods.costs import Costs, matrices, recomputations, rule_text
from toolkit.methods.method import Lines, Method, Models, Row, Tokenizers
from toolkit.methods.objective import Exported
from toolkit.methods.pairs import check_sizes, look, pair_epochs, pair_example, pair_row, warn
from toolkit.methods.preview import as_tokens
from toolkit.methods.shared import recompute_layers
from toolkit.models.backbone import DTYPES, adapted, add_lora, load_encoder_backbone, on_meta
from toolkit.models.contextual import ContextualEncoder, check_form
from toolkit.models.contextual_files import CONTEXT, is_contextual, load_contextual, read_context
from toolkit.models.lengths import check_length, check_window
from toolkit.models.two_adapters import add_first, same_adapter
from toolkit.models.vocabulary import model_tokenizer
from toolkit.recipe.errors import RecipeError

_MAY_DIFFER = {"max_tokens", "null_probability"}  # between a start in two stages and the stage that goes on with it


def _row(stage: CdeStage) -> Row:
    row, context = pair_row(stage), stage.objective.context
    documents = context.size // context.vectors_per_document
    what = f"{row.what}, read with {context.size} vectors of {documents} of the pool's documents"
    return row._replace(what=what)


def _build(stage: CdeStage, seed: int, device: torch.device | str, models: Models) -> Cde:
    source, objective, dtype = models.retriever, stage.objective, DTYPES[stage.precision]
    trained, adapter = source.adapter or source.folder, objective.first_stage.adapter
    folder = first_folder(stage, models)
    backbone = load_encoder_backbone(source.folder, dtype, device)
    backbone: Any = adapted(backbone, stage.lora, source.adapter, False, seed)
    pooling, normalize = stage.encoder_settings.pooling, stage.encoder_settings.normalize
    if is_contextual(trained):
        _check_same(stage, trained)
        encoder = load_contextual(trained, backbone, pooling, normalize, dtype, device)
        encoder.settings, encoder.share_prefix = objective.context, objective.share_prefix and encoder.causal_text
    else:
        first = None
        if adapter is None:
            first = load_encoder_backbone(folder, dtype, device)
        else:
            add_first(backbone, _lora_config(backbone, stage), seed + 1)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            encoder = ContextualEncoder(
                backbone,
                first,
                objective.context,
                pooling,
                normalize,
                instruction_end=_colon(source.folder) if objective.context.pool == "after_instruction" else None,
                share_prefix=objective.share_prefix,
            ).to(device, dtype)
    if stage.activation_checkpointing:
        recompute_layers(backbone, **({} if adapter is None else {"context_fn": same_adapter(backbone)}))
        if encoder.first_backbone is not None:
            recompute_layers(encoder.first_backbone)
    exported = Exported("encoder.backbone.", first_stage=folder if adapter is None else None)
    return Cde(encoder.train(), objective, stage.batch, exported).to(device)


def _lora_config(backbone: PeftModel, stage: CdeStage) -> LoraConfig:
    lora = stage.objective.first_stage.adapter
    assert lora is not None
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type=backbone.peft_config["default"].task_type,
    )


def _colon(folder: Path) -> int:
    """The id of the token that ends an instruction."""
    tokenizer = model_tokenizer(folder)
    ids = tokenizer(":", add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f'objective.context.pool: the tokenizer has no token for ":" alone ({folder}); write "text"')
    return ids[0]


def _check_same(stage: CdeStage, folder: Path) -> None:
    """ValueError unless a start in two stages is what the recipe says."""
    there, here = (each.model_dump() for each in (read_context(folder).settings, stage.objective.context))
    different = [key for key in here if there[key] != here[key] and key not in _MAY_DIFFER]
    if (there["null_probability"] > 0) != (here["null_probability"] > 0):
        different.append("null_probability")
    if different:
        key = different[0]
        raise ValueError(
            f"objective.context.{key}: {here[key]!r}, but {folder / CONTEXT} says {there[key]!r}; write that, or start "
            "from a model that has no context yet"
        )
    first = stage.objective.first_stage
    if first.start is not None:
        raise ValueError(f"objective.first_stage.start: {folder} has a first stage; remove the key to go on with it")


def _fit(stage: CdeStage, configs: dict[str, PretrainedConfig]) -> None:
    """What the models' configs show of the keys of the context."""
    check_sizes(stage, configs)
    context, config = stage.objective.context, configs["retriever"]
    first, adapter = configs.get("first_stage", config), stage.objective.first_stage.adapter
    try:
        check_form(context, config, stage.encoder.pooling or "mean")
    except ValueError as error:
        raise RecipeError(f"objective.{error}") from None
    try:
        check_length(first, context.max_tokens, "objective.context.max_tokens")
        if context.form == "projected":
            check_window(config, stage.encoder.max_tokens or 1)
        if context.form == "tokens" and (context.width or first.hidden_size) != config.hidden_size:
            raise ValueError(
                f"objective.context.width: context vectors of width {context.width or first.hidden_size} cannot enter "
                f"a backbone of width {config.hidden_size} as token embeddings; write {config.hidden_size}, or form "
                '"projected"'
            )
        if adapter is not None:
            with torch.device("meta"):
                add_lora(on_meta(config, False), adapter.rank, adapter.alpha, 0.0, adapter.targets, False, seed=0)
    except ValueError as error:
        raise RecipeError(str(error)) from None


def _costs(stage: CdeStage, objective: Cde) -> Costs:
    """A prefix costs what as many tokens would; heads, one vector a text, are left out."""
    again, encoder = recomputations(stage), objective.encoder
    second, _ = matrices(encoder.backbone, stage.zero.stage)
    first, _ = matrices(
        encoder.backbone if encoder.first_backbone is None else encoder.first_backbone, stage.zero.stage
    )
    of_text = dict.fromkeys(("query", "document", "prefix"), second.cost(True, again))
    rules = [rule_text("second stage", [second], again), rule_text("first stage", [first], again)]
    return Costs({"context": first.cost(True, again)} | of_text, "; ".join(rules))


def _example(stage: CdeStage, number: int, look: Look, tokenizers: Tokenizers) -> Lines:
    lines = pair_example(stage, number, look, tokenizers)
    source, settings = stage.data.sources[number], stage.encoder_settings
    encoder = settings.model_copy(update={"max_tokens": stage.objective.context.max_tokens})
    prefix = settings.passage_prefix if source.passage_prefix is None else source.passage_prefix
    named = stage.objective.first_stage.start is not None
    tokenizer = tokenizers("first_stage" if named else "retriever")
    if isinstance(tokenizer, str):
        return [*lines, ("example context document", f"not shown: {tokenizer}")]
    return [*lines, as_tokens("context document", tokenizer, look.pairs[0].positives[0], prefix, encoder)]


METHOD = Method(
    row=_row,
    open_feed=open_feed,
    build=_build,
    costs=_costs,
    fit=_fit,
    look=look,
    warn=warn,
    epochs=pair_epochs,
    example=_example,
    training_text=None,
    card="Contextual Document Embeddings ([arXiv 2410.02525](https://arxiv.org/abs/2410.02525))",
)
