"""Results beside earlier ones. Called by eval.run with --compare."""

import json
from pathlib import Path

from rich.console import Console


def print_comparisons(result: Path, others: list[Path]) -> None:
    """Print the main score of each collection that two results share.

    Args:
        result: folder of an evaluation (metrics.json).
        others: folders of earlier ones.
    """
    console = Console()
    own = json.loads((result / "metrics.json").read_text(encoding="utf-8"))["collections"]
    for other in others:
        before = json.loads((other / "metrics.json").read_text(encoding="utf-8"))["collections"]
        for name in own.keys() & before.keys():
            key = own[name]["main_score"]
            console.print(f"{name}: {key} {own[name][key]:.4f}, {before[name][key]:.4f} in {other}")
