"""A whole recipe, from the Hub to a quantized model that loads: bigpipe against the four tools one after the other.

    python benchmarks/recipe.py [--size 1.3B] [--scheme int8|nf4] [--rounds 3] [--rate BYTES] [--folder DIR]

A made-up fp16 model lies on a Hub on loopback, in files of 500 MB. Each arm is one process that downloads it (the Hub
cache is empty), reshards it to 200 MB, quantizes that, and loads the result on the CPU; a sync ends the timing. The
tools' arm is a single script, so torch is imported once: snapshot_download, transformers' save_pretrained,
quantization on load by bitsandbytes with save_pretrained, from_pretrained. bigpipe runs twice: as it does by default,
and with `--jobs 1`, where nothing overlaps. `--rate` limits what the Hub sends, in bytes per second of all connections
together: 125000000 is a line of 1 Gbit/s, 0 as fast as it can.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from machine import alternate, facts, median, whole_process
from reshard import make_source

HERE = Path(__file__).parent
SHARD = "200MB"
SERVER = """
import sys
from pathlib import Path
from support.hub import LoopbackHub
folder, environment, rate = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
with LoopbackHub() as hub:
    hub.create("org/model", {path.name: path for path in folder.iterdir()})
    hub.bandwidth.rate = rate
    names = "\\n".join(f"{name}={value}" for name, value in hub.environment(environment.parent / "hf").items())
    environment.with_suffix(".part").write_text(names)
    environment.with_suffix(".part").rename(environment)
    sys.stdin.read()
"""
TOOLS = """
import os, sys, torch, transformers
from huggingface_hub import snapshot_download
out, scheme, shard = sys.argv[1:4]
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
Model = transformers.AutoModelForCausalLM
source = snapshot_download("org/model")
model = Model.from_pretrained(source, dtype=torch.float16)
model.save_pretrained(f"{out}/shards", max_shard_size=shard)
del model
if scheme == "int8":
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
else:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
model = Model.from_pretrained(
    f"{out}/shards", quantization_config=config, device_map={"": "cpu"}, dtype=torch.float16
)
model.save_pretrained(f"{out}/quantized")
del model
Model.from_pretrained(f"{out}/quantized", device_map={"": "cpu"})
os.sync()
"""
RECIPE = """
version: 1
name: whole
stages:
  download: {{uses: download, with: {{repo: org/model}}}}
  shard: {{uses: shard, inputs: download, with: {{max_shard_size: {shard}}}, cache: false}}
  quantize: {{uses: quantize, inputs: shard, with: {quantize}}}
  load: {{uses: dispatch, inputs: quantize, with: {{device_map: {{"": cpu}}, verify: load}}}}
"""
QUANTIZE = {
    "int8": "{scheme: int8}",
    "nf4": "{scheme: nf4, bnb_4bit_use_double_quant: true}",
}
BIGPIPE = """
import os, subprocess, sys
command = [sys.executable, "-m", "bigpipe", "run", "recipe.yaml", "--store", sys.argv[1] + "/store", *sys.argv[2:]]
subprocess.run(command, check=True)
os.sync()
"""


def timed(folder: Path, environment: dict[str, str], command: list[str]) -> tuple[float, int]:
    for name in ("out", "hf"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "out").mkdir()
    subprocess.run(["sync"], check=True)
    seconds, memory = whole_process(command, env=environment, cwd=folder)
    print(f"{seconds:.1f} s: {command[-1]}", file=sys.stderr, flush=True)
    return seconds, memory


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    source, told = folder / "source", folder / "environment"
    make_source(source, arguments.size, "safetensors", "500MB")
    (folder / "recipe.yaml").write_text(RECIPE.format(shard=SHARD, quantize=QUANTIZE[arguments.scheme]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    paths = [str(HERE.parent / "tests"), environment.get("PYTHONPATH", "")]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, source, told, str(arguments.rate)],
        stdin=subprocess.PIPE, env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    try:
        while not told.exists():
            if server.poll() is not None:
                raise SystemExit("the Hub on loopback did not start")
        environment |= dict(line.split("=", 1) for line in told.read_text().splitlines())
        run = partial(timed, folder, environment)
        out = str(folder / "out")
        arms = {
            "bigpipe": lambda: run([sys.executable, "-c", BIGPIPE, out]),
            "bigpipe --jobs 1": lambda: run([sys.executable, "-c", BIGPIPE, out, "--jobs", "1"]),
            "tools": lambda: run([sys.executable, "-c", TOOLS, out, arguments.scheme, SHARD]),
        }
        results = alternate(arms, arguments.rounds)
    finally:
        server.stdin.close() if server.stdin else None
        server.wait()
    seconds = {name: median([wall for wall, _ in values]) for name, values in results.items()}
    return {
        "benchmark": "recipe",
        "size": arguments.size,
        "scheme": arguments.scheme,
        "rate": arguments.rate,
        "machine": facts(),
        "arms": {
            name: {"seconds": seconds[name], "all": [round(wall, 2) for wall, _ in values]}
            for name, values in results.items()
        },
        "ratio to the tools": round(seconds["bigpipe"] / seconds["tools"], 3),
        "ratio to one after the other": round(seconds["bigpipe"] / seconds["bigpipe --jobs 1"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.3B")
    parser.add_argument("--scheme", choices=sorted(QUANTIZE), default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    arguments, _ = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(json.dumps(measure(Path(folder).resolve(), arguments), indent=2))


if __name__ == "__main__":
    main()
