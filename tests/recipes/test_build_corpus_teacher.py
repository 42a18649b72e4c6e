"""build_corpus with a teacher: whatever the server and the machine do, the same corpus, and nothing asked twice."""

import collections
import contextlib
import importlib.util
import io
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from pedgpt import training

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "build_corpus.py"
KEY, VARIABLE = "sk-CorpusKey/0123+456=", "CORPUS_TEACHER_KEY"


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


chat_server = load("corpus_chat_server", ROOT / "tests" / "corpus" / "chat_server.py")
ChatServer, PASSING = chat_server.ChatServer, chat_server.PASSING

# Synthetic, written for this test.
LISTING = """
[[source]]
file = "book.md"
kind = "textbook"
build = ["role_play", "preferences"]
[[source]]
file = "talk.jsonl"
kind = "dialogues"
[[source]]
file = "qa.jsonl"
kind = "instructions"
build = ["reconstruct", "preferences"]
[[source]]
file = "graph.tsv"
kind = "knowledge_graph"
build = ["text", "medkqa", "evidiag", "trerecom", "preferences"]
"""
BOOK = """# 第一章 常见病
## 急性支气管炎
急性支气管炎是支气管黏膜的急性炎症。症状以咳嗽为主，先为干咳，以后有痰。治疗以休息、多喝水和湿化空气为主。
## 手足口病
手足口病由肠道病毒引起，常在幼儿园流行。症状是口腔疱疹和手足皮疹。治疗以清淡饮食和口腔护理为主。
## 秋季腹泻
秋季腹泻多见于婴幼儿，起病较急。症状是水样便，常先有呕吐。治疗以少量多次补液和继续喂养为主。
## 湿疹
湿疹是婴儿常见的皮肤病，容易反复。症状是面颊红斑和瘙痒。治疗以保湿和避免抓挠为主。
## 便秘
便秘在添加辅食以后多见。症状是大便干硬，排便费力。治疗以多吃蔬菜和养成排便习惯为主。
## 哮喘
哮喘是气道的慢性炎症，夜间容易发作。症状是喘息和胸闷。治疗以长期控制和避开诱因为主。
"""
QUESTIONS = [
    ("宝宝流鼻涕鼻子不通气怎么办？", "可以用生理盐水清洁鼻腔，室内保持湿润，抱起来睡会舒服些。"),
    ("孩子晚上总是磨牙是怎么回事？", "磨牙和换牙、睡前太兴奋有关，睡前安静下来，多数会慢慢减少。"),
    ("孩子不爱吃饭要不要管？", "吃饭时间固定，少给零食，不要追着喂，体重正常就不必担心。"),
    ("婴儿湿疹脸上发红怎么护理？", "洗澡水不要太热，洗后及时涂保湿霜，衣服选宽松的棉布。"),
    ("宝宝便秘拉不出来怎么办？", "多吃蔬菜和水果，多喝水，每天饭后坐便盆，轻轻按揉腹部。"),
    ("孩子咳嗽有痰咳不出来怎么办？", "多喝温水，空气保持湿润，由下向上轻拍背部帮助排痰。"),
    ("孩子第一次上幼儿园总哭正常吗？", "分离时哭是正常的，接送要守时，在家多说幼儿园里有趣的事。"),
    ("孩子被蚊子咬了肿个大包怎么处理？", "先用凉毛巾冷敷，剪短指甲避免抓破，红肿扩大就去看皮肤科。"),
]
TALKS = [
    ["医生您好，孩子昨晚开始发热，还流涕。", "精神怎么样？出皮疹了吗？", "精神还好，没有皮疹，需要多喝水吗？", "对。",
     "那要注意保暖吗？", "注意保暖，在家观察。"],
    ["您好，宝宝拉肚子，是水样便。", "有没有呕吐？小便少不少？", "吐了一次，小便还可以，要继续喂奶吗？", "是的。",
     "什么情况要去医院？", "没有小便、精神变差就到医院来。"],
    ["大夫，孩子夜里喘息，早上又好了。", "以前有过吗？家里养不养猫狗？", "以前也有过，家里养了猫，猫要送走吗？",
     "可以。", "要做什么检查？", "到医院做肺功能检查。"],
]  # fmt: skip
GRAPH = {
    "急性支气管炎": ("咳嗽 咳痰", "休息 多喝水", "注意保暖", "肺炎", "胸部检查"),
    "手足口病": ("口腔疱疹 手足皮疹", "清淡饮食 口腔护理", "勤洗手", "脑炎", "咽拭子检查"),
    "秋季腹泻": ("水样便 呕吐", "补液 继续喂养", "注意饮食卫生", "脱水", "大便检查"),
    "湿疹": ("红斑 瘙痒", "保湿 避免抓挠", "衣物宽松", "皮肤感染", "皮肤检查"),
}
RELATIONS = ("症状", "治疗", "预防", "并发症", "检查")


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    (folder / "corpus.toml").write_text(LISTING, encoding="utf-8")
    (folder / "book.md").write_text(BOOK, encoding="utf-8")
    write(folder / "qa.jsonl", [{"question": question, "answer": answer} for question, answer in QUESTIONS])
    roles = ["user", "assistant"] * 3
    write(folder / "talk.jsonl", [
        {"messages": [{"role": role, "content": said} for role, said in zip(roles, talk, strict=True)]}
        for talk in TALKS
    ])  # fmt: skip
    triples = [(name, relation, tail) for name, facts in GRAPH.items()
               for relation, tails in zip(RELATIONS, facts, strict=True) for tail in tails.split()]  # fmt: skip
    (folder / "graph.tsv").write_text("".join("\t".join(row) + "\n" for row in triples), encoding="utf-8")
    return folder


