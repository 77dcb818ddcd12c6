"""Templates of prompts: what is checked when one is read, and how one is filled."""

import re
from pathlib import Path

import pytest

from toolkit.generate.flags import FORMS
from toolkit.generate.prompt import read_prompts
from toolkit.generate.template import SHIPPED, fill
from toolkit.recipe.errors import RecipeError

TEXT = (SHIPPED / "passages.toml").read_text(encoding="utf-8")


def changed(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "own.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("form", FORMS)
def test_the_shipped_template_is_one(form: str, tmp_path: Path):
    shipped = read_prompts(form, None, None, 1)
    assert read_prompts(form, changed(tmp_path), None, 1).hash() == shipped.hash()
    assert read_prompts(form, changed(tmp_path, ("# What", "# Which")), None, 2).hash() == shipped.hash()
    other = read_prompts(form, changed(tmp_path, ("Made for this need.", "Made for it.")), None, 1)
    assert other.hash() != shipped.hash()
    assert len({read_prompts(each, None, None, 1).hash() for each in FORMS}) == 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("Query: $query\n", "Query:\n"), r"\[together\]: no text holds \$query"),
        (
            ("Query: $query\n", "Query: $qeury\n"),
            r"\[together\]: user: unknown placeholder \$qeury; did you mean query",
        ),
        (
            ("Query: $query\n", "Query: $query costs $5\n"),
            r"\[together\]: user: a \$ begins no placeholder; write \$\$",
        ),
        (("[together] #", "[togehter] #"), r"unknown table 'togehter'; those of a template are grades, together"),
        (("\nsystem = '''", "\nsystme = '''"), r"\[together\]: unknown text 'systme'; did you mean system\?"),
        (('"0" = "A wrong hit', '"4" = "A wrong hit'), r"\[grades\] has 3, 2, 1, 4; write 3, 2, 1 and 0"),
        (('"news" = "- Written', '"news" = 3 # "- Written'), r"attributes.register.news: is no text"),
        (("[grades] #", "[grades #"), r"is no TOML \(.*line 7"),
    ],
)
def test_a_faulty_template_is_one_line(change: tuple[str, str], problem: str, tmp_path: Path):
    path = changed(tmp_path, change)
    with pytest.raises(RecipeError, match=problem) as told:
        read_prompts("together", path, None, 1)
    assert str(told.value).startswith(str(path)) and "\n" not in str(told.value)


def test_only_the_form_that_is_used_is_checked(tmp_path: Path):
    path = changed(tmp_path, ("Query: $query\n", "Query:\n"))
    assert read_prompts("one-by-one", path, None, 1).hash() == read_prompts("one-by-one", None, None, 1).hash()


def test_a_form_that_shows_nothing_of_before_has_no_text_for_it(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"\$earlier in user and the text earlier belong together"):
        read_prompts("one-by-one", changed(tmp_path, ("$earlier\n", "")), None, 1)
    path = tmp_path / "own.toml"
    path.write_text(re.sub(r"earlier = '''.*?'''", "", TEXT, flags=re.DOTALL).replace("\n$earlier\n", ""))
    assert not read_prompts("one-by-one", path, None, 1).follows()
    assert read_prompts("one-by-one", None, None, 1).follows()


def test_what_is_filled_in_is_not_looked_at_again():
    assert fill("a $query b $$5", {"query": "$query $$ ${grades}"}) == "a $query $$ ${grades} b $5"
    assert fill("a\n\n$query\n\nb", {"query": ""}) == "a\n\nb"
