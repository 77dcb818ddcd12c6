"""A contextual retriever as a module of sentence-transformers: its export names this class in modules.json.

Made by `sentence_transformer`: sentence-transformers itself refuses any class that is not its own. The folder holds no
code.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Self

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.input_module import InputModule
from sentence_transformers.util import load_dir_path

from toolkit.data.tokens import Tokens, pad, pad_id, tokenize
from toolkit.export.check import answer
from toolkit.export.write import load_export
from toolkit.models.in_context import KEPT, InContext, in_context, read_vectors, without_context, write_vectors
from toolkit.retrieval.context import context_documents, embed_context

_OF_THE_MODEL = ("modules.json", "config_sentence_transformers.json", "README.md")  # which SentenceTransformer writes


class ContextualRetriever(InputModule):
    """Texts -> vectors, each text read with the context that is set; without one, with null vectors."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.retriever = load_export(folder, "cpu")
        self.encoder = self.retriever.encoder
        self.tokenizer = self.retriever.tokenizer
        self.max_seq_length = self.retriever.settings.eval_max_tokens

    @property
    def context_documents(self) -> int:
        """How many documents a context is made of."""
        return context_documents(self.retriever)

    def set_context(self, texts: list[str] | None) -> None:
        """Read all texts from now on with these documents, `context_documents` of them; None: with null vectors.

        Raises:
            ValueError: for another number of documents.
        """
        self.retriever = without_context(self.retriever)
        if texts is not None:
            self.retriever = in_context(self.retriever, embed_context(self.retriever, texts, "set_context"))
        self.encoder = self.retriever.encoder

    def read_context(self, path: str | Path) -> None:
        """Read all texts from now on with the context of a file that `write_context` or an evaluation has written."""
        self.retriever = in_context(self.retriever, read_vectors(Path(path), self.retriever))
        self.encoder = self.retriever.encoder

    def write_context(self, path: str | Path | None = None) -> None:
        """Write the context to a file; None: into the folder of the model, which is then loaded with it.

        Raises:
            ValueError: if none is set.
        """
        if not isinstance(self.encoder, InContext):
            raise ValueError("there is no context; set_context sets one")
        write_vectors(self.folder / KEPT if path is None else Path(path), self.encoder.kept)

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Token ids of texts, with the prompt before them."""
        del kwargs
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        eos = self.retriever.settings.append_eos
        rows = tokenize(self.tokenizer, texts, prompt or "", self.max_seq_length, eos)
        return pad(rows, pad_id(self.tokenizer))._asdict()

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds "sentence_embedding" [texts, dim]."""
        del kwargs
        features["sentence_embedding"] = self.encoder(Tokens(features["input_ids"], features["attention_mask"]))
        return features

    def get_embedding_dimension(self) -> int:
        """Numbers of a vector."""
        config: Any = self.encoder.backbone.config
        return self.retriever.settings.truncate_dim or config.hidden_size

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Copy the folder that was loaded, with the context that is set; SentenceTransformer writes the rest."""
        del args, kwargs
        shutil.copytree(
            self.folder, output_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_OF_THE_MODEL, KEPT.parts[0])
        )
        if isinstance(self.encoder, InContext):
            self.write_context(Path(output_path) / KEPT)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """The module of a folder or hub id; no code that lies there is run."""
        del init_defaults, kwargs
        given = {"token": token, "cache_folder": cache_folder, "revision": revision}
        found = load_dir_path(model_name_or_path, subfolder, local_files_only=local_files_only, **given)
        return cls(Path(str(found)))


def sentence_transformer(folder: str | Path, device: str | torch.device | None = None) -> SentenceTransformer:
    """A contextual export as a SentenceTransformer.

    Raises:
        RecipeError: as load_export.
    """
    module = ContextualRetriever(Path(folder))
    options = json.loads((Path(folder) / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    return SentenceTransformer(
        modules=[module],
        device=None if device is None else str(device),
        prompts=options["prompts"],
        similarity_fn_name=options["similarity_fn_name"],
    )


if __name__ == "__main__":  # the fresh process that proves a contextual export
    answer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sentence_transformer)
