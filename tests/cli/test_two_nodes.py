"""Two torchrun agents on loopback, one process each, are two nodes: together they train what one process trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.random_model import write_model
from lightning_ft.engine import sharded_files
from tests.cli.conftest import call
from tests.tolerances import TOL


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # another run goes on from the checkpoint
def test_two_nodes_train_what_one_process_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model", initializer_range=0.2)
    rows = [{"prompt": f"ask {n}:", "completion": " " + "ab"[n % 2] * (1 + n % 5)} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "fit",
        f"--model.base={tmp_path}/model",
        "--model.lr=0.5",
        "--model.optimizer=torch.optim.SGD",
        "--lora.r=4",
    ]
    flags += ["--model.warmup_steps=0", "--model.schedule=constant", "--model.base_dtype=float32"]
    flags += [f"--data.path={tmp_path}/rows.jsonl", f"--data.cache_dir={tmp_path}/cache", "--trainer.max_steps=3"]
    flags += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.devices=1"]
    flags += [f"--trainer.default_root_dir={tmp_path}"]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED")
    }
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1"]
            + ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", "--rdzv-id=nodes"]
            + ["-m", "lightning_ft", *flags, "--data.batch_size=4", "--name=nodes"]
            + ["--trainer.strategy=fsdp2", "--trainer.num_nodes=2"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        alone = call(capsys, *flags, "--data.batch_size=8", "--name=alone")  # while they start
        said = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert alone.code == 0, alone.err
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)

    together = sharded_files.read_whole(tmp_path / "runs" / "nodes" / "checkpoints" / "last.ckpt")
    wanted = torch.load(tmp_path / "runs" / "alone" / "checkpoints" / "last.ckpt", weights_only=True)
    assert together["lightning_ft"]["world_size"] == 2 and wanted["lightning_ft"]["world_size"] == 1
    assert together["state_dict"].keys() == wanted["state_dict"].keys()
    for name, value in wanted["state_dict"].items():
        torch.testing.assert_close(
            together["state_dict"][name], value, rtol=TOL[torch.float32], atol=TOL[torch.float32]
        )
        assert value.abs().max() > 1e-4, name  # lora_B has left zero

    # Its configuration comes with it, where it ran too.
    flags += [
        f"--ckpt_path={tmp_path}/runs/nodes/checkpoints/last.ckpt",
        "--trainer.strategy=auto",
        "--trainer.num_nodes=1",
    ]
    other = call(capsys, *flags, "--data.batch_size=8", "--name=on", "--lora.r=2")
    assert other.code == 2 and "was trained with lora.r 4, and this run has 2" in other.err
    on = call(capsys, *flags, "--data.batch_size=8", "--name=on", "--trainer.max_steps=4")
    assert on.code == 0, on.err
    assert torch.load(tmp_path / "runs/on/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
