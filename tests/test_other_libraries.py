"""The examples of docs/any_model.md run as they stand, on a small random Qwen3."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parents[1]
EXPERTS, DFPO = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs" / "any_model.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder in which the name of the hub's model is a folder with a small one."""
    folder = tmp_path_factory.mktemp("project")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<|end|>", *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = Qwen3Config(vocab_size=257, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, **sizes, **tokens)
    base = folder / "Qwen" / "Qwen3-0.6B"
    Qwen3ForCausalLM(config).save_pretrained(base)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(base)
    return folder


@pytest.fixture(autouse=True)
def offline(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_examples_are_as_short_as_they_say():
    assert [len(code.strip().splitlines()) for code in (EXPERTS, DFPO)] <= [30, 20]


def test_experts_in_transformers_trainer(project, capsys):
    exec(EXPERTS, {"__name__": "__main__"})
    assert "Question: What lowers a child's fever?" in capsys.readouterr().out
    assert (project / "runs" / "experts" / "adapter" / "adapter_model.safetensors").is_file()


def test_dfpo_in_trls_trainer(capsys):
    exec(DFPO, {"__name__": "__main__"})
    assert "'train_loss'" in capsys.readouterr().out


def test_without_the_likelihood_term_it_is_trls_own_loss():
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    names = {}
    exec(DFPO.split("pairs = ")[0].replace("mu=1.0", "mu=0.0"), names)
    arguments = DPOConfig("runs/trl", precompute_ref_log_probs=True, report_to="none", bf16=False)
    pairs = Dataset.from_list([{"prompt": "a b", "chosen": "cd", "rejected": "efg"}] * 2)
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
    losses = []
    for kind in (DPOTrainer, names["DFPOTrainer"]):
        trainer = kind("Qwen/Qwen3-0.6B", args=arguments, train_dataset=pairs, processing_class=tokenizer)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        torch.nn.init.normal_(trainer.model.model.norm.weight, generator=torch.Generator().manual_seed(0))
        losses.append(trainer.compute_loss(trainer.model, inputs))
    assert losses[0].item() != pytest.approx(0.6931, abs=1e-3)
    torch.testing.assert_close(losses[1], losses[0].float(), rtol=1e-4, atol=1e-5)
