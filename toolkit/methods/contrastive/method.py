"""The contrastive method: queries against the documents of their pool."""

import torch

from toolkit.methods.contrastive.keys import ContrastiveStage
from toolkit.methods.contrastive.objective import Contrastive
from toolkit.methods.costs import Costs, matrices, recomputations, rule_text
from toolkit.methods.method import Method, Models
from toolkit.methods.pairs import fit_pairs, look, open_pairs, pair_epochs, pair_example, pair_row, warn
from toolkit.methods.shared import build_encoder


def _build(stage: ContrastiveStage, seed: int, device: torch.device | str, models: Models) -> Contrastive:
    encoder = build_encoder(stage, seed, device, models.retriever)
    return Contrastive(encoder, stage.objective, stage.batch).to(device)


def _costs(stage: ContrastiveStage, objective: Contrastive) -> Costs:
    again = recomputations(stage)
    body, _ = matrices(objective.encoder.backbone, stage.zero.stage)
    return Costs(dict.fromkeys(("query", "document"), body.cost(True, again)), rule_text("retriever", [body], again))


METHOD = Method(
    row=pair_row,
    open_feed=open_pairs,
    build=_build,
    costs=_costs,
    fit=fit_pairs,
    look=look,
    warn=warn,
    epochs=pair_epochs,
    example=pair_example,
    training_text=None,
    card="InfoNCE over (query, positive, negatives) rows and the other rows of the pool",
)
