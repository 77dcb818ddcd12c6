"""Datasets of the hub as the datasets library loads them: the whole split, or its first rows; a failure is one line.

Called by the readers of records and of pairs.
"""

import functools
import re
from collections.abc import Callable
from itertools import islice
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import get_session, validate_repo_id

from toolkit.recipe.errors import RecipeError, one_line
from toolkit.recipe.sources import HubSource


class Unreachable(RecipeError):
    """The hub cannot be reached, and what is asked for is not in the local cache."""


@functools.cache
def reachable() -> bool:
    """Whether the hub answers here, asked once and for five seconds; the libraries themselves try for half a minute."""
    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except (HTTPError, OSError):
        return False
    return True


def hub_dataset(source: HubSource) -> Any:
    """The split of a hub dataset, kept on disk by the datasets library; see `load_from_hub` for failures."""
    import datasets  # here, since it is slow to import and needed for hub data alone

    return load_from_hub(source, datasets.load_dataset)


def first_of_hub(source: HubSource, most: int) -> Any:
    """The first rows of a hub dataset, fetched without the rest; without the network, of the local cache."""
    import datasets  # as in hub_dataset

    if not reachable():
        dataset = hub_dataset(source)  # downloads nothing: it is in the cache, or this fails
        return dataset.select(range(min(most, len(dataset))))

    def load(*names: Any, split: str, streaming: bool) -> Any:
        whole = re.sub(r"\[[^]]*\](\(\w+\))?", "", split)  # of "train[:10%]" any rows of train show the columns
        rows = list(islice(datasets.load_dataset(*names, split=whole, streaming=True), most))
        return datasets.Dataset.from_list(rows)

    return load_from_hub(source, load)


def load_from_hub(source: HubSource, load: Callable[..., Any]) -> Any:
    """`load` (datasets.load_dataset) with each failure as one line; Unreachable where only the network lacks."""
    try:
        validate_repo_id(source.hub)
        return load(source.hub, source.config, split=source.split, streaming=False)
    except Exception as error:  # the library raises half a dozen unrelated types here
        local = 'put its files in a local folder and write {"folder": "<path>"}'
        raise hub_error(error, "data.sources: ", source.hub, local) from None


def hub_error(error: Exception, where: str, name: str, local: str) -> RecipeError:
    """Why a dataset cannot be loaded, on one line behind `where`, and the way out, of which `local` needs no hub."""
    text = first_line(error)
    kinds = {kind.__name__ for cause in (error, error.__cause__, error.__context__) for kind in type(cause).__mro__}
    if "gated" in str(error).lower() or "GatedRepoError" in kinds:
        page = f"https://huggingface.co/datasets/{name}"
        fix = f"access is restricted; ask for it at {page} and set HF_TOKEN"
    elif "DatasetNotFoundError" in kinds:
        fix = "not found on the hub; mend the id, set HF_TOKEN if it is private"
    elif {"ConnectionError", "TimeoutError", "ConnectError"} & kinds:
        fix = f"the hub cannot be reached ({text}); connect to the network"
        return Unreachable(one_line(f"{where}dataset {name}: {fix}, or {local}"))
    else:
        fix = f"cannot be loaded ({text}); mend id, config or split"
    return RecipeError(one_line(f"{where}dataset {name}: {fix}, or {local}"))


def first_line(error: BaseException) -> str:
    """What an error of a library says, on one line."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0][:300])
