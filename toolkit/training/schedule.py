"""The learning rate as a pure function of the step: nothing to save, nothing to resume."""

import math

from toolkit.recipe.training import Optim


def learning_rate(optim: Optim, step: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0).

    Warm-up over `warmup_steps`: linear, lr * (step + 1) / warmup_steps; linear_from_zero, lr * step / warmup_steps, as
    Contriever (whose first update is void); or log, lr * ln(step + 1) / ln(warmup_steps), as DeepSpeed's WarmupLR
    (which starts at 0 too). Then linear or cosine to 0 at `steps`, or constant.
    """
    warmup = optim.warmup_steps
    if step < warmup:
        if optim.warmup == "log" and warmup > 1:
            return optim.lr * math.log(step + 1) / math.log(warmup)
        return optim.lr * (step + (optim.warmup != "linear_from_zero")) / warmup
    progress = (step - warmup) / max(1, optim.steps - warmup)
    match optim.schedule:
        case "linear":
            return optim.lr * (1 - progress)
        case "cosine":
            return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
        case "constant":
            return optim.lr
