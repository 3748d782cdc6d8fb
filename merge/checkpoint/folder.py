"""Open a checkpoint folder: which files hold the weights, what lies beside them.

Understood: a transformers folder (one safetensors file, or shards with an index), a
sentence-transformers folder (modules in numbered folders), and a lone ``.safetensors`` file.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from merge.checkpoint.files import FileSource
from merge.checkpoint.header import Header, check_regular, read_header, strict_json
from merge.errors import SourceError
from merge.ir.checkpoint import SPACE_KEY, Checkpoint
from merge.ir.expr import Expr, Read
from merge.ir.side import Side, SideFile

__all__ = ["no_such_model", "open_path"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# fmt: off
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot",
    ".tflite", ".npz", ".pkl", ".pickle",
)
_SIDE = (
    ".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".vocab", ".yaml", ".yml",
)
# fmt: on
_NAMES = ("LICENSE", "NOTICE", "COPYING")
_NOT_SIDE = {"merge_manifest.json", "merge_recipe.yml", "mergekit_config.yml"}
_MAX_JSON = 50_000_000  # bytes; an index of 500 000 tensors is about this long


def open_path(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, a folder or a ``.safetensors`` file; only headers are read."""
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise no_such_model(path)
    folder = path.resolve()
    config = _json(folder, "config.json")
    _refuse_quantised(config, folder)
    headers = _weights(folder, "")
    module_folders = _module_folders(folder)
    for sub in module_folders:
        headers.update(_weights(folder, f"{sub}/"))
    if not headers:
        raise _no_weights(folder)
    return _checkpoint(str(folder), str(path), headers, _side(folder, config, module_folders))


def no_such_model(path: object, reason: object = None) -> SourceError:
    """The error for a reference that leads to nothing that can be opened."""
    return SourceError(
        "no such model",
        model=path,
        found=reason,
        expected="a folder with safetensors weights, or a .safetensors file",
        do="check the path; fetch a model of the Hub with `hf download REPO --local-dir DIR`",
    )


def _open_file(path: Path) -> Checkpoint:
    if path.suffix != ".safetensors":
        raise SourceError(
            "only safetensors files are read",
            file=path,
            found=path.suffix or "no suffix",
            do="save the weights as safetensors, as save_pretrained does",
        )
    real = path.resolve()
    return _checkpoint(str(real), str(path), {real.name: read_header(real)}, Side())


def _checkpoint(identity: str, label: str, headers: dict[str, Header], side: Side) -> Checkpoint:
    source = FileSource.of(identity, headers)
    tensors: dict[str, Expr] = {}
    folders: dict[str, str] = {}
    for key, header in headers.items():
        folder = key.rpartition("/")[0]
        for name, spec in header.tensors.items():
            full = f"{folder}/{name}" if folder else name
            if full in tensors:
                raise SourceError(
                    "two shards hold the same tensor",
                    tensor=full,
                    file=header.file.path,
                    found=f"also in {source.location(full).file}",
                    do="remove the shard that the index does not need",
                )
            tensors[full] = Read(source, spec.named(full))
            if folder:
                folders[full] = folder
    delta = any(h.metadata.get(SPACE_KEY) == "delta" for h in headers.values())
    mass = 0.0 if delta else 1.0
    return Checkpoint(tensors, label, mass, side=side, folders=folders, roots=(identity,))


def _there(path: Path) -> bool:
    """Whether there is something at ``path``, be it a link that leads nowhere."""
    return path.exists() or path.is_symlink()


def _weights(root: Path, prefix: str) -> dict[str, Header]:
    """Headers by file name from ``root``, as transformers would choose: one file, else the index.

    prefix: the folder of the weights in the checkpoint ``root``, '' or with a slash at its end.
    """
    folder = root / prefix
    if _there(folder / SINGLE):
        return {prefix + SINGLE: read_header(_inside(root, prefix + SINGLE))}
    if _there(folder / INDEX):
        return _sharded(root, prefix)
    others = sorted(
        p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter")
    )
    if len(others) == 1:
        return {prefix + others[0]: read_header(_inside(root, prefix + others[0]))}
    if others:
        raise SourceError(
            "several weight files and no index that says which belong together",
            folder=folder,
            found=", ".join(others[:5]),
            expected=f"{SINGLE}, or {INDEX}",
            do="name one file, or fetch the index",
        )
    return {}


