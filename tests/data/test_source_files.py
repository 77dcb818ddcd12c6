"""Which files of a folder are read: none of another split without a word, and those of the hub's README.md."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pairs import write
from sources import folder_source

from toolkit.data.records import read_source
from toolkit.data.source_files import other_files, source_files
from toolkit.recipe.errors import RecipeError


def source(folder: Path, split: str | None = None, config: str | None = None, form: str = "documents") -> Any:
    return folder_source(folder=str(folder), split=split, config=config, format=form)


def make(folder: Path, *names: str) -> Path:
    """Files of one row each, whose text is the file's name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, {"text": name})
    return folder


def names(folder: Path, split: str | None = None, config: str | None = None) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in source_files(source(folder, split, config))]


def error(folder: Path, split: str | None = None, config: str | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        source_files(source(folder, split, config))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"data.sources: {folder} ")


SPLITS = [
    ({"train": ["train.jsonl"], "test": ["test.jsonl"]}),
    ({"train": ["train.jsonl"], "dev": ["dev.jsonl"]}),
    ({"train": ["my_train.jsonl.gz"], "validation": ["my_validation.jsonl.gz"]}),
    ({"train": ["pairs-train.parquet"], "eval": ["pairs-eval.parquet"]}),
    (
        {
            "train": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            "test": ["test-00000-of-00001.parquet"],
        }
    ),
    ({"train": ["data/train-00000-of-00001.parquet"], "test": ["data/test-00000-of-00001.parquet"]}),
    ({"odd_name": ["data/odd_name-00000-of-00001.parquet"], "train": ["data/train-00000-of-00001.parquet"]}),
    ({"train": ["train/a.jsonl", "train/b.jsonl"], "test": ["test/a.jsonl"]}),
]


@pytest.mark.parametrize("splits", SPLITS, ids=" ".join)
@pytest.mark.parametrize("form", ["documents", "pairs"])
def test_files_of_several_splits_are_not_read_together(tmp_path: Path, splits: dict[str, list[str]], form: str) -> None:
    make(tmp_path, *(name for files in splits.values() for name in files))
    told = error(tmp_path)
    assert told.startswith("holds files of several splits (") and "set split to " in told
    for split, files in splits.items():
        assert f"{split}: {Path(files[0]).name}" in told
        assert names(tmp_path, split) == files
    texts = [record.texts[0] for record in read_source(source(tmp_path, "train"), Counter())]
    assert texts == splits["train"]
    assert error(tmp_path, "other") == f"has no split 'other'; set split to {' or '.join(sorted(splits, key=_place))}"


def _place(split: str) -> str:
    return {"odd_name": "data/odd"}.get(split, f"data/{split}")


def test_dev_is_the_hub_s_validation(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "dev.jsonl")
    assert names(tmp_path, "validation") == names(tmp_path, "dev") == ["dev.jsonl"]


def test_a_file_of_no_split_beside_one_is_said(tmp_path: Path) -> None:
    make(tmp_path, "pairs.jsonl", "test.jsonl")
    assert error(tmp_path) == (
        "holds files of several splits (test: test.jsonl; of no split: pairs.jsonl); set split to test, or name a file "
        "in place of the folder"
    )


def test_a_folder_without_splits_or_of_one_is_read_as_it_is(tmp_path: Path) -> None:
    make(tmp_path / "none", "latest.jsonl", "b.parquet", "contest.jsonl.gz")
    assert names(tmp_path / "none") == ["b.parquet", "contest.jsonl.gz", "latest.jsonl"]
    make(tmp_path / "one", "train-1.jsonl", "train-2.jsonl")
    assert names(tmp_path / "one") == ["train-1.jsonl", "train-2.jsonl"]
    assert error(tmp_path / "none", "dev") == (
        "has no split 'dev'; no name of b.parquet, contest.jsonl.gz, latest.jsonl says one; set it to null"
    )
    assert names(tmp_path / "none", "train") == names(tmp_path / "none")  # the default of earlier versions
    make(tmp_path / "below", "en/a.jsonl", "fr/b.jsonl", ".cache/hidden.jsonl")
    assert names(tmp_path / "below") == ["en/a.jsonl", "fr/b.jsonl"]


