"""The weight files of an HF folder: what they hold at once, the tensors when asked, and nothing but tensors."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pedgpt.models.config import inside_folder, parse_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
READ_BYTES = 64 * 2**20  # how much of a file stays mapped while parts of it are copied

_PLAIN_GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")


class WeightFile:
    """One .safetensors or .bin file, mapped into memory; the library that owns the format checks header and pickle.

    `tensors` maps each key to its shape and dtype. Raises ValueError that names the file if it is truncated, if its
    header lies, if it carries more than tensors, or if a tensor is not of a floating-point dtype.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._handle: Any = None
        self._read = 0
        self.tensors: dict[str, tuple[torch.Size, torch.dtype]] = {}
        with self._opened() as handle:
            for key in handle.offset_keys():
                tensor = handle.get_tensor(key)
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
        except pickle.UnpicklingError:
            raise ValueError(f"{self.file}: holds more than weights, or is damaged; only safe files are read") from None
        except (SafetensorError, OSError, RuntimeError, EOFError, MemoryError, OverflowError) as error:
            raise ValueError(f"{self.file}: cannot be read as weights, the file may be truncated ({error})") from None


class _BinReader:
    """A torch.save file with the methods of `safe_open`."""

    def __init__(self, file: Path) -> None:
        try:
            if not zipfile.is_zipfile(file):
                raise OSError("no zip archive, as torch has written since 1.6")
            _check_archive(file)
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, OSError):
            raise
        except Exception as error:  # a damaged instruction raises what the one it now spells does: KeyError, TypeError
            raise OSError(f"{type(error).__name__}: {error}") from None
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            raise ValueError(f"{file}: expected a dictionary of tensors, found {type(state).__name__}")
        claimed = 0
        for key, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise ValueError(f"{file}: {key} is no dense tensor but {type(tensor).__name__}")
            if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():  # strides of 0 make much of little
                raise ValueError(f"{file}: {key} claims the shape {list(tensor.shape)}, more than the file holds")
            claimed += tensor.numel() * tensor.itemsize
        if claimed > 2 * file.stat().st_size:  # a tied head is stored once; no more than that is shared
            raise ValueError(f"{file}: its tensors share their bytes; {claimed} are claimed, more than the file holds")
        self.state: Mapping[str, Tensor] = state

    def offset_keys(self) -> list[str]:
        return list(self.state)

    def get_tensor(self, key: str) -> Tensor:
        return self.state[key].detach()

    get_slice = get_tensor


def _check_archive(file: Path) -> None:
    """Refuse what torch's weights_only unpickler allows and no state dict needs.

    It runs no code, yet would call `bytearray(10**12)`, inflate whatever is compressed, and hash or print any nesting.
    """
    size = file.stat().st_size
    with zipfile.ZipFile(file) as archive:
        if any(info.compress_type or info.file_size > size for info in archive.infolist()):
            raise OSError("its parts are compressed, or larger than the file")
    content = torch._C.PyTorchFileReader(str(file)).get_record("data.pkl")  # zipfile might find another of that name
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
        index = folder / index_name
        if index.is_file():
            weight_map = parse_json(inside_folder(index)).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index}: not an index with a weight_map")
            for name in weight_map.values():
                if not isinstance(name, str) or Path(name).name != name or "\0" in name:
                    raise ValueError(f"{index}: weight_map names {name!r}, which is not a file of this folder")
            names = sorted(set(weight_map.values()))
            for name in names:
                if Path(name).suffix != Path(single).suffix:
                    raise ValueError(f"{index}: weight_map names {name!r}; expected {Path(single).suffix} files")
                if not os.path.isfile(folder / name):  # Path.is_file raises OSError for a name that is too long
                    raise ValueError(f"{folder / name}: no such file, though {index.name} names it")
            return [inside_folder(folder / name) for name in names]
        if (folder / single).is_file():
            return [inside_folder(folder / single)]
    raise ValueError(f"{folder}: no weights; expected {WEIGHTS}, {INDEX} or {BIN}")
