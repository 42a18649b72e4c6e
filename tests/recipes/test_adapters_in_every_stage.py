"""Every stage trains all parameters, a LoRA or experts, and goes on from an adapter that another stage has trained."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file

EXPERTS = {"adapter": "experts", "rank": 2, "learning_rate": 1e-2}
LORA = {"adapter": "lora", "rank": 2, "learning_rate": 1e-2}
CASES = [
    ("continued_pretrain", LORA), ("continued_pretrain", EXPERTS), ("full_finetune", LORA), ("dfpo", EXPERTS),
    ("expert_finetune", LORA),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "settings"), CASES)
def test_only_the_adapter_trains_and_a_killed_run_goes_on_bit_for_bit(lab, tmp_path, recipe, settings):
    before = load_file(lab.folder / "model/model.safetensors")
    done = lab.run(recipe, tmp_path / "whole", **settings)
    assert done.code == 0, done.err
    metrics = lab.metrics(tmp_path / "whole")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    experts = settings is EXPERTS
    title = "experts" if experts else "LoRA"
    assert f"{title} on " in done.out
    shares = [[line[f"gates/expert_{j}"] for j in (1, 2, 3)] for line in metrics if experts]
    assert all(math.isclose(sum(share), 1, abs_tol=1e-5) for share in shares)
    names = {name.rsplit(".", 2)[1] for name in lab.weights(tmp_path / "whole")}
    assert names == {"lora_A", "lora_B"} | ({"router", "router_noise"} if experts else set())
    after = load_file(lab.folder / "model/model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    halves = {**settings, "checkpoint_every": 1}
    assert lab.run(recipe, tmp_path / "halves", die_after=2, **halves).code == -9
    assert lab.run(recipe, tmp_path / "halves", **halves).code == 0
    lab.assert_as_if_nothing_happened(tmp_path / "halves", tmp_path / "whole")


def test_stage_2_with_experts_is_stage_4(lab, tmp_path):
    assert lab.run("full_finetune", tmp_path, **EXPERTS).code == 0
    found, expected = lab.weights(tmp_path), lab.weights(lab.reference("expert_finetune"))
    assert found.keys() == expected.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture(scope="module")
def taught(lab):
    """A LoRA that stage 2 has trained, and the same merged into the model."""
    folder = lab.folder / "taught"
    assert lab.run("full_finetune", folder, **LORA).code == 0
    arguments = ["--model", lab.folder / "model", "--adapter", folder / "adapter", "--output", folder / "model"]
    assert lab.call("merge_lora", list(map(str, arguments))).code == 0
    return folder


@pytest.mark.parametrize("recipe", ["continued_pretrain", "full_finetune", "expert_finetune"])
def test_going_on_from_an_adapter_starts_where_its_merged_model_does(lab, tmp_path, taught, recipe):
    onward = {"max_steps": 2, "adapter": "lora"}
    going_on = lab.run(recipe, tmp_path / "on", from_adapter=taught / "adapter", rank=None, **onward)
    assert going_on.code == 0, going_on.err
    assert lab.run(recipe, tmp_path / "merged", model=taught / "model", **onward).code == 0
    on, merged = (lab.metrics(tmp_path / name)[0]["loss"] for name in ("on", "merged"))
    assert on == pytest.approx(merged, abs=1e-5)
    start, trained = load_file(taught / "adapter/adapter_model.safetensors"), lab.weights(tmp_path / "on")
    assert start.keys() == trained.keys()
    assert all(0 < (trained[name] - tensor).abs().max() < 0.03 for name, tensor in start.items())


def test_the_reference_of_dfpo_is_the_model_with_the_adapter_as_it_came_in(lab, tmp_path, taught):
    settings = {"adapter": "lora", "max_steps": 4, "checkpoint_every": 1, "learning_rate": 1e-2}
    whole = {**settings, "from_adapter": taught / "adapter"}
    assert lab.run("dfpo", tmp_path / "on", **whole).code == 0
    assert lab.run("dfpo", tmp_path / "merged", model=taught / "model", **settings).code == 0
    on, merged = (load_file(tmp_path / name / "reference_logps.safetensors")["logps"] for name in ("on", "merged"))
    torch.testing.assert_close(on, merged, rtol=0, atol=1e-4)
    assert lab.metrics(tmp_path / "on")[0]["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
    # A run that was killed takes its reference from the file, or from the adapter as it came in, never as it is now.
    assert lab.run("dfpo", tmp_path / "killed", die_after=2, **whole).code == -9
    (tmp_path / "killed/reference_logps.safetensors").unlink()
    assert lab.run("dfpo", tmp_path / "killed", **whole).code == 0
    lab.assert_as_if_nothing_happened(tmp_path / "killed", tmp_path / "on")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapter": "none", "rank": 4}, "rank is set, but all parameters train; give --adapter lora or experts"),
        ({"adapter": "none", "from_adapter": "taught/adapter"}, "from_adapter is set, but all parameters train"),
        ({"adapter": "experts", "from_adapter": "taught/adapter"}, "adapter holds lora, but adapter is experts"),
        ({"adapter": "lora", "from_adapter": "taught/adapter", "rank": 4}, "rank is 4, but .* has 2; leave out rank"),
        ({"adapter": "none", "target_modules": "o_proj"}, "target_modules is set, but all parameters train"),
        ({"adapter": "lora", "num_specific_experts": 2}, "a LoRA has none; give --adapter experts"),
        ({"adapter": "lora", "balance": 0.1}, "balance is set, but a LoRA has none; give --adapter experts"),
        ({"adapter": "experts", "balance": -1}, "balance must not be negative, found -1.0"),
        ({"adapter": "experts", "top_k": 4}, "top_k must be in 1 to num_specific_experts, 3, found 4"),
        ({"adapter": "experts", "num_specific_experts": "two"}, "must be an integer or a table, found 'two'"),
        ({"adapter": "lora", "from_adapter": "taught/adapter", "dropout": 0.1}, "dropout is 0.1, but .* has 0.0"),
        ({"adapter": "lora", "from_adapter": "taught/adapter", "target_modules": "o_proj"}, "leave out target_modules"),
        ({"adapter": "lora", "from_adapter": "taught/adapter", "model": "tied"}, "was trained on other weights than"),
        ({"adapter": "lora", "from_adapter": "nowhere"}, "nowhere/adapter_config.json: no such file"),
        ({"adapter": "lorra"}, "adapter must be one of none, lora, experts, found 'lorra'"),
    ],
)
def test_mistakes_end_in_one_line(lab, tmp_path, taught, settings, said):
    done = lab.run("full_finetune", tmp_path, **settings)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert re.search(said, done.err), done.err


def test_variants_of_the_experts_resume_go_on_and_train_on_two_ranks(lab, tmp_path):
    """The balance is that of a micro-batch, and micro-batches of one row do not depend on ranks."""
    table = 'num_specific_experts = { "*.0.*" = 2, "*" = 3 }'
    (tmp_path / "variants.toml").write_text(f"{table}\nnum_universal_experts = 2\ntop_k = 2\nshared_A = true\n")
    settings = {**EXPERTS, "config": tmp_path / "variants.toml", "balance": 0.5, "micro_batch_size": 1, "max_steps": 3}
    done = lab.run("expert_finetune", tmp_path / "whole", **settings, checkpoint_every=1)
    assert done.code == 0, done.err
    metrics = lab.metrics(tmp_path / "whole")
    assert all(line["gates/balance"] > 0 and "gates/expert_3" in line for line in metrics)
    assert lab.run("expert_finetune", tmp_path / "killed", **settings, checkpoint_every=1, die_after=2).code == -9
    assert lab.run("expert_finetune", tmp_path / "killed", **settings, checkpoint_every=1).code == 0
    lab.assert_as_if_nothing_happened(tmp_path / "killed", tmp_path / "whole")
    on = {**settings, "config": None, "rank": None, "from_adapter": tmp_path / "whole/adapter", "max_steps": 1}
    assert lab.run("expert_finetune", tmp_path / "on", **on).code == 0
    done = lab.two_ranks([("expert_finetune", tmp_path / "two", settings, None)])
    assert done.code == 0, done.err
    found, expected = lab.weights(tmp_path / "two"), lab.weights(tmp_path / "whole")
    assert {tensor.shape[0] for name, tensor in found.items() if ".router." in name} == {2, 3}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-4)


def test_two_ranks_match_one(lab, tmp_path, taught):
    on = {"adapter": "lora", "from_adapter": str(taught / "adapter"), "learning_rate": 1e-2}
    jobs = [("continued_pretrain", LORA), ("dfpo", EXPERTS), ("full_finetune", on)]
    jobs = [(recipe, {**settings, "max_steps": 3}) for recipe, settings in jobs]
    done = lab.two_ranks([(recipe, tmp_path / f"{recipe}_two", settings, None) for recipe, settings in jobs])
    assert done.code == 0, done.err
    for recipe, settings in jobs:
        assert lab.run(recipe, tmp_path / recipe, **settings).code == 0
        found, expected = lab.weights(tmp_path / f"{recipe}_two"), lab.weights(tmp_path / recipe)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-4)
        for mine, theirs in zip(lab.metrics(tmp_path / f"{recipe}_two"), lab.metrics(tmp_path / recipe), strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
