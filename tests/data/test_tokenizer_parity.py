"""A small form of benchmarks/check_tokenizers.py, on a sample of the open medical data where that lies beside us."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("sentencepiece")

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_tokenizers", ROOT / "benchmarks" / "check_tokenizers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not DATA.is_dir(), reason="the open medical data is not there")
def test_ids_and_texts_match_sentencepiece_and_transformers(script, tmp_path):
    found = script.texts_of(DATA)
    assert len(found) > 30_000
    rows = list(script.check(tmp_path, found[::90] + script.random_texts(300), found[::90], 3000))
    assert [row.name for row in rows] == ["baichuan2", "llama2", "no_bytes", "llama3", "qwen"]
    for row in rows:
        print(row)
        assert (row.wrong_ids, row.wrong_texts) == ([], []) and row.texts > 630


def test_every_string_of_a_folder_is_compared(script, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "热", "turns": [["咳", {"v": "痰"}], 5, null]}\n\n{"q": "热"}\n')
    (tmp_path / "b.csv").write_text('name,text\r\n儿科,"两行\n一格"\r\n')
    (tmp_path / "c.md").write_text("# 文\n")
    (tmp_path / "d.bin").write_bytes(b"\xff")
    assert script.texts_of(tmp_path) == ["热", "咳", "痰", "name", "text", "儿科", "两行\n一格", "# 文\n"]


def test_a_mismatch_is_found(script):
    class Wrong:
        document_prefix: list[int] = []
        encode = staticmethod(lambda text: [0] * len(text))
        decode = staticmethod(lambda ids: "x" * len(ids))

    right = lambda text: [len(text)]  # noqa: E731
    assert script.compare(Wrong, ["", "ab"], right, lambda ids: "x") == (["", "ab"], [])
