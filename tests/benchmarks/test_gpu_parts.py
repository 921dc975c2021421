"""`make gpu` on a CPU with a tiny model: every method's part runs and is checked, and one that fails does not end the rest."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lightning_ft
from benchmarks import gpu, gpu_fits, gpu_forks, gpu_kernels, gpu_more, gpu_peers

# A benchmark's own warnings (autocast on CPUs, seeds) are switched off where it runs as a process.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("gpu")
    assert gpu.part(gpu.MODEL, found, dry=True, steps=5)["batch"] == 4
    return found


# FSDP2 starts a process group, and compiled blocks a compiler; processes of their own are there for both (below, and --dry).
IN_PROCESS = [name for name, job in gpu_fits.jobs().items() if job.saved]


def test_every_method_of_the_library_has_a_part():
    from lightning_ft.cli.slots import techniques

    setting = gpu_fits.Setting(blocks=4, steps=5, prenorm=True)
    used = {type(callback) for job in gpu_fits.jobs().values() for callback in job.callbacks(setting)}
    used |= {getattr(lightning_ft, name) for name in gpu_more.STREAMS if hasattr(lightning_ft, name)}
    assert {cls for cls in techniques().values() if "model" in cls.traits.edits} <= used


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_part_trains_and_reloads(name, folder, monkeypatch):
    job = gpu_fits.jobs()[name]
    few = job.precisions[:1] if name not in ("LoRA", "nf4 + LoRA") else job.precisions
    monkeypatch.setattr(gpu_fits, "jobs", lambda: {name: replace(job, precisions=few)})
    found = gpu.part(name, folder, dry=True, steps=3)
    assert list(found) == list(few)
    for one in found.values():
        assert len(one["losses"]) == 3 and one["losses"][-1] < one["losses"][0]
        assert one["loss_after_loading"] == pytest.approx(one["loss_before_saving"], rel=1e-2)
        assert one["trainable"] > 0


def test_a_loss_that_rises_fails_the_part(folder, monkeypatch):
    monkeypatch.setattr(gpu_fits, "fit", lambda *_: {"losses": [1.0, 2.0]})
    with pytest.raises(AssertionError, match="fp32: the loss did not fall"):
        gpu.part("LoRA", folder, dry=True, steps=3)
    told = iter([{"losses": [2.0, 1.0]}, {"losses": [2.2, 1.0]}])
    monkeypatch.setattr(gpu_fits, "fit", lambda *_: next(told))
    with pytest.raises(AssertionError, match="bf16: the first loss is 2.2000, in fp32 it was 2.0000"):
        gpu.part("LoRA", folder, dry=True, steps=3)


def test_the_head_on_a_cpu_is_itself():
    found = gpu_kernels.head("cpu")
    assert found["float32"] == {"value": 0.0, "gradient": 0.0}
    assert list(found["chunk_sizes"]) == [1, 2, 4, 8, 16, 32, 64]


def test_the_driver_goes_on_after_a_failure_and_only_repeats_that(tmp_path, monkeypatch, capsys):
    done = []

    def run_parts(names, start, lanes, told):
        for name in names:
            done.append((name, lanes))
            bad = name == "LoRA" and [one for one, _ in done].count("LoRA") == 1
            answer = {"failed": "out of memory"} if bad else {"there": True, "works": True, "peak_memory_bytes": 1}
            told(name, answer)

    monkeypatch.setattr(gpu.gpu_forks, "run_parts", run_parts)
    flags = ["--dry", "--lanes", "3", "--only", "LoRA", "--output", str(tmp_path / "gpu.json")]
    assert gpu.main(flags) == 1
    every = list(done)
    order = [name for name, _ in every]
    assert order[:2] == [gpu.USABLE, gpu.MODEL]
    assert order.index("LoRA") < order.index("FSDP2 + LoRA") < order.index("1 B: LoRA")
    assert dict(every)["nf4 + LoRA"] == 3 and dict(every)["1 B: LoRA"] == 1
    assert "LoRA: FAILED: out of memory" in capsys.readouterr().out
    assert gpu.main(flags) == 0
    assert [name for name, _ in done[len(every) :]] == [gpu.USABLE, gpu.MODEL, "LoRA"]
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["LoRA"] == {"there": True, "works": True}  # memory beside others says nothing
    assert kept["1 B: LoRA"]["peak_memory_bytes"] == 1


def finished(work, folder, limit=20.0):
    found = []
    gpu_forks.run_parts(
        ["head"], lambda name: gpu_forks.Part(name, folder, work, limit), 1, lambda *one: found.append(one)
    )
    return found[0][1]


def test_a_fork_answers_fails_with_its_reason_or_is_ended_with_what_it_started(tmp_path):
    def raises():
        raise RuntimeError("no kernel image")

    def hangs():
        (tmp_path / "child").write_text(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)

    assert finished(lambda: {"answer": 1}, tmp_path)["answer"] == 1
    assert finished(raises, tmp_path)["failed"].endswith("RuntimeError: no kernel image")
    assert finished(lambda: os._exit(3), tmp_path) == {"failed": "no output, exit code 3"}
    assert finished(hangs, tmp_path, 1.0) == {"failed": "no result after 1 s"}
    status = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    deadline = time.monotonic() + 5
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_fresh_process_that_hangs_or_dies_is_a_failure_with_its_reason(tmp_path):
    assert "exit code 2" in finished(["sh", "-c", "exit 2"], tmp_path)["failed"]
    assert "sleep" in finished(["sleep"], tmp_path)["failed"]
    assert finished(["sh", "-c", "sleep 30"], tmp_path, 0.3) == {"failed": "no result after 0 s"}


@pytest.mark.parametrize("how", [[], ["--fresh"]])
def test_parts_in_processes_of_their_own(how, tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--only", "machine", "--output", str(output), *how]
    subprocess.run(command, check=True, cwd=Path(gpu.__file__).parents[1])
    assert json.loads(output.read_text())["machine"]["matmul_tflops"]["bfloat16"] > 0


@pytest.mark.parametrize("name", list(gpu_more.CHECKS))
def test_other_objectives_run_on_the_tiny_model(name, folder):
    found = gpu_more.CHECKS[name](folder, "cpu", 5)
    assert found.get("device", "cpu") == "cpu"


def test_generation_counts_what_was_written(folder):
    found = gpu_peers.generation(folder, "cpu", 5)
    assert all(found[side]["tokens_per_second"] > 0 for side in ("adapter", "merged", "transformers"))


@pytest.fixture
def one_rank():
    """A place for a process group of one, which is gone afterwards."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def test_a_sharded_fit(folder, one_rank):
    found = gpu.part("FSDP2 + LoRA", folder, dry=True, steps=3)
    assert found["fp32"]["trainable"] == found["bf16"]["trainable"] > 0
