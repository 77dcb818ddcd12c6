"""A model from nothing: tokenizer and random weights, cached by digest below <run>/prepared/.

Called by training on every rank; rank 0 does the work, and if it fails every rank raises the same RecipeError.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from toolkit.data.train_tokenizer import BOS, EOS, train_tokenizer
from toolkit.files import replacing_folder
from toolkit.models.backbone import build_llama, llama_config
from toolkit.prepare.passages import data_digest
from toolkit.prepare.sources import check_unchanged, known_sources
from toolkit.ranks.together import together
from toolkit.recipe.models import BuildModel
from toolkit.recipe.texts import TextsData


def build_start(
    build: BuildModel, data: TextsData, texts: Callable[[], Iterator[str]], of: str, seed: int, run: Path
) -> Path:
    """A folder with a tokenizer trained on the stage's text and a small Llama with random weights.

    Args:
        texts: gives the texts of `data` that the tokenizer is trained on.
        of: the method whose texts these are; another's may be cut in another way.

    Raises:
        RecipeError: for malformed or empty data, or files that change while they are read; the same on every rank.
    """

    def write() -> str:
        known = known_sources(data.sources, run.parent / "prepared")
        key = json.dumps([build.model_dump(mode="json"), data_digest(data, known), of, seed])
        folder = run / "prepared" / f"start_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if not folder.is_dir():
            with replacing_folder(folder) as work:
                tokenizer = train_tokenizer(build.tokenizer, texts())
                vocabulary = tokenizer.get_vocab()
                config = llama_config(build.model_dump(), vocabulary[BOS], vocabulary[EOS], vocabulary[EOS])
                # With a padding id the embedding of that token, here the end token, would be zero and never learn.
                config.pad_token_id = None
                build_llama(config, seed, build.zero_residual).save_pretrained(work)  # pyright: ignore[reportCallIssue]
                tokenizer.save_pretrained(work)
                check_unchanged(known)
        return str(folder)

    return Path(together(write))
