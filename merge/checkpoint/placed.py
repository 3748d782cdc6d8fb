"""Where the tensors of a pickle lie, once torch's reader has listed them: a header like others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge.checkpoint.header import Header
from merge.errors import SourceError
from merge.ir.dtypes import BY_NAME
from merge.ir.expr import InputFile
from merge.ir.spec import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["StateDict", "header_in_file", "header_in_memory"]


@dataclass(frozen=True, slots=True)
class StateDict:
    """Tensors by name, and what lies beside them, with the reason why it is left out."""

    tensors: Mapping[str, torch.Tensor]
    dropped: Mapping[str, str]


def header_in_file(state: StateDict, file: InputFile, records: Mapping[int, int]) -> Header:
    """The header of tensors on the meta device; each in a record of the archive, and within it.

    records: from the first byte of a record's data to its length. Names of the same bytes, seen
    alike, are tied.
    """
    specs = {name: _spec(name, tensor, file) for name, tensor in state.tensors.items()}
    begin: dict[str, int] = {}
    strides: dict[str, tuple[int, ...]] = {}
    places: dict[str, object] = {}
    for name, tensor in state.tensors.items():
        begin[name] = 0
        if not tensor.numel():
            continue
        begin[name] = _begin(name, tensor, file, records)
        places[name] = (begin[name], tensor.dtype, tensor.shape, tensor.stride())
        if not tensor.is_contiguous():
            strides[name] = tuple(tensor.stride())
    return Header(
        file, specs, begin, {}, strides=strides, tied=_ties(places), dropped=state.dropped
    )


def header_in_memory(state: StateDict, file: InputFile) -> Header:
    """The header of tensors that were loaded, of a file that does not say where they lie."""
    specs = {name: _spec(name, tensor, file) for name, tensor in state.tensors.items()}
    tied = _ties(
        {
            n: (t.data_ptr(), t.dtype, t.shape, t.stride())
            for n, t in state.tensors.items()
            if t.numel()
        }
    )
    held = {n: t.detach().contiguous() for n, t in state.tensors.items() if n not in tied}
    nbytes = sum(specs[n].nbytes for n in held)
    return Header(
        file,
        specs,
        dict.fromkeys(specs, 0),
        {},
        held=held,
        tied=tied,
        dropped=state.dropped,
        notes=(
            f"{file.path} is of torch's format before 1.6: its {nbytes:,} bytes of weights are held"
            " in memory",
        ),
    )


def _spec(name: str, tensor: torch.Tensor, file: InputFile) -> TensorSpec:
    """Name, type and shape of a tensor, which must be a plain dense one."""
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_quantized
    if not plain or tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        raise SourceError(
            "a tensor is not a plain dense one",
            file=file.path,
            tensor=name,
            found=f"{type(tensor).__name__}, {tensor.layout}, {tensor.dtype}",
            do="save it dense, as a float or integer type",
        )
    dtype = BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise SourceError(
            "a tensor's dtype is not known", file=file.path, tensor=name, found=tensor.dtype
        )
    return TensorSpec(name, dtype, tuple(tensor.shape))


def _begin(name: str, tensor: torch.Tensor, file: InputFile, records: Mapping[int, int]) -> int:
    """Where the first element lies in the file; the last one must lie in the same record."""
    storage, size = tensor.untyped_storage(), tensor.element_size()
    offset, nbytes = storage._checkpoint_offset, storage.nbytes()
    if offset is None or records.get(offset) != nbytes:
        raise SourceError(
            "a tensor's data is not in the file",
            file=file.path,
            tensor=name,
            found="no data" if offset is None else f"{nbytes} bytes at byte {offset}",
            expected="a record of the archive",
            do="the file may be damaged: fetch it again",
        )
    first = int(tensor.storage_offset())
    last = first + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if min(first, *tensor.stride(), 0) < 0 or (last + 1) * size > nbytes:
        raise SourceError(
            "a tensor leads out of its data",
            file=file.path,
            tensor=name,
            found=f"elements {first} to {last} of {size} bytes",
            expected=f"at most {nbytes} bytes",
            do="do not use this file before you know why it says so",
        )
    return offset + first * size


def _ties(places: Mapping[str, object]) -> dict[str, str]:
    """Names of one and the same data: from each later name to the first."""
    first: dict[object, str] = {}
    return {n: o for n, place in places.items() if (o := first.setdefault(place, n)) != n}
