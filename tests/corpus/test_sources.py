"""What a listing may say, what a folder without one is found to hold, and what each file's fields are read as."""

import json
from pathlib import Path

import pytest

from pedgpt.corpus.sources import describe_sources, is_name, read_listing
from pedgpt.data.readers import field_mapping

SAMPLE = Path(__file__).resolve().parents[2] / "recipes" / "sample_corpus"


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "a.jsonl", [{"question": "孩子发烧吗？", "answer": "到医院检查。"}])
    write(tmp_path / "b.jsonl", [{"text": "小儿肺炎是常见病。"}])
    return tmp_path


def test_listing_of_the_sample_names_a_licence_for_every_source_and_misses_no_file():
    sources = read_listing(SAMPLE)
    assert read_listing(SAMPLE / "corpus.toml") == sources
    assert {source.licence for source in sources} == {"Apache-2.0"}
    files = {file.name for source in sources for file in source.files}
    assert files == {path.name for path in SAMPLE.iterdir() if path.suffix in (".jsonl", ".tsv")}


def test_keys_of_a_source_and_their_defaults(folder):
    (folder / "corpus.toml").write_text(
        """
[[source]]
file = ["a.jsonl", "b.jsonl"]
name = "both"
kind = "instructions"
domain = "general_medical"
task = "consultations"
licence = "CC BY 4.0"
weight = 2
epochs = 1.5
build = ["reconstruct"]
[[source]]
file = "b.jsonl"
kind = "textbook"
[[source]]
kind = "self_cognition"
assistant = "小安"
""",
        encoding="utf-8",
    )
    both, book, self_cognition = read_listing(folder)
    assert both.files == (folder / "a.jsonl", folder / "b.jsonl") and both.name == "both"
    assert (both.domain, both.task, both.licence) == ("general_medical", "consultations", "CC BY 4.0")
    assert (both.weight, both.epochs, both.build, both.reads) == (2.0, 1.5, ("reconstruct",), "conversations")
    assert (book.name, book.domain, book.licence, book.weight) == ("b", "pediatric", "not stated", 1.0)
    assert book.build == ("role_play",) and book.reads == "documents"
    assert (self_cognition.name, self_cognition.assistant, self_cognition.files) == ("self_cognition", "小安", ())


A = "[[source]]\nfile = 'a.jsonl'\n"


@pytest.mark.parametrize(
    ("listing", "told"),
    [
        ("[[source]\n", "not valid TOML"),
        ("\xff", "not valid TOML"),
        ("", r"expected \[\[source\]\]"),
        ("source = 3\n", r"expected \[\[source\]\]"),
        ("source = ['a.jsonl']\n", r"expected \[\[source\]\]"),
        ("[source]\nfile = 'a.jsonl'\n", r"expected \[\[source\]\]"),
        ("title = 1\n" + A + "kind = 'instructions'\n", r"expected \[\[source\]\] tables alone"),
        (A, "source 1: kind is None"),
        (A + "kind = 'talk'\n", "source 1: kind is 'talk', expected one of textbook"),
        (A + "kind = ['talk']\n", "source 1: kind is"),
        (A + "kind = 'instructions'\nlicense = 'MIT'\n", "unknown key 'license'; did you mean 'licence'"),
        (A + "kind = 'instructions'\ndomain = 'space'\n", "domain is 'space'"),
        (A + "kind = 'instructions'\ndomain = ''\n", "domain is ''"),
        (A + "kind = 'instructions'\ntask = '../x'\n", "task is '../x', expected letters"),
        (A + "kind = 'instructions'\nname = 'a b'\n", "name is 'a b', expected letters"),
        (A + "kind = 'instructions'\nlicence = 3\n", "licence is 3"),
        (A + "kind = 'instructions'\nweight = -1\n", "weight is -1"),
        (A + "kind = 'instructions'\nweight = nan\n", "weight is nan"),
        (A + "kind = 'instructions'\nepochs = true\n", "epochs is True"),
        (A + "kind = 'instructions'\nbuild = ['evidiag']\n", "build is .*list of builders among reconstruct"),
        (A + "kind = 'instructions'\nbuild = 'reconstruct'\n", "build is 'reconstruct', expected a list of texts"),
        (A + "kind = 'safety'\n", "file is 'a.jsonl', expected none for this kind"),
        ("[[source]]\nkind = 'instructions'\n", "file is None, expected a path or a list of paths"),
        ("[[source]]\nkind = 'instructions'\nfile = 3\n", "file is 3"),
        ("[[source]]\nkind = 'instructions'\nfile = 'c.jsonl'\n", "c.jsonl: found no such file"),
        (2 * (A + "kind = 'instructions'\n"), "source 2: the name 'a' is taken"),
        ("[[source]]\nkind = 'self_cognition'\nassistant = ' '\n", "assistant is ' ', expected some text"),
        ("[[source]]\nkind = 'self_cognition'\ndeveloper = ''\n", "developer is '', expected some text"),
    ],
)
def test_wrong_listing_is_an_error_that_says_where(folder, listing, told):
    (folder / "corpus.toml").write_bytes(listing.encode("latin-1"))
    with pytest.raises(ValueError, match=told) as error:
        read_listing(folder)
    assert str(folder / "corpus.toml") in str(error.value)