def _sharded(root: Path, prefix: str) -> dict[str, Header]:
    """The shards that the index names; each tensor must be where the index says, and listed."""
    index = root / prefix / INDEX
    parsed = _json(root, prefix + INDEX)
    where = parsed.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise SourceError("the index has no weight_map", file=index)
    for tensor, name in where.items():
        if not isinstance(name, str) or not _plain(name):
            raise SourceError(
                "the index points outside the folder",
                file=index,
                tensor=tensor,
                found=repr(name),
                expected="the plain name of a file beside the index",
                do="do not use this checkpoint before you know why it says so",
            )
    headers: dict[str, Header] = {}
    for name in dict.fromkeys(where.values()):
        try:
            headers[name] = read_header(_inside(root, prefix + name))
        except SourceError as error:
            raise error.at(named_by=index) from None
    owner = {t: f for f, h in headers.items() for t in h.tensors}
    for tensor, name in where.items():
        if tensor not in headers[name].tensors:
            raise SourceError(
                "the index names a tensor that its shard does not hold",
                file=index,
                tensor=tensor,
                found=f"it is in {owner[tensor]}" if tensor in owner else "no shard holds it",
                expected=f"in {name}",
            )
    for name, header in headers.items():
        for tensor in header.tensors:
            if tensor not in where:
                raise SourceError(
                    "a shard holds a tensor that the index does not name",
                    file=header.file.path,
                    tensor=tensor,
                    expected=f"listed in {index}",
                )
            if where[tensor] != name:
                raise SourceError(
                    "two shards hold the same tensor",
                    tensor=tensor,
                    found=f"{name} and {where[tensor]}",
                    file=index,
                )
    return {prefix + name: header for name, header in headers.items()}


def _plain(name: str) -> bool:
    return (
        bool(name)
        and len(name) <= 255
        and name not in (".", "..")
        and not any(c in '/\\:%"' or ord(c) < 32 for c in name)
    )


def _inside(root: Path, name: str) -> Path:
    """``root/name``, which may not be a link out of ``root``, but to a Hub cache's blobs."""
    path = root / name
    try:
        real = path.resolve()
        blobs = (root.parent.parent / "blobs").resolve()
    except (OSError, RuntimeError):
        raise SourceError("a file is a link that leads round in a circle", file=path) from None
    if root not in real.parents and real.parent != blobs:
        raise SourceError(
            "a file is a link that leads out of its folder",
            file=path,
            found=str(real),
            expected=f"a file in {root}",
            do="copy the file here, or name the real folder",
        )
    return path


def _read_json(root: Path, name: str) -> object:
    """The JSON of a small file of the checkpoint; None when there is no such file."""
    if not _there(root / name):
        return None
    path = _inside(root, name)
    if check_regular(path, "file").st_size > _MAX_JSON:
        raise SourceError("a JSON file is too large to be what it says", file=path)
    try:
        return strict_json(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"not sound JSON: {error}", file=path) from None
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=path) from None


def _json(root: Path, name: str) -> dict[str, object]:
    """A JSON object from a small file; {} when there is none."""
    parsed = _read_json(root, name)
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise SourceError("not a JSON object", file=root / name, found=type(parsed).__name__)
    return parsed


def _refuse_quantised(config: dict[str, object], folder: Path) -> None:
    found = config.get("quantization_config")
    if isinstance(found, dict):
        raise SourceError(
            "the weights are quantised, so their numbers cannot be averaged",
            model=folder,
            found=f"quantization_config: {found.get('quant_method', json.dumps(found)[:80])}",
            expected="weights in float16, bfloat16, float32 or float64",
            do="use the model that this one was quantised from",
        )


def _no_weights(folder: Path) -> SourceError:
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt")
    )
    if (folder / "adapter_config.json").exists():
        what, do = "this is an adapter, not a model", "merge it into its base first"
    elif pickles:
        what, do = (
            f"the weights are a pickle ({pickles[0]}), which can run code when it is opened",
            "load the model in transformers and save_pretrained it: that writes safetensors",
        )
    else:
        what, do = "the folder holds no safetensors weights", "check the path"
    return SourceError(what, model=folder, expected=f"{SINGLE}, or {INDEX} and its shards", do=do)


def _module_folders(folder: Path) -> tuple[str, ...]:
    """The folders of a sentence-transformers model's modules, as modules.json lists them."""
    path = folder / "modules.json"
    modules = _read_json(folder, "modules.json")
    found = []
    for module in modules if isinstance(modules, list) else []:
        name = module.get("path") if isinstance(module, dict) else None
        if not isinstance(name, str) or not name:
            continue
        if not _plain(name):
            raise SourceError("modules.json points outside the folder", file=path, found=repr(name))
        if (folder / name).is_dir():
            _inside(folder, name)
            found.append(name)
    return tuple(found)


def _side(folder: Path, config: dict[str, object], module_folders: tuple[str, ...]) -> Side:
    """The files to copy beside the weights, sorted by name."""
    found: list[SideFile] = []
    left: list[str] = []
    for sub in ("", *module_folders, "additional_chat_templates"):
        here = folder / sub
        if not here.is_dir():
            continue
        for path in sorted(here.iterdir()):
            name = str(PurePosixPath(sub) / path.name)
            if path.name.startswith(".") or not (path.is_file() or path.is_symlink()):
                continue
            if _is_side(path):
                info = check_regular(_inside(folder, name), "side file")
                found.append(SideFile(name, str(path), info.st_size, info.st_mtime_ns))
            elif path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
                left.append(name)
    return Side(tuple(sorted(found, key=lambda f: f.name)), config, tuple(left))


def _is_side(path: Path) -> bool:
    if path.name.startswith(_NAMES):
        return True
    if path.name in _NOT_SIDE or path.name.endswith((".index.json",)):
        return False
    return path.suffix in _SIDE
