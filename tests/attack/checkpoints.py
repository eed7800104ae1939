"""Checkpoints made to hurt, each a folder of a few files; and a process that opens them all, watched.

    python -m attack.checkpoints FOLDER

prints one JSON line per folder in FOLDER: `[name, seconds, tensors or "", error's class, cause, cure]`.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import socket
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Make = Callable[[Path], object]
Files = Mapping[str, "bytes | Make"]
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "C64",
    "F4",
    "E8M0",
)
FORBIDDEN = (
    "posix system", "os system", "os popen", "os execv", "nt system", "subprocess Popen", "subprocess check_output",
    "subprocess run", "builtins eval", "builtins exec", "builtins compile", "builtins __import__", "builtins open",
    "builtins getattr", "builtins setattr", "builtins breakpoint", "builtins print", "__builtin__ eval", "__main__ x",
    "importlib import_module", "importlib._bootstrap _load", "runpy run_path", "runpy _run_code", "pty spawn",
    "commands getoutput", "webbrowser open", "socket socket", "socket create_connection", "urllib.request urlopen",
    "http.client HTTPConnection", "requests get", "httpx get", "shutil rmtree", "shutil copyfile", "pathlib Path",
    "pathlib Path.write_text", "tempfile mktemp", "ctypes CDLL", "ctypes.util find_library", "operator attrgetter",
    "operator methodcaller", "operator itemgetter", "functools partial", "functools reduce", "types CodeType",
    "types FunctionType", "marshal loads", "pickle loads", "pickle Unpickler", "_pickle loads", "dill loads",
    "cloudpickle loads", "joblib load", "numpy load", "numpy.core.multiarray _reconstruct", "numpy.testing runstring",
    "numpy.f2py.crackfortran getlincoef", "torch load", "torch hub.load", "torch.hub load", "torch.jit load",
    "torch.utils.cpp_extension load_inline", "torch._C _import_ir_module_from_buffer",
    "torch.storage _load_from_bytes", "torch.serialization load", "torch._inductor.codecache compile_file",
    "torch.fx.graph_module reduce_graph_module", "torch.distributed.rpc.internal _run_function",
    "torch.package.package_importer _", "transformers AutoModel", "bdb Bdb.run", "cProfile run", "profile run",
    "timeit timeit", "code interact", "code InteractiveInterpreter", "doctest debug_script", "trace Trace", "pdb run",
    "pydoc pipepager", "idlelib.run Executive", "lib2to3.pgen2 driver", "asyncio.unix_events _UnixSubprocessTransport",
    "multiprocessing.process Process", "concurrent.futures Executor", "sqlite3 connect", "signal raise_signal",
    "sys exit", "os _exit", "os kill", "gc get_objects", "atexit register", "threading Thread", "logging FileHandler",
    "zipimport zipimporter", "venv create", "ensurepip bootstrap", "pip main", "distutils.file_util write_file",
    "setuptools setup", "site addpackage", "yaml load", "jinja2 Template", "torch _utils._rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v2.__globals__", "torch._utils __builtins__", "torch._utils _import_dotted_name",
    "collections OrderedDict.__init__", "collections namedtuple", "copyreg _reconstructor",
    "bigpipe.modules import_attribute", "bigpipe.files write_file", "conftest x", "a b", " ", "é ü", "..os system",
)  # fmt: skip
"""`module name`, as a pickle's GLOBAL writes them."""
NAMES = (
    "../x.safetensors", "../../etc/passwd", "/etc/passwd", "/dev/zero", "/proc/self/mem", "..", ".", "", "/", "//",
    "a/b", "a\\b", "C:\\x", "c:x", "\\\\server\\x", "a\0b", "\0", "a\nb", "\x1b[2J", "~", "~root/x",
    "file:///etc/passwd", "http://127.0.0.1/x", "hf://a/b", "$HOME", "%2e%2e/x", "..%2fx", "..;/x", ".../x", "x" * 300,
    "x" * 5000, " ", "-rf", "con", "nul.safetensors", "a.safetensors/", "./a.safetensors", "a.safetensors/../../x",
    "ａ.safetensors", "\u202ex", 7, None, True, 1.5, [], {}, ["a.safetensors"], {"file": "a"},
)  # fmt: skip
"""What an index may say that a tensor's file is called."""
F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def header_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def torch_zip(pickled: bytes, files: Mapping[str, bytes] | None = None, **options: Any) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in {"byteorder": b"little", "data/0": b"\0" * 8, "version": b"3\n", **(files or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return made.getvalue()


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
GOOD_PICKLE = b"\x80\x02}X\x01\0\0\0a" + TENSOR + b"s."
GOOD = header_file({"a": F32, "b": {"dtype": "F16", "shape": [2], "data_offsets": [4, 8]}}, b"\0" * 8)


def cases() -> dict[str, Files]:
    """Return name → the files of a folder. None of them is a checkpoint that can be read, but those called `right`."""
    found: dict[str, Files] = {}
    for group in (headers, cuts, pickles, zips, indexes, links, odd_files, configs):
        for name, files in group():
            found[f"{group.__name__}-{len(found):03d}-{name}"] = files
    return found


def headers() -> Iterator[tuple[str, Files]]:
    def one(entry: object, data: int = 4) -> Files:
        return {"model.safetensors": header_file({"a": entry}, b"\0" * data)}

    for dtype in DTYPES:
        yield f"{dtype} of the wrong size", one({"dtype": dtype, "shape": [7], "data_offsets": [0, 3]}, 3)
        yield f"{dtype} beyond the end", one({"dtype": dtype, "shape": [64], "data_offsets": [0, 2**40]}, 0)
    strange: list[Any] = [-1, 1.0, True, "1", None, [], {}, 2**63, 2**64, 10**400, "x" * 1000]
    for value in strange:
        yield "a size", one({**F32, "shape": [value]})
        if value != []:  # a scalar
            yield "sizes", one({**F32, "shape": value})
        yield "a begin", one({**F32, "data_offsets": [value, 4]} if value != "1" else {**F32, "data_offsets": ["0", 4]})
        yield "an end", one({**F32, "data_offsets": [0, value]})
        yield "offsets", one({**F32, "data_offsets": value})
        yield "a dtype", one({**F32, "dtype": value})
        yield "an entry", one(value)
        yield (
            "metadata",
            {
                "model.safetensors": header_file(
                    {"__metadata__": {"a": value if value != "1" and not isinstance(value, str) else 1}, "a": F32},
                    b"\0" * 4,
                )
            },
        )
    for text in (
        b"",
        b" ",
        b"[]",
        b"null",
        b"{",
        b"}",
        b'{"a"',
        b"\xff{}",
        b"{}\0",
        b"{}{}",
        b"{'a':1}",
        b'{"a":NaN}',
        b"\xef\xbb\xbf{}",
    ):
        yield "a header", {"model.safetensors": header_file(text, b"x")}
    for depth in (100, 1000, 30_000):
        yield f"depth {depth}", {"model.safetensors": header_file(b'{"a":' + b"[" * depth + b"]" * depth + b"}")}
    for length in (1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1):
        yield f"length {length}", {"model.safetensors": header_file({"a": F32}, b"\0" * 4, length=length)}
    twice = {"a": F32, "b": {**F32, "data_offsets": [2, 6]}}
    yield "overlap", {"model.safetensors": header_file(twice, b"\0" * 6)}
    yield "hole", {"model.safetensors": header_file({"a": F32, "b": {**F32, "data_offsets": [8, 12]}}, b"\0" * 12)}


def cuts() -> Iterator[tuple[str, Files]]:
    whole = torch_zip(GOOD_PICKLE)
    for size in range(0, len(GOOD), 5):
        yield f"safetensors of {size}", {"model.safetensors": GOOD[:size]}
    for size in range(0, len(whole), 23):
        yield f"zip of {size}", {"pytorch_model.bin": whole[:size]}
    yield "longer", {"model.safetensors": GOOD + b"\0"}


def pickles() -> Iterator[tuple[str, Files]]:
    for reference in FORBIDDEN:
        module, _, name = reference.partition(" ")
        called = f"c{module}\n{name}\n".encode() + b"X\x04\0\0\0true\x85R"
        yield f"calls {reference}"[:60], {"pytorch_model.bin": torch_zip(b"\x80\x02" + called + b".")}
    for reference in FORBIDDEN[:12]:
        module, _, name = reference.partition(" ")
        text = [struct.pack("<I", len(part)) + part.encode() for part in (module, name)]
        stack = b"X" + text[0] + b"X" + text[1] + b"\x93"
        yield f"stack {reference}", {"pytorch_model.bin": torch_zip(b"\x80\x04" + stack + b")R.")}
        inside = b"\x80\x02}X\x01\0\0\0a" + TENSOR + b"sX\x01\0\0\0bc" + f"{module}\n{name}\n".encode() + b")Rs."
        yield f"beside a tensor: {reference}", {"pytorch_model.bin": torch_zip(inside)}
    for code in range(256):
        if chr(code) not in ".":
            yield f"operation {code:#04x}", {"pytorch_model.bin": torch_zip(bytes([0x80, 2, code, 10, 10, 46]))}
    yield "numbers", {"pytorch_model.bin": torch_zip(pickle.dumps({"a": 10**10000}, 2))}
    yield "no zip", {"pytorch_model.bin": pickle.dumps({"a": 1}, 2)}
    yield "text", {"pytorch_model.bin": b"(dp0\nS'a'\np1\ncos\nsystem\n(S'true'\ntRs."}


def zips() -> Iterator[tuple[str, Files]]:
    whole = torch_zip(GOOD_PICKLE)
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield f"method {method}", {"pytorch_model.bin": torch_zip(GOOD_PICKLE, compression=method)}
    bomb = torch_zip(b"\0" * 2**26, compression=zipfile.ZIP_DEFLATED, compresslevel=9)
    yield "bomb", {"pytorch_model.bin": bomb}
    for files in (
        {"constants.pkl": b"\x80\x02)."},
        {"byteorder": b"big"},
        {"data/0": b""},
        {"../../x": b"x"},
        {"/x": b"x"},
    ):
        yield (
            "contents",
            {"pytorch_model.bin": torch_zip(GOOD_PICKLE, files)}
            if "x" not in str(files)
            else {"pytorch_model.bin": torch_zip(GOOD_PICKLE[:-3], files)},
        )
    for field in (4, 6, 8, 10, 16, 20, 24, 28, 30, 42):  # of the central directory, APPNOTE.TXT 4.3.12
        at = whole.index(b"PK\x01\x02") + field
        yield (
            f"directory {field}",
            {"pytorch_model.bin": whole[:at] + b"\xff\xff" + whole[at + 2 :]}
            if field > 6
            else {"pytorch_model.bin": whole[:at]},
        )
    yield "second end", {"pytorch_model.bin": whole + whole[whole.rindex(b"PK\x05\x06") :]}


def indexes() -> Iterator[tuple[str, Files]]:
    for name in NAMES:
        text = json.dumps({"weight_map": {"a": name}}).encode()
        yield f"names {str(name)[:20]!a}", {"model.safetensors.index.json": text, "a.safetensors": GOOD, "a": GOOD}
    maps: list[object] = [None, [], "a", 1, {}, {"": "a.safetensors", "b": "b.safetensors"}]
    for found in maps:
        yield (
            "a map",
            {"model.safetensors.index.json": json.dumps({"weight_map": found}).encode(), "a.safetensors": GOOD},
        )
    for text in (b"", b"[]", b"{", b"\xff", b"[" * 50_000, b'{"weight_map": {"a": "a", "a": "b"}}', b" " * (17 << 20)):
        yield "a text", {"model.safetensors.index.json": text, "a.safetensors": GOOD}


def links() -> Iterator[tuple[str, Files]]:
    targets = (
        "/etc/passwd", "/dev/zero", "/dev/tty", "/proc/self/environ", "/proc/self/mem", "../../secret", "nowhere",
        "model.safetensors", ".", "..", "/", "/proc/self/fd/0", "config.json/x", "x" * 255,
    )  # fmt: skip
    for target, name in itertools.product(
        targets, ("model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json")
    ):
        files: dict[str, Any] = {name: lambda path, target=target: path.symlink_to(target)}
        if not name.startswith(("model", "pytorch")):
            files["model.safetensors"] = GOOD
        yield f"{name} to {target[:20]}", files


def odd_files() -> Iterator[tuple[str, Files]]:
    def sparse(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(1 << 40)

    def listening(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(path.parent)
            server.bind(path.name)
            os.chdir(here)

    makers: dict[str, Make] = {
        "fifo": os.mkfifo, "directory": Path.mkdir, "sparse": sparse, "socket": listening,
        "unreadable": lambda path: (path.write_bytes(b""), path.chmod(0)),
    }  # fmt: skip
    names = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.json", "tokenizer.json")
    for (kind, make), name in itertools.product(makers.items(), names):
        if name in names[:3]:
            yield f"{kind} as {name}", {name: make}
        elif (kind, name) != ("unreadable", "tokenizer.json") and kind != "directory":
            yield f"{kind} as {name}", {name: make, "model.safetensors": GOOD}


def configs() -> Iterator[tuple[str, Files]]:
    for text in (
        b"",
        b"[]",
        b"nul",
        b"\xff\xfe{}",
        b"{" * 40_000,
        b'{"a":' * 30_000,
        b"[" * 100_000,
        b'"' + b"a" * (11 << 20) + b'"',
        b'{"a": ' + b"1" * 5000 + b"}",
    ):
        yield "a text", {"config.json": text, "model.safetensors": GOOD}


def build(folder: Path, files: Files) -> None:
    folder.mkdir()
    for name, made in files.items():
        if isinstance(made, bytes):
            (folder / name).write_bytes(made)
        else:
            made(folder / name)


def main(folder: Path) -> None:
    from bigpipe.bigmodel.checkpoint import describe_checkpoint, open_checkpoint, pickles  # noqa: F401
    from bigpipe.errors import BigpipeError

    import encodings.utf_16_be, encodings.utf_16_le, encodings.utf_32_be, encodings.utf_32_le  # noqa: E401, F401  isort: skip
    import numpy  # noqa: F401  isort: skip
    from .mutations import Watch, limit_memory

    limit_memory()
    watch = Watch()
    for place in sorted(folder.iterdir()):
        begun, told = time.monotonic(), ("", "", "", "")
        watch.on = True
        try:
            checkpoint = open_checkpoint(place)
            for name in checkpoint.tensors:
                checkpoint.read(name)
            describe_checkpoint(place)
            told = (",".join(checkpoint.tensors), "", "", "")
        except BigpipeError as error:
            told = ("", type(error).__name__, error.cause, error.cure)
        finally:
            watch.on = False
        sys.stdout.write(json.dumps([place.name, time.monotonic() - begun, *told]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
