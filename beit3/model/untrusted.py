"""Files of strangers: told apart by their content, checked whole, and read without running anything in them.

Three kinds of file hold weights: the zip container of `torch.save`, the format that `torch.save` wrote before PyTorch
1.6, and safetensors. Anything else is refused in one sentence that says what it is. The ending of a name decides
nothing.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor

from beit3.system.atomic_files import sha256_of
from beit3.system.errors import InputError, printable

ZIP, LEGACY, SAFETENSORS = "zip", "legacy", "safetensors"

# Weights compress two- or threefold at most; a file that unpacks to more than this many times its size is a bomb.
MOST_UNPACKED = 20
SMALL = 64 << 20  # bytes that may be unpacked whatever the size of the file, for tiny models that are mostly zeros
# Names and shapes of 10 000 tensors pickle to about 1.5 MB; each byte can become a value of a hundred in memory.
MOST_HEADER = 16 << 20
ALIGNMENT = 16  # bytes, of the largest number a tensor can hold

# `torch.save` before 1.6 begins with this number as a pickle, whatever the pickle's protocol.
_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")
_SIGNATURES = (  # where, what stands there, what that is
    (0, b"version https://git-lfs", "a Git LFS pointer instead of the file; fetch the file itself with `git lfs pull`"),
    (0, b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (0, b"BZh", "compressed with bzip2; unpack it first"),
    (0, b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (0, b"Rar!", "a RAR archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
    (0, b"\x89HDF", "an HDF5 file, wanted weights of PyTorch"),
    (0, b"\x93NUMPY", "a NumPy array, wanted a state dict"),
    (0, b"GGUF", "a GGUF file, wanted weights of PyTorch"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x89PNG", "a picture"),
    (0, b"\xff\xd8\xff", "a picture"),
    (0, b"\x7fELF", "a program"),
    (0, b"PK\x05\x06", "an empty zip archive"),
)
_TEXTS = (  # what a text begins with, in small letters, and what that is
    ("<!doctype html", "a web page; the download gave an error or a login page"),
    ("<html", "a web page; the download gave an error or a login page"),
    ("<", "XML text; a server's error message?"),
    ("{", "JSON text; a server's error message?"),
    ("[", "JSON text"),
)
HOW_TO_SAVE = (
    "if you trust it, save its weights alone: python -c \"import torch; x = torch.load('OLD', weights_only=False); "
    "torch.save({'model': x['model']}, 'NEW')\""
)


def refuse(file: Path, why: str) -> NoReturn:
    """Raise an `InputError` of one line about a file."""
    raise InputError([f"{printable(str(file))}: {why}"])


def reason(error: BaseException) -> str:
    """The first line of what another library says, short and printable."""
    # torch puts a page of advice around what its unpickler says.
    text = str(error).split("WeightsUnpickler error:")[-1].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip() and "Weights only load failed" not in line]
    return printable(lines[0])[:120] if lines else type(error).__name__


def check_file(file: Path) -> None:
    """Read a file of weights whole and compare its checksums, where it has any.

    A `.pth` in torch's zip container has a CRC-32 of every part, a `.safetensors` of this toolkit the SHA-256 of its
    tensors. torch and safetensors look at neither: a flipped bit would be a changed weight that nobody sees.

    Raises:
        InputError: truncated or altered, or no file of weights at all.
    """
    with _readable(file):
        kind = kind_of(file)
        if kind == SAFETENSORS:
            _check_safetensors(file)
        elif kind == ZIP:
            with zipfile.ZipFile(file) as container:
                _check_container(file, container)
                part = container.testzip()
            if part is not None:
                refuse(file, f"damaged, {printable(part)[:80]} in it was altered since it was written")


def kind_of(file: Path) -> str:
    """ZIP, LEGACY or SAFETENSORS.

    Raises:
        InputError: another kind of file; says which, and what it begins with.
        OSError: it cannot be read.
    """
    with open(file, "rb") as content:
        head = content.read(512)
    if head.startswith(b"PK\x03\x04"):
        return ZIP
    if _LEGACY_MAGIC in head[:32]:
        return LEGACY
    # The length of the header, in 8 bytes, then the header, which is a JSON object.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return SAFETENSORS
    refuse(file, f"not a readable checkpoint but {_describe(file, head)}")


def load_untrusted(file: Path, also: Mapping[str, Any] | None = None) -> Any:
    """`torch.load` on the CPU of tensors and plain values; code hidden in the file is refused and never runs.

    Numbers of numpy become Python's; harmless classes that old checkpoints hold beside the weights become `Skipped`.

    Args:
        also: further classes that may be built, {full name: class}.

    Raises:
        InputError: not a checkpoint, damaged, or holds anything but tensors and plain values.
    """
    with _readable(file), _allowing({**_ALLOWED, **(also or {})}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of pickle protocols; the refusal says it
        kind = kind_of(file)
        if kind == SAFETENSORS:
            refuse(file, "a safetensors file, wanted one that torch.save wrote")
        # Tensors are views of the mapped file where it lies there as it is in memory. Of compressed parts, torch would
        # show the compressed bytes; parts that begin anywhere are safer copied. torch takes the name's ending for the
        # kind, so a file of another name is handed over open.
        if kind == ZIP and _can_be_mapped(file) and file.suffix != ".safetensors":
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        with open(file, "rb") as content:
            return torch.load(content, map_location="cpu", weights_only=True, mmap=False)


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        InputError: damaged, or not one.
    """
    with _readable(file), safe_open(file, framework="pt", device="cpu") as content:
        return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118


