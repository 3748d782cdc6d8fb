"""Headers of safetensors files: every fault has a name and a place, every sound file is read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save, save_file

from merge.checkpoint.header import MAX_HEADER, MAX_NAME, read_header
from merge.errors import SourceError
from merge.ir.dtypes import BY_NAME
from merge.ir.json_text import strict_json
from merge.ir.spec import TensorSpec
from merge.plan.layout import header as lay_out_header

Entry = Mapping[str, object]

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
)


def entry(shape: object, begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(header: object, data: int = 0) -> bytes:
    """A file with this header (JSON data, or text as it is) and ``data`` zero bytes after it."""
    if isinstance(header, bytes):
        text = header
    else:
        text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def sized(length: int, rest: bytes = b"{}") -> bytes:
    """A file whose first field says that the header has ``length`` bytes."""
    return length.to_bytes(8, "little") + rest


def error_of(path: Path, content: bytes) -> SourceError:
    """The error that a file with ``content`` yields."""
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        read_header(path)
    assert caught.value.where["file"] == str(path)
    assert str(path) in str(caught.value)
    return caught.value


TOO_LONG = "the header is longer than the file or than the format allows"

LENGTHS = {
    "empty": (b"", "too short"),
    "seven bytes": (bytes(7), "too short"),
    "one past the end": (sized(3), TOO_LONG),
    "past the limit of the format": (sized(MAX_HEADER + 1), TOO_LONG),
    "2^31": (sized(2**31), TOO_LONG),
    "2^32": (sized(2**32), TOO_LONG),
    "2^63 - 9": (sized(2**63 - 9), TOO_LONG),
    "2^63": (sized(2**63), TOO_LONG),
    "2^64 - 1": (sized(2**64 - 1), TOO_LONG),
}


@pytest.mark.parametrize(("content", "what"), LENGTHS.values(), ids=LENGTHS)
def test_a_wrong_header_length_is_refused_with_both_sizes(
    content: bytes, what: str, tmp_path: Path
) -> None:
    error = error_of(tmp_path / "m.safetensors", content)
    assert what in error.what
    assert f"{len(content)} bytes" in str(error.found)
    assert error.do is not None and "fetch it again" in error.do


def test_a_header_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(sized(MAX_HEADER + 1))
    with path.open("r+b") as f:
        f.truncate(2 * MAX_HEADER)  # sparse: the file is long enough to hold such a header
    with pytest.raises(SourceError, match="longer than") as caught:
        read_header(path)
    assert caught.value.expected == f"at most {MAX_HEADER} bytes"


JSON_FAULTS: dict[str, tuple[str | bytes, str]] = {
    "not JSON": ("hello", "not sound JSON"),
    "cut off": ('{"w":{"dtype":"F32"', "not sound JSON"),
    "more after it": ("{}{}", "not sound JSON"),
    "empty": ("", "not sound JSON"),
    "a list": ("[]", "not a JSON object"),
    "a number": ("3", "not a JSON object"),
    "null": ("null", "not a JSON object"),
    "not UTF-8": (b'{"\xff":1}', "not UTF-8"),
    "a surrogate in UTF-8": (b'{"\xed\xa0\x80":1}', "not UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), "not UTF-8"),
    "UTF-16 without a mark": ("{}".encode("utf-16-le"), "not sound JSON"),
    "UTF-32": ("{}".encode("utf-32-be"), "not sound JSON"),
    "a byte order mark": ("{}".encode("utf-8-sig"), "not sound JSON"),
    "half a surrogate pair": (r'{"\ud800":1}', "surrogate"),
    "nested lists": ("[" * 200_000, "nested too deeply"),
    "nested objects": ('{"a":' * 100_000, "nested too deeply"),
    "NaN": ('{"w":NaN}', "NaN is not a JSON number"),
    "infinity": ('{"w":-Infinity}', "-Infinity is not a JSON number"),
    "a number of 5000 digits": ('{"w":' + "1" * 5000 + "}", "not sound JSON"),
    "a tensor twice": (
        '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        '"w":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
        "the key 'w' occurs twice",
    ),
    "a tensor twice, once with escapes": (
        '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        r'"\u0077":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        "the key 'w' occurs twice",
    ),
    "a field twice": (
        '{"w":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
        "the key 'dtype' occurs twice",
    ),
    "a metadata key twice": ('{"__metadata__":{"a":"1","a":"2"}}', "the key 'a' occurs twice"),
}


@pytest.mark.parametrize(("text", "what"), JSON_FAULTS.values(), ids=JSON_FAULTS)
def test_a_header_that_is_not_strict_json_is_refused(
    text: str | bytes, what: str, tmp_path: Path
) -> None:
    assert what in error_of(tmp_path / "m.safetensors", file_of(text, 4)).what


@pytest.mark.parametrize(
    "metadata", [None, [], "text", 3, {"a": 1}, {"a": None}, {"a": {}}], ids=str
)
def test_metadata_that_is_not_text_is_refused(metadata: object, tmp_path: Path) -> None:
    error = error_of(tmp_path / "m.safetensors", file_of({"__metadata__": metadata}))
    assert "__metadata__ is not a map from text to text" in error.what


SHAPE = "shape is not a list of sizes"
OFFSETS = "offsets are not a byte range"
FIELDS = "wrong fields"
LARGER = "larger than any file"

ENTRY_FAULTS: dict[str, tuple[object, str]] = {
    "a number": (3, FIELDS),
    "a list": ([], FIELDS),
    "null": (None, FIELDS),
    "nothing in it": ({}, FIELDS),
    "no dtype": ({"shape": [1], "data_offsets": [0, 4]}, FIELDS),
    "no shape": ({"dtype": "F32", "data_offsets": [0, 4]}, FIELDS),
    "no offsets": ({"dtype": "F32", "shape": [1]}, FIELDS),
    "a field too many": (entry([1], 0, 4) | {"stride": [1]}, FIELDS),
    "unknown dtype": (entry([1], 0, 4, "F33"), "dtype is not known"),
    "dtype in small letters": (entry([1], 0, 4, "f32"), "dtype is not known"),
    "dtype of torch": (entry([1], 0, 4, "float32"), "dtype is not known"),
    "dtype a number": (entry([1], 0, 4, 3), "dtype is not known"),
    "dtype a list": (entry([1], 0, 4, ["F32"]), "dtype is not known"),
    "shape a number": (entry(1, 0, 4), SHAPE),
    "shape null": (entry(None, 0, 4), SHAPE),
    "shape negative": (entry([-1], 0, 4), SHAPE),
    "shape negative twice": (entry([-1, -1], 0, 4), SHAPE),
    "shape with a fraction": (entry([1.0], 0, 4), SHAPE),
    "shape with true": (entry([True], 0, 4), SHAPE),
    "shape with text": (entry(["1"], 0, 4), SHAPE),
    "shape with a list": (entry([[1]], 0, 4), SHAPE),
    "shape of 2^63": (entry([2**63], 0, 4), SHAPE),
    "shape of 2^64 + 1": (entry([2**64 + 1], 0, 4), SHAPE),
    "product of 2^64": (entry([2**32, 2**32], 0, 0), LARGER),
    "product of 2^64 + 1, by factors": (entry([274177, 67280421310721], 0, 4), LARGER),
    "product of 2^62 in bytes 2^64": (entry([2**31, 2**31], 0, 0), LARGER),
    "product past 2^63 of eight-bit": (entry([2**62, 2], 0, 0, "I8"), LARGER),
    "offsets a number": ({"dtype": "F32", "shape": [1], "data_offsets": 4}, OFFSETS),
    "offsets of one": ({"dtype": "F32", "shape": [1], "data_offsets": [4]}, OFFSETS),
    "offsets of three": ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}, OFFSETS),
    "offsets reversed": (entry([1], 4, 0), OFFSETS),
    "offsets negative": (entry([1], -4, 0), OFFSETS),
    "offsets with fractions": (entry([1], 0.0, 4.0), OFFSETS),
    "offsets with false": (entry([1], False, 4), OFFSETS),
    "offsets of text": (entry([1], "0", "4"), OFFSETS),
    "offsets of 2^64": (entry([1], 2**64, 2**64 + 4), OFFSETS),
    "too few bytes": (entry([2], 0, 4), "byte range does not fit its shape"),
    "too many bytes": (entry([], 0, 8), "byte range does not fit its shape"),
    "bytes for nothing": (entry([0, 9], 0, 4), "byte range does not fit its shape"),
    "half a byte": (entry([1], 0, 1, "F4"), "does not fill whole bytes"),
}


@pytest.mark.parametrize(("wrong", "what"), ENTRY_FAULTS.values(), ids=ENTRY_FAULTS)
def test_a_wrong_entry_names_file_and_tensor(wrong: object, what: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    error = error_of(path, file_of({"good": entry([0], 0, 0), "layer.w": wrong}, 4))
    assert what in error.what
    assert error.where == {"file": str(path), "tensor": "'layer.w'"}


def test_found_and_expected_sizes_are_named(tmp_path: Path) -> None:
    error = error_of(tmp_path / "m.safetensors", file_of({"w": entry([2, 3], 0, 20)}, 20))
    assert (error.found, error.expected) == ("20 bytes", "24 bytes for float32[2, 3]")


def test_an_unknown_dtype_comes_with_the_known_ones(tmp_path: Path) -> None:
    error = error_of(tmp_path / "m.safetensors", file_of({"w": entry([1], 0, 4, "F33")}, 4))
    assert error.found == "F33"
    assert "BF16" in str(error.expected) and "F8_E4M3" in str(error.expected)


OVERLAP, HOLE = "two tensors overlap", "there is a hole between two tensors"

RANGES = {
    "overlap": ({"a": (0, 8), "b": (4, 12)}, 12, OVERLAP, "b", "a"),
    "one inside the other": ({"a": (0, 12), "b": (4, 8)}, 12, OVERLAP, "b", "a"),
    "the same bytes": ({"a": (0, 8), "b": (0, 8)}, 8, OVERLAP, "b", "a"),
    "hole": ({"a": (0, 4), "b": (8, 12)}, 12, HOLE, "b", "a"),
    "hole before the first": ({"a": (4, 8)}, 8, HOLE, "a", "the header"),
    "empty tensor inside another": ({"a": (0, 8), "b": (4, 4)}, 8, OVERLAP, "b", "a"),
    "empty tensor past the end": ({"a": (0, 8), "b": (12, 12)}, 8, HOLE, "b", "a"),
    "listed backwards": ({"b": (4, 12), "a": (0, 8)}, 12, OVERLAP, "b", "a"),
}


@pytest.mark.parametrize(
    ("ranges", "size", "what", "tensor", "before"), RANGES.values(), ids=RANGES
)
def test_ranges_that_do_not_tile_the_data_name_both_tensors(
    ranges: dict[str, tuple[int, int]],
    size: int,
    what: str,
    tensor: str,
    before: str,
    tmp_path: Path,
) -> None:
    header = {n: entry([(e - b) // 4], b, e) for n, (b, e) in ranges.items()}
    error = error_of(tmp_path / "m.safetensors", file_of(header, size))
    begin, end = ranges[tensor]
    assert error.what == what
    assert error.where["tensor"] == f"'{tensor}'"
    assert f"bytes {begin} to {end}, after '{before}'" in str(error.found)


@pytest.mark.parametrize(("there", "what"), [(11, "cut off"), (0, "cut off"), (13, "bytes after")])
def test_a_file_of_another_size_than_its_tensors_is_refused(
    there: int, what: str, tmp_path: Path
) -> None:
    header = {"a": entry([1], 0, 4), "b": entry([2], 4, 12)}
    error = error_of(tmp_path / "m.safetensors", file_of(header, there))
    assert what in error.what
    assert error.found == f"{there} bytes of data"
    assert error.expected == "12 bytes of data, up to the end of 'b'"


def test_a_good_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    good = save({"a": torch.ones(3), "b": torch.ones(2, 5)})
    for size in range(len(good)):
        error_of(tmp_path / "m.safetensors", good[:size])


NAMES = {
    "empty": "",
    "newline": "a\nb",
    "NUL": "a\0b",
    "escape": "\x1b[2J",
    "delete": "a\x7f",
    "eight-bit escape": "\x9b2J",
    "over-long": "n" * (MAX_NAME + 1),
    "1 MB": "n" * 1_000_000,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_is_empty_or_over_long_or_moves_a_terminal_is_refused(
    name: str, tmp_path: Path
) -> None:
    error = error_of(tmp_path / "m.safetensors", file_of({name: entry([1], 0, 4)}, 4))
    assert "name is empty, too long or holds control characters" in error.what
    assert len(str(error)) < 1000
    assert str(error).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/w", "ß.重み.🙂", " ", "n" * MAX_NAME, "a%s"]
)
def test_any_other_name_is_only_a_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_of({name: entry([1], 0, 4)}, 4))
    assert list(read_header(path).tensors) == [name]


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    for path, what in (
        (tmp_path / "absent", "a weight file is missing"),
        (tmp_path, "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
    ):
        with pytest.raises(SourceError, match=what) as caught:
            read_header(path)
        assert caught.value.where["file"] == str(path)


def test_strict_json_reads_what_is_sound() -> None:
    assert strict_json('{"a": [1, 2.5, "ü", null, true, {}]}') == {
        "a": [1, 2.5, "ü", None, True, {}]
    }


def test_json_nests_to_a_bound_that_no_recursion_meets() -> None:
    strict_json("[" * 150 + "]" * 150)
    for depth in (300, 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            strict_json('{"a":' * depth + "1" + "}" * depth)


# -- sound files ------------------------------------------------------------------------------


def zeros(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_safetensors_writes_is_read_back(dtype: torch.dtype, tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "scalar": (),
        "empty": (0, 3),
        "matrix": (2, 3),
        "v": (5,),
    }
    tensors = {name: zeros(dtype, shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt", "by": "test"})
    found = read_header(tmp_path / "m.safetensors")
    kind = BY_NAME[str(dtype).removeprefix("torch.")]
    assert found.tensors == {n: TensorSpec(n, kind, s) for n, s in shapes.items()}
    assert found.metadata == {"format": "pt", "by": "test"}
    assert found.file.size == (tmp_path / "m.safetensors").stat().st_size


def test_begin_is_where_the_bytes_are(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5), "a": torch.arange(3.0), "c": torch.tensor(True)}
    save_file(tensors, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    found = read_header(tmp_path / "m.safetensors")
    for name, tensor in tensors.items():
        begin = found.begin[name]
        stored = content[begin : begin + found.tensors[name].nbytes]
        assert stored == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_offsets_beyond_4_gib_are_right(tmp_path: Path) -> None:
    """A sparse file of 5 GB: no block of it is on the disk but the header's."""
    path, far = tmp_path / "m.safetensors", 5_000_000_000
    start = file_of({"huge": entry([far], 0, far, "I8"), "last": entry([1], far, far + 4)})
    path.write_bytes(start)
    with path.open("r+b") as f:
        f.truncate(len(start) + far + 4)
    found = read_header(path)
    assert found.begin == {"huge": len(start), "last": len(start) + far}


