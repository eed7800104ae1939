from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.launching import Launched, gone, make_job, read_pid, wait_for
from support.workshop import Workshop

import bigpipe
from bigpipe.allocator import ALLOCATOR
from bigpipe.errors import DoesNotFit, Interrupted, StageFailed, Transient, UsageError
from bigpipe.orchestrator.contract.events import LogLine, Progress

CANARY = "hf_canaryCANARY0123456789"


def test_a_process_stage_runs_in_a_child_and_gives_its_result(tmp_path: Path) -> None:
    outcome = Launched(make_job(tmp_path, params={"do": "succeed"})).run()
    assert outcome.metrics["pid"] != os.getpid()
    assert outcome.files == {"made": ("0" * 64, 3)}
    assert (tmp_path / "work/out/made").read_text() == "yes"
    assert 5 * 2**20 < outcome.peak_rss < 500 * 2**20
    assert outcome.seconds > 0
    assert outcome.metrics["modules"] == []


def test_an_inline_stage_runs_here(tmp_path: Path) -> None:
    launched = Launched(make_job(tmp_path, "INLINE", params={"do": "talk"}))
    outcome = launched.run()
    assert outcome.metrics["pid"] == os.getpid()
    assert launched.of(LogLine) == [LogLine("node@a=1", "said nothing")]
    assert len(launched.of(Progress)) == 1000
    assert not (tmp_path / "attempt/job.json").exists()


def test_an_inline_stage_cannot_bring_in_torch(tmp_path: Path) -> None:
    from bigpipe.orchestrator.launch.executors import heavy_imports_barred

    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "torch"}
    try:
        with pytest.raises(StageFailed, match="runs inline and imports torch"):
            Launched(make_job(tmp_path, "INLINE", params={"do": "torch"})).run()
        assert "torch" not in sys.modules
    finally:
        sys.modules.update(hidden)
    with heavy_imports_barred("x"):
        import json.tool  # noqa: F401


def test_output_and_events_are_captured_by_line(tmp_path: Path) -> None:
    launched = Launched(make_job(tmp_path, params={"do": "talk", "text": "abc"}))
    launched.run()
    lines = [event.line for event in launched.of(LogLine)]
    assert "plain line" in lines
    assert "100%" in lines
    assert not any("50%" in line for line in lines)
    assert all(event.detail for event in launched.of(LogLine) if not event.line.startswith("said"))
    assert "plain line" in (tmp_path / "attempt/log.txt").read_text().splitlines()
    progress = launched.of(Progress)
    assert progress[-1] == Progress("node@a=1", 1000, 1000, "item", "counting")
    assert len(progress) < 20


def test_an_expected_error_comes_back_as_itself(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit) as caught:
        Launched(make_job(tmp_path, params={"do": "fail"})).run()
    assert caught.value.cause.startswith("20 GiB do not fit")
    assert caught.value.cure == "use --batch-size 1"
    with pytest.raises(Transient, match="busy"):
        Launched(make_job(tmp_path, params={"do": "transient"})).run()
    with pytest.raises(DoesNotFit, match="memory ran out"):
        Launched(make_job(tmp_path, params={"do": "memory"})).run()


@pytest.mark.parametrize("attribute", ["PROCESS", "INLINE"])
def test_an_unexpected_error_names_its_log(tmp_path: Path, attribute: str) -> None:
    with pytest.raises(StageFailed, match=r"node@a=1: KeyError: 'lost'") as caught:
        Launched(make_job(tmp_path, attribute, params={"do": "crash"})).run()
    log = tmp_path / "attempt/log.txt"
    assert str(log) in caught.value.cure
    assert "Traceback" in log.read_text()
    assert "_fail_unexpected" in log.read_text()


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSEGV", "SIGBUS"])
def test_a_crash_names_the_signal_and_shows_the_last_lines(tmp_path: Path, signal_name: str) -> None:
    with pytest.raises(StageFailed, match=f"was ended by {signal_name}") as caught:
        Launched(make_job(tmp_path, params={"do": "die", "text": signal_name})).run()
    assert "last words" in caught.value.cure
    assert str(tmp_path / "attempt/log.txt") in caught.value.cure
    if signal_name == "SIGKILL":
        assert "of 8.0 GiB" in caught.value.cure
    assert not list(tmp_path.glob("core*"))


