"""`make gpu` on a CPU with a tiny model: every method's part runs and is checked, and one that fails does not end the rest."""

import json
import os
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu, gpu_fits, gpu_kernels

# A benchmark's own warnings (autocast on CPUs, seeds) are switched off where it runs as a process.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("gpu")
    assert gpu.part(gpu.MODEL, found, dry=True, steps=5)["batch"] == 4
    return found


# FSDP2 starts a process group, and compiled blocks a compiler; processes of their own are there for both (below, and --dry).
IN_PROCESS = [name for name, job in gpu_fits.jobs().items() if not job.fsdp2 and not job.compiled]


def test_every_method_of_the_library_has_a_part():
    from lightning_ft.cli.slots import techniques

    setting = gpu_fits.Setting(blocks=4, steps=5, prenorm=True)
    used = {type(callback) for job in gpu_fits.jobs().values() for callback in job.callbacks(setting)}
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

    def launched(name, *_):
        done.append(name)
        return {"failed": "out of memory"} if name == "LoRA" and done.count("LoRA") == 1 else {"answer": 1}

    monkeypatch.setattr(gpu, "launched", launched)
    flags = ["--dry", "--only", "LoRA", "--output", str(tmp_path / "gpu.json")]
    assert gpu.main(flags) == 1
    every = list(done)
    assert "nf4 + LoRA" in every and every.index("LoRA") < every.index("FSDP2 + LoRA")
    assert "LoRA: FAILED: out of memory" in capsys.readouterr().out
    assert gpu.main(flags) == 0
    assert done == [*every, gpu.MODEL, "LoRA"]
    assert json.loads((tmp_path / "gpu.json").read_text())["LoRA"] == {"answer": 1}


def test_a_process_that_hangs_or_dies_is_a_failure_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "sleep")
    assert "sleep" in gpu.launched("head", tmp_path, True, 3, 20)["failed"]
    script = tmp_path / "hangs"
    script.write_text("#!/bin/sh\nsleep 30\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert gpu.launched("head", tmp_path, True, 3, 0.3) == {"failed": "no result after 0 s"}


def test_a_part_in_a_process_of_its_own(tmp_path):
    output = tmp_path / "gpu.json"
    assert gpu.main(["--dry", "--only", "machine", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["machine"]["matmul_tflops"]["bfloat16"] > 0


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
