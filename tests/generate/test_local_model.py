"""A model in this process: its answers depend on the request alone, on one rank or two; mistakes are said."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import DROPS_SYSTEM, NO_SYSTEM, TEMPLATE, save_chat_model
from distributed import run_on_ranks
from safetensors.torch import load_file
from transformers import ContinuousBatchingConfig, LlamaForCausalLM

from toolkit.generate import local_model
from toolkit.generate.local_model import Sampled, local_engine
from toolkit.generate.requests import Answer, Request, Sampling
from toolkit.recipe.errors import RecipeError

CPU = torch.device("cpu")
SAMPLING = Sampling(max_tokens=12, temperature=0.8, top_p=0.9)
GREEDY = SAMPLING._replace(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat") / "model")


def requests(number: int) -> list[Request]:
    """Of uneven lengths, in no order."""
    return [Request(f"r{i}", "be good", f"text {i} " * (1 + i * 7 % 5), None, 100 + i) for i in range(number)]


def answered(engine: Any, asked: list[Request]) -> dict[str, Answer]:
    found = list(engine.answers(asked))
    assert len({answer.name for answer in found}) == len(found) == len(asked)
    return {answer.name: answer for answer in found}


def test_an_answer_does_not_depend_on_its_neighbours(folder, monkeypatch):
    engine = local_engine(str(folder), SAMPLING, CPU)
    together = answered(engine, requests(14))
    assert len({answer.text for answer in together.values()}) == 14
    assert together == {name: a for one in requests(14) for name, a in answered(engine, [one]).items()}
    monkeypatch.setattr(local_model, "BATCH_TOKENS", 200)
    monkeypatch.setattr(local_model, "WINDOW", 5)
    assert together == answered(engine, requests(14)[::-1])
    other = [request._replace(seed=request.seed + 1) for request in requests(14)]
    assert all(answer != together[name] for name, answer in answered(engine, other).items())


def test_two_ranks_give_what_one_gives(folder, tmp_path):
    request = {"model": str(folder), "sampling": list(SAMPLING), "requests": [list(one) for one in requests(9)]}
    ranks = run_on_ranks("generate_ranks.py", 2, request, tmp_path)
    assert [len(part) for (part,) in ranks] == [5, 4]
    one = answered(local_engine(str(folder), SAMPLING, CPU), requests(9))
    assert {Answer(*row) for (part,) in ranks for row in part} == set(one.values())


def test_requests_are_drawn_a_window_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(local_model, "WINDOW", 4)
    drawn: list[str] = []
    answers = local_engine(str(folder), SAMPLING, CPU).answers(drawn.append(r.name) or r for r in requests(20))
    next(answers)
    assert len(drawn) == 4


def test_a_batch_is_bounded_by_its_tokens(folder, monkeypatch):
    engine: Any = local_engine(str(folder), GREEDY, CPU)
    monkeypatch.setattr(local_model, "BATCH_TOKENS", 300)
    shapes: list[tuple[int, int]] = []
    generate = engine._model.generate

    def noted(**inputs: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return generate(**inputs)

    monkeypatch.setattr(engine._model, "generate", noted)
    answered(engine, requests(20))
    assert sum(rows for rows, _ in shapes) == 20
    assert all(rows * (longest + 12) <= 300 for rows, longest in shapes)
    assert [longest for _, longest in shapes] == sorted(longest for _, longest in shapes)


def test_greedy_answers_are_those_of_generate(folder):
    """Also by continuous batching, which a GPU takes; the CPU's memory is not to be filled with its cache."""
    engine: Any = local_engine(str(folder), GREEDY, CPU)
    asked = requests(9)
    found = answered(engine, asked)
    model = LlamaForCausalLM.from_pretrained(folder)
    for request in asked:
        prompt = engine._tokenizer(
            f"<system>be good</s><user>{request.user}</s><assistant>", add_special_tokens=False
        ).input_ids
        row = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]  # pyright: ignore
        assert found[request.name].text == engine._tokenizer.decode(row, skip_special_tokens=True)
        assert found[request.name].prompt_tokens == len(prompt)


def test_continuous_batching_gives_what_batches_give(folder, monkeypatch):
    little = partial(ContinuousBatchingConfig, num_blocks=32, max_batch_tokens=64, page_size=32)
    monkeypatch.setattr(local_model, "ContinuousBatchingConfig", little)
    engine: Any = local_engine(str(folder), GREEDY, CPU)
    too_long = Request("long", "", "x" * 300, None, 1)
    found = {answer.name: answer for answer in engine._continuously(iter([too_long, *requests(9)]))}
    assert found.pop("long").failed.startswith("too long")
    assert found == answered(engine, requests(9))
    engine = local_engine(str(folder), SAMPLING, CPU)
    sampled = list(engine._continuously(iter(requests(6))))  # what is drawn hangs on which are in a batch
    assert {answer.name for answer in sampled} == {f"r{i}" for i in range(6)}
    answers = engine._continuously(iter(requests(6)))
    next(answers)
    answers.close()  # the others are not waited for
    assert list(engine._continuously(iter([]))) == []