# The teacher: by the words of the prompt, a JSON answer with the fields that it asks for; now and then a wrong one.


def answer(payload):
    *system, user = (message["content"] for message in payload["messages"])
    return json.dumps(_answer("".join(system), user), ensure_ascii=False) if "哮喘" not in user else "我不知道。"


def _answer(system, user):
    if "角色扮演" in system or "主任医师" in system:
        topic, passage = re.search("主题：(.*?)）：\n(.*?)\n\n", user, re.DOTALL).groups()
        parent = "患儿家长" in system + user
        if "角色扮演" in system:
            question = f"孩子得了{topic}，该怎么治疗？" if parent or topic == "便秘" else f"{topic}的症状是什么？"
            if topic == "湿疹" and not parent:
                question = "本文说湿疹的症状是什么？"
            return {"question": question, "role": "家长"}
        (said,) = re.findall(f"{'治疗' if '治疗？' in user else '症状'}.*?。", passage)
        more = "可以吃阿莫西林。" if topic == "手足口病" else ""
        return {"answer": f"您好，{topic}的{said}{more}", "evidence": "应住院十天。" if topic == "秋季腹泻" else said}
    if "审查" in system:
        score = {"孩子晚": 1, "孩子不": "五"}.get(user[3:6], 5)  # one that is bad, one that is judged in words
        return {"score": score, "reason": "切题" if score == 5 else "不切题"}
    if "完善中文" in system or "整理中文" in system:
        said = re.search("回答：(.*?)\n\n", user, re.DOTALL)[1]
        if "完善" in system:
            said += "每天做3次。" if "便秘" in user else "这样孩子会舒服一些。" if "鼻" in user else ""
        return {"answer": said, "reason": "按已有内容"}
    if "温和、有耐心" in system:
        said = re.search("正确回答：(.*?)\n\n", user, re.DOTALL)[1]
        return {"answer": f"您的心情我理解。{said}{'可以吃阿莫西林。' if '有痰' in user else ''}"}
    if "普通的问答助手" in system:
        return {"answer": re.search("正确回答：(.*?)[，。]", user)[1] + "。"}
    assert "整理医患对话" in system, system
    said = re.search("最后一句医生的话：(.*?)\n", user)[1]
    more = {"是的。": "，孩子有肺炎，请住院。", "对。": "，像您说的那样做就好。", "可以。": "，猫送走更好。"}
    return {"answer": said[:-1] + more.get(said, said[-1])}


