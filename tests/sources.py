"""Sources of a recipe by their format, for tests that read many kinds."""

from typing import Any

from toolkit.recipe.pairs import FolderPairs, HubPairs
from toolkit.recipe.texts import FolderTexts, HubTexts


def folder_source(**keys: Any) -> Any:
    """A source of a folder: of pairs, or of texts."""
    kind = FolderPairs if keys.get("format") in ("pairs", "beir") else FolderTexts
    return kind.model_validate(keys)


def hub_source(**keys: Any) -> Any:
    """A source of the hub: of pairs, or of texts."""
    kind = HubPairs if keys.get("format") == "pairs" else HubTexts
    return kind.model_validate(keys)
