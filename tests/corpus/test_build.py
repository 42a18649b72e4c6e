"""From each kind of source to its rows: the builders that are asked for, whose rows know their parents and tasks."""

from collections import Counter
from dataclasses import replace
from itertools import chain, combinations

import pytest

from pedgpt.corpus.build import Step, build, build_disease, build_graph, build_templates, divided, stages, table_of
from pedgpt.corpus.builders.knowledge_graph import Disease
from pedgpt.corpus.classify import DOMAINS
from pedgpt.corpus.rows import Built, Dropped, texts
from pedgpt.corpus.sources import KINDS, Source
from pedgpt.data import Conversation, Document, Message, PreferencePair

BOOK = Document(
    "# 第一章 肺炎\n\n## 临床表现\n\n患儿多有发热、咳嗽和气促，重者出现呼吸困难。肺部可闻及湿啰音。\n\n"
    "## 治疗\n\n一般治疗包括休息和补充水分，保持呼吸道通畅。细菌感染者在医生指导下使用抗生素治疗。\n\n"
    "# 第二章 水痘\n\n## 预防\n\n接种水痘疫苗可以预防水痘。患儿应隔离至全部疱疹结痂，避免接触其他儿童。\n",
    "book.md",
)
DISEASE = Disease(
    "百日咳",
    {"症状": ["阵发性咳嗽", "鸡鸣样回声", "呕吐"], "好发年龄": ["婴儿"], "病因": ["百日咳杆菌"], "检查": ["血常规"],
     "治疗": ["隔离休息"], "预防": ["接种疫苗"], "并发症": ["肺炎"], "传播途径": ["飞沫"]},
)  # fmt: skip
OTHER = Disease(
    "手足口病",
    {"症状": ["皮疹", "口腔疱疹", "流涎"], "好发年龄": ["幼儿"], "病因": ["肠道病毒"], "检查": ["咽拭子"],
     "治疗": ["对症处理"], "预防": ["勤洗手"], "并发症": ["脑膜炎"]},
)  # fmt: skip


def talk(*turns, system="", **fields):
    spoken = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns))
    return Conversation(((Message("system", system),) if system else ()) + spoken, "talk.jsonl:3", **fields)


SINGLE = talk("孩子发烧三天，怎么治疗？", "发热时多喝水，注意休息，可以物理降温，建议到医院检查血常规。")
SEVERAL = talk("孩子发烧三天了", "有没有咳嗽？", "有咳嗽，痰多", "考虑支气管炎，建议到医院拍胸片，查血常规。")
POEM = talk("写一首诗", "春风拂面，柳絮纷飞，万物生长。")


def source(kind, *builders, **fields):
    return Source(kind, kind, build=builders or (() if fields.pop("nothing", False) else KINDS[kind][1]), **fields)


def subsets(kind):
    names = KINDS[kind][1] + KINDS[kind][2]
    return chain.from_iterable(combinations(names, n) for n in range(len(names) + 1))


def rows(steps):
    return [step for step in steps if isinstance(step.row, Built)]


def assert_parents_are_right(steps):
    """A parent comes before its child and is a row, or was left out; a pair asks what its parent asks."""
    for i, step in enumerate(steps):
        assert -1 <= step.parent < i
        if step.builder in ("role_play", "preferences"):
            parent = steps[step.parent]
            assert step.parent >= 0 and isinstance(parent.row, Built)
            if isinstance(step.row, Built):
                assert step.row.record.source == parent.row.record.source
            if step.builder == "role_play":
                assert isinstance(parent.row.record, Document)
            elif isinstance(step.row, Built):
                assert isinstance(parent.row.record, Conversation)
                prompt = [message for message in parent.row.record.messages[:-1]]
                assert list(step.row.record.prompt) == prompt
                assert step.row.details["correct"] == parent.row.record.messages[-1].content.strip()
        else:
            assert step.parent == -1


def built(document, source):
    steps = []
    for passage in divided([document], source):
        found = build(passage, source)
        assert_parents_are_right(found)
        steps += found
    return steps