def misbehave(seed):
    """(behave, answer) of a server that is wrong at random: in half of its replies, and in the JSON within the good."""
    told = collections.Counter()

    def behave(request, nth):
        rng = random.Random(f"{seed} {request.question} {nth}")
        return rng.choice(PASSING) if nth < 4 and rng.random() < 0.5 else "good"

    def spoilt(payload):
        asked = json.dumps(payload["messages"])
        rng = random.Random(f"{seed} {asked}")
        told[asked] += 1
        if told[asked] > rng.choice((0, 0, 0, 1, 2)):  # of a question's three answers one at least is right
            return answer(payload)
        wrong = ["好的。", "{}", '{"answer": 3}', '{"answer": "', '{"question": ["问"], "role": null, "score": "5"}',
                 '{"answer": "答"} {"answer": "答"}', '{"answer": " "}', "[" * 9999]  # fmt: skip
        return rng.choice(wrong)

    return behave, spoilt


# Runs


@pytest.fixture(scope="module")
def recipe():
    return load("build_corpus_with_teacher", RECIPE)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(ROOT / "tests"))  # reading all certificates takes longer than a build here


def toml(path, server, **changed):
    values = {"url": getattr(server, "url", server), "model": "tiny", "key_variable": VARIABLE, "retry_wait": 0.005,
              "timeout": 5.0, "concurrency": 4} | changed  # fmt: skip
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()), encoding="utf-8")
    return path


def arguments(source, output, teacher, **more):
    given = {"source": source, "output": output, "teacher": teacher, "heldout_share": 0.25, **more}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


class Ran(collections.namedtuple("Ran", "code out err")):
    """How a command ended."""


def call(recipe, source, output, teacher, **more):
    """The command in this process, up to its exit code."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["build_corpus.py", *arguments(source, output, teacher, **more)]),
        patch.object(os, "_exit", sys.exit), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
    ):  # fmt: skip
        try:
            training.run_recipe(recipe.main, recipe.Config)
        except SystemExit as exit:
            code = exit.code
    return Ran(code, out.getvalue(), err.getvalue())


def start(python, source, output, teacher, **more):
    """The command in a process of its own."""
    command = [python, str(RECIPE), *arguments(source, output, teacher, **more)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def manifest(corpus):
    return json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))


def dropped(corpus):
    return jsonl(corpus / "reports" / "dropped.jsonl")


def rows(corpus, name=""):
    """(table, row) of all rows of a source, but those that repeat others for stage 2."""
    files = [file for file in manifest(corpus)["files"] if file["table"] != "tasks_sample"]
    return [(file["table"], row) for file in files if name in ("", file["source"])
            for row in jsonl(corpus / file["path"])]  # fmt: skip


def committed(cache):
    with contextlib.closing(sqlite3.connect(f"file:{cache}?mode=ro", uri=True)) as database:
        return {key for (key,) in database.execute("SELECT key FROM answers")}


def asked_of(log):
    """The cache's keys of requests; a request that follows an unusable reply has another Idempotency-Key."""
    return collections.Counter(request.key.split("-")[0] for request in log)


