"""Whatever a recipe file or --set holds, loading it gives a recipe or lines that say where and what is wrong."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from garbage import BROKEN, TEXT, VALUES, damaged, examples, line, outcome
from hypothesis import given
from hypothesis import strategies as st
from recipe_changes import RECIPES, TINY, changed, problems

from toolkit.recipe.schema import Recipe, load_recipe

SHIPPED = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.rglob("*.json"))]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("garbage") / "r.json"


def load(path: Path, data: bytes, *overrides: str) -> Recipe | str:
    """The recipe, which can be written and read again, or what is wrong with it, a place in each line."""
    path.write_bytes(data)
    found = outcome(lambda: load_recipe(path, overrides))
    if isinstance(found, Recipe):
        path.write_text(found.to_json(), encoding="utf-8")
        assert load_recipe(path) == found
    else:
        assert all(line.startswith((f"{path}: ", "--set ")) for line in found.split("\n"))
    return found


@examples(100)
@given(st.one_of(st.binary(max_size=40), VALUES.map(line), st.lists(BROKEN, max_size=4).map(b"".join)))
def test_any_bytes_and_any_json(path: Path, data: bytes):
    assert isinstance(load(path, data), str)


@examples(60)
@given(st.sampled_from(SHIPPED).map(line).flatmap(damaged))
def test_damaged_files(path: Path, data: bytes):
    load(path, data)


def places(value: Any, upto: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path of every key and entry of a JSON value, itself left out."""
    entries = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    return [found for key, inner in entries for found in ((*upto, key), *places(inner, (*upto, key)))]


def replaced(recipe: dict[str, Any], at: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    recipe = copy.deepcopy(recipe)
    node: Any = recipe
    for part in at[:-1]:
        node = node[part]
    node[at[-1]] = value
    return recipe


PLACES = [(recipe, place) for recipe in SHIPPED for place in places(recipe)]
# Parts of other places too, so that sections stand where they do not belong.
PARTS = st.sampled_from([value for recipe in SHIPPED[:3] for value in recipe["stages"][0].values()])


@examples(250)
@given(st.sampled_from(PLACES), st.one_of(VALUES, PARTS))
def test_any_part_replaced_by_anything(path: Path, where: tuple[dict[str, Any], tuple[str | int, ...]], value: Any):
    load(path, line(replaced(*where, value)))


SECTIONS = [(recipe, place) for recipe, place in PLACES if isinstance(place[-1], str)]


@examples(100)
@given(st.sampled_from(SECTIONS), TEXT, VALUES)
def test_any_key_added(path: Path, where: tuple[dict[str, Any], tuple[str | int, ...]], key: str, value: Any):
    recipe, (*upto, _) = where
    load(path, line(replaced(recipe, (*upto, key), value)))


KEYS = st.one_of(
    st.sampled_from([".".join(map(str, place)) for place in places(TINY)]),
    st.lists(
        st.one_of(TEXT, st.sampled_from(["stages", "0", "-1", "²", "\u0660", "9" * 5000, "optim"])), max_size=4
    ).map(".".join),
)
ASSIGNED = st.one_of(TEXT, VALUES.map(json.dumps), st.sampled_from(["[" * 100_000, "9" * 5000, "\udcff", "{"]))


@examples(150)
@given(st.lists(st.one_of(st.tuples(KEYS, ASSIGNED).map("=".join), TEXT), min_size=1, max_size=2))
def test_any_overrides(path: Path, overrides: list[str]):
    load(path, line(TINY), *overrides)


def test_the_property_is_able_to_fail(path: Path, monkeypatch: pytest.MonkeyPatch):
    assert isinstance(load(path, line(TINY)), Recipe)
    with monkeypatch.context() as patch:
        patch.setattr("toolkit.recipe.schema.one_line", str)
        with pytest.raises(AssertionError):
            load(path, line(replaced(TINY, ("stages", 0, "zero"), {"stage": 3, "offload_param": {"nvme": "a\nb"}})))
    with pytest.raises(AttributeError):
        load(path, line(TINY), 3)  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------- what was found once


def test_what_garbage_once_brought_down_is_one_line(tmp_path: Path):
    assert problems(tmp_path, TINY, "seed=" + "[" * 100_000) == [
        f"--set seed={'[' * 112}...: the value is nested too deeply for a recipe; flatten it"
    ]
    (entry,) = problems(tmp_path, TINY, f"stages.{'9' * 5000}=1")
    assert entry.endswith("...: stages has entries 0 to 1; name one of them") and len(entry) < 200
    (key,) = problems(tmp_path, TINY, "a\nb=1")
    assert key == "a\\nb: unknown key; known: description, hardware, memory, name, seed, sources, stages, time"
    place = {"stage": 3, "offload_param": {"nvme": "x" * 5000}}
    (nvme,) = problems(tmp_path, changed(("stages.0.zero", place)))
    assert nvme.endswith("xxx is no folder; create it on the NVMe disk of every node")
    (seed,) = problems(tmp_path, TINY, f"seed={2**53 + 1}")
    assert seed == 'seed: input should be a valid integer; found "9007199254740993"'
    assert load_recipe(_written(tmp_path, line(TINY)), (f"seed={2**53}",)).seed == 2**53


def test_a_section_of_many_keys_takes_no_time_of_its_square(tmp_path: Path):
    many = {"seed": {str(i): 1 for i in range(50_000)}}  # counting each key anew took minutes
    assert load_recipe_problem(tmp_path, line(TINY | many)).endswith(
        'seed: input should be a valid integer; found {"0": 1, "1": 1, "2": 1, "3": 1, "4":...'
    )


def test_a_byte_order_mark_and_windows_line_ends_are_no_fault(tmp_path: Path):
    text = json.dumps(TINY, indent=1).replace("\n", "\r\n")
    assert load_recipe(_written(tmp_path, b"\xef\xbb\xbf" + text.encode())) == load_recipe(
        _written(tmp_path, line(TINY))
    )
    assert "is not UTF-8 text" in load_recipe_problem(tmp_path, text.encode("utf-16"))


def load_recipe_problem(folder: Path, data: bytes) -> str:
    found = outcome(lambda: load_recipe(_written(folder, data)))
    assert isinstance(found, str)
    return found


def _written(folder: Path, data: bytes) -> Path:
    (folder / "r.json").write_bytes(data)
    return folder / "r.json"