@pytest.mark.parametrize("kind", ["textbook", "guideline"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_book_gives_its_passages_then_what_is_built_of_each(kind, domain):
    for builders in subsets(kind):
        of = Source(kind, "book", domain=domain, build=builders)
        steps = built(BOOK, of)
        plain = [step.row.record for step in steps if step.builder == ""]
        assert [record.source for record in plain] == [
            "book.md:5 › 第一章 肺炎 › 临床表现", "book.md:9 › 第一章 肺炎 › 治疗", "book.md:15 › 第二章 水痘 › 预防",
        ]  # fmt: skip
        assert {table_of(record, of) for record in plain} == {f"text/{domain}"}
        assert all("#" not in record.text for record in plain) and "接种水痘疫苗" in plain[-1].text
        made = {step.builder for step in steps} - {""}
        assert made <= set(builders) and ("role_play" in made) == ("role_play" in builders)
        assert made <= {"role_play"} or "role_play" in builders  # pairs are made of what role play gives
        for step in rows(steps):
            if step.builder == "role_play":
                table = table_of(step.row.record, of)
                assert table.startswith("tasks/") if domain == "pediatric" else table == f"generalist/{domain}"
    of = Source(kind, "book", build=("role_play", "preferences"))
    for both in (build(passage, of) for passage in divided([BOOK], of)):
        parents = [i for i, s in enumerate(both) if s.builder == "role_play" and s.row.details["role"] == "parent"]
        assert sorted({step.parent for step in both if step.builder == "preferences"}) == parents


def test_encyclopedia_is_text_as_it_is():
    text = replace(BOOK, text=BOOK.text[:200])
    for domain in DOMAINS:
        of = Source("encyclopedia", "e", domain=domain)
        assert build(text, of) == [Step("", Built(text))] and table_of(text, of) == f"text/{domain}"
    assert table_of(text, Source("encyclopedia", "e", domain="")) == "text/pediatric"


@pytest.mark.parametrize("of", [Source("preferences", "p", domain=domain) for domain in DOMAINS])
def test_pairs_are_rows_as_they_are(of):
    pair = PreferencePair((Message("user", "孩子咳嗽？"),), "别急，先观察。", "观察。", "p:1", "感冒", "儿科")
    assert build(pair, of) == [Step("", Built(pair))] and table_of(pair, of) == "preferences"


TASKS = [
    # (kind, domain, the listing's task, the row's task, the row) -> the table
    ("instructions", "pediatric", "", "", SINGLE, "tasks/trerecom"),
    ("instructions", "pediatric", "", "", SEVERAL, "tasks/evidiag"),
    ("instructions", "pediatric", "", "", POEM, "tasks/medkqa"),  # said to be pediatric, whatever its words
    ("instructions", "general_medical", "", "", SINGLE, "generalist/general_medical"),
    ("instructions", "general", "", "", SEVERAL, "generalist/general"),
    ("instructions", "", "", "", SINGLE, "tasks/trerecom"),
    ("instructions", "", "", "", POEM, "generalist/general"),
    ("instructions", "", "", "", talk("高血压患者能喝酒吗？", "少喝，按医生要求治疗。"), "generalist/general_medical"),
    ("instructions", "pediatric", "safety", "MedKQ&A", SINGLE, "generalist/safety"),
    ("instructions", "general", "TreRecom", "", POEM, "tasks/trerecom"),
    ("instructions", "general", "", "儿科问答", SINGLE, "generalist/儿科问答"),
    ("instructions", "general", "", "MedKQ&A", SINGLE, "tasks/medkqa"),
    ("instructions", "", "", "../evil", SINGLE, "tasks/trerecom"),
    ("instructions", "pediatric", "", "a b", SEVERAL, "tasks/evidiag"),
    ("instructions", "pediatric", "", "x" * 61, SINGLE, "tasks/trerecom"),
    ("instructions", "general", "", "a\n", POEM, "generalist/general"),
    ("dialogues", "pediatric", "", "", SEVERAL, "tasks/evidiag"),
    ("dialogues", "pediatric", "", "", SINGLE, "tasks/trerecom"),  # no dialogue
    ("dialogues", "general_medical", "", "", SEVERAL, "generalist/general_medical"),
    ("dialogues", "", "", "", SEVERAL, "tasks/evidiag"),
    ("dialogues", "pediatric", "MedKQ&A", "", SEVERAL, "tasks/medkqa"),
    ("dialogues", "pediatric", "", "TreRecom", SEVERAL, "tasks/trerecom"),
    ("dialogues", "pediatric", "EviDiag", "", SINGLE, "tasks/evidiag"),  # the listing has the last word
]


@pytest.mark.parametrize(("kind", "domain", "task", "own", "row", "table"), TASKS)
def test_task_is_the_listings_or_the_rows_or_the_domains(kind, domain, task, own, row, table):
    for builders in subsets(kind):
        of = Source(kind, "talk", domain=domain, task=task, build=builders)
        steps = build(replace(row, task=own), of)
        assert_parents_are_right(steps)
        (first,) = [step for step in rows(steps) if isinstance(step.row.record, Conversation)]
        assert table_of(first.row.record, of) == table
        assert "/".join(table.split("/")[1:]) and "/" not in first.row.record.task
        assert first.builder in ("", *builders)
        assert {table_of(s.row.record, of) for s in rows(steps) if s is not first} <= {"preferences"}


def test_single_turn_of_another_domain_is_not_called_pediatric_for_its_rows_own_task():
    row = replace(SINGLE, task="EviDiag")  # a dialogue by its own word, but of one turn
    (step,) = build(row, Source("instructions", "talk", domain="general_medical"))
    assert table_of(step.row.record, Source("instructions", "talk", domain="general_medical")) == (
        "generalist/general_medical"
    )


def test_dialogue_keeps_its_fields_system_message_and_what_carries_no_loss():
    row = talk(*texts(SEVERAL), system="你是儿科医生。", disease="支气管炎", department="儿科")
    row = replace(row, messages=(*row.messages[:2], replace(row.messages[2], loss=False), *row.messages[3:]))
    for kind in ("dialogues", "instructions"):
        for builders in subsets(kind):
            first = build(row, Source(kind, "talk", build=builders))[0].row.record
            assert first.messages[0] == row.messages[0]
            assert [message.loss for message in first.messages] == [True, True, False, True, True]
            assert (first.source, first.disease, first.department) == (row.source, "支气管炎", "儿科")


def test_conversation_as_it_is_changes_in_its_task_alone():
    steps = build(SEVERAL, Source("instructions", "talk"))
    assert steps == [Step("", Built(replace(SEVERAL, task="EviDiag")))]


def test_row_that_a_builder_leaves_out_is_given_with_its_reason():
    thanks = talk("好的谢谢医生", "不客气，祝早日康复。", "好的，再见", "再见。")
    (step,) = build(thanks, Source("dialogues", "talk", build=("evidiag",)))
    assert isinstance(step.row, Dropped) and step.row.source == "talk.jsonl:3" and step.row.reason
    steps = build(talk("孩子发烧？", "嗯。"), Source("instructions", "talk", build=("reconstruct", "preferences")))
    assert [type(step.row) for step in steps] == [Dropped]  # and no pair of what is not there


GRAPH = ("medkqa", "evidiag", "trerecom", "two_hop", "negative")
GRAPH_TABLES = {"medkqa": {"tasks/medkqa"}, "evidiag": {"tasks/evidiag"}, "trerecom": {"tasks/trerecom"},
                "two_hop": {"tasks/medkqa", "tasks/trerecom"}, "negative": {"tasks/medkqa"}}  # fmt: skip


def test_graph_gives_the_builders_that_are_asked_for_in_order():
    whole = {name: list(build_graph([DISEASE, OTHER], source("knowledge_graph", name))) for name in GRAPH}
    for name, steps in whole.items():
        assert steps and {step.builder for step in steps} == {f"graph/{name}"}
        assert {table_of(step.row.record, source("knowledge_graph")) for step in steps} <= GRAPH_TABLES[name]
        assert {step.row.record.disease for step in steps} <= {"百日咳", "手足口病"}
        assert {step.parent for step in steps} == {-1}
    for builders in subsets("knowledge_graph"):
        steps = list(build_graph([DISEASE, OTHER], Source("knowledge_graph", "g", build=builders)))
        assert steps == [step for name in GRAPH if name in builders for step in whole[name]]


def test_disease_gives_text_and_pairs_if_asked_for():
    for builders in subsets("knowledge_graph"):
        steps = build_disease(DISEASE, Source("knowledge_graph", "g", build=builders))
        found = Counter(step.builder for step in steps)
        assert found["graph/text"] == 2 * ("text" in builders)
        assert bool(found["graph/preferences"]) == ("preferences" in builders)
        assert set(found) <= {"graph/text", "graph/preferences"}
        for step in rows(steps):
            assert step.row.record.disease == "百日咳"
            assert isinstance(step.row.record, Document if step.builder == "graph/text" else PreferencePair)


def test_hostile_graph_names_are_text():
    facts = {**DISEASE.facts, "症状": ["{tails}", "{}", "%s"], "generic": ["{0}"]}
    odd = Disease("{head}病|$x$", facts)
    made = [*build_graph([odd, OTHER], source("knowledge_graph")), *build_disease(odd, source("knowledge_graph"))]
    assert any("{head}病|$x$" in text and "{tails}" in text for step in made for text in texts(step.row.record))
    assert any("{0}" in text for step in made for text in texts(step.row.record))


@pytest.mark.parametrize("symptoms", [400])
def test_disease_with_many_symptoms_takes_no_longer_than_it_must(symptoms):
    """All orderings of three of 400 are 63 million: eight are wanted."""
    resource = pytest.importorskip("resource")
    facts = {**DISEASE.facts, "症状": [f"{chr(0x4E00 + i)}{chr(0x6E00 + i)}痛" for i in range(symptoms)]}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, hard))
    try:
        steps = list(build_graph([replace(DISEASE, facts=facts)], source("knowledge_graph", "evidiag")))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert len(steps) == 8


