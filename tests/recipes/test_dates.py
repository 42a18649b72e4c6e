"""Templates that write today's date: the day belongs to the run, whatever the clock says when it goes on."""

import json
import shutil
from datetime import date

import pytest
import torch

from pedgpt.data import Message, chat_format, encode_prompt, load_tokenizer
from pedgpt.training import World, loop, settle_run

DATED = (  # as Llama 3.1's: the day stands in a system text that is always there
    "{{ strftime_now('%d %b %Y') + '\n' }}{% for m in messages %}"
    "{{ {'system': '', 'user': '<reserved_106>', 'assistant': '<reserved_107>'}[m.role] + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}"
)
STEPS = {"epochs": 0.8, "checkpoint_every": 1}


@pytest.fixture
def clock(monkeypatch):
    """Sets the day that every clock shows."""

    def set_to(day):
        class Day(date):
            @classmethod
            def today(cls):
                return date.fromisoformat(day)

        for name in ("pedgpt.training.loop", "pedgpt.data.chat"):
            monkeypatch.setattr(f"{name}.date", Day)

    return set_to


@pytest.fixture
def dated(lab, tmp_path):
    """The tiny model with a template that writes the date."""
    folder = tmp_path / "dated"
    shutil.copytree(lab.folder / "model", folder)
    (folder / "chat_template.jinja").write_text(DATED, encoding="utf-8")
    return folder


def ran(lab, recipe, output, **settings):
    result = lab.run(recipe, output, **settings)
    assert result.code == 0, result.err
    return result


def day_of(output):
    return json.loads((output / "done.json").read_text(encoding="utf-8"))["template_date"]


def test_a_run_goes_on_the_next_day(lab, dated, clock, tmp_path):
    clock("2026-03-31")
    settings = {"model": dated, **STEPS}
    assert lab.run("full_finetune", tmp_path / "run", die_after=2, **settings).code == -9
    clock("2026-04-01")
    result = lab.run("full_finetune", tmp_path / "run", template_date="2026-04-01", **settings)
    assert result.code == 2 and "template_date was '2026-03-31', is '2026-04-01'" in result.err
    assert "at step 2 of" in ran(lab, "full_finetune", tmp_path / "run", **settings).err
    assert day_of(tmp_path / "run") == "2026-03-31"
    ran(lab, "full_finetune", tmp_path / "whole", template_date="2026-03-31", **settings)
    ours, whole = (lab.weights(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(tensor, ours[name]) for name, tensor in whole.items())
    clock("2026-05-01")
    assert "finished already" in ran(lab, "full_finetune", tmp_path / "run", **settings).out
    ran(lab, "full_finetune", tmp_path / "new", **settings)
    assert day_of(tmp_path / "new") == "2026-05-01"  # a new run has its own day, and other rows
    runs = [json.loads((tmp_path / name / "done.json").read_text()) for name in ("run", "new")]
    assert runs[0]["rows_and_base_model"] != runs[1]["rows_and_base_model"]


def test_a_shared_reference_file_names_the_day_of_its_run(lab, dated, clock, tmp_path):
    settings = {"model": dated, "reference_logps": tmp_path / "shared.safetensors", "max_steps": 1}
    clock("2026-03-31")
    ran(lab, "dfpo", tmp_path / "one", **settings)
    clock("2026-04-01")
    second = ran(lab, "dfpo", tmp_path / "two", template_date="2026-03-31", **settings)
    assert "reference log-probabilities from" in second.out and day_of(tmp_path / "two") == "2026-03-31"
    refused = lab.run("dfpo", tmp_path / "three", **settings)
    assert refused.code == 2
    assert (
        "'template_date' is '2026-03-31', expected '2026-04-01'" in refused.err and "shared.safetensors" in refused.err
    )


def test_midnight_between_two_ranks_does_not_part_them(clock, monkeypatch, tmp_path):
    sent = []

    def all_values(value, world):
        sent.append(value)
        return sent

    monkeypatch.setattr(loop, "all_values", all_values)
    device = torch.device("cpu")
    clock("2026-03-31")
    first = settle_run(tmp_path, World(0, 2, device))
    clock("2026-04-01")
    assert first == settle_run(tmp_path, World(1, 2, device)) == "2026-03-31"


def test_formats_without_a_date_keep_none_and_older_runs_are_still_theirs(lab, clock, tmp_path):
    clock("2026-03-31")
    output = tmp_path / "run"
    ran(lab, "full_finetune", output, max_steps=1)
    assert day_of(output) == ""
    run = json.loads((output / "done.json").read_text(encoding="utf-8"))
    older = {name: value for name, value in run.items() if name not in ("template_date", "enable_thinking")}
    (output / "done.json").write_text(json.dumps(older), encoding="utf-8")
    clock("2026-04-01")
    assert "finished already" in ran(lab, "full_finetune", output, max_steps=1).out


def test_a_day_can_be_chosen_and_must_be_one(dated):
    tokenizer = load_tokenizer(dated)
    ids = encode_prompt([Message("user", "a")], chat_format(tokenizer, "auto", today="2026-03-31"))
    assert tokenizer.decode(ids) == "31 Mar 2026\na"
    with pytest.raises(ValueError, match="'31.3.26'"):
        chat_format(tokenizer, "auto", today="31.3.26")
