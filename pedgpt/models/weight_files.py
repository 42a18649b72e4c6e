"""The weight files of an HF folder: what they hold at once, the tensors when asked, and nothing but tensors."""

from __future__ import annotations

import hashlib
import pickle
import pickletools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pedgpt.files import own_file, read_object

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
HEAD = "lm_head.weight"
READ_BYTES = 64 * 2**20  # how much of a file stays mapped while parts of it are copied

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8)
_PLAIN_GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")


class Weights:
    """The tensors in a folder's weight files: `tensors` are on the meta device, and their numbers are read when asked.

    Files are mapped one at a time by the library that owns the format, which checks their headers and pickles. Raises
    ValueError that names a file if it is damaged, if it lies, or if it holds other things than weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.tensors: dict[str, Tensor] = {}
        self._file, self._read = Path(), 0
        self._handle: Any = None
        for file in weight_files(folder):
            with self._opened(file) as handle:
                found = {key: handle.get_tensor(key) for key in handle.offset_keys()}
            for key, tensor in found.items():
                if tensor.dtype not in _DTYPES:
                    told = f"{key} is stored as {tensor.dtype}; only floating-point and bitsandbytes' weights load"
                    raise ValueError(f"{file}: {told}")
                if key in self.files:
                    raise ValueError(f"{file}: holds {key}, which {self.files[key].name} holds too")
                if not key.endswith("rotary_emb.inv_freq"):  # stored by old checkpoints, computed here
                    self.files[key], self.tensors[key] = file, tensor.to("meta")

    def whole(self, key: str) -> Tensor:
        """A tensor as it lies in its file: pages are read when touched, and changes stay in memory."""
        with self._opened(self.files[key]) as handle:
            return handle.get_tensor(key)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows start ≤ i < stop of a tensor, to be copied at once: the mapping goes when enough has been read."""
        size = self.tensors[key][start:stop].nbytes
        if self._read + size > READ_BYTES:
            self._file, self._handle = Path(), None
        with self._opened(self.files[key]) as handle:
            self._read += size
            return handle.get_slice(key)[start:stop]

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        try:
            if self._file != file:
                handle = _BinReader(file) if file.suffix == ".bin" else safe_open(file, "pt")
                self._file, self._handle, self._read = file, handle, 0
            yield self._handle
        except pickle.UnpicklingError:
            raise ValueError(f"{file}: holds more than weights, or is damaged; only safe files are read") from None
        except Exception as error:  # a damaged pickle raises whatever its instructions now do
            damaged = "" if type(error) is ValueError else "cannot be read as weights, the file may be truncated: "
            raise ValueError(f"{file}: {damaged}{error}") from None


class _BinReader(dict[str, Tensor]):
    """The tensors of a torch.save file, with the methods of `safe_open`.

    torch's weights_only unpickler calls more than a state dict needs, `bytearray(10**12)` for one: that is refused.
    """

    offset_keys, get_tensor, get_slice = dict.keys, dict.__getitem__, dict.__getitem__

    def __init__(self, file: Path) -> None:
        pickled = torch._C.PyTorchFileReader(str(file)).get_record("data.pkl")
        called = [str(argument) for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"]
        if not all(map(_PLAIN_GLOBALS.fullmatch, called)):
            raise pickle.UnpicklingError
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            raise ValueError(f"expected a dictionary of tensors, found {type(state).__name__}")
        for key, tensor in state.items():
            dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
            if not dense or tensor.nbytes > tensor.untyped_storage().nbytes():  # a stride of 0 repeats one number
                raise ValueError(f"{key} is no dense tensor of the file's own numbers, but a {type(tensor).__name__}")
        super().__init__({key: tensor.detach() for key, tensor in state.items()})


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights, safetensors before .bin; ValueError if an index leads elsewhere."""
    for index_name, single, suffix in ((INDEX, WEIGHTS, ".safetensors"), (BIN_INDEX, BIN, ".bin")):
        if index := own_file(folder, index_name):
            weight_map = read_object(folder, index_name).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index}: not an index with a weight_map")
            for name in weight_map.values():
                plain = isinstance(name, str) and Path(name).name == name and name.isprintable()
                if not plain or Path(name).suffix != suffix:
                    raise ValueError(f"{index}: weight_map names {name!r}; expected a {suffix} file of this folder")
                if own_file(folder, name) is None:
                    raise ValueError(f"{folder / name}: no such file, though {index.name} names it")
            return [folder / name for name in sorted(set(weight_map.values()))]
        if file := own_file(folder, single):
            return [file]
    raise ValueError(f"{folder}: no weights; expected {WEIGHTS}, {INDEX} or {BIN}")


def model_fingerprint(folder: str | Path) -> str:
    """A short name of this model: of its config.json and its weight files, of large ones 4 KiB of each MiB."""
    digest = hashlib.sha256(Path(folder, "config.json").read_bytes())
    for file in weight_files(Path(folder)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as handle:
            for place in range(0, size, 2**20):
                handle.seek(place)
                digest.update(handle.read(2**20 if place < 2**26 else 4096))
    return digest.hexdigest()[:16]


def weights_fingerprint(folder: str | Path) -> str:
    """A short name of a folder's weights: a checksum of the shape and one bfloat16 row of every tensor but the head.

    Training changes it. Other files, another config.json and another dtype do not (float16: if it was bfloat16 before).
    """
    digest, stored = hashlib.sha256(), Weights(Path(folder))
    for key in sorted(stored.tensors.keys() - {HEAD}):  # a tied head may be stored or not
        if ".quant_state." in key:  # bitsandbytes' JSON, which names the dtype
            continue
        if shape := stored.tensors[key].shape:
            rows = (shape[0] // 2, shape[0] // 2 + 1) if len(shape) > 1 else (0, shape[0])
            part = stored.rows(key, *rows).to(torch.bfloat16).contiguous()
            part = part.masked_fill(part.abs() < 2**-14, 0)  # float16 has fewer digits there
            digest.update(f"{key} {list(shape)}".encode() + part.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
