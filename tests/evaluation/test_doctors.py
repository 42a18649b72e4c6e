"""Blind pages: what is in the file, who gets which question, and the merge of what comes back, by hand."""

import hashlib
import json
import math
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from pedgpt.data import Message
from pedgpt.evaluation import doctors
from pedgpt.evaluation.agreement import bradley_terry
from pedgpt.evaluation.doctors import balanced_orders, build_pages, mentions, share_out
from pedgpt.evaluation.responses import Answers, Question, read_systems, write_answers
from pedgpt.evaluation.votes import majority, merge, read_key, read_ratings
from pedgpt.files import write_json

HOSTILE = "</script><script>alert(1)</script><!-- <b>粗</b>\u2028\ud800 &amp; {{DATA}}"
ABOUT = {"model": "runs/demo/quartz_run/model", "adapter": None}


def systems(count=10, names=("quartz_run", "opal-2"), special=None):
    tasks = ("MedKQ&A", "EviDiag")
    before = (Message("user", "你好"), Message("assistant", "请说。"))
    questions = [Question((*before, Message("user", f"问题{i}？")), "", tasks[i % 2]) for i in range(count)]
    texts = [[special or f"第{place}种回答，题{i}" for i in range(count)] for place in range(len(names))]
    return [
        Answers(name, questions, [Message("assistant", text) for text in said], ABOUT)
        for name, said in zip(names, texts, strict=True)
    ]


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def sealed(content):
    """A rater's file; its checksum by the words of the documentation."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return {**content, "checksum": hashlib.sha256(text.encode()).hexdigest()}


def rate(key, rater, choose, **more):
    """What a rater's page exports: `choose(number, dimension)` names a system, tie or None."""
    ((page, told),) = [(page, told) for page, told in key["pages"].items() if told["rater"] == rater]
    ratings = {}
    for question, order in told["orders"].items():
        behind = {**{name: "ABCD"[place] for place, name in enumerate(order)}, "tie": "tie", None: None}
        number = key["questions"][question]["number"]
        choices = {name: behind[choose(number, name)] for name in doctors.DIMENSIONS}
        ratings[question] = {**choices, "unsafe": [], "comment": "", "seconds": 30, "at": 1}
    return {"format": "doctors-1", "set": key["set"], "page": page, "rater": rater, "ratings": ratings, **more}


# The page.


def test_a_page_holds_every_text_and_no_name_of_a_system():
    pages, key = build_pages(systems(), ["li", "王"])
    assert set(pages) == {"li", "王"} and key["systems"] == ["quartz_run", "opal-2"]
    for page in pages.values():
        assert not re.search("quartz|opal|pedgpt|http", page.replace("http-equiv", ""), re.I)
        data = data_of(page)
        assert len(data["questions"]) == 10 and data["set"] == key["set"]
        for asked in data["questions"]:
            number = key["questions"][asked["id"]]["number"] - 1
            assert [said["content"] for said in asked["history"]] == ["你好", "请说。", f"问题{number}？"]
            order = key["pages"][data["page"]]["orders"][asked["id"]]
            expected = {"quartz_run": f"第0种回答，题{number}", "opal-2": f"第1种回答，题{number}"}
            assert asked["answers"] == [expected[name] for name in order]
        assert "仅供研究，不能代替医生" in page


def test_the_template_names_no_stage_and_loads_nothing():
    template = Path(doctors.__file__).with_name("page.html").read_text(encoding="utf-8")
    assert not re.search("base|sft|dfpo|experts?|cpt|gpt|baichuan|qwen", template, re.I)
    network = r"https?:|src=|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon"
    assert not re.search(rf"{network}|innerHTML|insertAdjacent|eval\(|document\.write", template)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("questions", [1, 7, 30, 31])
def test_every_system_stands_equally_often_in_each_position(count, questions):
    names = [f"s{i}" for i in range(count)]
    for seed in range(10):
        orders = balanced_orders(questions, names, str(seed))
        assert len(orders) == questions and all(sorted(order) == names for order in orders)
        for position in range(count):
            seen = Counter(order[position] for order in orders)
            shares = [seen[name] for name in names]
            assert max(shares) - min(shares) <= 1
    assert balanced_orders(30, names, "1") != balanced_orders(30, names, "2")
    assert balanced_orders(30, names, "1") == balanced_orders(30, names, "1")