def test_a_worker_that_ends_without_a_result_failed(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="exit status 0 and no result"):
        Launched(make_job(tmp_path, params={"do": "vanish"})).run()


def test_a_timeout_ends_the_worker(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"timeout of 1\.5 s"):
        Launched(make_job(tmp_path, params={"do": "sleep"})).run(timeout=1.5)
    assert gone(read_pid(tmp_path / "work/scratch/asleep-0"))


@pytest.mark.parametrize("action", ["sleep", pytest.param("ignore", marks=pytest.mark.slow)])
def test_cancelling_ends_the_worker(tmp_path: Path, action: str) -> None:
    launched = Launched(make_job(tmp_path, params={"do": action}))
    threading.Thread(target=lambda: (read_pid(tmp_path / "work/scratch/asleep-0"), launched.cancelled.set())).start()
    with pytest.raises(Interrupted):
        launched.run()
    assert gone(read_pid(tmp_path / "work/scratch/asleep-0"))
    with pytest.raises(Interrupted):
        launched.run()


def test_what_a_stage_leaves_running_is_ended(tmp_path: Path) -> None:
    Launched(make_job(tmp_path, params={"do": "child"})).run()
    assert gone(read_pid(tmp_path / "work/scratch/child"))


def test_peak_memory_is_measured(tmp_path: Path) -> None:
    outcome = Launched(make_job(tmp_path, params={"do": "swell", "text": str(300 * 2**20)})).run()
    assert 300 * 2**20 < outcome.peak_rss < 400 * 2**20


def test_results_of_an_earlier_attempt_are_not_taken(tmp_path: Path) -> None:
    Launched(make_job(tmp_path)).run()
    with pytest.raises(StageFailed, match="no result"):
        Launched(make_job(tmp_path, params={"do": "vanish"})).run()


def test_secrets_reach_the_stage_but_are_masked(tmp_path: Path) -> None:
    job = make_job(tmp_path, "HUB", params={"do": "talk"}, environment={"SHOWN": "yes"})
    launched = Launched(job)
    outcome = launched.run(secrets={"HF_TOKEN": CANARY})
    assert outcome.metrics["environment"]["HF_TOKEN"] == "***"
    assert outcome.metrics["shown"] == "yes"
    assert "said ***" in (tmp_path / "attempt/log.txt").read_text()
    assert CANARY not in str(launched.events)
    _assert_absent(CANARY, tmp_path)


@pytest.mark.parametrize("action", ["fail", "crash", "die"])
def test_failures_do_not_give_secrets_away(tmp_path: Path, action: str) -> None:
    job = make_job(tmp_path, "HUB", params={"do": action})
    launched = Launched(job)
    with pytest.raises((StageFailed, DoesNotFit)) as caught:
        launched.run(secrets={"HF_TOKEN": CANARY})
    assert CANARY not in str(caught.value)
    assert CANARY not in str(launched.events)
    _assert_absent(CANARY, tmp_path)


