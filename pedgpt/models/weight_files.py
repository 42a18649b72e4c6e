"""The weight files of an HF folder: what they hold at once, the tensors when asked, and nothing but tensors."""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
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
READ_BYTES = 64 * 2**20  # how much of a file stays mapped while parts of it are copied

_PLAIN_GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")


class WeightFile:
    """One .safetensors or .bin file, mapped into memory; the library that owns the format checks header and pickle.

    `tensors` maps each key to its shape and dtype, without the rotary frequencies of old checkpoints. Raises ValueError
    that names the file if it is damaged, if it lies, or if it carries other things than floating-point tensors.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tensors: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._handle: Any = None
        self._read = 0
        with self._opened() as handle:
            stored = {key: handle.get_tensor(key) for key in handle.offset_keys() if not key.endswith(".inv_freq")}
        for key, tensor in stored.items():
            if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{file}: {key} is stored as {kind}; quantized weights are not supported")
            self.tensors[key] = tensor.shape, tensor.dtype

    def whole(self, key: str) -> Tensor:
        """A tensor as it lies in the file: pages are read when touched, and changes stay in memory."""
        with self._opened() as handle:
            return handle.get_tensor(key)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows start ≤ i < stop of a tensor, to be copied at once: the mapping goes when enough has been read."""
        shape, dtype = self.tensors[key]
        if self._read > READ_BYTES:
            self.close()
        self._read += (stop - start) * shape[1:].numel() * dtype.itemsize
        with self._opened() as handle:
            return handle.get_slice(key)[start:stop]

    def close(self) -> None:
        """Give the mapping back; tensors from `whole` keep theirs."""
        self._handle, self._read = None, 0

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            if self._handle is None:
                self._handle = _BinReader(self.file) if self.file.suffix == ".bin" else safe_open(self.file, "pt")
            yield self._handle
        except _Refused as error:
            raise ValueError(f"{self.file}: {error}") from None
        except pickle.UnpicklingError:
            raise ValueError(f"{self.file}: holds more than weights, or is damaged; only safe files are read") from None
        except Exception as error:  # a damaged pickle raises whatever its instructions now do
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.file}: cannot be read as weights, the file may be truncated ({reason})") from None


class _Refused(Exception):
    """What is wrong with a file that can be read."""


class _BinReader(dict[str, Tensor]):
    """The tensors of a torch.save file, with the methods of `safe_open`.

    Refuses what torch's weights_only unpickler allows and no state dict needs. It runs no code, yet would call
    `bytearray(10**12)`, inflate whatever is compressed, and hash or print any nesting.
    """

    offset_keys, get_tensor, get_slice = dict.keys, dict.__getitem__, dict.__getitem__

    def __init__(self, file: Path) -> None:
        size = file.stat().st_size
        with zipfile.ZipFile(file) as archive:
            if any(info.compress_type or info.file_size > size for info in archive.infolist()):
                raise _Refused("its parts are compressed, or larger than the file")
        # zipfile might find another record of that name.
        _check_pickle(torch._C.PyTorchFileReader(str(file)).get_record("data.pkl"))
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            raise _Refused(f"expected a dictionary of tensors, found {type(state).__name__}")
        for key, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise _Refused(f"{key} is no dense tensor but {type(tensor).__name__}")
            if tensor.nbytes > tensor.untyped_storage().nbytes():  # a stride of 0 repeats one number
                raise _Refused(f"{key} claims the shape {list(tensor.shape)}, more than the file holds")
        claimed = sum(tensor.nbytes for tensor in state.values())
        if claimed > 2 * size:  # a tied head is stored once; no more than that is shared
            raise _Refused(f"its tensors share their bytes; {claimed} are claimed, more than the file holds")
        super().__init__({key: tensor.detach() for key, tensor in state.items()})


def _check_pickle(content: bytes) -> None:
    """UnpicklingError for instructions that no dictionary of tensors needs."""
    source: dict[str, str] = {}  # slot of the memo -> the instruction whose result it holds
    previous, tuples, reused = "", 0, 0
    for opcode, argument, _ in pickletools.genops(content):
        name, value = opcode.name, str(argument)
        if name == "GLOBAL" and not _PLAIN_GLOBALS.fullmatch(value):
            raise pickle.UnpicklingError(value)
        if name in ("BINPUT", "LONG_BINPUT"):
            source[value] = previous
        tuples += name.startswith("TUPLE")
        reused += name in ("BINGET", "LONG_BINGET") and source.get(value) not in ("GLOBAL", "BINUNICODE", "REDUCE")
        previous = name
    if tuples > 2**15 or reused > 2**4:  # a tensor takes five, a tie one; deep nesting takes as many as it has levels
        raise pickle.UnpicklingError("deeply nested")


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights, safetensors before .bin; ValueError if an index leads elsewhere."""
    for index_name, single in ((INDEX, WEIGHTS), (BIN_INDEX, BIN)):
        if index := own_file(folder, index_name):
            weight_map = read_object(folder, index_name).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index}: not an index with a weight_map")
            for name in weight_map.values():
                if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != Path(single).suffix:
                    kind = f"a {Path(single).suffix} file of this folder"
                    raise ValueError(f"{index}: weight_map names {name!r}; expected {kind}")
                if own_file(folder, name) is None:
                    raise ValueError(f"{folder / name}: no such file, though {index.name} names it")
            return [folder / name for name in sorted(set(weight_map.values()))]
        if file := own_file(folder, single):
            return [file]
    raise ValueError(f"{folder}: no weights; expected {WEIGHTS}, {INDEX} or {BIN}")