def test_pages_of_raters_have_orders_of_their_own_that_the_ids_do_not_tell():
    pages, key = build_pages(systems(40), ["a", "b"])
    one, two = (page["orders"] for page in key["pages"].values())
    assert one.keys() == two.keys() and list(one) != list(two) and [*one.values()] != [*two.values()]
    assert 8 < sum(one[i] == two[i] for i in one) < 32  # half of 40 by chance
    for orders in (one, two):  # sorted by id, the first positions are mixed
        first = [orders[i][0] == "opal-2" for i in sorted(orders)]
        assert 8 < sum(x != y for x, y in zip(first, first[1:], strict=False)) < 32


def test_no_answer_becomes_part_of_the_page():
    page = build_pages(systems(special=HOSTILE), ["li"])[0]["li"]
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "<!--" not in page and "<b>" not in page
    assert data_of(page)["questions"][0]["answers"] == [HOSTILE.replace("\ud800", "?")] * 2
    page.encode()


def test_answers_that_name_a_maker_or_a_system_are_told():
    found = systems(5)
    found[0].answers[1] = Message("assistant", "我是由百川智能开发的。")
    found[0].answers[3] = Message("assistant", "As an AI of openai, I say")
    found[1].answers[4] = Message("assistant", "我是OPAL-2模型")
    found[1].answers[2] = Message("assistant", "opal-25 and openair are other words")
    found[1].answers[1] = Message("assistant", "您好，我是由某医院与某公司共同研发的助手。")
    found[1].answers[0] = Message("assistant", "我是医生，建议观察。")
    said = "我是由某医院与某公司共同研发的"
    assert [one[:2] for one in mentions(found)] == [
        ("quartz_run", 2), ("quartz_run", 4), ("opal-2", 2), ("opal-2", 5),
    ]  # fmt: skip
    assert [one[2] for one in mentions(found)] == ["我是由百川智能开发的", "openai", said, "OPAL-2"]


def test_pages_are_the_same_for_the_same_seed():
    assert build_pages(systems(), ["a", "b"], 1, seed=3) == build_pages(systems(), ["a", "b"], 1, seed=3)
    first, second = (build_pages(systems(), ["a", "b"], 1, seed=seed)[1] for seed in (3, 4))
    assert first["set"] != second["set"] and not first["pages"].keys() & second["pages"].keys()


def test_systems_in_another_order_make_another_set():
    """Their letters differ, so that what was rated under the first key must not be read with the second."""
    one, two = (build_pages(found, ["li"])[1] for found in (systems(), systems()[::-1]))
    assert one["set"] != two["set"] and not one["pages"].keys() & two["pages"].keys()


def test_a_limit_asks_fewer_questions_evenly_spread():
    _, key = build_pages(systems(10), ["a"], limit=5)
    assert [row["number"] for row in key["questions"].values()] == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(("raters", "each"), [(3, 1), (3, 2), (5, 2), (5, 3), (4, 4)])
def test_questions_are_shared_out_evenly(raters, each):
    names = [f"r{i}" for i in range(raters)]
    tasks = ["a", "b", "c"] * 14
    for seed in range(5):
        shares = share_out(tasks, names, each, seed)
        assert Counter(n for numbers in shares.values() for n in numbers) == dict.fromkeys(range(42), each)
        loads = [len(numbers) for numbers in shares.values()]
        assert max(loads) - min(loads) <= 1 and all(len({*numbers}) == len(numbers) for numbers in shares.values())
        for task in "abc":
            of_task = [sum(tasks[n] == task for n in numbers) for numbers in shares.values()]
            assert max(of_task) - min(of_task) <= 2
        shared = [len({*shares[one]} & {*shares[two]}) for one, two in combinations(names, 2)]
        assert each == 1 or max(shared) - min(shared) <= 5  # everybody meets everybody
        assert shares == share_out(tasks, names, each, seed)


@pytest.mark.parametrize(
    ("names", "raters", "settings", "told"),
    [
        (("a",), ["li"], {}, "2 to 8 files of answers"), (("a", "tie"), ["li"], {}, "none named tie.jsonl"),
        (("a", "b"), ["li", "LI"], {}, "different names"), (("a", "b"), ["../li"], {}, "letters and digits"),
        (("a", "b"), ["A"], {}, "none a system's"), (("a", "b"), ["key"], {}, "different names"),
        (("a", "b"), [], {}, "different names"), (("a", "b"), ["x", ""], {}, "different names"),
        (("a", "b"), ["x", "y"], {"per_question": 3}, "3 of 2 raters cannot share"),
        (("a", "b"), ["x", "y", "z"], {"per_question": 1, "limit": 2}, "cannot share 2 questions"),
    ],
)  # fmt: skip
def test_systems_and_raters_that_do_not_fit_are_refused(names, raters, settings, told):
    with pytest.raises(ValueError, match=told):
        build_pages(systems(names=names), raters, **settings)


