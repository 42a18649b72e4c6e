"""Frozen weights in 8 and 4 bits against bitsandbytes, hand arithmetic and float64.

Triton's kernels run compiled where there is a GPU and under its interpreter elsewhere.
"""

import copy
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pedgpt.kernels import Linear, Quantized, QuantizedLinear, lora_linear, quantized
from pedgpt.kernels.quantized import DYNAMIC, NF4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = quantized.triton is not None and DEVICE == "cpu"
needs_triton = pytest.mark.skipif(quantized.triton is None, reason="needs Triton")
both_impls = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
all_kinds = pytest.mark.parametrize("kind", ["int8", "nf4"])
all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Rows and columns: fewer than a tile, odd numbers of rows, more blocks than one of the second quantisation.
SHAPES = [("int8", 1, 1), ("int8", 65, 70), ("int8", 9, 515), ("nf4", 1, 64), ("nf4", 67, 192), ("nf4", 53, 320)]
all_shapes = pytest.mark.parametrize(("kind", "rows", "columns"), SHAPES)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make(kind, rows, columns, dtype=torch.float32, bias=True, impl=None):
    """A quantised layer of random weights."""
    base = nn.Linear(columns, rows, bias=bias, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        base.weight.copy_(0.02 * random(rows, columns))
    layer = QuantizedLinear(base, kind)
    layer.quantization.quantize_(layer.weight, base.weight.detach().split(7))
    layer.impl = impl
    return layer


def definition(layer):
    """W in float64 as the head of quantized.py defines it, number by number."""
    q, codes = layer.quantization, layer.weight.cpu()
    if q.kind == "int8":
        return (codes.double() * q.scale.cpu().double()[:, None] / 127).to(DEVICE)
    a = DYNAMIC.double()[q.absmax.cpu().long().flatten()]
    a = a * torch.tensor([q.nested_absmax[i // 256] for i in range(len(a))]).double() + q.offset.cpu().double()
    numbers = torch.stack([NF4.double()[(codes // 16).long()], NF4.double()[(codes % 16).long()]], -1)
    return (numbers.flatten() * a.repeat_interleave(64)).view(len(codes), -1).to(DEVICE)


def dense(layer, dtype=torch.float32, impl=None):
    return layer.quantization.dense(layer.weight, dtype, impl=impl)


def state(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def error(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


# Quantising


def weights(rows, columns, dtype):
    """With a row of zeros, one of small numbers and one large outlier."""
    w = 0.02 * random(rows, columns)
    w[1], w[2] = 0, w[2] / 8
    w[0, 5] = -0.9
    return w.to(dtype).cpu()


@all_dtypes
@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (33, 192), (300, 1024)])
def test_nf4_matches_bitsandbytes(rows, columns, dtype):
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = weights(rows, columns, dtype)
    layer = QuantizedLinear(nn.Linear(columns, rows, dtype=dtype), "nf4")
    q, codes = layer.quantization, layer.weight
    q.quantize_(codes, w.split(7))
    theirs, their_state = bnb.quantize_4bit(w, compress_statistics=True, quant_type="nf4")
    assert torch.equal(codes.flatten(), theirs.flatten())
    # They sum the mean in float32. Over bfloat16 weights that is exact here, because the sum has few bits.
    assert torch.equal(q.offset, their_state.offset) or dtype != torch.bfloat16
    torch.testing.assert_close(q.offset, their_state.offset, rtol=2e-6, atol=0)
    # Their rounding of the rest from the same mean, in the form for any device. The one for CPUs alone misses the
    # nearest code where two are almost equally near, because it looks them up by 16 bits of the value.
    blocks = w.float().view(-1, 64).abs().amax(1) - q.offset
    operator = torch.ops.bitsandbytes.quantize_blockwise.default
    any_device = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    absmax, nested = operator.redispatch(any_device, blocks, bnb.create_dynamic_map(), 256)
    assert torch.equal(q.absmax.flatten(), absmax) and torch.equal(q.nested_absmax, nested)
    on_cpu, _ = operator(blocks, bnb.create_dynamic_map(), 256)
    groups = F.pad(blocks, (0, -len(blocks) % 256)).view(-1, 256) / nested.clamp(min=1e-38)[:, None]
    values = groups.flatten()[: len(blocks)]
    distances = [(values - DYNAMIC[found.long()]).abs() for found in (absmax, on_cpu)]
    assert (distances[0] <= distances[1]).all() and (distances[1] - distances[0]).max() <= 2**-14
    # Their arithmetic on our numbers.
    their_state.absmax, their_state.offset, their_state.state2.absmax = q.absmax.flatten(), q.offset, q.nested_absmax
    assert torch.equal(q.dense(codes, dtype, impl="torch"), bnb.dequantize_4bit(codes.view(-1, 1), their_state))


@all_dtypes
@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (33, 191), (300, 1024)])
def test_int8_matches_bitsandbytes(rows, columns, dtype):
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = weights(rows, columns, dtype)
    layer = QuantizedLinear(nn.Linear(columns, rows, dtype=dtype), "int8")
    q, codes = layer.quantization, layer.weight
    q.quantize_(codes, w.split(7))
    theirs, scale, _ = bnb.int8_vectorwise_quant(w)
    theirs[1] = 0  # They divide a row of zeros by zero.
    assert torch.equal(codes, theirs) and torch.equal(q.scale, scale)
    assert torch.equal(q.dense(codes, torch.float32, impl="torch"), bnb.int8_vectorwise_dequant(theirs, scale))


def test_the_tables_are_those_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(NF4, bnb.get_4bit_type("nf4", device="cpu")) and torch.equal(DYNAMIC, bnb.create_dynamic_map())


def test_int8_matches_hand_arithmetic():
    layer = QuantizedLinear(nn.Linear(3, 2), "int8")
    layer.quantization.quantize_(layer.weight, [torch.tensor([[1.0, -2.0, 0.51]]), torch.tensor([[0.0, 0.0, 4.0]])])
    assert layer.weight.tolist() == [[64, -127, 32], [0, 0, 127]]  # 63.5 goes to the even number
    assert layer.quantization.scale.tolist() == [2.0, 4.0]
    expected = torch.tensor([[128 / 127, -2, 64 / 127], [0, 0, 4]])
    torch.testing.assert_close(dense(layer.cpu(), impl="torch"), expected, rtol=3e-7, atol=0)


def test_nf4_matches_hand_arithmetic():
    """Two blocks, whose largest numbers are 1 and 3: their mean is 2, and what is left is −1 and 1 times 1."""
    layer = QuantizedLinear(nn.Linear(128, 1), "nf4")
    row = torch.zeros(1, 128)
    row[0, :4], row[0, 64:67] = torch.tensor([1.0, -1.0, 0.75, 0.04]), torch.tensor([-3.0, 0.75, 3 * 0.33])
    layer.quantization.quantize_(layer.weight, [row])
    assert layer.weight[0, :3].tolist() == [0xF0, 0xE8, 0x77] and layer.weight[0, 32:34].tolist() == [0x0A, 0xB7]
    assert layer.quantization.offset == 2 and layer.quantization.nested_absmax.tolist() == [1.0]
    assert layer.quantization.absmax.tolist() == [[0, 255]]  # The table goes from -0.9929688 to 1.
    w = dense(layer.cpu(), impl="torch")[0]
    low = 2 - 0.99296874
    expected = torch.tensor([low, -low, 0.7229568362 * low, 0.0795802996 * low, 0, 0])
    torch.testing.assert_close(w[:6], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(w[64:68], 3 * torch.tensor([-1, 0.2461123019, 0.3379152417, 0]), rtol=1e-6, atol=0)


@all_shapes
def test_codes_do_not_depend_on_the_blocks_in_which_rows_come(kind, rows, columns):
    w = random(rows, columns)
    found = []
    for size in (1, 2, 7, rows):
        layer = QuantizedLinear(nn.Linear(columns, rows, device=DEVICE), kind)
        layer.quantization.quantize_(layer.weight, (part for part in w.split(size)))
        found.append(state(layer))
    for other in found[1:]:
        assert_same({k: v for k, v in other.items() if k != "bias"}, {k: v for k, v in found[0].items() if k != "bias"})


def test_the_threads_that_sum_change_no_bit():
    """The mean of these numbers in float32 depends on them."""
    w, found = 0.02 * random(1024, 4096, seed=1).cpu(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        layer = QuantizedLinear(nn.Linear(4096, 1024, bias=False), "nf4")
        layer.quantization.quantize_(layer.weight, w.split(512))
        found.append(state(layer))
    torch.set_num_threads(1)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@all_kinds
def test_rows_of_zeros_and_of_the_smallest_numbers_stay_small(kind):
    layer = QuantizedLinear(nn.Linear(64, 3, device=DEVICE), kind)
    w = random(3, 64) * torch.tensor([[0.0], [1e-38], [1e-42]], device=DEVICE)
    layer.quantization.quantize_(layer.weight, [w])
    assert not layer.weight[0].any() or kind == "nf4" and (layer.weight[0] == 0x77).all()
    assert (dense(layer, impl="torch").abs() <= 1e-36).all()


@all_kinds
def test_rows_that_are_missing_are_noticed(kind):
    layer = QuantizedLinear(nn.Linear(64, 5), kind)
    with pytest.raises(RuntimeError):
        layer.quantization.quantize_(layer.weight, random(4, 64).cpu().split(2))


@all_kinds
def test_no_more_than_half_a_step_is_lost(kind):
    w = 0.02 * random(64, 512).double()
    layer = QuantizedLinear(nn.Linear(512, 64, device=DEVICE), kind)
    layer.quantization.quantize_(layer.weight, [w.float()])
    lost = (definition(layer) - w).abs()
    if kind == "int8":
        assert (lost <= w.abs().amax(1, keepdim=True) * (0.5 / 127) * 1.0001).all()
    else:  # Half of the widest gap between two numbers of the table, and what the second quantisation adds.
        absmax = w.view(-1, 64).abs().amax(1)
        step = (absmax - absmax.mean()).abs().max() * 0.5 / 64
        assert (lost.view(-1, 64).amax(1) <= absmax * (1 - 0.6961928) / 2 + step).all()
    assert error(definition(layer), w) < (0.01 if kind == "int8" else 0.1)


# Dequantising


@both_impls
@all_shapes
def test_dense_weights_match_the_definition_in_float64(kind, rows, columns, impl):
    layer = make(kind, rows, columns)
    found, truth = dense(layer, impl=impl), definition(layer)
    assert found.shape == (rows, columns) == Quantized(layer.weight, layer.quantization).shape
    torch.testing.assert_close(found.double(), truth, rtol=4 * 2**-24, atol=0)


@all_dtypes
@all_shapes
def test_dense_weights_are_rounded_once(kind, rows, columns, dtype):
    layer = make(kind, rows, columns)
    assert torch.equal(dense(layer, dtype, impl="torch"), dense(layer, impl="torch").to(dtype))
    assert torch.equal(dense(layer, torch.float64, impl="torch"), dense(layer, impl="torch").double())


@needs_triton
@all_dtypes
@all_shapes
def test_triton_gives_the_bits_of_torch(kind, rows, columns, dtype):
    layer = make(kind, rows, columns)
    expected = dense(layer, dtype, impl="torch")
    if INTERPRETED and dtype == torch.bfloat16:  # The interpreter does not round to bfloat16, but cuts bits off.
        bits = dense(layer, impl="torch").view(torch.int32) >> 16
        expected = bits.to(torch.int16).view(torch.bfloat16)
    assert torch.equal(dense(layer, dtype, impl="triton"), expected)


@all_kinds
def test_many_rows_are_dequantised_in_several_steps(kind):
    """2^18 numbers a step on the CPU."""
    layer = make(kind, 301, 2048)
    torch.testing.assert_close(dense(layer, impl="torch").double(), definition(layer), rtol=4 * 2**-24, atol=0)


# Products


def results(function, x, dy, *others):
    """y and the gradients of x and of the others."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x, *others)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


# Every shape with all these tokens, every second pair by torch and the others by Triton.
TOKENS = [(), (1,), (3, 5), (16,), (17,), (2, 35), (0,)]
PAIRS = [(i + j, (*SHAPES[i], TOKENS[j])) for i in range(len(SHAPES)) for j in range(len(TOKENS))]


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "tokens", "impl"),
    [pytest.param(*pair, "triton", marks=needs_triton) if n % 2 else (*pair, "torch") for n, pair in PAIRS],
)
def test_the_layer_and_its_gradients_match_float64(kind, rows, columns, tokens, impl):
    layer = make(kind, rows, columns, impl=impl)
    w, x, dy = definition(layer), random(*tokens, columns), random(*tokens, rows, seed=1)
    layer.bias.requires_grad_()

    def ours(x, bias):
        return torch.func.functional_call(layer, {"bias": bias}, x)

    found = results(ours, x, dy, layer.bias)
    truth = results(lambda x, bias: F.linear(x, w, bias), x.double(), dy, layer.bias.double())
    for one, other in zip(found, truth, strict=True):
        assert one.shape == other.shape and one.dtype == torch.float32
        assert error(one, other) <= 1e-6 if other.norm() > 0 else not one.any()


@both_impls
@all_dtypes
@pytest.mark.parametrize(("kind", "tokens"), [("int8", 5), ("nf4", 40)])
def test_half_precision_is_as_close_to_float64_as_f_linear(kind, dtype, tokens, impl):
    """Over the same dense weight; with a budget of 5 %, since sums are rounded in another order."""
    layer = make(kind, 70, 320, dtype, impl=impl)
    w, x, dy = dense(layer, dtype, impl), random(tokens, 320, dtype=dtype), random(tokens, 70, seed=1)
    truth = results(lambda x: F.linear(x, w.double(), layer.bias.double()), x.double(), dy.to(dtype))
    theirs = results(lambda x: F.linear(x, w, layer.bias), x, dy)
    for found, other, true in zip(results(layer, x, dy), theirs, truth, strict=True):
        assert found.dtype == dtype and error(found, true) <= 1.05 * error(other, true) + 1e-7


def adapter(rows, columns, experts, rank=3, dropout=False, tokens=37):
    """Operands of lora_linear but for x, weight and bias: parameters, then settings."""
    size = (experts + 1) * rank
    names = {"lora_A": (size, columns), "lora_B": (rows, size)}
    names |= {"router": (experts, columns), "router_noise": (experts, columns)} if experts else {}
    names |= {"dropped": (tokens, columns)} if dropout else {}
    parameters = {
        name: random(*shape, seed=i + 5) * (1 if name == "dropped" else shape[1] ** -0.5)
        for i, (name, shape) in enumerate(names.items())
    }
    return parameters, {"scaling": 1.7, **({"noise": random(tokens, experts, seed=9)} if experts else {})}


def with_adapter(weight, bias, names, settings):
    def function(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return lora_linear(x, weight, bias, given.pop("lora_A"), given.pop("lora_B"), **given, **settings)[0]

    return function


@both_impls
@pytest.mark.parametrize(
    ("kind", "tokens", "experts", "dropout"),  # every second combination
    [
        ("int8", 7, 0, False), ("int8", 37, 3, False), ("int8", 7, 3, True),
        ("nf4", 37, 0, False), ("nf4", 7, 3, False), ("nf4", 37, 3, True),
    ],
)  # fmt: skip
def test_adapters_over_codes_and_their_gradients_match_float64(kind, tokens, experts, dropout, impl):
    """The truth is the same operator over the dense weight in float64, which is tested against hand arithmetic."""
    layer = make(kind, 45, 192)
    w, x, dy = definition(layer), random(tokens, 192), random(tokens, 45, seed=1)
    parameters, settings = adapter(45, 192, experts, dropout=dropout, tokens=tokens)
    weight = Quantized(layer.weight, layer.quantization)
    ours = with_adapter(weight, layer.bias, parameters, {**settings, "impl": impl})
    found = results(ours, x, dy, *parameters.values())
    wide = {name: value.double() if torch.is_tensor(value) else value for name, value in settings.items()}
    theirs = with_adapter(w, layer.bias.double(), parameters, wide)
    truth = results(theirs, x.double(), dy, *(p.double() for p in parameters.values()))
    for name, one, other in zip(("y", "x", *parameters), found, truth, strict=True):
        assert error(one, other) <= 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("experts", [0, 3])
@all_kinds
def test_codes_give_the_bits_of_their_dense_weight(kind, experts, dtype):
    layer = make(kind, 45, 192, dtype)
    x, dy = random(37, 192, dtype=dtype), random(37, 45, seed=1)
    parameters, settings = adapter(45, 192, experts)
    found, expected = (
        results(with_adapter(w, layer.bias, parameters, {**settings, "impl": "torch"}), x, dy, *parameters.values())
        for w in (Quantized(layer.weight, layer.quantization), dense(layer, dtype, impl="torch"))
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@all_kinds
def test_autocast_chooses_the_dtype(kind):
    layer, x = make(kind, 9, 64, impl="torch"), random(5, 64)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x.bfloat16(), dense(layer, torch.bfloat16, "torch"), layer.bias.bfloat16()))


@all_kinds
def test_it_is_differentiable_once(kind):
    y = make(kind, 9, 64)(x := random(5, 64).requires_grad_())
    with pytest.raises(RuntimeError, match="QuantizedLinear is differentiable once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


# Memory


@pytest.fixture
def no_scratch():
    quantized._scratch.clear()
    yield
    quantized._scratch.clear()


@pytest.fixture
def few_objects():
    """What other tests left is no longer looked through, which takes seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


def large_tensors(numbers, dtype=torch.float32):
    """The storages of at least so many numbers, of which the garbage collector knows a tensor."""
    gc.collect()
    plain = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.layout == torch.strided]
    tensors = [t for t in plain if t.dtype == dtype]
    return {t.untyped_storage().data_ptr() for t in tensors if t.untyped_storage().nbytes() >= numbers * dtype.itemsize}


@all_kinds
def test_no_dense_weight_is_kept_for_the_backward_pass(kind, no_scratch, few_objects):
    """Of two layers and an adapter, the graph keeps what is small, and all share the memory of the largest."""
    first, second = make(kind, 256, 512), make(kind, 512, 256)
    parameters, settings = adapter(256, 512, 3)
    before, kept = large_tensors(512 * 256), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        h = first(random(37, 512).requires_grad_())
        y = second(h)
        weight = Quantized(first.weight, first.quantization)
        z = with_adapter(weight, first.bias, parameters, settings)(
            y, *(p.requires_grad_() for p in parameters.values())
        )
    assert sum(kept) < 512 * 256 and len(large_tensors(512 * 256) - before) == 1
    z.sum().backward()
    assert len(large_tensors(512 * 256) - before) == 1 and len(quantized._scratch) == 1


@all_kinds
def test_layers_of_different_sizes_and_dtypes_take_turns(kind, no_scratch):
    layers = [make(kind, *shape) for shape in ((9, 64), (70, 320), (5, 128))]
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for layer in (*layers, *layers[::-1]):
            x = random(20, layer.in_features, dtype=dtype)
            w = dense(layer, dtype)
            torch.testing.assert_close(layer(x), F.linear(x, w, layer.bias.to(dtype)))
    assert {(key[1], memory.numel()) for key, memory in quantized._scratch.items()} == {
        (torch.float32, 70 * 320), (torch.bfloat16, 70 * 320),
    }  # fmt: skip


@all_kinds
def test_memory_from_inference_serves_training(kind, no_scratch):
    layer, x = make(kind, 9, 64), random(20, 64)
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y, expected)


def test_threads_do_not_write_into_each_others_weight(no_scratch):
    layers = [make("nf4", 256, 256, bias=False) for _ in range(4)]
    x, wrong = random(30, 256), []
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.quantization.offset.mul_(i + 1)
        expected = [layer(x) for layer in layers]

        def work(layer, truth):
            with torch.no_grad():
                wrong.extend(1 for _ in range(40) if not torch.equal(layer(x), truth))

        threads = [threading.Thread(target=work, args=pair) for pair in zip(layers, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("use_reentrant", [False, True])
@all_kinds
def test_activation_checkpointing_gives_the_same(kind, use_reentrant):
    network, gradients = nn.Sequential(make(kind, 128, 64), nn.ReLU(), make(kind, 64, 128)), []
    for function in (network, lambda x: checkpoint(network, x, use_reentrant=use_reentrant)):
        x = random(20, 64).requires_grad_()
        function(x).backward(random(20, 64, seed=1))
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].any()


@all_kinds
def test_tensors_without_numbers_have_the_right_shapes(kind, no_scratch):
    """A plan of memory runs the code with shapes only; the layer may stay on the meta device, but for its codes."""
    with torch.device("meta"):
        layer = QuantizedLinear(nn.Linear(64, 9), kind)
    assert {p.device.type for p in (*layer.parameters(), *layer.buffers())} == {"meta"}
    x = torch.randn(3, 5, 64, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    with torch._subclasses.FakeTensorMode():
        layer.weight = nn.Parameter(torch.empty(layer.weight.shape, dtype=layer.weight.dtype), requires_grad=False)
        layer.bias = nn.Parameter(torch.empty(9))
        x = torch.randn(3, 5, 64, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert type(y).__name__ == "FakeTensor" and y.shape == (3, 5, 9) and x.grad.shape == x.shape
    assert not quantized._scratch


@pytest.mark.filterwarnings("error:Dynamo")
@all_kinds
def test_a_compiled_layer_gives_the_same(kind):
    layer, x, dy = make(kind, 9, 64, impl="torch"), random(20, 64), random(20, 9, seed=1)
    quantized._on_device.clear()
    torch.compiler.reset()
    found = results(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, dy)
    for one, other in zip(found, results(layer, x, dy), strict=True):
        torch.testing.assert_close(one, other)


# The module


@all_kinds
def test_the_state_dict_has_these_keys(kind):
    parts = {
        "int8": {"weight": ((9, 128), torch.int8), "quantization.scale": ((9,), torch.float32)},
        "nf4": {
            "weight": ((9, 64), torch.uint8),
            "quantization.absmax": ((9, 2), torch.uint8),
            "quantization.nested_absmax": ((1,), torch.float32),
            "quantization.offset": ((), torch.float32),
        },
    }[kind]
    layer = make(kind, 9, 128, torch.bfloat16)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in layer.state_dict().items()}
    assert found == parts | {"bias": ((9,), torch.bfloat16)}
    with torch.device("meta"):
        empty = QuantizedLinear(nn.Linear(128, 9), kind)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(dense(empty), dense(layer))
    assert {n for n, p in empty.named_parameters() if not p.requires_grad} == parts.keys() & {
        "weight", "quantization.absmax",
    }  # fmt: skip


@all_kinds
def test_casts_leave_every_bit_and_move_the_dtype_of_products(kind):
    layer = make(kind, 300, 128)
    before = {name: tensor for name, tensor in state(layer).items() if name != "bias"}
    assert layer.quantization.dtype == torch.float32
    for cast, dtype in (
        (lambda m: m.to(torch.bfloat16), torch.bfloat16), (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64), (lambda m: m.to(DEVICE), torch.float64),
    ):  # fmt: skip
        cast(nn.Sequential(layer))
        assert layer.quantization.dtype == layer.bias.dtype == dtype
        assert_same({name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}, before)
    assert layer(random(3, 128, dtype=torch.float64)).dtype == torch.float64


@all_kinds
def test_copies_compute_the_same(kind):
    layer, x = make(kind, 9, 64), random(5, 64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and other.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("layer_type", [nn.Linear, Linear])
def test_it_takes_the_place_of_a_layer(layer_type):
    base = layer_type(64, 9, dtype=torch.bfloat16, device=DEVICE).eval()
    layer = QuantizedLinear(base, "nf4")
    assert layer.bias is base.bias and not layer.training and layer.quantization.dtype == torch.bfloat16
    assert (layer.in_features, layer.out_features) == (64, 9) and layer.weight.device == base.weight.device
    assert isinstance(layer, nn.Linear) and QuantizedLinear(nn.Linear(64, 9, bias=False), "int8").bias is None


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="nf4 needs in_features that 64 divides, found 65; take int8"):
        QuantizedLinear(nn.Linear(65, 9), "nf4")
    assert QuantizedLinear(nn.Linear(65, 9), "int8").weight.shape == (9, 65)
