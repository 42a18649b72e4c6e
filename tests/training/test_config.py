"""Settings from TOML and flags: what they become, and what a mistake is told."""

import io
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
        (["--names", "b", "c", "--names=d"], Config("m", ["d"], names=["d"])),  # of a repeated flag the last counts
        (["--steps", "1", "--rate", "1", "--steps=2"], Config("m", ["d"], 2, 1.0)),
        (["--fast", "--fast=false", "--data", "e"], Config("m", ["e"])),
        (["--names"], Config("m", ["d"], names=[])),
    ],
)
def test_flags_become_typed_fields(flags, expected):
    assert parse(*flags) == expected


def test_flags_win_over_the_file_and_dashes_equal_underscores(tmp_path):
    file = tmp_path / "c.toml"
    given = 'output = "文件"\nmax_steps = 5\nepochs = 2\nseed = 1\nactivation_checkpointing = "block"\n'
    file.write_text(given, "utf-8")
    found = parse_settings(TrainingSettings, ["--seed", "9", "--config", str(file), "--keep-checkpoints", "4"])
    assert found == TrainingSettings(
        "文件", max_steps=5, epochs=2.0, seed=9, activation_checkpointing="block", keep_checkpoints=4
    )
    assert isinstance(found.epochs, float)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--setps", "1"], "--setps is no setting of this recipe; did you mean 'steps'?"),
        (["--zzz", "1"], "--zzz is no setting of this recipe; known settings: model, data, steps"),
        (["--steps", "many"], "--steps must be an integer, found 'many'"),
        (["--steps", "1.5"], "--steps must be an integer, found 1.5"),
        (["--rate", "fast"], "--rate must be a number, found 'fast'"),
        (["--fast", "perhaps"], "--fast must be true or false, found 'perhaps'"),
        (["--steps"], "--steps takes one value, found 0"),
        (["--steps", "1", "2"], "--steps takes one value, found 2"),
        (["--config", "a.toml", "b.toml"], "--config takes one value, found 2"),
        (["--config", "/nowhere/c.toml"], "/nowhere/c.toml: cannot be read (No such file or directory)"),
    ],
)
def test_mistaken_flags_are_named(flags, message):
    with pytest.raises(ValueError) as error:
        parse(*flags)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"setps = 1", "c.toml line 1: setps is no setting of this recipe; did you mean 'steps'?"),
        (b"\n[steps]\na = 1", "c.toml line 2: steps must be an integer, found {'a': 1}"),
        (b"steps.a.b = 1", "c.toml line 1: steps must be an integer, found {'a': {'b': 1}}"),
        (b"steps = {a = 1}", "c.toml line 1: steps must be an integer, found {'a': 1}"),
        (b"rate = 1\n[[names]]\na = 1", "c.toml line 2: names must be a string, found {'a': 1}"),
        (b"[names]\na = 1", "c.toml line 1: names must be a string, found {'a': 1}"),
        (b"[training]\na = 1", "c.toml line 1: training is no setting"),
        (b'steps = "7"', "c.toml line 1: steps must be an integer, found '7'"),
        (b"steps = 7.0", "steps must be an integer, found 7.0"),
        (b"steps = true", "steps must be an integer, found True"),
        (b"rate = true", "rate must be a number, found True"),
        (b"steps = 2024-02-29", "steps must be an integer, found datetime.date(2024, 2, 29)"),
        (b"limit = [1]", "c.toml line 1: limit must be an integer, found [1]"),
        (b"names = " + b"[" * 5000, "c.toml: not valid TOML ("),
        (b"fast = 1", "fast must be true or false, found 1"),
        (b"names = [1]", "names must be a string, found 1"),
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


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("true", "True"),
        ("false", "False"),
        ("1", "1"),
        ('"blocks"', "'blocks'"),
        ("['block']", "['block']"),
    ],
)
def test_one_of_three_words_is_named_where_another_stands(tmp_path, content, found):
    file = tmp_path / "c.toml"
    file.write_text(f'output = "o"\nactivation_checkpointing = {content}\n', encoding="utf-8")
    said = f'activation_checkpointing must be one of none, selective, block, offload, found {found}'
    with pytest.raises(ValueError) as error:
        parse_settings(TrainingSettings, ["--config", str(file)])
    assert str(error.value) == f"{file} line 2: {said}"
    for flag in ("--activation_checkpointing=True", "--activation-checkpointing"):
        with pytest.raises(ValueError, match="^--activation_checkpointing (must be|takes one value)"):
            parse_settings(TrainingSettings, ["--output", "o", flag])
    assert parse_settings(TrainingSettings, ["--output", "o", "--activation-checkpointing", "selective"]) == (
        TrainingSettings("o", activation_checkpointing="selective")
    )