@pytest.fixture(scope="module")
def reference(recipe, source, tmp_path_factory):
    """The corpus of a server without fault, how often it was asked, and what was said."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patched, ChatServer(answer=answer) as server:
        patched.setenv("NO_PROXY", "127.0.0.1")
        patched.setenv(VARIABLE, KEY)
        patched.setenv("SSL_CERT_DIR", str(ROOT / "tests"))
        ran = call(recipe, source, folder / "corpus", toml(folder / "t.toml", server))
        assert ran.code == 0, ran.err
        return folder / "corpus", server.log, ran


# What a teacher makes


def test_rows_of_the_teacher_are_in_their_tables_and_say_how_they_were_made(reference):
    corpus, log, ran = reference
    made = collections.Counter((table, row["origin"].get("builder", "")) for table, row in rows(corpus))
    # The book: six passages; of the questions on them, those that a right answer came to.
    assert made["text/pediatric", ""] == 6
    asked = {row["messages"][0]["content"]: (table, row) for table, row in rows(corpus, "book") if "messages" in row}
    assert set(asked) == {
        "孩子得了急性支气管炎，该怎么治疗？", "急性支气管炎的症状是什么？", "孩子得了湿疹，该怎么治疗？",
        "孩子得了便秘，该怎么治疗？",
    }  # fmt: skip
    table, row = asked["孩子得了急性支气管炎，该怎么治疗？"]
    assert table == "tasks/trerecom" and asked["急性支气管炎的症状是什么？"][0] == "tasks/medkqa"
    assert row["messages"][1]["content"] == "您好，急性支气管炎的治疗以休息、多喝水和湿化空气为主。"
    assert row["origin"] == {
        "place": "book.md:3 › 第一章 常见病 › 急性支气管炎", "builder": "role_play", "support": 1.0, "role": "parent",
        "aspect": "治疗", "evidence": "治疗以休息、多喝水和湿化空气为主。",
    }  # fmt: skip
    # The instructions: every version is kept, a refused one too.
    answers = dict(QUESTIONS)
    built = {row["messages"][0]["content"]: row for _, row in rows(corpus, "qa") if "messages" in row}
    assert set(built) == {question for question in answers if question[:3] not in ("孩子晚", "孩子不")}
    for question, row in built.items():
        versions = row["origin"]["versions"]
        assert versions[0] == {"step": "judge", "answer": answers[question], "reason": "score 5: 切题"}
        assert ("鼻" in question) == (len(versions) == 2) and ("便秘" in question) == ("refused" in row["origin"])
    nose, hard = (next(row for question, row in built.items() if word in question) for word in ("鼻", "便秘"))
    assert nose["messages"][1]["content"] == nose["origin"]["versions"][0]["answer"] + "这样孩子会舒服一些。"
    assert nose["origin"]["versions"][1]["step"] == "enrich" and nose["origin"]["versions"][1]["reason"] == "按已有内容"
    said = answers["宝宝便秘拉不出来怎么办？"] + "每天做3次。"
    refused = {"step": "enrich", "answer": said, "reason": "adds the number 3"}
    assert hard["origin"]["refused"] == [refused] and "3次" not in hard["messages"][1]["content"]
    # The dialogues: a terse turn completed, and one whose completion brought a disease: it stays as it was.
    talks = {row["origin"]["place"]: row for _, row in rows(corpus, "talk")}
    assert set(talks) == {"talk.jsonl:1", "talk.jsonl:2", "talk.jsonl:3"}
    changed = {place: row["origin"]["rewritten"] for place, row in talks.items()}
    assert {place: len(changes) for place, changes in changed.items()} == {
        "talk.jsonl:1": 1, "talk.jsonl:2": 0, "talk.jsonl:3": 1,
    }  # fmt: skip
    assert talks["talk.jsonl:1"]["messages"][3]["content"] == "对，像您说的那样做就好。"
    assert "肺炎" not in json.dumps(talks["talk.jsonl:2"], ensure_ascii=False)
    # Pairs, the teacher's answer preferred.
    pairs = [row for table, row in rows(corpus) if table == "preferences"]
    builders = collections.Counter(row["origin"]["builder"] for row in pairs)
    assert builders["preferences"] >= 8 and builders["graph/preferences"] >= 4
    assert all(row["chosen"].startswith("您的心情我理解。") and row["origin"]["correct"] for row in pairs)
    assert {(row["origin"]["chosen_by"], row["origin"]["rejected_by"]) for row in pairs} == {("teacher", "template")}
    assert re.search(f"tiny at .*: {len(log)} requests sent, {len(log)} answered", ran.out)
    assert manifest(corpus)["settings"]["teacher"] == "tiny"


def test_wrong_answers_are_left_out_with_their_reason(reference):
    corpus, *_ = reference
    listed, places = collections.defaultdict(list), collections.defaultdict(collections.Counter)
    for row in dropped(corpus):
        listed[row["source"], row["reason"]].append(row)
        places[row["source"], row["reason"]][row["place"].split(" › ")[-1]] += 1
    assert places["book", "answer not supported by its passage"] == {"手足口病": 2}
    assert places["book", "evidence is not in its passage"] == {"秋季腹泻": 2}
    assert places["book", "question points at its passage"] == {"湿疹": 1}
    assert places["book", "question repeats another role's"] == {"便秘": 1}
    assert places["book", "teacher's answer was unusable"] == {"哮喘": 2}
    assert places["qa", "judged unusable: by the teacher"] == {"qa.jsonl:2": 1}
    assert places["qa", "teacher's answer was unusable"] == {"qa.jsonl:3": 1}
    assert places["qa", "teacher's answer was not supported"] == {"qa.jsonl:6": 1}
    assert "阿莫西林" in listed["book", "answer not supported by its passage"][0]["detail"]
    assert "我不知道" in listed["book", "teacher's answer was unusable"][0]["detail"]
    written = json.dumps(rows(corpus), ensure_ascii=False)
    assert "阿莫西林" not in written and "住院" not in written and "保湿" in written
    assert_nothing_is_lost(corpus)


def assert_nothing_is_lost(corpus):
    """Every row read came to what was built of it, and that is written or listed; nothing is there twice."""
    written, found = collections.Counter(), manifest(corpus)
    for file in found["files"]:
        written[file["source"]] += file["rows"] * (file["table"] != "tasks_sample")
    listed = collections.Counter(row["source"] for row in dropped(corpus))
    for name, counts in found["sources"].items():
        assert counts["built"] == written[name] + listed[name] > 0 and counts["skipped"] == 0
    assert {name: sum(reasons.values()) for name, reasons in found["dropped"].items()} == dict(listed)
    assert {name: counts["read"] for name, counts in found["sources"].items()} == {
        "book": 1, "talk": len(TALKS), "qa": len(QUESTIONS),
        "graph": sum(len(" ".join(facts).split()) for facts in GRAPH.values()),
    }  # fmt: skip
    lines = [json.dumps({**row, "origin": None}) for _, row in rows(corpus)]
    assert len(set(lines)) == len(lines)
    # One instruction or dialogue, one row of it: written or listed.
    for name, count in (("qa", len(QUESTIONS)), ("talk", len(TALKS))):
        ends = collections.Counter(row["origin"]["place"] for table, row in rows(corpus, name) if "messages" in row)
        left_out = [row for row in dropped(corpus) if row["source"] == name]
        ends.update(row["place"] for row in left_out if "supported" not in row["reason"])  # a pair's reason
        assert ends == {f"{name}.jsonl:{i}": 1 for i in range(1, count + 1)}
    # In the order of the input, whichever answer came first.
    orders = [[row["origin"]["place"] for row in jsonl(corpus / file["path"])] for file in found["files"]
              if file["source"] == "qa"]  # fmt: skip
    assert all(order == sorted(order) for order in orders) and max(map(len, orders)) > 3


def test_second_run_is_answered_by_the_cache_and_writes_the_same_bytes(recipe, source, tmp_path, reference):
    with ChatServer(answer=answer) as server:
        teacher = toml(tmp_path / "t.toml", server)
        first = call(recipe, source, tmp_path / "corpus", teacher)
        before, asked = files_of(tmp_path / "corpus"), len(server.log)
        second = call(recipe, source, tmp_path / "corpus", teacher)
        assert {path.name for path in tmp_path.iterdir()} == {"t.toml", "corpus", "corpus.teacher.sqlite"}
        assert first.code == second.code == 0 and len(server.log) == asked == len(reference[1])
        assert files_of(tmp_path / "corpus") == before == files_of(reference[0])
        assert set(asked_of(server.log).values()) == {1} and len(committed(tmp_path / "corpus.teacher.sqlite")) == asked
        assert f"0 requests sent, 0 answered, {asked} answers from corpus.teacher.sqlite" in second.out


def test_misbehaving_server_changes_nothing_in_the_corpus(recipe, source, tmp_path, reference):
    behave, spoilt = misbehave(seed=1)
    with ChatServer(behave=behave, answer=spoilt, slow=2.0, retry_after="0.02") as server:
        ran = call(recipe, source, tmp_path / "corpus", toml(tmp_path / "t.toml", server, timeout=0.8, max_retries=8))
        assert ran.code == 0, ran.err
        faults = collections.Counter(request.fault for request in server.log)
        assert len(faults) > 20 and faults.total() - faults["good"] > 50  # it did misbehave
        answered = asked_of(request for request in server.log if request.answered)
        assert max(answered.values()) == 1  # no answer is paid twice
        assert f"{len(server.log)} requests sent, {len(answered)} answered" in ran.out
        assert len(answered) > len(reference[1])  # what was no JSON was asked again
    assert files_of(tmp_path / "corpus") == files_of(reference[0])
    assert_nothing_is_lost(tmp_path / "corpus")


# Kills


@contextlib.contextmanager
def watched(folder):
    """The states of a folder, all of its files, one after another."""
    seen, ended = [], threading.Event()

    def watch():
        while not ended.wait(0.01):
            with contextlib.suppress(FileNotFoundError):
                before = folder.stat().st_ino
                found = files_of(folder)
                if folder.stat().st_ino == before and found not in seen[-1:]:  # not replaced while it was read
                    seen.append(found)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def test_killed_runs_go_on_and_end_with_the_same_corpus(recipe, source, tmp_path, reference, python):
    output, cache, rng = tmp_path / "corpus", tmp_path / "corpus.teacher.sqlite", random.Random(os.urandom(8))
    total = len(reference[1])
    assert call(recipe, source, output, "", near_duplicate=0.7).code == 0  # an earlier corpus
    states = {json.dumps(manifest(folder)): files_of(folder) for folder in (output, reference[0])}
    (earlier, complete), kills = states, 0
    with ChatServer(answer=answer, pause=0.03) as server, watched(output) as seen:
        teacher = toml(tmp_path / "t.toml", server)
        # At a random answer; then at a random moment after the last one, when the corpus is written.
        for goal in (rng.randrange(1, total), total):
            process = start(python, source, output, teacher)
            while sum(request.answered for request in server.log) < goal and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.03 if goal < total else 1.0))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
            while server.in_flight:
                time.sleep(0.005)
            kept, sent = committed(cache), len(server.log)
            assert len(kept) >= min(goal, sum(request.answered for request in server.log)) - 4
            assert files_of(output) == states[json.dumps(manifest(output))]  # the old or the new one, whole
            leftover = tmp_path / ".corpus.building"
            if process.returncode == -signal.SIGKILL and leftover.exists():
                (leftover / "stale").write_text("of a run that was killed", encoding="utf-8")
        process = start(python, source, output, teacher)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        later = asked_of(server.log[sent:])
        assert not set(later) & kept  # what was committed at the last kill is not sent again
    # The last state may have come too late to be looked at; no other was ever there.
    assert kills >= 1 and seen in ([states[earlier]], [states[earlier], states[complete]])
    assert files_of(output) == files_of(reference[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "corpus.teacher.sqlite", "t.toml"]
    # Answers that were on their way at a kill, at most one a worker, are all that was asked twice.
    repeated = sum(count - 1 for count in asked_of(server.log).values())
    assert repeated <= 4 * kills and len(asked_of(server.log)) == total


# Budget, keys, refusals


def test_budget_ends_the_run_and_a_larger_one_asks_only_the_rest(recipe, source, tmp_path, reference):
    output = tmp_path / "corpus"
    with ChatServer(answer=answer) as server:
        small = toml(tmp_path / "small.toml", server, token_budget=6000, max_tokens=200)
        large = toml(tmp_path / "large.toml", server, token_budget=600_000, max_tokens=200)
        ran = call(recipe, source, output, small)
        assert_one_line(ran, "token_budget = 6,000 is spent", f"is kept in {output}.teacher.sqlite")
        assert not output.exists()
        asked, kept = len(server.log), committed(f"{output}.teacher.sqlite")
        assert 5 < asked == len(kept) < len(reference[1])
        assert call(recipe, source, output, small).code == 2 and len(server.log) == asked  # not a request more
        assert call(recipe, source, output, "").code == 0
        earlier = files_of(output)
        assert call(recipe, source, output, small).code == 2 and files_of(output) == earlier
        ran = call(recipe, source, output, large)
        assert ran.code == 0 and len(server.log) == len(reference[1]) and set(asked_of(server.log).values()) == {1}
    assert files_of(output) == files_of(reference[0])


def holds_key(folder, *said):
    found = [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    return found or any(KEY in text for text in said)


def assert_one_line(ran, *words):
    lines = ran.err.strip().splitlines()
    assert ran.code == 2 and lines[-1].startswith("error: ") and not re.search("Traceback|Error: ", ran.out)
    assert all(word in lines[-1] for word in words), lines[-1]
    assert sum("error: " in line for line in lines) == 1 and "Traceback" not in ran.err


@pytest.mark.parametrize("which", ["teacher", "plain_teacher"])
def test_without_the_key_nothing_is_read_or_written(recipe, source, tmp_path, monkeypatch, which):
    monkeypatch.delenv(VARIABLE)
    with ChatServer(answer=answer) as server:
        wrong = toml(tmp_path / "t.toml", server)
        right = toml(tmp_path / "right.toml", server, key_variable="")
        more = {"teacher": wrong} if which == "teacher" else {"teacher": right, "plain_teacher": wrong}
        with patch.object(recipe, "read_listing", side_effect=AssertionError("was read")):
            ran = call(recipe, source, tmp_path / "deep" / "corpus", **more)
        assert_one_line(ran, VARIABLE, "not set")
        assert not server.log and {path.name for path in tmp_path.iterdir()} == {"t.toml", "right.toml"}


def test_wrong_key_ends_the_run_at_once_and_is_shown_nowhere(source, tmp_path, python):
    with ChatServer(behave=lambda request, nth: "401", echo=KEY) as server:
        process = start(python, source, tmp_path / "corpus", toml(tmp_path / "t.toml", server))
        ran = Ran(*reversed([*reversed(process.communicate(timeout=60)), process.wait()]))
        assert_one_line(ran, f"refuses the key in {VARIABLE}", "HTTP 401", "***")
        assert 1 <= len(server.log) <= 16 and all(KEY in request.headers["Authorization"] for request in server.log)
    assert not (tmp_path / "corpus").exists() and not holds_key(tmp_path, ran.out, ran.err)


def test_a_key_that_the_server_repeats_is_masked_in_all_that_is_written(recipe, source, tmp_path):
    def telltale(payload):
        found = json.loads(answer(payload)) if "哮喘" not in payload["messages"][-1]["content"] else {}
        return json.dumps({name: value + KEY if isinstance(value, str) else value for name, value in found.items()})

    with ChatServer(answer=telltale) as server:
        ran = call(recipe, source, tmp_path / "corpus", toml(tmp_path / "t.toml", server))
    assert ran.code == 0 and not holds_key(tmp_path, ran.out, ran.err)
    assert b"***" in b"".join(files_of(tmp_path).values())


def test_a_server_that_is_down_is_named(recipe, source, tmp_path):
    teacher = toml(tmp_path / "t.toml", "http://127.0.0.1:1/v1", max_retries=2)
    ran = call(recipe, source, tmp_path / "corpus", teacher)
    assert_one_line(ran, "no answer from http://127.0.0.1:1/v1 in 3 requests; the last: ConnectError")
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("word", "place"), [("磨牙", "qa.jsonl:2"), ("口腔疱疹和手足皮疹", "book.md"), ("脱水", "秋季腹泻")]
)
def test_a_request_that_is_refused_for_good_costs_its_row_and_is_listed(recipe, source, tmp_path, word, place):
    def behave(request, nth):
        return "400" if word in request.question else "good"

    with ChatServer(behave=behave, answer=answer, echo="content policy") as server:
        settings = toml(tmp_path / "t.toml", server)
        ran = call(recipe, source, tmp_path / "corpus", settings)
        if ran.code:  # it was among the first, and until a server has answered anything a refusal may be of everything
            assert_one_line(ran, "HTTP 400: 400 for content policy", f"(asked about {place}")
            assert not (tmp_path / "corpus").exists()
            ran = call(recipe, source, tmp_path / "corpus", settings)
        assert ran.code == 0, ran.err
    listed = (tmp_path / "corpus" / "reports" / "dropped.jsonl").read_text(encoding="utf-8")
    refused = [row for row in map(json.loads, listed.splitlines()) if "HTTP 400: 400 for content" in row["detail"]]
    assert refused and all(row["reason"] == "teacher's answer was unusable" for row in refused)
    assert all(place in row["place"] for row in refused) and len(refused) < 8


# Two teachers


def test_plain_teachers_answers_become_the_rejected_ones(recipe, source, tmp_path):
    with ChatServer(answer=answer) as server, ChatServer(answer=answer) as other:
        plain = toml(tmp_path / "p.toml", other, model="plain", token_budget=100_000)
        ran = call(recipe, source, tmp_path / "corpus", toml(tmp_path / "t.toml", server), plain_teacher=plain)
        assert ran.code == 0, ran.err
        pairs = [row for table, row in rows(tmp_path / "corpus") if table == "preferences"]
        assert len(pairs) > 12
        for row in pairs:
            assert (row["origin"]["chosen_by"], row["origin"]["rejected_by"]) == ("teacher", "teacher")
            assert row["chosen"].startswith("您的心情我理解。") and row["rejected"][:-1] in row["origin"]["correct"]
        assert all("正确回答：" in request.question for request in other.log) and len(other.log) >= len(pairs)
        assert manifest(tmp_path / "corpus")["settings"]["plain_teacher"] == "plain"
        # Each is counted, priced and limited alone.
        for log, name in ((server.log, "tiny"), (other.log, "plain")):
            (said,) = re.findall(f"{name} at .*", ran.out)
            assert f"{len(log)} requests sent, {len(log)} answered" in said
            tokens = re.search(r"; all runs with this cache: ([\d,]+) prompt and ([\d,]+) completion tokens", said)
            assert all(int(count.replace(",", "")) > len(log) for count in tokens.groups())


def test_a_plain_teacher_alone_is_asked_by_several_threads(recipe, source, tmp_path):
    with ChatServer(answer=answer, pause=0.01) as server:
        plain = toml(tmp_path / "p.toml", server)
        ran = call(recipe, source, tmp_path / "corpus", "", plain_teacher=plain)
        assert ran.code == 0 and server.most_in_flight > 1
    pairs = [row for table, row in rows(tmp_path / "corpus") if table == "preferences"]
    assert pairs and {(row["origin"]["chosen_by"], row["origin"]["rejected_by"]) for row in pairs} == {
        ("template", "teacher")
    }
