"""Names and bodies of functions and classes as pairs."""

from pathlib import Path

from test_stdlib_corpus import find

from toolkit.data.stdlib_names import named_code


def test_every_definition_of_some_length_with_its_name_taken_out(tmp_path: Path):
    train, dev = (find(f"{split} text number {{}}", split) for split in ("train", "dev"))
    (tmp_path / "json").mkdir()
    long = "\n".join(f"    x = {i}" for i in range(100))
    (tmp_path / "json" / "__init__.py").write_text(
        f'''class _Outer(dict):
    """{train}"""

    def method(self, x):
        """{dev}"""
        if x:
            def inner(y):
                x = y
                inner(y)
                return x
        return x


def short(): return 5


async def many():
{long}
'''
    )
    pairs = dict(named_code(tmp_path))
    assert list(pairs) == ["Outer", "_Outer method", "inner", "many"]
    assert pairs["Outer"].startswith(f'class (dict):\n    """{train}"""') and "def method" in pairs["Outer"]
    assert pairs["_Outer method"].startswith("    def (self, x):\n        if x:")
    assert pairs["inner"].split("\n")[0].strip() == "def (y):" and "inner(y)" in pairs["inner"]
    assert pairs["many"].startswith("async def ():\n    x = 0") and len(pairs["many"].split("\n")) == 60
    assert not any(dev in code for code in pairs.values())
