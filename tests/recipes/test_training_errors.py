"""A user's mistake ends in one line that names it, exit code 2, before anything is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

RECIPES = ("continued_pretrain", "full_finetune", "dfpo", "expert_finetune")
DATA = dict(zip(RECIPES, ("text", "instructions", "preferences", "instructions"), strict=True))


def fails(lab, output, recipe, arguments=None, **settings):
    """The message of a run that must fail and leave nothing."""
    flags = lab.arguments(recipe, output, **settings) if arguments is None else arguments
    result = lab.call(recipe, flags)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and "Traceback" not in result.err
    assert not output.exists()
    return line.removeprefix("error: ")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run"


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings(lab, recipe, output, tmp_path, monkeypatch):
    data = DATA[recipe]
    broken = tmp_path / "broken.toml"
    broken.write_text("epochs = \n", encoding="utf-8")
    misspelt = tmp_path / "misspelt.toml"
    misspelt.write_text("learning_rat = 1.0\n", encoding="utf-8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for settings, message in (
        ({"learnin_rate": 1}, "--learnin_rate is no setting of this recipe; did you mean 'learning_rate'?"),
        ({"config": misspelt}, f"{misspelt} line 1: learning_rat is no setting of this recipe; did you mean 'learn"),
        ({"config": broken}, f"{broken}: not valid TOML (Invalid value (at line 1, column 10))"),
        ({"config": tmp_path / "no.toml"}, f"{tmp_path}/no.toml: cannot be read (No such file or directory)"),
        ({"config": tmp_path}, f"{tmp_path}: cannot be read (Is a directory)"),
        ({"epochs": "many"}, "--epochs must be a number, found 'many'"),
        ({"epochs": 0}, "epochs must be positive and finite, found 0"),
        ({"model": None}, "missing setting: model; give --model or set it in the --config file"),
        ({data: None}, f"missing setting: {data}; give --{data}"),
        ({"device": "cuda"}, "device is cuda, but torch sees no CUDA device; use --device cpu or auto"),
        ({"device": "tpu"}, "device must be \"auto\", \"cpu\" or \"cuda\", found 'tpu'"),
        ({"dtype": "float16"}, "--dtype must be one of float32, bfloat16, found 'float16'"),
        ({"on_bad_row": "ignore"}, "on_bad_row is 'ignore', expected \"error\" or \"skip\""),
        ({data: tmp_path / "no.jsonl"}, f"{tmp_path}/no.jsonl: found no such file or folder; check the path"),
        ({"model": tmp_path / "no"}, f"{tmp_path}/no: no tokenizer; expected tokenizer.json or tokenizer.model"),
    ):
        assert fails(lab, output, recipe, **settings).startswith(message)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("continued_pretrain", {"instruction_share": 1.5}, "instruction_share must be in [0, 1]"),
        ("continued_pretrain", {"domain_to_general": 0}, "instruction_share must be in [0, 1], domain_to"),
        ("continued_pretrain", {"instructions": None}, "the mixture gives 'instructions' a share of 50%, but it"),
        ("full_finetune", {"chat_format": "alpaca"}, "chat_format 'alpaca' is unknown; expected \"auto\", \"bai"),
        ("dfpo", {"chat_format": "chatml"}, "{folder}/model: the tokenizer has no token '<|im_start|>'"),
        ("dfpo", {"beta": -0.1}, "beta and mu must be finite and not negative, found beta=-0.1"),
        ("dfpo", {"label_smoothing": 0.5}, "label_smoothing must be in [0, 0.5), found 0.5"),
        ("dfpo", {"row_length": 10}, "{folder}/pairs.jsonl:1: over-long: "),
        ("full_finetune", {"row_length": 10}, "{folder}/train.jsonl:1: over-long: "),
        ("continued_pretrain", {"row_length": 0}, "row_length must be at least 1, found 0"),
        ("continued_pretrain", {"row_length": 129}, "row_length 129 exceeds the model's max_position_embeddings, 128"),
        ("dfpo", {"row_length": 4096}, "row_length 4096 exceeds the model's max_position_embeddings, 128"),
        ("expert_finetune", {"target_modules": "mlp.none"}, "target_modules: 'mlp.none' matches no linear layer"),
        ("expert_finetune", {"num_specific_experts": 0}, "num_specific_experts must be at least 1, found 0"),
    ],
)  # fmt: skip
def test_settings_of_one_recipe(lab, output, recipe, settings, message):
    assert fails(lab, output, recipe, **settings).startswith(message.format(folder=lab.folder))


GOOD = {
    "text": {"text": "孩子发烧要多喝水。"},
    "instructions": {"question": "孩子发烧怎么办？", "answer": "多喝水。"},
    "preferences": {"prompt": "孩子发烧怎么办？", "chosen": "别担心，多喝水。", "rejected": "喝水。"},
}
# The good row without what must be learned from it.
BAD = {
    "text": ({"title": "发烧"}, "missing field: found the keys title, expected text"),
    "instructions": ({"question": "发烧怎么办？"}, "missing field: found the keys question, expected answer"),
    "preferences": ({"prompt": "发烧怎么办？", "chosen": "多喝水。"}, "missing field: found the keys prompt, chosen"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bad_row_is_named_by_file_and_line(lab, recipe, output, tmp_path):
    data, (row, fault) = DATA[recipe], BAD[DATA[recipe]]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in (GOOD[data], row)), encoding="utf-8")
    assert fails(lab, output, recipe, **{data: file}).startswith(f"{file}:2: {fault}")
    result = lab.run(recipe, output, on_bad_row="skip", max_steps=1, **{data: file})
    assert result.code == 0 and f"1 skipped, missing field: {file}:2" in result.out


# A document longer than a row becomes several, so nothing is too long for the first recipe.
CASES = [(recipe, how) for recipe in RECIPES for how in ("bad", "blank", "long")[: 2 if DATA[recipe] == "text" else 3]]


@pytest.mark.parametrize(("recipe", "how"), CASES)
def test_nothing_left_to_train_on(lab, recipe, output, tmp_path, how):
    data = DATA[recipe]
    row = BAD[data][0] if how == "bad" else {**GOOD[data], list(GOOD[data])[-1]: "水" * 500}
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" if how == "blank" else json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    policies = {"on_bad_row": "skip"} | ({} if data == "text" else {"on_long_row": "skip"})
    message = fails(lab, output, recipe, **policies, **{data: file})
    nothing = "the mixture gives 'domain text' a share" if data == "text" else "there is nothing to train on"
    assert message.startswith(nothing)


@pytest.fixture
def model(lab, tmp_path):
    """A copy of the model to damage."""
    shutil.copytree(lab.folder / "model", tmp_path / "copy")
    return tmp_path / "copy"


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def cut(file):
    file.write_bytes(file.read_bytes()[:20_000])


def without(file, name):
    weights = load_file(file)
    del weights[name]
    save_file(weights, file)


WEIGHTS = "model.safetensors"
DAMAGE = {
    "other_shape": (lambda m: edit(m / "config.json", intermediate_size=64), "has the shape [32, 48], not [32, 64]"),
    "fewer_layers": (lambda m: edit(m / "config.json", num_hidden_layers=1), "unexpected: model.layers.1."),
    "truncated": (lambda m: cut(m / WEIGHTS), f"{WEIGHTS}: cannot be read as weights, the file may be truncated"),
    "no_weights": (lambda m: (m / WEIGHTS).unlink(), "no weights; expected model.safetensors"),
    "no_config": (lambda m: (m / "config.json").unlink(), "config.json: no such file"),
    "broken_config": (lambda m: (m / "config.json").write_text("{"), "config.json: not valid JSON"),
    "other_family": (lambda m: edit(m / "config.json", model_type="gpt2"), "model_type 'gpt2' is not supported"),
    "missing_tensor": (lambda m: without(m / WEIGHTS, "model.norm.weight"), "1 missing: model.norm.weight"),
    "no_tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer; expected tokenizer.json"),
    "broken_tokenizer": (lambda m: (m / "tokenizer.json").write_text("[]"), "tokenizer.json: not a usable tokenizer"),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_folder(lab, recipe, output, model, damage):
    break_it, message = DAMAGE[damage]
    break_it(model)
    found = fails(lab, output, recipe, model=model)
    assert message in found and (str(model) in found or "config.json" in found)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_vocabulary_smaller_than_the_tokenizer_s(lab, recipe, output, model):
    edit(model / "config.json", vocab_size=290)
    weights = load_file(model / WEIGHTS)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = weights[name][:290].clone()
    save_file(weights, model / WEIGHTS)
    message = f"{model}: the model has a vocabulary of 290 tokens, its tokenizer needs 300; they do not belong together"
    assert fails(lab, output, recipe, model=model) == message


def test_an_output_that_cannot_be_a_folder(lab, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    result = lab.run("full_finetune", file)
    assert result.code == 2 and result.err == f"error: [Errno 17] File exists: '{file}'\n"
    assert file.read_text(encoding="utf-8") == "mine"


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(lab, model, output):
    weights = load_file(model / WEIGHTS)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / WEIGHTS)
    result = lab.run("full_finetune", output, model=model, checkpoint_every=1)
    assert result.code == 2 and "error: the loss became nan; lower learning_rate" in result.err
    assert [path.name for path in output.iterdir()] == ["metrics.jsonl"] and lab.metrics(output) == []


def test_the_command_itself_ends_in_one_line_and_code_2(lab, output):
    result = lab.ended(lab.fork(lab.script("dfpo"), [*lab.arguments("dfpo", output), "--betta", "1"]))
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: --betta is no setting of this recipe; did you mean 'beta'?\n"


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_names_every_setting_and_how_to_run(lab, recipe, output):
    result = lab.call(recipe, ["--help"])
    assert result.code == 0 and f"torchrun --nproc-per-node 8 recipes/{recipe}.py" in result.out
    fields = lab.module(recipe).Config.__dataclass_fields__
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.startswith("  --")}
    assert set(lines) == {f"--{name}" for name in fields}
    assert all(len(line.split()) > 2 for line in lines.values())  # each has a comment
