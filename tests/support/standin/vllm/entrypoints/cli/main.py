"""In place of vLLM where there is no GPU: its command line and its server's API over the toy of `support.api`.

Options, their names and what they take are those of `vllm serve` 0.11 and later that bigpipe gives; any other ends it,
as it would end vLLM. What a test wants to go wrong stands in VLLM_STANDIN.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from support.api import Api, Asked, Reply


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vllm")
    serve = parser.add_subparsers(required=True).add_parser("serve")
    serve.add_argument("model_tag")
    serve.add_argument("--host")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--served-model-name", nargs="+")
    serve.add_argument("--dtype", choices=["auto", "bfloat16", "float", "float16", "float32", "half"], default="auto")
    serve.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    serve.add_argument("--data-parallel-size", "-dp", type=int, default=1)
    serve.add_argument("--max-model-len", type=int)
    serve.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    serve.add_argument("--runner", choices=["auto", "draft", "generate", "pooling"], default="auto")
    return parser.parse_args()


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main() -> None:
    asked, trouble = parse(), os.environ.get("VLLM_STANDIN", "")
    if not (Path(asked.model_tag) / "config.json").is_file():
        sys.exit(f"{asked.model_tag} is no model")
    if trouble == "port":
        say("OSError: [Errno 98] Address already in use")
        sys.exit(1)
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # vLLM's EngineCore is a child
    say(json.dumps({"engine": engine.pid, "server": os.getpid(), **vars(asked)}))
    if trouble == "endless":
        time.sleep(600)
    if trouble == "memory":
        say("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`")
        sys.exit(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    with Api(port=asked.port, key=os.environ["VLLM_API_KEY"], model=asked.served_model_name[0]) as api:

        def change(question: Asked, reply: Reply) -> Reply:
            if trouble == "dies" and question.number == 3:
                say("engine core died")
                os.kill(os.getpid(), signal.SIGKILL)
            if question.body.get("continue_final_message"):
                say("goes on with a message")
            return replace(reply, after=0.02)

        api.change = change
        signal.sigwait([signal.SIGTERM])
        say("shutting down")
        engine.kill()


if __name__ == "__main__":
    main()
