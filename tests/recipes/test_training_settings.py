"""What single settings of the recipes do."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from pedgpt.adapters import check_base
from pedgpt.data import load_tokenizer
from pedgpt.models import load_model, weights_fingerprint
from pedgpt.models.transformer import Block


@pytest.mark.parametrize("recipe", ["continued_pretrain", "full_finetune", "dfpo", "expert_finetune"])
def test_the_loss_falls_on_training_and_held_out_rows(lab, recipe, tmp_path):
    # At a rate at which nothing is learned, the last evaluation is that of the model as it came.
    assert lab.run(recipe, tmp_path, learning_rate=1e-9, max_steps=1).code == 0
    (untrained,) = lab.metrics(tmp_path)
    trained = lab.metrics(lab.reference(recipe))
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.2
    assert trained[-1]["eval_loss"] < untrained["eval_loss"] - 0.2


@pytest.mark.parametrize("recipe", ["continued_pretrain", "full_finetune", "dfpo", "expert_finetune"])
def test_bfloat16_runs_and_its_loss_falls(lab, recipe, tmp_path):
    assert lab.run(recipe, tmp_path, dtype="bfloat16", max_steps=12, epochs=None).code == 0
    losses = [line["loss"] for line in lab.metrics(tmp_path)]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.5
    # The same first batch as in float32, 16 bits fewer: near it, and not it.
    assert 0 < abs(losses[0] - lab.metrics(lab.reference(recipe))[0]["loss"]) < 0.05
    (dtype,) = {tensor.dtype for tensor in lab.weights(tmp_path).values()}
    # A model is saved as it computes; an adapter as it trains.
    assert dtype == (torch.float32 if recipe == "expert_finetune" else torch.bfloat16)


LORA = {"adapter": "lora", "rank": 2}


@pytest.mark.parametrize(("recipe", "settings"), [("full_finetune", {}), ("dfpo", {}), ("dfpo", LORA)])
def test_trained_weights_are_saved_in_the_dtype_that_is_asked_for(lab, tmp_path, recipe, settings):
    common = {"dtype": "bfloat16", "max_steps": 1, **settings}
    for name in ("float32", "bfloat16"):
        result = lab.run(recipe, tmp_path / name, save_dtype=name, **common)
        assert result.code == 0, result.err
        assert {tensor.dtype for tensor in lab.weights(tmp_path / name).values()} == {getattr(torch, name)}
        assert ("saved in bfloat16: rounding moved" in result.out) == (name == "bfloat16" and not settings)
    whole, rounded = lab.weights(tmp_path / "float32"), lab.weights(tmp_path / "bfloat16")
    assert all(torch.equal(tensor.bfloat16(), rounded[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("recipe", ["continued_pretrain", "full_finetune", "dfpo", "expert_finetune"])
def test_activation_checkpointing_matches_training_without_it(lab, recipe, tmp_path, monkeypatch):
    calls = []
    forward = Block.forward

    def counted(self, *arguments, **rest):
        calls.append(torch.is_grad_enabled())
        return forward(self, *arguments, **rest)

    monkeypatch.setattr(Block, "forward", counted)
    counts, metrics, weights = [], [], []
    for how in ("none", "selective", "block", "offload"):
        calls.clear()
        assert lab.run(recipe, tmp_path / how, activation_checkpointing=how, max_steps=2).code == 0
        counts.append(sum(calls))
        metrics.append([(line["loss"], line.get("eval_loss", 0.0)) for line in lab.metrics(tmp_path / how)])
        weights.append(lab.weights(tmp_path / how))
    # "block" computes every block of a training pass again, and no other; "selective" computes none again.
    assert counts[3] == counts[2] == 2 * counts[1] == 2 * counts[0] > 0
    for other in (1, 2, 3):
        assert metrics[0] == [pytest.approx(pair, abs=1e-6) for pair in metrics[other]]
        for name, tensor in weights[0].items():
            torch.testing.assert_close(weights[other][name], tensor, rtol=0, atol=1e-5)


def test_evaluation_matches_cross_entropy_of_the_saved_model(lab, tmp_path):
    assert lab.run("full_finetune", tmp_path, evaluate_every=2).code == 0
    metrics = lab.metrics(tmp_path)
    assert [line["step"] for line in metrics if "eval_loss" in line] == [2, 4, 5]
    model = load_model(tmp_path / "model", dtype=torch.float64)
    ids = json.loads((tmp_path / "model" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    user, assistant, eos = ids["<reserved_106>"], ids["<reserved_107>"], ids["</s>"]
    encode = load_tokenizer(tmp_path / "model").encode
    total, count = 0.0, 0
    for line in (lab.folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines():
        tokens, targets = [], []  # targets[t]: what position t − 1 should have said
        for message in json.loads(line)["messages"]:
            words = encode(message["content"])
            if message["role"] == "system":
                tokens, targets = tokens + words, targets + [-100] * len(words)
            elif message["role"] == "user":
                after_answer = eos if tokens and targets[-1] != -100 else -100
                tokens, targets = [*tokens, user, *words], [*targets, after_answer, *[-100] * len(words)]
            else:
                tokens, targets = [*tokens, assistant, *words], [*targets, -100, *words]
        labels = torch.tensor([*targets[1:], eos])
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0]
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    assert metrics[-1]["eval_loss"] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize(("recipe", "ranks"), [("full_finetune", 1), ("expert_finetune", 1), ("full_finetune", 2)])
def test_the_best_model_is_that_of_a_run_which_ends_there(lab, recipe, ranks, tmp_path):
    heldout = tmp_path / "heldout.jsonl"  # answers unlike those that are learnt: soon their loss rises
    rows = [{"question": "孩子发烧怎么办？", "answer": answer} for answer in ("诊烧孩常", "婴湿肺发", "哮贫腹幼")]
    heldout.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    common = {
        "epochs": None, "learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0.0, "evaluate_every": 1,
        "heldout_instructions": heldout,
    }  # fmt: skip

    def ran(name, **settings):
        if ranks == 1:
            assert lab.run(recipe, tmp_path / name, **common, **settings).code == 0
        else:
            result = lab.two_ranks([(recipe, tmp_path / name, {**common, **settings}, None)])
            assert result.code == 0, result.err
        return lab.weights(tmp_path / name)

    best = ran("best", max_steps=7, keep_best="true")
    losses = [line["eval_loss"] for line in lab.metrics(tmp_path / "best")]
    step = losses.index(min(losses)) + 1
    assert 1 < step < 7 and not (tmp_path / "best" / "checkpoints").exists()
    expected = ran("short", max_steps=step)
    assert all(torch.equal(tensor, best[name]) for name, tensor in expected.items())


def test_dfpo_starts_from_the_reference(lab):
    first = lab.metrics(lab.reference("dfpo"))[0]
    assert first["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("chosen", "rejected", "margins"):
        assert first[f"rewards/{name}"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] == pytest.approx(first["loss/preference"] + first["loss/regularization"], abs=1e-5)
    last = lab.metrics(lab.reference("dfpo"))[-1]
    assert last["rewards/margins"] > 0.1 and last["eval_rewards/margins"] > 0.1


def test_dfpo_holds_every_pair_to_its_own_reference(lab, tmp_path):
    # Nothing learned, so every margin is 0, up to the rounding of float32 sums of about 150. With references mixed up,
    # −log σ of margins that cancel is more than log 2.
    assert lab.run("dfpo", tmp_path, learning_rate=1e-12, weight_decay=0.0).code == 0
    metrics = lab.metrics(tmp_path)
    assert [line["loss/preference"] for line in metrics] == pytest.approx([math.log(2)] * 5, abs=1e-5)
    assert metrics[-1]["eval_loss/preference"] == pytest.approx(math.log(2), abs=1e-5)


def test_dfpo_with_lora_starts_from_the_reference_and_trains_the_adapter_alone(lab, tmp_path):
    result = lab.run("dfpo", tmp_path, adapter="lora", rank=2, mu=0.0, learning_rate=1e-2)
    assert result.code == 0, result.err
    metrics = lab.metrics(tmp_path)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and metrics[-1]["loss"] < metrics[0]["loss"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter", "done.json", "metrics.jsonl", "reference_logps.safetensors"
    ]  # fmt: skip
    assert all(".lora_" in name for name in lab.weights(tmp_path))


def test_an_adapter_says_which_weights_it_was_trained_on(lab, tmp_path):
    assert lab.run("dfpo", tmp_path, adapter="lora", rank=2, max_steps=1).code == 0
    for output in (tmp_path, lab.reference("expert_finetune")):
        check_base(output / "adapter", "moved", weights_fingerprint(lab.folder / "model"))
        with pytest.raises(ValueError, match=f"than those of tied; its base model was {lab.folder / 'model'}"):
            check_base(output / "adapter", "tied", weights_fingerprint(lab.folder / "tied"))


def test_the_trained_model_keeps_its_tokenizer(lab):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        saved = lab.reference("continued_pretrain") / "model" / name
        assert saved.read_bytes() == (lab.folder / "model" / name).read_bytes()


def test_a_seed_repeats_a_run_and_another_does_not(lab, tmp_path):
    expected = lab.weights(lab.reference("expert_finetune"))
    assert lab.run("expert_finetune", tmp_path / "same").code == 0
    assert lab.run("expert_finetune", tmp_path / "other", seed=8).code == 0
    same, other = lab.weights(tmp_path / "same"), lab.weights(tmp_path / "other")
    assert all(torch.equal(tensor, same[name]) for name, tensor in expected.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in expected.items())
