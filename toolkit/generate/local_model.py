"""A language model in this process as an engine: transformers' continuous batching on a GPU, batches on a CPU.

Called by whatever generates texts. Reads safetensors only, runs no code that comes with weights, and reaches for the
hub only where the command names a model there. Each rank of several has one whole model, and asks its own.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from jinja2 import TemplateError
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.utils.import_utils import is_flash_attn_2_available

from toolkit.files import expanded
from toolkit.generate.chat import messages
from toolkit.generate.failures import TOO_LONG, FirstFailures
from toolkit.generate.requests import Answer, Engine, Request, Sampling
from toolkit.models.backbone import DTYPES, load_causal_lm, read_config
from toolkit.models.places import hub_problem
from toolkit.models.vocabulary import model_tokenizer
from toolkit.prepare.models import MODEL_FILES, NOT_MODEL_FILES
from toolkit.ranks.last_words import notice
from toolkit.recipe.errors import RecipeError, one_line

BATCH_TOKENS = 16_384
"""Of a batch on a CPU: its rows times the longest prompt and answer."""
WINDOW = 128
"""Requests that are sorted by length before they go into batches."""
AT_A_TIME = 1024
"""Requests that the continuous batching of a GPU holds; what does not fit into its memory waits there."""
_FILES = [*MODEL_FILES, "*.jinja"]  # newer chat templates are files of their own


class _Prompt(NamedTuple):
    request: Request
    ids: list[int]


def local_engine(
    name: str,
    sampling: Sampling,
    device: torch.device,
    *,
    succeeded: bool = False,
    say: Callable[[str], None] = notice,
) -> Engine:
    """The engine of a causal language model with a chat template, in bf16 on a GPU and in fp32 on a CPU; there, too,
    in bf16 where the weights are in it and the processor has AMX, without which it is slower.

    On a CPU every request is drawn by its own seed, so an answer does not depend on the others of its batch, but for
    the last bits of the arithmetic. On a GPU one seed, of the first request, is for all that a start asks.

    Args:
        name: a folder, or an id of the hub, which is then downloaded.
        succeeded: some request of an earlier start was answered, so failures of this one are those of its requests.

    Raises:
        RecipeError: in one line, for a model that is not there, cannot be loaded, or has no chat template.
    """
    folder = _folder(name)
    try:
        model: Any = load_causal_lm(folder, *_how(folder, device), device)
        tokenizer = model_tokenizer(folder, model.config)
    except ValueError as error:
        raise RecipeError(f"--model: {error}") from None
    except torch.OutOfMemoryError:
        fix = "serve it over several with vLLM, and name the address by --server"
        raise RecipeError(f"--model {name}: does not fit into the memory of one GPU; {fix}") from None
    if tokenizer.chat_template is None:
        raise RecipeError(
            f"--model {name}: its tokenizer has no chat template, so it was not trained to follow instructions; name "
            "an instruct or chat model, or put the chat_template.jinja of this one into its folder"
        )
    is_folder = expanded(name).is_dir()
    return _Local(str(folder.resolve()) if is_folder else name, folder, model, tokenizer, sampling, succeeded, say)


def _how(folder: Path, device: torch.device) -> tuple[torch.dtype, str]:
    """Number format and attention; flash attention only where its package is installed, none comes from the hub."""
    if device.type != "cuda":
        is_bf16 = read_config(folder).dtype == DTYPES["bf16"] and torch.cpu.get_capabilities().get("amx_bf16", False)
        return DTYPES["bf16" if is_bf16 else "fp32"], "sdpa"
    return DTYPES["bf16"], "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def _folder(name: str) -> Path:
    folder = expanded(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise RecipeError(f"--model {name}: there is no such folder; name one that holds a model, or an id of the hub")
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=NOT_MODEL_FILES))
    except (OSError, ValueError, HTTPError) as error:  # the hub's own errors are kinds of these
        raise RecipeError(f"--model {name}: {hub_problem(name, error, 'name that folder')}") from None


class _Local:
    def __init__(
        self,
        name: str,
        folder: Path,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        succeeded: bool,
        say: Callable[[str], None],
    ) -> None:
        self._name, self._folder, self._say = name, folder, say
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._folds_system = False
        self._context = int(model.config.max_position_embeddings)
        found = model.generation_config.eos_token_id
        self._ends = sorted({tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])} - {None})
        self._pad = self._ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # in place of the folder's own, whose top_k or repetition_penalty would act unasked
        self._model.generation_config = self._greedy = GenerationConfig(
            max_new_tokens=sampling.max_tokens, do_sample=False, eos_token_id=self._ends, pad_token_id=self._pad
        )
        self._first_failures = FirstFailures(f"--model {name}", succeeded)

    def describe(self) -> dict[str, Any]:
        """The model, its type, size and format, the snapshot if it is the hub's, and what the seeds are for."""
        snapshot = self._folder.name if self._folder.parent.name == "snapshots" else None
        return {
            "engine": "transformers",
            "model": self._name,
            "snapshot": snapshot,
            "type": self._model.config.model_type,
            "parameters": sum(weight.numel() for weight in self._model.parameters()),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "version": transformers.__version__,
            "seeds": "one for all answers of a start" if self._is_on_gpu else "one for each request",
        }

    @property
    def _is_on_gpu(self) -> bool:
        return self._model.device.type == "cuda"

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """See Engine.

        Raises:
            RecipeError: in one line, if generation ends by itself, or all requests are too long.
        """
        answers = self._continuously(iter(requests)) if self._is_on_gpu else self._in_batches(iter(requests))
        return self._first_failures.passed_on(answers)

    def _prompt(self, request: Request) -> _Prompt | Answer:
        """The tokens of a request's chat; an answer that says so if they leave no room for one."""
        text = self._chat(request)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        needed = len(ids) + self._sampling.max_tokens
        if needed > self._context:
            reason = (
                f"{TOO_LONG}: {len(ids):,} tokens and {self._sampling.max_tokens:,} of the answer, of {self._context:,}"
            )
            return Answer(request.name, "", False, len(ids), 0, reason)
        return _Prompt(request, ids)

    def _chat(self, request: Request) -> str:
        def filled(chat: Request) -> str:
            return self._tokenizer.apply_chat_template(
                messages(chat),
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,  # read by the templates of models that think first, which would cost tokens
            )

        system = request.system.strip()
        if not self._folds_system:
            try:
                text = filled(request)
                if system in text:
                    return text
            except TemplateError:
                if not system:
                    raise
            self._folds_system = True
            self._say(f"{self._name}: its chat template takes no system text; that stands before the user's text")
        return filled(request._replace(system="", user=f"{system}\n\n{request.user}" if system else request.user))

    def _answer(self, request: Request, num_prompt: int, ids: list[int]) -> Answer:
        """An answer from its tokens, of which those after the first end token do not count."""
        ended = next((place for place, token in enumerate(ids) if token in self._ends), None)
        kept = ids[: self._sampling.max_tokens] if ended is None else ids[:ended]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        return Answer(request.name, text, ended is None, num_prompt, len(kept) + (ended is not None))

    def _in_batches(self, requests: Iterator[Request]) -> Generator[Answer]:
        while window := list(islice(requests, WINDOW)):
            prompts = [self._prompt(request) for request in window]
            yield from (prompt for prompt in prompts if isinstance(prompt, Answer))
            fitting = sorted((p for p in prompts if isinstance(p, _Prompt)), key=lambda prompt: len(prompt.ids))
            for batch in _batches(fitting, self._sampling.max_tokens):
                yield from self._generated(batch)

    @torch.inference_mode()
    def _generated(self, batch: list[_Prompt]) -> list[Answer]:
        longest = max(len(prompt.ids) for prompt in batch)
        padding = [longest - len(prompt.ids) for prompt in batch]
        ids = torch.tensor([[self._pad] * more + prompt.ids for more, prompt in zip(padding, batch, strict=True)])
        mask = torch.tensor([[0] * more + [1] * (longest - more) for more in padding])
        sampled = LogitsProcessorList()
        if self._sampling.temperature > 0:
            sampled.append(Sampled(self._sampling, [prompt.request.seed for prompt in batch]))
        found = self._model.generate(
            input_ids=ids, attention_mask=mask, generation_config=self._greedy, logits_processor=sampled
        )
        rows = found[:, longest:].tolist()
        return [self._answer(prompt.request, len(prompt.ids), row) for prompt, row in zip(batch, rows, strict=True)]

    def _continuously(self, requests: Iterator[Request]) -> Generator[Answer]:
        """Answers by transformers' continuous batching, which adds and takes away requests at every token."""
        first = next(requests, None)
        if first is None:
            return
        every, drawn_all, held = chain([first], requests), False, dict[str, _Prompt]()
        config = ContinuousBatchingConfig(seed=first.seed % 2**32, auto_switch_to_flash=False)
        with self._model.continuous_batching_context_manager(
            generation_config=self._by_library(), continuous_batching_config=config
        ) as manager:
            try:
                while held or not drawn_all:
                    while not drawn_all and len(held) < AT_A_TIME:
                        request = next(every, None)
                        drawn_all = request is None
                        prompt = None if request is None else self._prompt(request)
                        if isinstance(prompt, Answer):
                            yield prompt
                        elif prompt is not None:
                            held[prompt.request.name] = prompt
                            manager.add_request(prompt.ids, request_id=prompt.request.name, eos_token_id=self._ends)
                    if held and (result := self._result(manager)) is not None:
                        prompt = held.pop(result.request_id)
                        if result.error is None:
                            yield self._answer(prompt.request, len(prompt.ids), result.generated_tokens)
                        else:
                            yield Answer(
                                prompt.request.name, "", False, len(prompt.ids), 0, one_line(result.error, 300)
                            )
            finally:
                for name in held:  # or leaving would wait for their answers
                    manager.cancel_request(name)

    def _result(self, manager: Any) -> Any:
        """A finished request, or None if there was none for a second; RecipeError if generation has ended by itself."""
        result = manager.get_result(timeout=1.0)
        status = manager.background_thread_status
        if (result is None and not manager.is_running()) or (
            result is not None and result.error is not None and status.can_accept_new_requests() is not None
        ):
            reason = one_line((result and result.error) or status.fatal_error or "no reason is given", 300)
            raise RecipeError(f"--model {self._name}: generation ended: {reason}; what was finished is kept")
        return result if result is not None and result.is_finished() else None

    def _by_library(self) -> GenerationConfig:
        """How the library itself draws answers."""
        if self._sampling.temperature == 0:
            return self._greedy
        return GenerationConfig(
            max_new_tokens=self._sampling.max_tokens,
            do_sample=True,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            top_k=0,
            eos_token_id=self._ends,
            pad_token_id=self._pad,
        )


def _batches(prompts: list[_Prompt], max_tokens: int) -> Iterator[list[_Prompt]]:
    """Prompts, sorted by length, in batches of BATCH_TOKENS at most; one that is longer goes alone."""
    batch: list[_Prompt] = []
    for prompt in prompts:
        if batch and (len(batch) + 1) * (len(prompt.ids) + max_tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


class Sampled(LogitsProcessor):
    """Draws each row by a seed of its own: the largest score, once noise is added to each, is a sample (Gumbel-max).

    For `generate` with do_sample=False, whose own sampling takes one stream of numbers for the whole batch.
    """

    def __init__(self, sampling: Sampling, seeds: list[int]) -> None:
        """`seeds`: one a row, in their order."""
        self._shape: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_p < 1:
            self._shape.append(TopPLogitsWarper(sampling.top_p))
        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scores [rows, vocabulary] of the next token -> those whose largest is the sample."""
        scores = scores.float()
        for shape in self._shape:
            scores = shape(input_ids, scores)
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=stream) for stream in self._streams])
        return scores - noise.log()
