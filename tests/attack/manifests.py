"""Manifests that nobody meant: texts of YAML, and each field of a manifest, a stage and a kind with strange values."""

from __future__ import annotations

import os
from collections.abc import Iterator

VALUES = (
    "", "~", "null", "true", "False", "yes", "no", "on", "0", "-1", "1", "1.5", "-0.0", "1e3", "1e999", ".inf",
    "-.inf", ".nan", "nan", "inf", "0o17", "017", "0x1f", "1_000", "12:30:45", "2024-01-01", "9223372036854775808",
    "99999999999999999999999999999999999999", "1e308", "1e-400", "'1'", "''", "' '", '"\\0"', '"\\x1b[2J"',
    '"\\ud800"', '"\\u202e"', '"a\\nb"', "[]", "[[]]", "[1, a, ~, {}]", "{}", "{a: 1}", "{1: a}", "{'': 1}",
    "{[1]: 1}", "{a: {b: [c]}}", "!!str 1", "!!python/object/apply:os.system [id]", "!x y", "&a [*a]", "*nowhere",
    "'${params.b}'", "'${env.HF_TOKEN}'", "'${env.HOME}'", "'${matrix.x}'", "'${stages.download.metrics.bytes}'",
    "'${'", "'$${'", "'${env.X:?{}'", "/", ".", "..", "../../../../etc/passwd", "/etc/passwd", "/dev/zero",
    "/proc/self/mem", "fifo", "folder", "loop", "locked", "binary", "nowhere/x", "'*'", "'**/*'", "'['",
    "'zip://a::file:///etc/x'", "'http://127.0.0.1:1/x'", "'s3://a/b'", "'memory://x'", "'file:///etc'", "'hf://a/b'",
    "'hf://'", "'hf://a/b/c/d'", "'__main__:x'", "'os:system'", "':'", "'..:x'", "'builtins:eval'", "'~nobody/x'",
    "-rf", "'--help'", "а", "ｍodel", "🦀", "1 GiB", "1GB", "-1GB", "1e40GiB", "1Gb", "0s", "1h", "-1s", "9e99h",
    "download", "model", "'a b'", "'a/b'", "'A/B@" +  "0" *  40 +  "'", "0" *  40, "main", "'refs/pr/1'", "auto",
    "cpu",
)  # fmt: skip
LONG = (
    "a" * 300,
    "a" * 5000,
    "[" + "a, " * 2000 + "]",
    "{" + ", ".join(f"k{i}: 1" for i in range(2000)) + "}",
    "9" * 400,
)
TOP = (
    "version",
    "name",
    "description",
    "params",
    "secrets",
    "trust",
    "stages",
    "x-a",
    "<<",
    "'1'",
    "1",
    "stage",
    "~",
    "[]",
)
TRUST = ("modules", "remote_code", "limits", "x")
LIMITS = ("seconds", "memory", "modules", "sequences")
STAGE = (
    "uses", "inputs", "with", "needs", "matrix", "when", "launch", "resources", "retries", "timeout", "gates",
    "on_fail", "cache", "env", "secrets", "<<", "x",
)  # fmt: skip
LAUNCH = (
    "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "config_file",
    "mixed_precision",
)  # fmt: skip
RESOURCES = ("cpus", "ram", "gpus", "gpu_memory", "disk")
PLAIN = {
    "download": "path: model", "estimate": "batch_size: 1", "shard": "max_shard_size: 1MB", "quantize": "scheme: int8",
    "dispatch": "max_memory: {cpu: 1GiB}", "distributed-infer": "task: text-generation, prompts: [a]",
    "save": "to: out",
}  # fmt: skip
"""Kind → what it cannot do without."""
HEAD = "version: 1\nparams: {b: model}\nstages:\n"
DOWNLOAD = "  download: {uses: download, with: {path: model}}\n"
QUOTED = DOWNLOAD.replace("model", "'${params.b}'")