def test_a_string_in_the_file_may_stand_for_a_list(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('model = "m"\ndata = "one"\nrate = 1\n', encoding="utf-8")
    assert parse_settings(Config, ["--config", str(file)]) == Config("m", ["one"], rate=1.0)


def test_missing_settings_and_stray_arguments_are_named():
    with pytest.raises(ValueError, match=r"missing setting: model, data; give --model or set it in the --config file"):
        parse_settings(Config, [])
    with pytest.raises(ValueError, match=r"missing setting: model; give"):  # --model "$UNSET"
        parse_settings(Config, ["--model", "", "--data", "d"])
    with pytest.raises(ValueError, match="unexpected argument 'm'; settings are given as --key value"):
        parse_settings(Config, ["m", *NEEDED])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("global_batch_size", 0), ("micro_batch_size", -1), ("keep_checkpoints", 0), ("max_steps", -1),
        ("evaluate_every", -1), ("checkpoint_every", -2), ("max_grad_norm", -1.0), ("weight_decay", -0.1),
        ("epochs", 0.0),
        ("learning_rate", 0.0), ("learning_rate", float("nan")), ("epochs", float("inf")), ("beta2", float("nan")),
        ("warmup_ratio", 1.1), ("final_learning_rate_ratio", -0.1), ("beta1", 1.0), ("beta2", -0.1),
        ("decay_ratio", 1.5), ("checkpoint_every", "often"), ("checkpoint_every", 1.5),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must .*found '?{value}"):
        TrainingSettings("out", **{name: value}).check()


def test_weights_in_bfloat16_need_a_computation_in_bfloat16():
    TrainingSettings("out", dtype="bfloat16", weight_dtype="bfloat16", optimizer_state="bfloat16").check()
    TrainingSettings("out", optimizer_state="bfloat16").check()
    with pytest.raises(ValueError, match='computes in bfloat16 too: set dtype to "bfloat16"'):
        TrainingSettings("out", weight_dtype="bfloat16").check()


@pytest.mark.parametrize("name", ["dtype", "weight_dtype", "optimizer_state", "save_dtype"])
def test_a_dtype_is_one_of_two_words(name):
    with pytest.raises(ValueError) as error:
        parse_settings(TrainingSettings, ["--output", "o", f"--{name}", "float16"])
    assert str(error.value) == f"--{name} must be one of float32, bfloat16, found 'float16'"
    assert getattr(parse_settings(TrainingSettings, ["--output", "o", f"--{name}", "bfloat16"]), name) == "bfloat16"


def test_a_schedule_is_one_of_four_words(tmp_path):
    with pytest.raises(ValueError) as error:
        parse_settings(TrainingSettings, ["--output", "o", "--schedule", "cosin"])
    assert str(error.value) == "--schedule must be one of cosine, constant, linear, wsd, found 'cosin'"
    (tmp_path / "c.toml").write_text("schedule = true", encoding="utf-8")
    with pytest.raises(ValueError, match="wsd, found True$"):
        parse_settings(TrainingSettings, ["--output", "o", "--config", str(tmp_path / "c.toml")])


def test_trackers_and_the_best_model_need_what_they_are_made_of(monkeypatch):
    with pytest.raises(ValueError, match="--log_to must be one of wandb, tensorboard, found 'mlflow'"):
        parse_settings(TrainingSettings, ["--output", "o", "--log_to", "wandb", "mlflow"])
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=rf"log_to names {name}, .* pip install 'pedgpt\[{name}\]'"):
            TrainingSettings("out", log_to=[name]).check()
    with pytest.raises(ValueError, match="keep_best compares evaluations during training; set evaluate_every"):
        TrainingSettings("out", keep_best=True).check()


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


def test_an_error_on_a_terminal_cannot_act_and_a_plain_one_prints_everything(monkeypatch, exits):
    def main(config):
        print("\x1b]0;title\x07 宝宝\u202e", end="\r")
        print("50 %\r60 %", file=sys.stderr)
        raise ValueError("\x1b[2J\r from a file: 宝宝")

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "argv", ["recipe.py", *NEEDED])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    run_recipe(main, Config)
    assert exits == [2]
    assert out.buffer.getvalue() == rb"\x1b]0;title\x07 \u5b9d\u5b9d\u202e\x0d"
    assert err.buffer.getvalue() == b"50 %\r60 %\n" + rb"error: \x1b[2J\x0d from a file: \u5b9d\u5b9d" + b"\n"
