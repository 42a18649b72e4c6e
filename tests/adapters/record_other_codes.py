"""Record what the code of other mixtures computes, as numbers in other_codes.json, for test_other_codes.py.

    git clone https://github.com/Clin0212/HydraLoRA     the numbers are of commit afb693b
    git clone https://github.com/TUDB-Labs/MoE-PEFT     40f8cb7
    python tests/adapters/record_other_codes.py HydraLoRA MoE-PEFT

Each case is one layer of their code over a base weight: the adapter's config and tensors as their code saves them, an
input, and the output of their forward pass in evaluation. Inputs and weights are random multiples of 1/64, so they are
short and exact. Nothing of their code is kept.
"""

import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

IN, OUT, RANK, ALPHA, EXPERTS = 8, 6, 2, 3, 3


def package(name, folder):
    """A package whose own __init__ does not run, because it imports far more than the layers."""
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [str(folder)]


def fill(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 20).round() / 64


def case(config, base, tensors, x, y):
    tensors = {key: tensor.tolist() for key, tensor in sorted(tensors.items())}
    return {"config": config, "base": base.tolist(), "tensors": tensors, "x": x.tolist(), "y": y.tolist()}


def hydralora(root, x):
    code = root / "HydraLoRA" / "peft"
    for name in ("peft", "peft.utils", "peft.tuners"):
        package(name, code / name.removeprefix("peft").removeprefix("."))
    from peft.utils.config import PeftConfig, PeftType
    from peft.utils.other import transpose

    vars(sys.modules["peft.utils"]).update(PeftConfig=PeftConfig, PeftType=PeftType, transpose=transpose)
    from peft.tuners.lora import LoraConfig, LoraModel
    from peft.utils.save_and_load import get_peft_model_state_dict

    settings = {"r": RANK, "lora_alpha": ALPHA, "lora_nums": EXPERTS, "lora_dropout": 0.1, "bias": "none"}
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    block = nn.ModuleDict({"q_proj": nn.Linear(IN, OUT, bias=False)})
    model = LoraModel(config, nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([block])})}))
    layer = block["q_proj"]
    fill(layer, 0)
    layer.eval(), layer.lora_dropout.eval()  # their own eval() leaves it on
    # A PeftModel holds this as its base_model, which gives the first part of the names.
    state = {f"base_model.{key}": tensor for key, tensor in model.state_dict().items()}
    tensors = get_peft_model_state_dict(SimpleNamespace(peft_config=config, modules_to_save=None), state)
    return case({**asdict(config), "peft_type": "LORA"}, layer.weight, tensors, x, layer(x)[0])


def moe_peft(root, x, kind, **settings):
    package("moe_peft", root / "moe_peft")
    sys.modules["evaluate"] = ModuleType("evaluate")  # of the training alone
    from moe_peft.adapters import lora_config_factory
    from moe_peft.common import Linear, LLMBatchConfig
    from moe_peft.model import get_lora_layer_weight, init_lora_layer_weight

    given = {"name": "a", "peft_type": kind, "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.1, **settings}
    config = lora_config_factory(copy.deepcopy(given) | {"target_modules": ["up_proj"], "num_experts": EXPERTS})
    layer = Linear(nn.Linear(IN, OUT, bias=False), "cpu")
    decoder = SimpleNamespace(layer_id_=0, mlp_=SimpleNamespace(moes_={}), state_dict=lambda: ({}, {"up_proj": layer}))
    init_lora_layer_weight(decoder, SimpleNamespace(dim_=IN, device_="cpu"), config, None)
    parts = nn.ModuleList([layer, *layer.loras_.values(), *(moe.gate_ for moe in layer.moes_.values())])
    fill(parts, 1)
    parts.eval()
    tensors = {}
    get_lora_layer_weight(decoder, config, tensors)
    rows = SimpleNamespace(efficient_operator_=False, batch_configs_=[LLMBatchConfig("a", 0, len(x))])
    return case(config.export(), layer.base_layer_.weight, tensors, x, layer(x, rows))


@torch.no_grad()
def main(hydra, moe):
    x = (torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(2)) * 64).round() / 64
    cases = {
        "HydraLoRA": hydralora(Path(hydra), x),
        "MOLA": moe_peft(Path(moe), x, "MOLA", top_k=2),
        "LORAMOE": moe_peft(Path(moe), x, "LORAMOE"),
    }
    Path(__file__).with_name("other_codes.json").write_text(json.dumps(cases) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