def test_a_file_without_tensors_is_sound(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(file_of("{}"))
    assert read_header(tmp_path / "m.safetensors").tensors == {}


names = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=12).filter(
    lambda n: n != "__metadata__"
)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
layouts = st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=8)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(layout=layouts)
def test_our_header_is_read_back_and_is_what_safetensors_writes(
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    specs = [
        TensorSpec(name, BY_NAME[str(dtype).removeprefix("torch.")], shape)
        for name, (dtype, shape) in layout.items()
    ]
    text, begins = lay_out_header(specs)
    theirs = save({n: zeros(d, s) for n, (d, s) in layout.items()}, metadata={"format": "pt"})
    assert text + bytes(sum(s.nbytes for s in specs)) == theirs
    path = tmp_path_factory.getbasetemp() / "layout.safetensors"
    path.write_bytes(theirs)
    found = read_header(path)
    assert found.tensors == {s.name: s for s in specs}
    assert found.begin == {name: len(text) + begin for name, begin in begins.items()}


def test_the_order_of_types_is_that_of_safetensors() -> None:
    """All types at once, in names whose alphabet says the reverse of any order by type."""
    tensors = {f"{99 - i}": zeros(dtype, (2,)) for i, dtype in enumerate(DTYPES)}
    specs = [
        TensorSpec(n, BY_NAME[str(t.dtype).removeprefix("torch.")], (2,))
        for n, t in tensors.items()
    ]
    theirs = save(tensors, metadata={"format": "pt"})
    assert theirs.startswith(lay_out_header(specs)[0])


# -- seeded mutations --------------------------------------------------------------------------

GOOD = save(
    {
        "model.embed": torch.zeros(4, 3),
        "model.norm": torch.zeros(3, dtype=torch.bfloat16),
        "step": torch.tensor(7),
        "none": torch.zeros(0, 2),
    },
    metadata={"format": "pt"},
)
HOSTILE: tuple[object, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e999, 0.5, "", "F32", "F64", "\0", "\ud800", [], {},
    [0], [0, 0], [-1], [2**32, 2**32], [[]], {"a": 1},
)  # fmt: skip


def mutate_bytes(draw: random.Random) -> bytes:
    """A good file with one to four bytes changed, put in or taken out; sometimes cut."""
    content = bytearray(GOOD)
    head = 8 + int.from_bytes(GOOD[:8], "little")
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(head, len(content)))
        kind = draw.randrange(5)
        if kind == 0:
            content[at] = draw.randrange(256)
        elif kind == 1:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            content[at:at] = draw.randbytes(draw.randint(1, 9))
        elif kind == 3:
            del content[at : at + draw.randint(1, 9)]
        else:
            other = draw.randrange(min(head, len(content)))
            content[at], content[other] = content[other], content[at]
    return bytes(content[: draw.randrange(len(content))] if draw.random() < 0.1 else content)