def _assert_absent(canary: str, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            assert canary not in path.read_text(errors="replace"), path


def test_the_environment_is_an_allow_list(tmp_path: Path) -> None:
    parent = {
        "HF_TOKEN": "hf_secret", "HUGGING_FACE_HUB_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "x", "LD_PRELOAD": "",
        "ACCELERATE_USE_CPU": "false", "WORLD_SIZE": "7", "HF_HOME": "/hf", "TRACEPARENT": "00-1", "NCCL_DEBUG": "INFO",
    }  # fmt: skip
    job = make_job(tmp_path, environment={"SHOWN": "yes", "NCCL_DEBUG": "WARN"}, offline=True)
    seen = Launched(job).run(environment=parent).metrics["environment"]
    assert not {"HUGGING_FACE_HUB_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "LD_PRELOAD", "WORLD_SIZE"} & set(seen)
    assert not any(name.startswith(("ACCELERATE_", "BIGPIPE_")) for name in seen)
    assert seen["HF_HOME"] == "/hf"
    assert seen["TRACEPARENT"] == "00-1"
    assert seen["NCCL_DEBUG"] == "WARN"
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert seen["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
    assert Path(seen["HF_TOKEN_PATH"]).read_text() == ""


def test_workers_give_freed_memory_back_unless_told_otherwise(tmp_path: Path) -> None:
    for parent, node, expected in (
        ({}, {}, ALLOCATOR),
        ({"GLIBC_TUNABLES": "glibc.malloc.perturb=1"}, {}, "glibc.malloc.perturb=1"),
        ({}, {"GLIBC_TUNABLES": ""}, ""),
    ):
        seen = Launched(make_job(tmp_path, environment=node)).run(environment=parent).metrics["environment"]
        assert seen["GLIBC_TUNABLES"] == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the tunables")
def test_the_allocator_of_a_worker_keeps_no_holes() -> None:
    """Without the setting these 300 MiB stay: one block in ten holds the heap open behind each that was freed."""
    script = (
        "import ctypes, re\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p; libc.free.argtypes = [ctypes.c_void_p]\n"
        "libc.malloc.argtypes = [ctypes.c_size_t]\n"
        "libc.free(libc.malloc(16 << 20))\n"
        "blocks = [libc.malloc(3 << 20) for _ in range(100)]\n"
        "for block in blocks: ctypes.memset(block, 1, 3 << 20)\n"
        "for index, block in enumerate(blocks):\n"
        "    if index % 10 != 9: libc.free(block)\n"
        "print(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    kept = {
        setting: int(
            subprocess.run(
                [sys.executable, "-c", script], env={**os.environ, "GLIBC_TUNABLES": setting}, capture_output=True,
                check=True, text=True,
            ).stdout
        )
        for setting in ("", ALLOCATOR)
    }  # fmt: skip
    assert kept[ALLOCATOR] < 64 * 1024 < 256 * 1024 < kept[""]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the tunables")
@pytest.mark.parametrize("setting", [ALLOCATOR, "glibc.malloc.mmap_threshold=1048576"])
def test_blocks_that_are_kept_are_not_mapped_anew(setting: str) -> None:
    """A hundred blocks of 3 MiB one after the other, of 768 pages each: all of them anew, unless they are kept. What
    somebody else set stays as it is."""
    script = (
        "import ctypes, resource\n"
        "from bigpipe.allocator import keep_freed_blocks\n"
        "keep_freed_blocks()\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p; libc.free.argtypes = [ctypes.c_void_p]\n"
        "libc.malloc.argtypes = [ctypes.c_size_t]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(100):\n"
        "    block = libc.malloc(3 << 20)\n"
        "    for page in range(0, 3 << 20, 4096): ctypes.memset(block + page, 1, 1)\n"
        "    libc.free(block)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    environment = {**os.environ, "GLIBC_TUNABLES": setting}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True, text=True)
    assert (int(ended.stdout) < 2000) == (setting == ALLOCATOR)


def test_a_kind_that_declares_the_hub_token_gets_it_under_any_name(tmp_path: Path) -> None:
    seen = Launched(make_job(tmp_path, "HUB")).run(environment={"HUGGING_FACE_HUB_TOKEN": "hf_12345678"})
    assert seen.metrics["environment"]["HF_TOKEN"] == "***"
    assert "HF_HUB_DISABLE_IMPLICIT_TOKEN" not in seen.metrics["environment"]


def test_environment_that_loads_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="LD_PRELOAD"):
        Launched(make_job(tmp_path, environment={"LD_PRELOAD": "evil.so"})).run()


def test_the_job_file_holds_no_values_of_the_environment(tmp_path: Path) -> None:
    Launched(make_job(tmp_path, environment={"SHOWN": "a-value-to-see"})).run()
    text = (tmp_path / "attempt/job.json").read_text()
    assert json.loads(text)["environment"] == ["SHOWN"]
    assert "a-value-to-see" not in text


def test_relative_paths_mean_the_same_to_the_worker(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop.folder)
    Path("recipes").mkdir()
    Path("recipes/source").write_text("from afar")
    Path("recipes/r.yaml").write_text(
        "version: 1\nname: r\nstages:\n  write: {uses: write, with: {text: '', source: source}}\n"
    )
    result = bigpipe.run("recipes/r.yaml", store="store")
    assert (result.path("write") / "text").read_text() == "from afar"
    assert result.path("write").is_relative_to(workshop.folder / "store")


def test_launches_side_by_side_do_not_mix(tmp_path: Path) -> None:
    outcomes: dict[int, str] = {}

    def one(number: int) -> None:
        Launched(make_job(tmp_path / str(number), params={"text": str(number)}, base=tmp_path)).run()
        outcomes[number] = (tmp_path / str(number) / "work/out/made").read_text()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: not any(thread.is_alive() for thread in threads))
    assert outcomes == {0: "0", 1: "1", 2: "2"}
