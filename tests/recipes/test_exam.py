"""answer.py and exam.py: a model that knows thirty facts, one that knows nothing, an endpoint, a judge of essays."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from pedgpt.data import Message, chat_format, collate, encode_conversation, pack, train_tokenizer
from pedgpt.evaluation.exams import as_questions, read_exam
from pedgpt.evaluation.responses import read_answers
from pedgpt.models import ModelConfig, Transformer, save_model

ROOT = Path(__file__).parents[2]
SPECIAL = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


answer, exam_recipe = (load(f"exam_{name}", ROOT / f"recipes/{name}.py") for name in ("answer", "exam"))
chat_server = load("exam_server", ROOT / "tests/corpus/chat_server.py")


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Fifteen statements and fifteen choices. Synthetic, written for this test."""
    folder, dice = tmp_path_factory.mktemp("exam"), random.Random(0)
    truths = "questions,answers\n" + "".join(f"事实{i}成立。,{dice.choice('对错')}\n" for i in range(15))
    (folder / "truths.csv").write_text(truths, encoding="utf-8")
    options = [{letter: f"项{letter}{i}" for letter in "ABCD"} for i in range(15)]
    rows = [{"question": f"第{i}题？", "options": options[i], "answer": dice.choice("ABCD")} for i in range(15)]
    (folder / "choices.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(facts, tmp_path_factory):
    """(a model that knows the facts, one that knows nothing), as folders."""
    folder = tmp_path_factory.mktemp("models")
    asked = as_questions(read_exam(facts))
    tokenizer = train_tokenizer([one.text for one in asked] * 3, vocab_size=420, special_tokens=SPECIAL)
    config = ModelConfig(
        model_type="baichuan", vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=16, max_position_embeddings=128,
        normalize_head=True, fused_qkv=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model, chat = Transformer(config), chat_format(tokenizer)
    talks = [[*one.history, Message("assistant", one.reference)] for one in asked]
    rows = collate(pack([encode_conversation(talk, chat) for talk in talks], 128), range(30))
    for name, steps in (("untrained", 0), ("knows", 90)):
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(steps):
            logits = model(rows.tokens, documents=rows.documents)
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.labels.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        save_model(model, folder / name)
        tokenizer.save(folder / name)
    return folder


def answered(folder, tmp_path, name, **settings):
    path = tmp_path / f"{name}.jsonl"
    answer.main(answer.Config(output=str(path), max_new_tokens=6, device="cpu", **settings))
    return path


def examined(tmp_path, exam, **settings):
    exam_recipe.main(exam_recipe.Config(exam=str(exam), output=str(tmp_path / "exam.json"), device="cpu", **settings))
    return json.loads((tmp_path / "exam.json").read_text(encoding="utf-8"))


def test_who_knows_the_facts_scores_100_by_both_ways_and_who_does_not_the_chance_level(facts, models, tmp_path, capsys):
    for name in ("knows", "untrained"):
        path = answered(facts, tmp_path, name, model=str(models / name), exam=str(facts), batch_size=7)
        result = examined(tmp_path, facts, answers=[str(path)], model=str(models / name), batch_size=4)
        generated, likelihood = result["generated"][name], result["likelihood"][name]
        if name == "knows":
            for found in (generated, likelihood):
                assert [found["kinds"][kind]["score"][0] for kind in ("choice", "true_false")] == [100, 100]
            assert not generated["unread"] and likelihood["calibration"]["ece"] < 10
        else:
            for one in likelihood["kinds"].values():
                assert one["score"][1] <= one["chance"] <= one["score"][2]
            assert len(generated["unread"]) > 20  # it writes anything
        assert likelihood["rotated"]["questions"] == 15 and 0 <= likelihood["stable"][0] <= 100
    assert "options under other letters" in capsys.readouterr().out


def test_answers_resume_and_are_not_mixed(facts, models, tmp_path, monkeypatch):
    settings = {"model": str(models / "knows"), "exam": str(facts), "batch_size": 5}
    whole = answered(facts, tmp_path, "whole", **settings).read_text(encoding="utf-8")
    real, count = answer.answer, []

    def stopped(*arguments, **others):
        for batch in real(*arguments, **others):
            count.append(len(batch))
            yield batch
            if len(count) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(answer, "answer", stopped)
    with pytest.raises(KeyboardInterrupt):
        answered(facts, tmp_path, "again", **settings)
    part = tmp_path / "again.jsonl.part"
    part.write_bytes(part.read_bytes() + b'{"number": 3, "answ')
    assert answered(facts, tmp_path, "again", **settings).read_text(encoding="utf-8") == whole
    assert count == [5] * 6 and not part.exists()
    answered(facts, tmp_path, "again", **settings)  # done already
    with pytest.raises(ValueError, match="another system or set"):
        answered(facts, tmp_path, "again", **settings, dtype="bfloat16")
    with pytest.raises(ValueError, match="another system or set"):
        answered(facts, tmp_path, "again", **{**settings, "model": str(models / "untrained")})


def test_an_adapter_that_was_trained_again_is_another_system(models, tmp_path):
    settings = answer.Config(output="x", model=str(models / "knows"), adapter=str(tmp_path))
    names = {settings.weights()}
    for text in ("one", "two"):
        (tmp_path / "adapter_model.safetensors").write_text(text)
        names.add(settings.weights())
    assert len(names) == 3 and len({name.partition("+")[0] for name in names}) == 1


def test_an_endpoints_unfinished_reasoning_is_no_answer(facts, tmp_path):
    with chat_server.ChatServer(answer=lambda _: "<think>也许是对") as server:
        toml = tmp_path / "end.toml"
        toml.write_text(f'url = "{server.url}"\nmodel = "x"\nkey_variable = ""\n', encoding="utf-8")
        path = answered(facts, tmp_path, "other", endpoint=str(toml), exam=str(facts))
    assert {(one.content, one.reasoning) for one in read_answers(path).answers} == {("", "<think>也许是对")}


def test_an_endpoint_answers_and_a_judge_grades_texts(facts, tmp_path, capsys):
    exam = tmp_path / "exam"
    exam.mkdir()
    essays = "questions,answers\n简述发热,多喝水\n简述咳嗽,拍背\n简述皮疹,观察\n"
    (exam / "essay.csv").write_text(essays, encoding="utf-8")
    (exam / "truths.csv").write_text((facts / "truths.csv").read_text(encoding="utf-8"), encoding="utf-8")

    def reply(payload):
        text = payload["messages"][-1]["content"]
        if any("满分 5 分" in message["content"] for message in payload["messages"]):
            return "很好" if "皮疹" in payload["messages"][1]["content"] else '{"score": 2.5}'
        return "对" if "判断" in text else f"<think>想</think>答{text}"

    with chat_server.ChatServer(answer=reply) as server:
        toml = tmp_path / "end.toml"
        toml.write_text(f'url = "{server.url}"\nmodel = "x"\nkey_variable = ""\nconcurrency = 4\n', encoding="utf-8")
        path = answered(exam, tmp_path, "other", endpoint=str(toml), exam=str(exam))
        before = len(server.log)
        result = examined(tmp_path, exam, answers=[str(path)], judge=str(toml))
        assert result["judge"] == "x" and len(result["template"]) == 16
        assert "other, by its answers" in capsys.readouterr().out
        assert "essay" not in examined(tmp_path, exam, answers=[str(path)])["generated"]["other"]["kinds"]
        assert "3 essays and cases are not graded and do not count; give --judge" in capsys.readouterr().out
        asked = len(server.log)
        with pytest.raises(ValueError, match="no question has exactly one right letter"):
            examined(tmp_path, exam / "essay.csv", answers=[str(path)], judge=str(toml), model="nowhere")
        assert len(server.log) == asked
    said = read_answers(path)
    assert before == 18 and said.about["model"] == "x" and said.answers[0].content == "答简述发热"
    assert said.answers[0].reasoning == "想"
    found = result["generated"]["other"]
    assert found["kinds"]["essay"]["score"][0] == 50 and found["kinds"]["essay"]["questions"] == 2
    assert len(found["unread"]) == 1 and "not graded" in found["unread"][0] and found["total"] is None


def test_questions_of_a_corpus_and_overlap(facts, models, tmp_path, capsys):
    tasks = tmp_path / "heldout" / "tasks"
    tasks.mkdir(parents=True)
    row = {"messages": [{"role": "user", "content": "第3题？"}, {"role": "assistant", "content": "多喝水。"}]}
    for name in ("medkqa", "evidiag"):
        (tasks / f"{name}.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    path = answered(facts, tmp_path, "talk", model=str(models / "untrained"), questions=[str(tasks)])
    assert [one.task for one in read_answers(path).questions] == ["EviDiag", "MedKQ&A"]
    with pytest.raises(ValueError, match="answers another exam"):
        examined(tmp_path, facts, answers=[str(path)])
    with pytest.raises(ValueError, match="two files are named talk"):
        examined(tmp_path, facts, answers=[str(path)] * 2)
    copy = tmp_path / "exams"
    copy.mkdir()
    for name in "ab":  # the same exam twice in a folder
        (copy / f"{name}.json").write_bytes((facts / "choices.json").read_bytes())
    examined(tmp_path, copy, corpus=str(tasks))
    assert "warning: 15 of 30 questions occur again" in capsys.readouterr().out
    with pytest.raises(ValueError, match="give --answers, --model or --adapter"):
        examined(tmp_path, facts)
    result = examined(tmp_path, facts / "choices.json", corpus=str(tasks))
    assert len(result["in_corpus"]) == 1 and "1 of 15 questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "give --questions or --exam"),
        ({"exam": "x", "model": "m", "endpoint": "e"}, "give --questions or --exam"),
        ({"exam": "x", "endpoint": "e", "top_p": 0.9}, "top_p is not sent to an endpoint"),
        ({"exam": "nowhere.csv", "model": "m"}, "nowhere.csv: found no such file"),
    ],
)
def test_what_cannot_be_answered_is_refused(tmp_path, settings, told):
    with pytest.raises(ValueError, match=told):
        answer.main(answer.Config(output=str(tmp_path / "a.jsonl"), **settings))
