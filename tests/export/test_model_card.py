"""The model card and its table of scores."""

from pathlib import Path

import torch
import yaml
from tiny_retriever import CARD

from toolkit.export.card import add_scores, model_card
from toolkit.recipe.models import EncoderSettings

SETTINGS = EncoderSettings(
    pooling="eos",
    normalize=True,
    append_eos=True,
    query_prefix="find: ",
    passage_prefix="",
    max_tokens=16,
    eval_max_tokens=24,
)


def card(base: str, adapter: bool) -> str:
    options = {"dtype": "bfloat16", "add_pooling_layer": False}
    return model_card(Path("/runs/tiny/export"), CARD, SETTINGS, options, base, adapter)


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_card_names_the_facts():
    text = card("/models/base", adapter=True)
    assert front_matter(text)["library_name"] == "sentence-transformers"
    facts = ("`/models/base`", "arXiv 2506.16552", "0123456789abcdef", "fedcba9876543210", "| Seed | 7 |", "| 1,200 |")
    settings = (
        "| 4,915,200 |",
        f"torch {torch.__version__.split('+')[0]}",
        '| query_prefix | `"find: "` |',
        "bfloat16",
    )
    for fact in facts + settings:
        assert fact in text, fact
    for snippet in (
        'SentenceTransformer("/runs/tiny/export")',
        "PeftModel.from_pretrained",
        'AutoModel.from_pretrained("/models/base", dtype="bfloat16", add_pooling_layer=False)',
        "python -m eval.run /runs/",
    ):
        assert snippet in text, snippet
    assert "PeftModel" not in card("/models/base", adapter=False)


def test_only_a_hub_id_is_a_base_model_of_the_front_matter():
    assert front_matter(card("Qwen/Qwen2.5-0.5B", adapter=True))["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert "base_model" not in front_matter(card("/models/base", adapter=True))


def test_scores_replace_earlier_ones_in_both_cards(tmp_path):
    (tmp_path / "merged").mkdir()
    paths = [tmp_path / "README.md", tmp_path / "merged" / "README.md"]
    for path in paths:
        path.write_text(card("/models/base", adapter=True))
    add_scores(tmp_path, {"stdlib:dev": {"ndcg_at_10": 0.2}}, None)
    add_scores(tmp_path, {"stdlib:dev": {"ndcg_at_10": 0.25, "mrr_at_10": 0.1}}, {"stdlib:dev": {"ndcg_at_10": 0.125}})
    for path in paths:
        assert path.read_text() == card("/models/base", adapter=True) + (
            "\n## Scores\n\n| suite | model | ndcg_at_10 | mrr_at_10 |\n|---|---|---|---|\n"
            "| stdlib:dev | this model | 0.2500 | 0.1000 |\n| stdlib:dev | before training | 0.1250 |  |\n"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "merged"]