def test_templates_of_sources_without_files():
    safety = build_templates(source("safety"))
    assert safety and {step.builder for step in safety} == {"safety"}
    assert {table_of(step.row.record, source("safety")) for step in safety} == {"generalist/safety"}
    named = build_templates(Source("self_cognition", "s", assistant="小安{developer}", developer="某所"))
    assert {table_of(step.row.record, source("self_cognition")) for step in named} == {"generalist/self_cognition"}
    assert any("小安{developer}" in step.row.record.messages[1].content for step in named)
    assert not any("{assistant}" in text for step in named for text in texts(step.row.record))


def test_stages_of_every_table():
    expected = {
        "text/pediatric": [1], "text/general": [1], "text/general_medical": [1],
        "tasks/medkqa": [1, 4], "tasks/evidiag": [1, 4], "tasks/trerecom": [1, 4], "tasks_sample": [2],
        "generalist/general": [1, 2], "generalist/safety": [1, 2], "generalist/general_medical": [1, 2, 4],
        "generalist/preferences": [1, 2], "generalist/tasks_sample": [1, 2], "preferences": [3],
    }  # fmt: skip
    assert {name: stages(name) for name in expected} == expected


def test_builders_ask_the_teachers_that_they_are_given():
    asked = Counter()

    def teacher(name):
        def ask(system, user, fields):
            asked[name] += 1
            values = {"question": "肺炎的孩子有什么表现？", "role": "parent", "answer": "多有发热、咳嗽和气促。",
                      "evidence": "患儿多有发热、咳嗽和气促", "score": 5, "reason": "好", "text": "百日咳"}  # fmt: skip
            return {field: values[field] for field in fields}

        return ask

    ask, plain = teacher("ask"), teacher("plain")
    graph, book = source("knowledge_graph", "text", "preferences"), source("textbook", "role_play")
    pairs = source("instructions", "preferences")
    for work, given, name in (
        (build, (BOOK, book, ask), "ask"), (build_disease, (DISEASE, graph, ask), "ask"),
        (build, (SINGLE, pairs, None, plain), "plain"), (build_disease, (DISEASE, graph, None, plain), "plain"),
    ):  # fmt: skip
        assert work(*given) and asked.pop(name) > 0 and not asked
