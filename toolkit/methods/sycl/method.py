"""The SyCL method: queries against graded passages of their pool."""

import torch

from toolkit.methods.costs import Costs, matrices, recomputations, rule_text
from toolkit.methods.method import Method, Models, Row
from toolkit.methods.shared import build_encoder
from toolkit.methods.sycl.keys import SyclStage
from toolkit.methods.sycl.objective import Sycl
from toolkit.methods.sycl.preview import epochs, example, look, warn
from toolkit.methods.sycl.rows import open_groups


def _row(stage: SyclStage) -> Row:
    size = stage.data.group.size
    what = f"queries with {size} graded passages each"
    return Row(what, 1 + size, stage.encoder.max_tokens, {"queries": 1, "passages": size})


def _build(stage: SyclStage, seed: int, device: torch.device | str, models: Models) -> Sycl:
    return Sycl(build_encoder(stage, seed, device, models.retriever), stage.objective, stage.batch)


def _costs(stage: SyclStage, objective: Sycl) -> Costs:
    again = recomputations(stage)
    body, _ = matrices(objective.encoder.backbone, stage.zero.stage)
    return Costs(dict.fromkeys(("query", "passage"), body.cost(True, again)), rule_text("retriever", [body], again))


METHOD = Method(
    row=_row,
    open_feed=open_groups,
    build=_build,
    costs=_costs,
    fit=None,
    look=look,
    warn=warn,
    epochs=epochs,
    example=example,
    training_text=None,
    card="Beyond Contrastive Learning: Synthetic Data Enables List-wise Training with Multiple Levels of Relevance "
    "([arXiv 2503.23239](https://arxiv.org/abs/2503.23239))",
)