def test_no_such_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        read_listing(tmp_path / "nowhere")


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_many_folders_with_one_long_name_inside_are_sources_of_their_own(tmp_path):
    inside = "a_name_of_more_than_sixty_characters_that_many_folders_have_inside"
    for n in range(70):  # more than a name has characters
        path = tmp_path / f"part{n:02}" / inside / "train.jsonl"
        path.parent.mkdir(parents=True)
        write(path, [{"question": "问", "answer": "答"}])
    sources = read_listing(tmp_path)
    assert len({source.name for source in sources}) == 70 and all(is_name(source.name) for source in sources)


def test_folder_without_a_listing_is_read_by_content(folder):
    talk = turns("宝宝发热两天了", "有没有咳嗽？", "有咳嗽，痰多", "考虑支气管炎，建议检查。")
    write(folder / "c.jsonl", [{"messages": talk}] * 3 + [{"messages": talk[:2]}])
    write(folder / "d.jsonl", [{"messages": turns("写一首诗", "好的。", "再写一首", "好的。")}])
    write(folder / "e.json", [])
    (folder / "e.json").write_text(json.dumps([{"prompt": "问", "chosen": "甲", "rejected": "乙"}]), encoding="utf-8")
    (folder / "f g.tsv").write_text("百日咳\t症状\t咳嗽\n", encoding="utf-8")
    (folder / "f_g.txt").write_text("小儿肺炎", encoding="utf-8")
    (folder / "README.md").write_text("# 说明", encoding="utf-8")
    (folder / "scan.pdf").write_bytes(b"%PDF")
    left_out = {}
    sources = read_listing(folder, left_out=left_out)
    assert {source.name: (source.kind, source.domain) for source in sources} == {
        "a": ("instructions", ""), "b": ("encyclopedia", "pediatric"), "c": ("dialogues", ""),
        "d": ("instructions", ""), "e": ("preferences", ""), "f_g": ("knowledge_graph", ""),
        "f_g_2": ("encyclopedia", "pediatric"),
    }  # fmt: skip
    told = describe_sources(sources, folder, left_out)
    assert "README.md: not read" in told and "scan.pdf: not read" in told
    assert "a.jsonl: question, answer" in told


@pytest.mark.parametrize(
    ("kind", "row", "told"),
    [
        ("conversations", {"id": 1, "instruction": "问", "input": "", "output": "答", "history": [], "cate1": "儿科"},
         "instruction → question, input, output → answer, history, cate1 → department; ignored: id"),
        ("conversations", {"messages": turns("问", "答"), "task": "x"}, "messages, task"),
        ("conversations", {"department": "儿科", "question": "问", "raw_anwser": "答", "raw_case": "y"},
         "department, question, raw_anwser → answer; ignored: raw_case"),
        ("preferences", {"prompt": "问", "chosen": "甲", "rejected": "乙", "score": 1},
         "prompt, chosen, rejected; ignored: score"),
        ("documents", {"title": "题", "text": "文", "disease": "感冒", "page": 3},
         "title, text, disease; ignored: page"),
        ("triples", {"head": "a", "relation": "b", "tail": "c", "weight": 1}, "head, relation, tail; ignored: weight"),
    ],
)  # fmt: skip
def test_mapping_of_fields_is_told(tmp_path, kind, row, told):
    write(tmp_path / "x.jsonl", [row])
    assert field_mapping(tmp_path / "x.jsonl", kind) == told