def test_an_answer_ends_at_the_end_token_and_is_cut_without_one(folder, tmp_path):
    engine: Any = local_engine(str(folder), GREEDY, CPU)
    (answer,) = engine.answers(requests(1))
    assert answer.cut and answer.tokens == 12
    prompt = engine._prompt(requests(1)[0])
    ids = engine._model.generate(torch.tensor([prompt.ids]))[0, len(prompt.ids) :].tolist()
    ends_at = next(i for i in range(1, 12) if ids[i] not in ids[:i])
    other = save_chat_model(tmp_path / "ends", eos_token_id=[1, ids[ends_at]])
    (ended,) = local_engine(str(other), GREEDY, CPU).answers(requests(1))
    assert not ended.cut and ended.tokens == ends_at + 1
    assert ended.text == engine._tokenizer.decode(ids[:ends_at], skip_special_tokens=True)


def test_the_folders_own_sampling_does_not_act(folder, tmp_path):
    plain = answered(local_engine(str(folder), SAMPLING, CPU), requests(3))
    other = save_chat_model(tmp_path / "model", do_sample=True, top_k=1, repetition_penalty=3.0, max_length=40)
    assert answered(local_engine(str(other), SAMPLING, CPU), requests(3)) == plain


def test_samples_are_drawn_from_the_distribution():
    """Temperature and nucleus as they are; 40,000 draws from six tokens."""
    sampling = Sampling(1, temperature=0.7, top_p=0.8)
    scores = torch.tensor([2.0, 1.5, 1.0, 0.2, -1.0, -3.0])
    share = torch.softmax(scores / 0.7, 0)
    kept = int((torch.cumsum(share, 0) < 0.8).sum()) + 1
    expected = torch.where(torch.arange(6) < kept, share, 0) / share[:kept].sum()
    draw = Sampled(sampling, list(range(40)))
    drawn = [draw(torch.zeros(40, 1, dtype=torch.long), scores.expand(40, 6)).argmax(1) for _ in range(1000)]
    found = torch.bincount(torch.cat(drawn), minlength=6) / 40_000
    assert (found - expected).abs().max() < 0.01 and not found[kept:].any()


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_template_without_system_text_has_it_before_the_users(tmp_path, template):
    said: list[str] = []
    engine: Any = local_engine(str(save_chat_model(tmp_path / "m", template)), GREEDY, CPU, say=said.append)
    texts = [engine._chat(request) for request in requests(2)]
    assert texts[0] == "<user>be good\n\ntext 0 </s><assistant>"
    assert said == [f"{tmp_path / 'm'}: its chat template takes no system text; that stands before the user's text"]
    assert engine._chat(Request("n", "", "alone", None, 1)) == "<user>alone</s><assistant>"


def test_thinking_is_switched_off_where_the_template_can(tmp_path):
    thinks = TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    engine: Any = local_engine(str(save_chat_model(tmp_path / "m", thinks)), GREEDY, CPU)
    assert engine._chat(requests(1)[0]).endswith("<assistant>")


def test_a_request_that_is_too_long_is_an_answer_that_says_so(folder):
    engine = local_engine(str(folder), SAMPLING, CPU)
    asked = [Request("long", "", "x" * 300, None, 1), *requests(3)]
    found = answered(engine, asked)
    tokens = found["long"].prompt_tokens
    assert found["long"].failed == f"too long for the model's context: {tokens} tokens and 12 of the answer, of 256"
    assert sum(bool(answer.failed) for answer in found.values()) == 1
    with pytest.raises(RecipeError, match="not one of 1 requests is answered") as error:
        list(local_engine(str(folder), SAMPLING, CPU).answers(asked[:1]))
    assert "of 256; lower --max-tokens" in str(error.value)


def test_a_model_without_a_chat_template(tmp_path):
    with pytest.raises(RecipeError) as error:
        local_engine(str(save_chat_model(tmp_path / "base", None)), SAMPLING, CPU)
    assert "its tokenizer has no chat template" in str(error.value) and "name an instruct" in str(error.value)
    assert "chat_template.jinja" in str(error.value)


def test_a_model_that_is_not_there_or_cannot_be_loaded(tmp_path):
    for name in (str(tmp_path / "no"), "./no", "a/b/c"):
        with pytest.raises(RecipeError, match="there is no such folder"):
            local_engine(name, SAMPLING, CPU)
    with pytest.raises(RecipeError, match="--model nobody/nothing: the hub cannot be reached"):
        local_engine("nobody/nothing", SAMPLING, CPU)  # the tests are offline
    folder = save_chat_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(RecipeError, match="which can run code when it is read"):
        local_engine(str(folder), SAMPLING, CPU)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(RecipeError, match="model type 'gpt2' is not supported"):
        local_engine(str(folder), SAMPLING, CPU)


def test_it_says_what_it_is(folder):
    about = local_engine(str(folder), SAMPLING, CPU).describe()
    assert about["model"] == str(folder) and about["engine"] == "transformers" and about["type"] == "llama"
    assert about["dtype"] == "float32" and about["seeds"] == "one for each request" and about["parameters"] > 1000
    json.dumps(about)


@pytest.mark.parametrize(("has_amx", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_weights_in_bf16_stay_so_where_the_processor_multiplies_them(tmp_path, monkeypatch, has_amx, dtype):
    folder = save_chat_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    assert local_engine(str(folder), SAMPLING, CPU).describe()["dtype"] == dtype


def test_weights_in_fp32_stay_so(folder, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert local_engine(str(folder), SAMPLING, CPU).describe()["dtype"] == "float32"