def mutate_fields(draw: random.Random) -> bytes:
    """A good file with one field of its header replaced by something hostile."""
    size = int.from_bytes(GOOD[:8], "little")
    header = json.loads(GOOD[8 : 8 + size])
    name = draw.choice(list(header))
    if draw.random() < 0.2:
        header[name] = draw.choice(HOSTILE)
    else:
        key = draw.choice(list(header[name]))
        inner = header[name][key]
        if isinstance(inner, list) and inner and draw.random() < 0.7:
            inner[draw.randrange(len(inner))] = draw.choice(HOSTILE)
        else:
            header[name][key] = draw.choice(HOSTILE)
    if draw.random() < 0.2:
        header[draw.choice(("", "x", "\0", "model.embed "))] = header.pop(name)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + GOOD[8 + size :]


@pytest.mark.parametrize("mutate", [mutate_bytes, mutate_fields])
@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_file_is_refused_or_sound(
    mutate: Callable[[random.Random], bytes], seed: int, tmp_path: Path
) -> None:
    """250 files: never another exception than ours, and what we accept safetensors accepts."""
    draw, path = random.Random(seed), tmp_path / "m.safetensors"
    refused = 0
    for _ in range(250):
        content = mutate(draw)
        path.write_bytes(content)
        try:
            found = read_header(path)
        except SourceError as error:
            refused += 1
            assert error.where["file"] == str(path)
            assert error.what and str(error).encode()
            continue
        try:
            theirs = {n: tuple(t["shape"]) for n, t in deserialize(content)}
        except SafetensorError as error:  # pragma: no cover
            pytest.fail(f"accepted, but safetensors says {error}: {content!r}")
        assert {n: s.shape for n, s in found.tensors.items()} == theirs
    assert refused > 100
