"""Stage 3: the prompt computed once, the reference's file, the metrics, the warning."""

import importlib.util
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pedgpt import training

TIMES = {"seconds", "tokens_per_second", "tokens"}  # sharing the prompt leaves fewer tokens to compute


def assert_same_training(lab, found, expected):
    mine, theirs = lab.metrics(found), lab.metrics(expected)
    assert len(mine) == len(theirs) == 5
    for line, other in zip(mine, theirs, strict=True):
        tied = {"rewards/accuracies"} if abs(other["rewards/margins"]) < 1e-5 else set()  # rounding decides, at first
        for name in other.keys() - TIMES - tied:
            assert line[name] == pytest.approx(other[name], abs=1e-4 * max(1, abs(other[name]) / 10)), name
    weights = lab.weights(expected)
    for name, tensor in lab.weights(found).items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-4, msg=name)


def test_a_shared_prompt_trains_as_two_rows_do_with_fewer_tokens(lab, tmp_path):
    result = lab.run("dfpo", tmp_path, shared_prompt="false")
    assert result.code == 0, result.err
    assert_same_training(lab, lab.reference("dfpo"), tmp_path)
    assert lab.metrics(lab.reference("dfpo"))[-1]["tokens"] < 0.9 * lab.metrics(tmp_path)[-1]["tokens"]


def test_metrics_have_trls_names(lab):
    trl = Path(importlib.util.find_spec("trl").origin).parent  # its text is enough, and importing it takes seconds
    source = (trl / "trainer/dpo_trainer.py").read_text(encoding="utf-8")
    theirs = set(re.findall(r'_metrics\[mode\]\["([^"]+)"\]', source))
    ours = set(lab.metrics(lab.reference("dfpo"))[0])
    assert ours & theirs == {
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
        "logps/rejected", "entropy", "mean_token_accuracy",
    }  # fmt: skip
    assert {"loss", "loss/preference", "loss/regularization"} <= ours


def test_the_references_file_serves_other_runs(lab, tmp_path):
    file = tmp_path / "reference.safetensors"
    first = lab.run("dfpo", tmp_path / "first", reference_logps=file)
    assert first.code == 0 and "reference log-probabilities from" not in first.out
    assert_same_training(lab, tmp_path / "first", lab.reference("dfpo"))

    # What is in the file is what counts: 3 nats more for chosen, 1 for rejected, and the rewards tell.
    with safe_open(file, "pt") as handle:
        logps, metadata = handle.get_tensor("logps"), handle.metadata()
    save_file({"logps": logps + torch.tensor([3.0, 1.0])}, file, metadata=metadata)
    second = lab.run("dfpo", tmp_path / "second", reference_logps=file, mu=0.0, max_steps=1)
    assert second.code == 0 and f"reference log-probabilities from {file}" in second.out
    (line,) = lab.metrics(tmp_path / "second")
    assert line["rewards/chosen"] == pytest.approx(-0.3, abs=1e-5)
    assert line["rewards/rejected"] == pytest.approx(-0.1, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "entry"), [({"preferences": "heldout_pairs.jsonl"}, "data"), ({"dtype": "bfloat16"}, "dtype")]
)
def test_the_references_file_of_another_run_is_refused(lab, tmp_path, settings, entry):
    file = lab.reference("dfpo") / "reference_logps.safetensors"
    before = file.read_bytes()
    result = lab.run("dfpo", tmp_path / "run", reference_logps=file, **settings)
    assert result.code != 0 and len(result.err.strip().splitlines()) == 1
    assert str(file) in result.err and f"'{entry}' is" in result.err and "--reference_logps" in result.err
    assert file.read_bytes() == before and not (tmp_path / "run").exists()


def test_the_outputs_own_file_is_made_anew_if_it_does_not_fit(lab, tmp_path):
    file = tmp_path / "reference_logps.safetensors"
    file.write_bytes((lab.reference("dfpo") / file.name).read_bytes()[:-8])
    result = lab.run("dfpo", tmp_path, max_steps=1)
    assert result.code == 0 and "reference log-probabilities from" not in result.out
    with safe_open(file, "pt") as found, safe_open(lab.reference("dfpo") / file.name, "pt") as expected:
        assert found.metadata() == expected.metadata()
        assert torch.equal(found.get_tensor("logps"), expected.get_tensor("logps"))


def test_a_falling_chosen_likelihood_is_told_to_the_user(lab, tmp_path):
    made = []

    class Watch:
        def __init__(self, **settings):
            made.append(settings)

        def __call__(self, record):
            return "chosen falls" if record["step"] == 1 else None

    with patch.object(training, "ChosenLikelihoodWatch", Watch):
        result = lab.run("dfpo", tmp_path, mu=0.25, beta=0.2, max_steps=2)
    assert made == [{"beta": 0.2, "mu": 0.25, "window": 10}]
    assert result.err.count("warning: chosen falls") == 1