def check_plain(value: object, file: Path, what: str) -> None:
    """Hold what a stranger wrote to a mapping of plain values that can be walked and printed in no time.

    Raises:
        InputError: other values inside, or too many of them.
    """
    if not isinstance(value, dict):
        refuse(file, f"its {what} is {_a(value)}, wanted a mapping")
    values, texts = 0, 0
    left: list[tuple[object, int]] = [(value, 0)]
    while left:
        part, depth = left.pop()
        values += 1
        if isinstance(part, dict):
            if not all(isinstance(key, str) for key in part):
                refuse(file, f"its {what} has keys that are not text")
            left += [(inner, depth + 1) for pair in part.items() for inner in pair]
        elif isinstance(part, (list, tuple)):
            left += [(inner, depth + 1) for inner in part]
        elif isinstance(part, str):
            texts += len(part)
        elif not (part is None or isinstance(part, (bool, float)) or (isinstance(part, int) and abs(part) < 1 << 63)):
            refuse(file, f"its {what} holds {_a(part)}, wanted plain values")
        # One list that stands in itself, or twice in each of many, is walked as often as it stands there.
        if depth > 32 or values > 1_000_000 or len(left) > 1_000_000 or texts > MOST_HEADER:
            refuse(file, f"its {what} is larger or deeper than any that a training writes")


