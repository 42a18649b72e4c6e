"""The weight files of an HF folder: what they hold at once, the tensors when asked, and nothing but tensors."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Iterator
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


class Weights:
    """The tensors in a folder's weight files: `tensors` are on the meta device, and their numbers are read when asked.

    Files are mapped one at a time by the library that owns the format, which checks their headers and pickles. Raises
    ValueError that names a file if it is damaged, if it lies, or if it holds other things than floating-point tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        self.tensors: dict[str, Tensor] = {}
        self._file, self._read = Path(), 0
        self._handle: Any = None
        for file in weight_files(folder):
            with self._opened(file) as handle:
                found = {key: handle.get_tensor(key) for key in handle.offset_keys()}
            for key, tensor in found.items():
                if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                    raise ValueError(f"{file}: {key} is stored as {tensor.dtype}, and only floating-point weights load")
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
        if self._read > READ_BYTES:
            self._file, self._handle = Path(), None
        with self._opened(self.files[key]) as handle:
            self._read += self.tensors[key][start:stop].nbytes
            return handle.get_slice(key)[start:stop]

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        try:
            if self._file != file:
                handle = _BinReader(file) if file.suffix == ".bin" else safe_open(file, "pt")
                self._file, self._handle, self._read = file, handle, 0
            yield self._handle
        except Exception as error:  # a damaged pickle raises whatever its instructions now do
            code = isinstance(error, pickle.UnpicklingError)  # torch's own words advise to run it
            reason = "it holds more than weights" if code else f"{type(error).__name__}: {error}"
            raise ValueError(f"{file}: cannot be read as weights, it may be truncated ({reason})") from None


class _BinReader(dict[str, Tensor]):
    """The tensors of a torch.save file, with the methods of `safe_open`; torch's `weights_only` runs no code."""

    offset_keys, get_tensor, get_slice = dict.keys, dict.__getitem__, dict.__getitem__

    def __init__(self, file: Path) -> None:
        with zipfile.ZipFile(file) as archive:
            if any(part.compress_type for part in archive.infolist()):
                raise ValueError("its parts are compressed, and would be mapped as if they were the numbers")
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise ValueError(f"expected a dictionary of tensors, found {type(state).__name__}")
        for key, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise ValueError(f"{key} is no dense tensor, but a {type(tensor).__name__}")
        # NOTE: a stride of 0 repeats one number, so a small file can claim huge tensors; only a tied head is shared.
        if sum(tensor.nbytes for tensor in state.values()) > 2 * file.stat().st_size:
            raise ValueError("its tensors share their bytes, and claim more of them than the file holds")
        super().__init__({key: tensor.detach() for key, tensor in state.items()})


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights, safetensors before .bin; ValueError if an index leads elsewhere."""
    for index_name, single in ((INDEX, WEIGHTS), (BIN_INDEX, BIN)):
        if index := own_file(folder, index_name):
            weight_map = read_object(folder, index_name).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index}: not an index with a weight_map")
            for name in weight_map.values():
                if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
                    raise ValueError(f"{index}: weight_map names {name!r}; expected a file of this folder")
                if own_file(folder, name) is None:
                    raise ValueError(f"{folder / name}: no such file, though {index.name} names it")
            return [folder / name for name in sorted(set(weight_map.values()))]
        if file := own_file(folder, single):
            return [file]
    raise ValueError(f"{folder}: no weights; expected {WEIGHTS}, {INDEX} or {BIN}")


def model_fingerprint(folder: str | Path) -> str:
    """A short name of a folder's model: of its config.json and of its weights as in `weights_fingerprint`."""
    digest = hashlib.sha256(Path(folder, "config.json").read_bytes() + weights_fingerprint(folder).encode())
    return digest.hexdigest()[:16]


def weights_fingerprint(folder: str | Path) -> str:
    """A short name of a folder's weights: a checksum of the shape and one bfloat16 row of every tensor but the head.

    Training changes it. Other files, another config.json and another dtype do not (float16: if it was bfloat16 before).
    """
    digest, stored = hashlib.sha256(), Weights(Path(folder))
    for key in sorted(stored.tensors.keys() - {HEAD}):  # a tied head may be stored or not
        if shape := stored.tensors[key].shape:
            rows = (shape[0] // 2, shape[0] // 2 + 1) if len(shape) > 1 else (0, shape[0])
            part = stored.rows(key, *rows).to(torch.bfloat16).contiguous()
            part = part.masked_fill(part.abs() < 2**-14, 0)  # float16 has fewer digits there
            digest.update(f"{key} {list(shape)}".encode() + part.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