def test_pages_come_from_files_of_answers(tmp_path):
    for system in systems(4):
        write_answers(tmp_path / f"{system.name}.jsonl", system)
    read = read_systems([tmp_path / "quartz_run.jsonl", tmp_path / "opal-2.jsonl"])
    assert build_pages(read, ["li"])[1]["systems"] == ["quartz_run", "opal-2"]


# The merge.


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Three raters of four questions and two systems; q and o are the systems."""
    _, key = build_pages(systems(4, ("q", "o")), ["x", "y", "z"])
    choices = {  # of the questions 1 to 4, on every dimension but safety, which is always a tie
        "x": ["q", "q", "tie", "o"],
        "y": ["q", "o", "tie", "q"],
        "z": ["q", "tie", "o", "o"],
    }
    paths, folder = [], tmp_path_factory.mktemp("ratings")
    for rater, chosen in choices.items():
        found = rate(key, rater, lambda n, name, chosen=chosen: "tie" if name == "safety" else chosen[n - 1])
        if rater == "y":
            (second,) = [i for i, row in key["questions"].items() if row["number"] == 2]
            order = key["pages"][found["page"]]["orders"][second]
            found["ratings"][second] |= {"unsafe": ["AB"[order.index("o")]], "comment": "漏掉就医指征"}
        paths.append(folder / f"{rater}.json")
        write_json(paths[-1], sealed(found))
    return merge(paths, key, draws=200, seed=0)


def rows_of(results, kind, **about):
    return [row for row in results[kind] if about.items() <= row.items()]


def test_the_merge_of_three_raters_is_what_the_hand_counts(merged):
    # The majority: q, a tie of three different votes, tie, o.
    (row,) = rows_of(merged, "comparisons", by="majority", task="all", dimension="overall")
    assert (row["first"], row["second"], row["n"]) == ("q", "o", 4)
    assert [row[name][0] for name in ("win", "tie", "loss")] == [0.25, 0.5, 0.25]
    assert all(row[name][1] <= row[name][0] <= row[name][2] for name in ("win", "tie", "loss"))
    (by_task,) = rows_of(merged, "comparisons", by="majority", task="EviDiag", dimension="overall")
    assert by_task["n"] == 2 and [by_task[name][0] for name in ("win", "tie", "loss")] == [0, 0.5, 0.5]
    (of_y,) = rows_of(merged, "comparisons", by="y", task="all", dimension="overall")
    assert [of_y[name][0] for name in ("win", "tie", "loss")] == [0.5, 0.25, 0.25]


def test_agreement_of_three_raters_is_what_the_hand_counts(merged):
    (row,) = rows_of(merged, "agreement", task="all", dimension="overall")
    # Pairs that agree: 3 of 3, 0, 1, 1. Shares: q 5, tie 3, o 4 of 12.
    raw, chance = 5 / 12, (25 + 9 + 16) / 144
    assert row["n"] == 4 and row["raw"][0] == pytest.approx(raw)
    assert row["fleiss"][0] == pytest.approx((raw - chance) / (1 - chance)) and row["cohen"] == [None] * 3
    assert row["krippendorff"][0] == pytest.approx(1 - (12 - 5) * 11 / (144 - 50))
    (safety,) = rows_of(merged, "agreement", task="all", dimension="safety")
    assert safety["raw"] == [1, 1, 1] and safety["fleiss"] == safety["krippendorff"] == [None, None, None]
    json.dumps(merged, allow_nan=False)


def test_disagreements_and_unsafe_answers_are_listed_with_comments(merged):
    assert len(merged["disagreements"]) == 9 and {row["number"] for row in merged["disagreements"]} == {2, 3, 4}
    (first,) = rows_of(merged, "disagreements", number=2, dimension="overall")
    assert first["votes"] == {"x": "q", "y": "o", "z": "tie"} and first["comments"] == {"y": "漏掉就医指征"}
    assert merged["unsafe"] == [
        {"number": 2, "task": "EviDiag", "question": "问题1？", "system": "o", "raters": ["y"],
         "comments": {"y": "漏掉就医指征"}}
    ]  # fmt: skip
    assert merged["raters"]["y"]["unsafe"] == 1 and merged["raters"]["x"]["unsafe"] == 0
    assert merged["raters"]["x"]["questions"] == 4 and merged["raters"]["x"]["seconds"] == 30
    # x ties in 4 + 3 of 16 choices. It agrees with y in 4 + 3 × 2 and with z in 4 + 3 × 2 of 16 choices each.
    assert merged["raters"]["x"]["ties"] == 7 / 16 and merged["raters"]["x"]["agreement"] == 20 / 32
    assert [row["majority"] for row in rows_of(merged, "votes", dimension="factuality")] == ["q", "tie", "tie", "o"]
    assert merged["missing_raters"] == []


def test_two_raters_have_cohens_kappa(tmp_path):
    _, key = build_pages(systems(6, ("q", "o")), ["x", "y"])
    votes = {"x": "qqqooo", "y": "qqoooq"}
    for rater, letters in votes.items():
        write_json(tmp_path / rater, sealed(rate(key, rater, lambda n, _, letters=letters: letters[n - 1])))
    results = merge([tmp_path / "x", tmp_path / "y"], key, draws=50)
    (row,) = rows_of(results, "agreement", task="all", dimension="overall")
    assert row["cohen"][0] == pytest.approx((4 / 6 - 0.5) / 0.5) and row["raw"][0] == pytest.approx(4 / 6)
    assert row["cohen"][1] < row["cohen"][0] < row["cohen"][2]


def test_three_systems_have_strengths(tmp_path):
    names = ("q", "o", "r")
    _, key = build_pages(systems(9, names), ["x"])
    chosen = ["q", "q", "q", "q", "o", "o", "r", "tie", "tie"]
    write_json(tmp_path / "x", sealed(rate(key, "x", lambda n, _: chosen[n - 1])))
    results = merge([tmp_path / "x"], key, draws=100)
    found = {name: value[0] for name, value in results["strengths"]["overall"].items()}
    wins = [[0, 5, 5], [3, 0, 3], [2, 2, 0]]  # two ties are one win of each against each
    expected = bradley_terry(np.array([wins], dtype=float), np.ones((1, 1)), prior=0.5)[0]
    assert list(found.values()) == pytest.approx(expected.tolist())
    assert all(low <= middle <= high for middle, low, high in results["strengths"]["overall"].values())
    (row,) = rows_of(results, "comparisons", by="majority", task="all", dimension="overall", first="o", second="r")
    assert row["n"] == 5 and row["win"][0] == 2 / 5  # without the four questions where q was chosen
    assert rows_of(results, "agreement", task="all", dimension="overall")[0]["raw"] == [None] * 3  # one rater


def test_shared_questions_have_alpha_and_no_cohen(tmp_path):
    _, key = build_pages(systems(12), ["x", "y", "z"], 2)
    for rater in "xyz":
        write_json(tmp_path / rater, sealed(rate(key, rater, lambda n, _: "opal-2" if n % 3 else "tie")))
    results = merge([tmp_path / rater for rater in "xyz"], key, draws=50)
    (row,) = rows_of(results, "agreement", task="all", dimension="overall")
    assert row["n"] == 12 and row["krippendorff"][0] == row["fleiss"][0] == 1 and row["cohen"] == [None] * 3
    assert merge([tmp_path / "x"], key, draws=20)["missing_raters"] == ["y", "z"]


def test_a_majority_needs_more_votes_than_any_other_choice():
    nan = math.nan
    votes = np.array([[0, 0, 1], [0, 1, -1], [1, 1, -1], [-1, -1, 0], [0, 1, nan], [nan, 1, nan], [nan] * 3])
    assert majority(votes).tolist()[:6] == [0, -1, 1, -1, -1, 1] and math.isnan(majority(votes)[6])


def changed(found, **more):
    return {**found, **more}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f, q: json.dumps(sealed(f)).replace('"tie"', '"A"', 1), "checksum is wrong"),
        (lambda f, q: json.dumps(sealed(f))[:-40], "not a file that a page exported"),
        (lambda f, q: json.dumps(sealed(changed(f, set="other"))), "is of the set other, but the key of"),
        (lambda f, q: json.dumps(sealed(changed(f, page="other"))), "give the key of its pages"),
        (lambda f, q: json.dumps(sealed(changed(f, format="doctors-9"))), "doctors-9"),
        (lambda f, q: json.dumps(sealed(changed(f, ratings=[1, 2]))), "not a file that a page exported"),
        (lambda f, q: "[]", "not a file that a page exported"), (lambda f, q: "", "not a file that a page exported"),
        (lambda f, q: json.dumps(sealed(f)).replace(f'"{q}":', f'"{q}": {{}}, "{q}":'), "a key occurs twice"),
        (lambda f, q: json.dumps(sealed(changed(f, ratings={**f["ratings"], "abc": {}}))), "'abc' is missing or"),
        (lambda f, q: json.dumps(sealed(changed(f, ratings={q: f["ratings"][q]}))), "3 of 4 questions lack a choice"),
        (lambda f, q: json.dumps(sealed(changed(f, ratings={**f["ratings"], q: {**f["ratings"][q], "overall": "D"}}))),
         "'D' is missing or unknown in it"),
        (lambda f, q: json.dumps(sealed(changed(f, ratings={**f["ratings"], q: {**f["ratings"][q], "unsafe": [[]]}}))),
         "not a file that a page exported"),
        (lambda f, q: json.dumps(sealed(changed(f, ratings={**f["ratings"], q: 5}))), "no attribute"),
        (lambda f, q: json.dumps(sealed(changed(f, ratings={**f["ratings"], q: {**f["ratings"][q], "safety": None}}))),
         "1 of 4 questions lack a choice; wait for the rest, or set partial"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_trusted_are_refused_by_name(tmp_path, spoil, told):
    _, key = build_pages(systems(4), ["x", "y"])
    found = rate(key, "x", lambda n, _: "tie")
    path = tmp_path / "ratings_x.json"
    path.write_text(spoil(found, next(iter(found["ratings"]))), encoding="utf-8")
    with pytest.raises(ValueError, match=told) as error:
        read_ratings(path, key)
    assert str(error.value).startswith(f"{path}: ")


def test_partial_files_are_merged_where_that_is_asked_for(tmp_path):
    _, key = build_pages(systems(4, ("q", "o")), ["x", "y"])
    write_json(tmp_path / "x", sealed(rate(key, "x", lambda n, name: None if n > 2 or name == "safety" else "q")))
    write_json(tmp_path / "y", sealed(rate(key, "y", lambda n, name: "q" if n > 1 else "o")))
    with pytest.raises(ValueError, match="4 of 4 questions lack a choice"):
        merge([tmp_path / "x", tmp_path / "y"], key)
    results = merge([tmp_path / "x", tmp_path / "y"], key, partial=True, draws=20)
    (row,) = rows_of(results, "agreement", task="all", dimension="overall")
    assert row["n"] == 2 and row["raw"][0] == 0.5
    (row,) = rows_of(results, "comparisons", by="majority", task="all", dimension="overall")
    assert row["n"] == 4 and row["win"][0] == 0.75 and row["tie"][0] == 0.25
    only = merge([tmp_path / "x"], key, partial=True, draws=20)
    assert rows_of(only, "comparisons", by="majority", task="all", dimension="safety")[0]["n"] == 0
    assert {row["majority"] for row in rows_of(only, "votes", dimension="safety")} == {None}


def test_two_files_of_one_rater_are_refused(tmp_path):
    _, key = build_pages(systems(4), ["x"])
    for name in ("old.json", "new.json"):
        write_json(tmp_path / name, sealed(rate(key, "x", lambda n, _: "tie")))
    with pytest.raises(ValueError, match="new.json: a second file of rater x"):
        merge([tmp_path / "old.json", tmp_path / "new.json"], key)


def test_a_file_that_an_editor_saved_with_a_byte_order_mark_is_read(tmp_path):
    _, key = build_pages(systems(4), ["x"])
    (tmp_path / "x").write_text(json.dumps(sealed(rate(key, "x", lambda n, _: "tie"))), encoding="utf-8-sig")
    assert read_ratings(tmp_path / "x", key)[0] == "x"


def test_another_file_is_no_key(tmp_path):
    write_json(tmp_path / "key.json", {"set": "1"})
    for name in ("key.json", "none.json"):
        with pytest.raises(ValueError, match=f"{name}: not the key of doctors' pages"):
            read_key(tmp_path / name)