def texts() -> Iterator[str | bytes]:
    """Yield whole documents."""
    good = HEAD + DOWNLOAD
    yield from (
        b"",
        b"\n",
        b"\0",
        b"\xff\xfe" + good.encode("utf-16-le"),
        b"\xef\xbb\xbf" + good.encode(),
        good.encode("utf-32"),
    )
    yield from (
        good.encode() + tail
        for tail in (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf0\x9f", b"\x1b", b"\x07", b"\x85", b"\x00")
    )
    for depth in (31, 33, 1000, 20_000):
        yield f"{good}x-a: {'[' * depth}{']' * depth}\n"
        yield f"{good}x-a: {'{a: ' * depth}{'}' * depth}\n"
        yield good + "x-a:\n" + "".join(f"{' ' * level}- \n" for level in range(1, min(depth, 1000)))
    yield good + "".join(f"x-{number}: 1\n" for number in range(20_000))
    yield HEAD + "".join(f"  s{number}: {{uses: download, with: {{path: m{number}}}}}\n" for number in range(3_000))
    yield f"{good}x-a: {'a' * 999_000}\n"
    yield f"{good}x-a: {'a' * 2_000_000}\n"
    yield good + "x-0: &a0 [x, x]\n" + "".join(f"x-{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    yield good + "x-0: &a0 {k: x}\n" + "".join(f"x-{n}: &a{n} {{a: *a{n - 1}, b: *a{n - 1}}}\n" for n in range(1, 40))
    yield from (
        good + line
        for line in (
            "x-a: &a {b: *a}\n", "x-a: {<<: 1}\n", "x-a: {<<: [{a: 1}, 2]}\n", "x-a: {<<: {<<: {a: 1}}}\n",
            "<<: {stages: {}}\n", "<<: [{name: a}, {name: b}]\n", "x-a: {? [a] : b}\n", "x-a: {? {a: b} : c}\n",
            "? x\n", ": x\n", "x-a: |\n a\n  b\n c\n", "x-a: >-\n  a\n", "x-a: %a\n", "x-a: @a\n", "x-a: `a`\n",
            "x-a: \t1\n", "\tx-a: 1\n", "x-a: 'a\n", 'x-a: "\\q"\n', 'x-a: "\\UFFFFFFFF"\n', "x-a: [a\n",
            "x-a: {a: 1\n", "x-a: a: b\n", "--- 1\n", "...\nname: x\n", "%YAML 9.9\n---\n", "%TAG ! tag:x,1:\n",
            "!!map {}\n", "name: a\nname: b\n", "'name': a\nname: b\n", "x-1: a\n'x-1': b\n", "# \x7f\n", "x-a: &a\n",
            "x-a: *\n", "x-a: &\n", "name: а\n", "nаme: x\n", "ｎame: x\n", "name\u200b: x\n", "\u202ename: x\n",
        )
    )  # fmt: skip
    for name in (
        "1",
        "a b",
        "a/b",
        "..",
        "-a",
        "a" * 65,
        "",
        "~",
        "null",
        "true",
        "é",
        "a@b",
        "a=b",
        "a,b",
        "CON",
        "x-a",
        "${a}",
    ):
        yield f"{HEAD}  {name!r}: {{uses: download, with: {{path: model}}}}\n"
        yield f"{good}  q: {{uses: shard, inputs: {name!r}, with: {{}}}}\n"
        yield f"version: 1\nparams: {{{name!r}: 1}}\nstages:\n{DOWNLOAD}"
        yield f"{good}  q: {{uses: quantize, inputs: download, matrix: {{{name!r}: [1]}}, with: {{scheme: int8}}}}\n"
        scheme = "with: {scheme: '${matrix.scheme}'}"
        yield f"{good}  q: {{uses: quantize, inputs: download, matrix: {{scheme: [{name!r}]}}, {scheme}}}\n"
        yield f"{good}  q: {{uses: {name!r}, inputs: download}}\n"
        yield f"{good}  q: {{uses: shard, inputs: download, gates: [{name!r}]}}\n"
        yield f"{good}  q: {{uses: shard, inputs: download, when: {name!r}}}\n"
        yield f"{good}  q: {{uses: shard, inputs: download, env: {{{name!r}: x}}}}\n"
    for name in (
        "LD_PRELOAD",
        "PATH",
        "PYTHONPATH",
        "HOME",
        "HF_TOKEN",
        "LD_LIBRARY_PATH",
        "BASH_ENV",
        "PYTHONSTARTUP",
        "A=B",
        "a b",
    ):
        yield f"{good}  q: {{uses: shard, inputs: download, env: {{{name}: /tmp/x.so}}}}\n"


def fields() -> Iterator[str]:
    """Yield manifests in which one field of the engine's has a strange value."""
    for value in (*VALUES, *LONG):
        yield from (f"{HEAD}{DOWNLOAD}{name}: {value}\n" for name in TOP if name not in ("version", "params", "stages"))
        yield from (f"{name}: {value}\nstages:\n{DOWNLOAD}" for name in ("version", "params"))
        yield f"version: 1\nstages: {value}\n"
        yield f"version: 1\nparams: {{b: {value}}}\nstages:\n{QUOTED}"
        yield from (f"{HEAD}{DOWNLOAD}trust: {{{name}: {value}}}\n" for name in TRUST)
        yield from (f"{HEAD}{DOWNLOAD}trust: {{limits: {{{name}: {value}}}}}\n" for name in LIMITS)
        for name in STAGE:
            others = {"uses": "uses: shard", "inputs": "inputs: download", "with": "with: {max_shard_size: 1MB}"}
            rest = ", ".join(text for key, text in others.items() if key != name)
            yield f"{HEAD}{DOWNLOAD}  s: {{{rest}, {name}: {value}}}\n"
        infer = "uses: distributed-infer, inputs: download, with: {task: text-generation, prompts: [a]}"
        yield from (f"{HEAD}{DOWNLOAD}  s: {{{infer}, launch: {{{name}: {value}}}}}\n" for name in LAUNCH)
        yield from (f"{HEAD}{DOWNLOAD}  s: {{{infer}, resources: {{{name}: {value}}}}}\n" for name in RESOURCES)


def params() -> Iterator[tuple[str, str]]:
    """Yield (kind, manifest) in which one field of a kind has a strange value."""
    from bigpipe.orchestrator.recipe.registry import load_stage

    for kind, plain in PLAIN.items():
        for name, info in load_stage(kind).params.model_fields.items():
            rest = ", ".join(part for part in plain.split(", ") if not part.startswith(f"{name}:"))
            for value in (*VALUES, *LONG):
                given = ", ".join(filter(None, [rest, f"{info.alias or name}: {value}"]))
                yield kind, HEAD + (DOWNLOAD if kind != "download" else "") + stage(kind, given)


def stage(kind: str, given: str) -> str:
    inputs = "" if kind == "download" else ", inputs: download"
    return f"  s: {{uses: {kind}{inputs}, with: {{{given}}}}}\n"


def written(manifest: str | bytes) -> bytes:
    return manifest if isinstance(manifest, bytes) else os.fsencode(manifest)
