"""Settings from TOML and flags: what they become, and what a mistake is told."""

import os
import sys
from dataclasses import dataclass, field

import pytest

from pedgpt.training import TrainingSettings, parse_settings, run_recipe
from pedgpt.training.config import describe_settings


@dataclass
class Config:
    """Every kind of field."""

    model: str  # folder of the model
    data: list[str]  # files
    steps: int = 3  # optimizer steps
    rate: float = 0.5
    fast: bool = False  # go fast
    names: list[str] = field(default_factory=lambda: ["a"])  # patterns
    limit: int | None = None  # most rows


NEEDED = ["--model", "m", "--data", "d"]


def parse(*flags):
    return parse_settings(Config, [*NEEDED, *flags])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], Config("m", ["d"], 3, 0.5, False, ["a"], None)),
        (["--steps", "7", "--rate", "1e-3"], Config("m", ["d"], 7, 1e-3)),
        (["--steps=-7", "--rate", "-2"], Config("m", ["d"], -7, -2.0)),
        (["--fast"], Config("m", ["d"], fast=True)),
        (["--fast", "False", "--limit", "9"], Config("m", ["d"], fast=False, limit=9)),
        (["--names", "b", "c", "--names=d"], Config("m", ["d"], names=["b", "c", "d"])),
        (["--names"], Config("m", ["d"], names=[])),
    ],
)
def test_flags_become_typed_fields(flags, expected):
    assert parse(*flags) == expected


def test_flags_win_over_the_file_and_dashes_equal_underscores(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('output = "文件"\nmax_steps = 5\nepochs = 2\nseed = 1\nactivation_checkpointing = true\n', "utf-8")
    found = parse_settings(TrainingSettings, ["--seed", "9", "--config", str(file), "--keep-checkpoints", "4"])
    assert found == TrainingSettings(
        "文件", max_steps=5, epochs=2.0, seed=9, activation_checkpointing=True, keep_checkpoints=4
    )
    assert isinstance(found.epochs, float)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--setps", "1"], "--setps is no setting of this recipe; did you mean 'steps'?"),
        (["--zzz", "1"], "--zzz is no setting of this recipe; known settings: model, data, steps"),
        (["--steps", "many"], "--steps must be an integer, found 'many'"),
        (["--steps", "1.5"], "--steps must be an integer, found '1.5'"),
        (["--rate", "fast"], "--rate must be a number, found 'fast'"),
        (["--fast", "perhaps"], "--fast must be true or false, found 'perhaps'"),
        (["--steps"], "--steps takes one value, found 0"),
        (["--steps", "1", "2"], "--steps takes one value, found 2"),
        (["--steps", "1", "--steps", "2"], "--steps takes one value, found 2"),
        (["--config", "a.toml", "b.toml"], "--config takes one value, found 2"),
        (["--config", "/nowhere/c.toml"], "--config /nowhere/c.toml: cannot be read (No such file or directory)"),
    ],
)
def test_mistaken_flags_are_named(flags, message):
    with pytest.raises(ValueError) as error:
        parse(*flags)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"setps = 1", "c.toml: setps is no setting of this recipe; did you mean 'steps'?"),
        (b"[steps]\na = 1", "steps must be an integer, found {'a': 1}"),
        (b"[training]\na = 1", "c.toml: training is no setting"),
        (b'steps = "7"', "steps must be an integer, found '7'"),
        (b"steps = 7.0", "steps must be an integer, found 7.0"),
        (b"steps = true", "steps must be an integer, found True"),
        (b"rate = true", "rate must be a number, found True"),
        (b"fast = 1", "fast must be true or false, found 1"),
        (b"names = [1]", "names must be a list of strings, found [1]"),
        (b"model = 3", "model must be a string, found 3"),
        (b"steps = = 7", "c.toml: not valid TOML (Invalid value (at line 1, column 9))"),
        (b'model = "\xff"', "c.toml: not valid TOML ("),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, content, message):
    file = tmp_path / "c.toml"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        parse_settings(Config, ["--data", "d", "--config", str(file)])
    assert message in str(error.value)


def test_a_string_in_the_file_may_stand_for_a_list(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('model = "m"\ndata = "one"\nrate = 1\n', encoding="utf-8")
    assert parse_settings(Config, ["--config", str(file)]) == Config("m", ["one"], rate=1.0)


def test_missing_settings_and_stray_arguments_are_named():
    with pytest.raises(ValueError, match=r"missing setting: model, data; give --model or set it in the --config file"):
        parse_settings(Config, [])
    with pytest.raises(ValueError, match="unexpected argument 'm'; settings are given as --key value"):
        parse_settings(Config, ["m", *NEEDED])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("global_batch_size", 0), ("micro_batch_size", -1), ("keep_checkpoints", 0), ("max_steps", -1),
        ("evaluate_every", -1), ("checkpoint_every", -2), ("max_grad_norm", -1.0), ("weight_decay", -0.1),
        ("epochs", 0.0),
        ("learning_rate", 0.0), ("learning_rate", float("nan")), ("epochs", float("inf")), ("beta2", float("nan")),
        ("warmup_ratio", 1.1), ("final_learning_rate_ratio", -0.1), ("dtype", "float16"), ("save_dtype", "float16"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must .*found '?{value}"):
        TrainingSettings("out", **{name: value}).check()


def test_the_defaults_are_in_range():
    TrainingSettings("out").check()


def test_help_lists_every_setting_with_its_comment_and_default():
    lines = describe_settings(Config).splitlines()
    assert lines[0] == "Settings from TOML and flags: what they become, and what a mistake is told."
    assert [line.split(maxsplit=1) for line in lines if line.startswith("  --")] == [
        ["--model", "folder of the model [required]"],
        ["--data", "files [required]"],
        ["--steps", "optimizer steps [3]"],
        ["--rate", "[0.5]"],
        ["--fast", "go fast [False]"],
        ["--names", "patterns [['a']]"],
        ["--limit", "most rows [None]"],
    ]


@pytest.fixture
def exits(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def test_help_runs_nothing(monkeypatch, capsys, exits):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--help", "--nonsense"])
    run_recipe(lambda config: pytest.fail("ran"), Config)
    assert "--model" in capsys.readouterr().out and exits == []


@pytest.mark.parametrize("mistake", [ValueError("too small"), FileExistsError(17, "File exists", "out")])
def test_a_mistake_ends_in_one_line_and_code_2(monkeypatch, capsys, exits, mistake):
    def main(config):
        raise mistake

    monkeypatch.setattr(sys, "argv", ["recipe.py", *NEEDED])
    run_recipe(main, Config)
    assert exits == [2]
    assert capsys.readouterr().err == f"error: {mistake}\n"
    monkeypatch.setenv("PEDGPT_TRACEBACK", "1")
    with pytest.raises(type(mistake)):
        run_recipe(main, Config)


def test_a_bug_keeps_its_traceback(monkeypatch, exits):
    monkeypatch.setattr(sys, "argv", ["recipe.py", *NEEDED])
    with pytest.raises(ZeroDivisionError):
        run_recipe(lambda config: 1 / 0, Config)
    assert exits == []