@pytest.mark.parametrize(("key", "value"), [("split", "test"), ("config", "a")])
def test_a_file_has_neither_split_nor_configuration(tmp_path: Path, key: str, value: str) -> None:
    path = make(tmp_path, "a.jsonl") / "a.jsonl"
    with pytest.raises(RecipeError) as caught:
        source_files(source(path, **{key: value}))
    assert str(caught.value) == f"data.sources: {path} is one file, which has no {key}; set {key} to null"
    assert source_files(source(path, split="train")) == [path]  # the default of earlier versions


@pytest.mark.parametrize(
    "held", ["testset.jsonl", "nq_tst.jsonl", "holdout.jsonl", "heldout-1.jsonl", "hold_out.jsonl", "nq-held-out.jsonl"]
)
def test_other_words_for_held_out_data_are_known(tmp_path: Path, held: str) -> None:
    make(tmp_path, "a.jsonl", held)
    assert error(tmp_path).startswith("holds files of several splits (")


def test_of_a_beir_folder_documents_are_the_corpus(tmp_path: Path) -> None:
    make(tmp_path, "corpus.jsonl", "queries.jsonl")
    assert names(tmp_path) == names(tmp_path, "train") == ["corpus.jsonl"]  # the default of earlier versions


def test_files_of_other_formats_are_named(tmp_path: Path) -> None:
    make(tmp_path, "dev.jsonl")
    for name in ("train.json", "more.csv", "README.md", "dataset_info.json", ".hidden.json"):
        (tmp_path / name).write_text("{}")
    assert other_files([tmp_path / "dev.jsonl"]) == ["more.csv", "train.json"]


# --------------------------------------------------------------------------- as downloaded from the hub

README = """---
license: mit
configs:
- config_name: small
  data_files:
  - split: train
    path: data/train-*
  - split: extra
    path: more/any.parquet
- config_name: large
  data_files: more/*.parquet
---
# Text
"""


def hub_folder(folder: Path, readme: str = README) -> Path:
    make(folder, "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "more/any.parquet")
    (folder / "README.md").write_text(readme)
    return folder


def test_a_dataset_as_downloaded_is_read_by_its_readme(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "set")
    train = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert names(folder, "train", "small") == train
    assert names(folder, "extra", "small") == ["more/any.parquet"]
    assert names(folder, None, "large") == ["more/any.parquet"]
    assert error(folder) == "has several configurations; set config to large or small"
    assert error(folder, None, "tiny") == "has no configuration 'tiny'; set config to large or small"
    assert error(folder, None, "small").startswith("holds files of several splits (train: train-00000-of-00002.parquet")
    assert error(folder, "test", "small") == "has no split 'test'; set split to train or extra"
    records = read_source(source(folder, "train", "small"), Counter())
    assert [record.texts[0] for record in records] == train


def test_one_configuration_or_the_default_needs_no_name(tmp_path: Path) -> None:
    one = README.replace("- config_name: large\n  data_files: more/*.parquet\n", "")
    assert len(names(hub_folder(tmp_path / "one", one), "train")) == 2
    default = README.replace("config_name: large", "config_name: default")
    assert names(hub_folder(tmp_path / "default", default)) == ["more/any.parquet"]


def test_a_readme_without_configurations_leaves_the_names(tmp_path: Path) -> None:
    make(tmp_path, "data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert names(tmp_path, "train") == ["data/train-00000-of-00001.parquet"]
    assert error(tmp_path).startswith("holds files of several splits (train: ")
    assert error(tmp_path, "train", "a").startswith("has no README.md with configs; set config to null")


def test_a_script_beside_the_data_is_never_run(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "set")
    (folder / "set.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    with pytest.raises(RecipeError, match=r"README\.md cannot be followed \(Dataset scripts are no longer supported"):
        source_files(source(folder, "train", "small"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("other/*.csv", "names x.csv; only .jsonl, .jsonl.gz and .parquet files of the folder itself are read"),
        ("nothing/*", "README.md cannot be followed (No (supported) data files found"),
        ("../outside.jsonl", "names outside.jsonl; only"),
    ],
)
def test_a_readme_that_cannot_be_followed_is_one_line(tmp_path: Path, path: str, told: str) -> None:
    make(tmp_path, "outside.jsonl")
    folder = hub_folder(tmp_path / "set", f"---\nconfigs:\n- config_name: a\n  data_files: {path}\n---\n")
    (folder / "other").mkdir()
    (folder / "other" / "x.csv").write_text("text\nx\n")
    with pytest.raises(RecipeError) as caught:
        source_files(source(folder))
    assert told in str(caught.value) and "\n" not in str(caught.value)