def check_sizes(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A tensor can claim billions of values and hold one, repeated; loading it would write them all out.

    Raises:
        InputError: the tensors have far more values than the file can hold.
    """
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values() if not tensor.is_meta)
    held = file.stat().st_size
    if claimed > MOST_UNPACKED * held + SMALL:
        refuse(file, f"its tensors claim {claimed:,} bytes, more than a file of {held:,} bytes can hold")


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Whatever goes wrong while a stranger's file is read becomes one sentence about the file.

    Raises:
        InputError: always in place of another error.
    """
    try:
        yield
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        # Python's words for a zip without the list of parts that stands at its end.
        missing = "File is not a zip file" in str(error)
        why = "its end is missing; was the download or the copy cut off?" if missing else reason(error)
        raise InputError([f"{printable(str(file))}: damaged, {why}"]) from error
    except FileNotFoundError as error:
        raise InputError([f"{printable(str(file))}: no such checkpoint"]) from error
    except OSError as error:
        why = error.strerror or reason(error)
        raise InputError([f"{printable(str(file))}: not a readable checkpoint ({why})"]) from error
    except NotPlainError as error:
        raise InputError([f"{printable(str(file))}: refused, it holds {error}; {HOW_TO_SAVE}"]) from error
    except pickle.UnpicklingError as error:
        raise InputError([f"{printable(str(file))}: {_unpicklable(str(error), error)}"]) from error
    except Exception as error:  # a file that is an instruction to a reader can make it fail in any way there is
        raise InputError([f"{printable(str(file))}: not a readable checkpoint, damaged ({reason(error)})"]) from error


def _unpicklable(text: str, error: BaseException) -> str:
    name = re.search(r"GLOBAL (\S+)|``(torch\S+)`` (?:and \S+ )?must be imported", text)
    found = "" if name is None else printable(name.group(1) or name.group(2)).strip(".")[:60]
    if found:
        return f"refused, it holds more than tensors and plain values ({found}); {HOW_TO_SAVE}"
    if "Unsupported operand" in text:
        return f"not a readable checkpoint, damaged or pickled with a protocol other than 2; {HOW_TO_SAVE}"
    return f"not a readable checkpoint ({reason(error)})"


def _describe(file: Path, head: bytes) -> str:
    """What a file is that holds no weights, and what it begins with."""
    if not head:
        return "an empty file (0 bytes)"
    start = head[:12].hex(" ")
    for place, signature, what in _SIGNATURES:
        if head[place:].startswith(signature):
            return f"{what} (begins with {start})" if place == 0 and not signature.isascii() else what
    if not head.strip(b"\0"):
        return "zeros at its beginning; a download that was not finished?"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "a Python pickle that torch.save did not write, which could run code"
    with contextlib.suppress(UnicodeDecodeError):
        encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
        cut = len(head) == 512  # perhaps inside a character
        text = codecs.getincrementaldecoder(encoding)().decode(head, final=not cut).lstrip("\ufeff").strip()
        if text and sum(not c.isprintable() and not c.isspace() for c in text) * 20 < len(text):
            return f"{_describe_text(file, text)} (begins with {printable(text[:40])!r})"
    if tarfile.is_tarfile(file):
        return "a tar archive; unpack it first"
    return f"an unknown or damaged file (begins with {start})"


def _describe_text(file: Path, text: str) -> str:
    if text.startswith("{") and file.stat().st_size <= MOST_HEADER:
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(file.read_bytes())
            if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
                return "the index of weights that are split into several files, which this toolkit does not join"
    return next((what for start, what in _TEXTS if text.lower().startswith(start)), "a text file")


def _check_container(file: Path, container: zipfile.ZipFile) -> str:
    """Hold a zip to what torch reads right, by its list of parts alone; returns the folder that all parts lie in.

    Raises:
        InputError: another zip, or one that torch would read wrongly.
    """
    parts = container.infolist()
    names = [part.filename for part in parts]
    root = names[0].split("/")[0] if names else ""
    if f"{root}/data.pkl" not in names:
        refuse(file, f"not a readable checkpoint but {_describe_zip(names)}")
    if f"{root}/constants.pkl" in names:
        refuse(file, "a TorchScript program, wanted a state dict")
    if any(part.flag_bits & 0x2041 for part in parts):  # three ways to say encrypted
        refuse(file, "an encrypted zip; unpack it and zip it without a password")
    if len({name.casefold() for name in names}) < len(names):  # torch takes upper and lower case for the same
        refuse(file, "damaged, it holds two parts of one name")
    if any(part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for part in parts):
        refuse(file, "a zip compressed in a way that PyTorch cannot read; unpack it and zip it again with `zip -0 -r`")
    if b"PK\x05\x06" in container.comment:
        refuse(file, "damaged, it has two lists of its parts")
    held, unpacked = file.stat().st_size, sum(part.file_size for part in parts)
    if unpacked > MOST_UNPACKED * held + SMALL:
        refuse(file, f"refused, a file of {held:,} bytes that unpacks to {unpacked:,} holds no weights")
    if container.getinfo(f"{root}/data.pkl").file_size > MOST_HEADER:
        refuse(file, f"refused, it holds more beside its tensors than {MOST_HEADER >> 20} MB")
    return root


def _describe_zip(names: list[str]) -> str:
    inside = [name for name in names if name.lower().endswith((".pth", ".pt", ".bin", ".safetensors", ".ckpt"))]
    if inside:
        return f"a zip archive with {printable(inside[0])[:80]} in it; unpack it and give that file"
    if "data.pkl" in names or any(name.endswith("/data.pkl") for name in names):
        return "a checkpoint that was unpacked and zipped otherwise; the parts have to lie in one folder in the zip"
    if names and all(name.endswith(".npy") for name in names):
        return "arrays of NumPy (.npz), wanted a state dict"
    return f"a zip archive of other things ({printable(names[0])[:80] if names else 'nothing'})"


def _can_be_mapped(file: Path) -> bool:
    """Whether each tensor lies in the container uncompressed and at an address that suits it."""
    with zipfile.ZipFile(file) as container, open(file, "rb") as content:
        root = _check_container(file, container)
        for part in container.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                return False
            if part.filename.startswith(f"{root}/data/"):
                content.seek(part.header_offset + 26)  # a local header is 30 bytes, a name and an extra field
                name, extra = struct.unpack("<HH", content.read(4))
                if (part.header_offset + 30 + name + extra) % ALIGNMENT:
                    return False
    return True


def _check_safetensors(file: Path) -> None:
    """Layout: 8 bytes with the length of the JSON header, the header, the tensors (safetensors' format description)."""
    size = file.stat().st_size
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if length > min(size - 8, MOST_HEADER):
            refuse(file, f"damaged, its header claims {length:,} bytes and the file has {size:,}")
        header = json.loads(content.read(length).decode("utf-8"), object_pairs_hook=_without_repeats)
        metadata = header.get("__metadata__", {})
        wanted = metadata.get("sha256") if isinstance(metadata, dict) else None
        if wanted is not None and sha256_of(content) != wanted:
            refuse(file, "damaged, its tensors were altered since they were written")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return content


def _a(value: object) -> str:
    name = value.name if isinstance(value, Skipped) else type(value).__name__
    return f"a value of type {printable(name)[:60]}"


class NotPlainError(Exception):
    """A value that is neither a number nor text."""


class Skipped:
    """Stands for a value beside the weights that nobody reads; whatever is done to it has no effect."""

    __slots__ = ()
    name = "unknown"

    def __new__(cls, *_: object) -> Skipped:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _NumpyType:
    """What a pickled `numpy.dtype` says: a code such as "f8", and the order of the bytes."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


# numpy's codes for plain numbers, and what `struct` calls them.
_NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?"}
_NUMBERS |= {"i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}


def _numpy_scalar(dtype: object, raw: object = None) -> object:
    """A pickled number or text of numpy as Python's own; numpy takes no part in it."""
    if isinstance(dtype, _NumpyType) and isinstance(raw, bytes):
        if dtype.code in _NUMBERS and len(raw) == int(dtype.code[1]):
            return struct.unpack(dtype.order + _NUMBERS[dtype.code], raw)[0]
        if re.fullmatch(r"U\d+", dtype.code):
            return raw.decode("utf-32-be" if dtype.order == ">" else "utf-32-le").rstrip("\0")
    raise NotPlainError("a value of numpy that is no plain number")


def _empty_dict(*_: object) -> dict[Any, Any]:
    return {}


def _empty_list(*_: object) -> list[Any]:
    return []


def _skipped(name: str) -> type[Skipped]:
    return type("Skipped", (Skipped,), {"__slots__": (), "name": name})


_PATHS = "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath".split()
_HARMLESS = (
    "argparse.Namespace types.SimpleNamespace "
    "datetime.datetime datetime.date datetime.timedelta datetime.timezone decimal.Decimal fractions.Fraction "
    "uuid.UUID builtins.object builtins.frozenset builtins.slice builtins.range copyreg._reconstructor "
    "builtins.int builtins.float builtins.str builtins.list builtins.dict builtins.tuple builtins.bool "
    "deepspeed.runtime.fp16.loss_scaler.LossScaler deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler "
    "deepspeed.runtime.zero.config.ZeroStageEnum deepspeed.utils.tensor_fragment.fragment_address"
).split() + [f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS]
# What may stand in a pickle beside what torch builds itself: {name in the file: what is called in its place}.
_ALLOWED: dict[str, Any] = {
    **{name: _skipped(name) for name in _HARMLESS},
    "collections.defaultdict": _empty_dict,
    "collections.deque": _empty_list,
    "numpy.dtype": _NumpyType,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}


@contextlib.contextmanager
def _allowing(names: Mapping[str, Any]) -> Iterator[None]:
    """torch's list of what a pickle may name is the process's: ours holds inside the block, the others' outside."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(built, name) for name, built in names.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)
