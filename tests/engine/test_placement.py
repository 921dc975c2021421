"""Where a run takes place changes nothing: DDP and FSDP2 on two ranks, resumed on one, exported from shards."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers as hf
from torch import Tensor

import lightning_ft
from lightning_ft import FSDP2Strategy, Refusal
from lightning_ft.engine import sharded_files
from tests.cli.conftest import call
from tests.contract.subjects import write_chat
from tests.engine import placement_jobs as jobs
from tests.modules.tasks import write_base
from tests.tolerances import TOL
from tests.two_ranks import TwoRanks

MANY, TRAIN, UNITS = (f"tests.engine.placement_jobs:{name}" for name in ("many", "train", "units"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    written = {kind: write_base(kind, folder / kind) for kind in ("bert", "t5")}
    return {"chat": write_chat(folder), **written}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    assert found.keys() == wanted.keys() and wanted, what
    for name, value in wanted.items():
        message = f"{what}: {name} differs by {float((found[name] - value).detach().abs().max())}"
        torch.testing.assert_close(found[name], value, rtol=TOL[torch.float32], atol=TOL[torch.float32], msg=message)


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        ("chat", list(jobs.METHODS)),
        ("bert", ["lora", "dora", "prefix", "ia3"]),
        ("t5", ["full", "lora", "adapter", "prefix", "ia3"]),
    ],
)
def test_every_method_learns_on_two_ranks_what_it_learns_on_one(
    kind: str, methods: list[str], bases: dict[str, Path], tmp_path: Path, two_ranks: TwoRanks
) -> None:
    job: dict[str, Any] = {"base": str(bases[kind]), "kind": kind, "folder": str(tmp_path), "methods": methods}
    alone = jobs.many(**job)
    for placement in ("ddp", "fsdp2"):
        for rank in two_ranks.run(MANY, **job, placement=placement):
            for method in methods:
                close(rank[method], alone[method], f"{method} under {placement}")


pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # who resumes here saves nothing


# -- another number of processes ------------------------------------------------------------------------------------


@pytest.fixture
def own_group() -> Iterator[None]:
    """Room for a process group of one in this process, which leaves nothing behind."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def saved(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, two_ranks: TwoRanks
) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """(job, weights at its end on one process, folder of checkpoints written in mid-epoch by each placement)."""
    folder = tmp_path_factory.mktemp("saved")
    job: dict[str, Any] = {"base": str(bases["chat"]), "kind": "chat", "folder": str(folder), "method": "lora"}
    job |= {"rows": 4, "steps": 6, "model": {"optimizer": jobs.ADAM, "lr": 0.02}, "data": {"shuffle": True}}
    whole = jobs.train(**job, save=str(folder / "single"))
    two_ranks.run(TRAIN, **{**job, "steps": 2}, placement="fsdp2", save=str(folder / "fsdp2"))
    one_file = {"save_distributed_checkpoint": False}
    two_ranks.run(TRAIN, **{**job, "steps": 2}, placement="fsdp2", options=one_file, save=str(folder / "one_file"))
    return job, whole, folder


@pytest.mark.parametrize("written", ["fsdp2", "one_file"])
@pytest.mark.parametrize("placement", ["single", "fsdp2"])
def test_what_two_ranks_saved_goes_on_in_one_process(
    written: str, placement: str, saved: tuple[dict[str, Any], dict[str, Tensor], Path], own_group: None
) -> None:
    job, whole, folder = saved
    resumed = jobs.train(**job, placement=placement, devices=1, resume=str(folder / written / "step=2.ckpt"))
    close(resumed, whole, f"{written} in one process")


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
def test_what_one_process_saved_goes_on_on_two_ranks(
    placement: str, saved: tuple[dict[str, Any], dict[str, Tensor], Path], two_ranks: TwoRanks
) -> None:
    job, whole, folder = saved
    for rank in two_ranks.run(TRAIN, **job, placement=placement, resume=str(folder / "single" / "step=2.ckpt")):
        close(rank, whole, f"a file under {placement}")
    if placement == "ddp":
        for rank in two_ranks.run(TRAIN, **job, placement="ddp", resume=str(folder / "fsdp2" / "step=2.ckpt")):
            close(rank, whole, "shards under ddp")


def test_what_cannot_be_exact_is_refused(saved: tuple[dict[str, Any], dict[str, Tensor], Path]) -> None:
    job, _, folder = saved
    sentence = jobs.refused(**{**job, "rows": 8}, resume=str(folder / "fsdp2" / "step=2.ckpt"))
    assert "in the middle of an epoch with batch_size 2 (now 8), devices 2 (now 1)" in sentence
    assert "batch_size times devices as it was" in sentence


# -- shards as a checkpoint like any other --------------------------------------------------------------------------


def test_shards_load_export_and_merge_without_a_process_group(
    saved: tuple[dict[str, Any], dict[str, Tensor], Path], bases: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    _, _, folder = saved
    shards, file = folder / "fsdp2" / "step=2.ckpt", folder / "single" / "step=2.ckpt"
    assert shards.is_dir() and not dist.is_initialized()
    ours, theirs = lightning_ft.load(shards), lightning_ft.load(file)
    wanted = {name: p.detach() for name, p in theirs.named_parameters() if "lora" in name}
    close({name: p.detach() for name, p in ours.named_parameters() if "lora" in name}, wanted, "loaded")
    assert any(bool(p.abs().sum() > 0) for name, p in wanted.items() if "lora_B" in name)
    for command in ("export", "merge"):
        left = call(capsys, command, f"--ckpt_path={shards}", f"--output={tmp_path / command}")
        assert left.code == 0, left.err
    ids = torch.arange(5)[None]
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merge", dtype=torch.float32)
    with torch.no_grad():
        close({"logits": merged(ids).logits}, {"logits": ours.model.float()(input_ids=ids).logits}, "merged")
    assert json.loads((tmp_path / "export" / "adapter_config.json").read_text())["r"] == 4


def test_shards_of_every_method_start_another_run_and_go_on_in_one_process(
    bases: dict[str, Path], tmp_path: Path, two_ranks: TwoRanks
) -> None:
    job: dict[str, Any] = {"base": str(bases["chat"]), "folder": str(tmp_path)}
    run = {**job, "kind": "chat", "rows": 4, "model": {"optimizer": jobs.ADAM, "lr": 0.02}}
    saves = {"methods": list(jobs.STARTS), "save": str(tmp_path / "shards"), "placement": "fsdp2", "steps": 2}
    two_ranks.run("tests.engine.placement_jobs:save_each", **run, **saves)
    for method in jobs.STARTS:
        shards = tmp_path / "shards" / method / "step=2.ckpt"
        assert shards.is_dir()
        trained = {n: p.detach() for n, p in lightning_ft.load(shards).named_parameters() if p.requires_grad}
        close(jobs.started(**job, method=method, init_from=str(shards)), trained, f"{method} from its shards")
        if method != "lora":  # that one goes on above
            resumed = jobs.train(**run, method=method, steps=4, resume=str(shards))
            close(resumed, jobs.train(**run, method=method, steps=4), f"{method} resumed")


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("false",)


def test_an_index_that_names_other_code_is_refused(
    saved: tuple[dict[str, Any], dict[str, Tensor], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "hostile.ckpt"
    shutil.copytree(saved[2] / "fsdp2" / "step=2.ckpt", folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(Refusal, match="The index of .* cannot be read .it names posix.system"):
        sharded_files.read_whole(folder)


# -- the plan -------------------------------------------------------------------------------------------------------


def test_units_are_named_in_yaml_and_change_no_weight(
    bases: dict[str, Path], tmp_path: Path, two_ranks: TwoRanks
) -> None:
    job: dict[str, Any] = {"base": str(bases["chat"]), "folder": str(tmp_path)}
    blocks = [f"model.model.layers.{i}" for i in (0, 1)]
    plans: list[tuple[list[str] | None, bool, list[str]]] = [
        (None, True, blocks),
        (
            ["mlp", "model.layers.0", "model.norm"],
            False,
            [blocks[0], f"{blocks[0]}.mlp", f"{blocks[1]}.mlp", "model.model.norm"],
        ),
    ]
    weights = []
    for patterns, reshard, wanted in plans:
        found, trained = two_ranks.run(UNITS, **job, patterns=patterns, reshard=reshard)[0]
        assert found == ["", *wanted]
        weights.append(trained)
    close(weights[1], weights[0], "other units")
    sentences = two_ranks.run(
        "tests.engine.placement_jobs:refused", **job, kind="chat", method="lora", placement="fsdp2",
        options={"units": ["model.layer.*"]},
    )  # fmt: skip
    assert all("'model.layer.*' matches nothing in this model; the nearest names are" in words for words in sentences)
    with pytest.raises(Refusal, match="units is empty"):
        FSDP2Strategy(units=[])


def test_the_base_stays_in_its_file_until_it_is_cut(
    bases: dict[str, Path], tmp_path: Path, two_ranks: TwoRanks
) -> None:
    job = {"base": str(bases["chat"]), "folder": str(tmp_path)}
    alone = jobs.train(**job, kind="chat", method="lora", model={"base_dtype": "bfloat16"})
    for rank in two_ranks.run("tests.engine.placement_jobs:mapped", **job):
        assert rank["held"] == rank["factors"] > 0, "nothing but the factors is in a process's own memory"
        assert rank["before"] == {torch.float32}, "the dtype waits for the cut"
        assert rank["after"] == {(True, torch.float32), (False, torch.bfloat16)}
        for name, value in alone.items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=TOL[torch.bfloat16], atol=TOL[torch.bfloat16])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own look at one
def test_compiled_blocks_learn_the_same_under_their_own_names(
    bases: dict[str, Path], tmp_path: Path, two_ranks: TwoRanks
) -> None:
    job: dict[str, Any] = {"base": str(bases["chat"]), "kind": "chat", "folder": str(tmp_path), "method": "lora"}
    plain = jobs.train(**job)
    for backend, checkpointing in (("counting", False), ("counting_again", True)):
        job["model"] = {"gradient_checkpointing": checkpointing}
        weights, graphs = jobs.compiled(backend, **job)
        close(weights, plain, f"compiled, checkpointing {checkpointing}")
        assert 4 <= graphs <= 16, "before, within and after attention; for one block or two"
    for weights, graphs in two_ranks.run(
        "tests.engine.placement_jobs:compiled", backend="counting", **job, placement="fsdp2"
    ):
        close(weights, plain, "compiled under fsdp2")
        assert 4 <= graphs <= 16
    job["model"] = {"compile_blocks": "inducto"}
    assert "compile_blocks 'inducto' is no backend of torch.compile; take one of" in jobs.refused(**job)


class _Written:
    """What Python 3.11.0 to 3.11.3 make of a member of an enumeration."""

    def __init__(self, kind: Any, name: str) -> None:
        self.asked = (kind, name)

    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        return getattr, self.asked


def test_members_of_enumerations_are_read_as_any_python_writes_them() -> None:
    kind = dcp.metadata._MEM_FORMAT_ENCODING
    for written in (kind.TORCH_CONTIGUOUS_FORMAT, _Written(kind, "TORCH_CONTIGUOUS_FORMAT")):
        read = sharded_files._IndexUnpickler(io.BytesIO(pickle.dumps(written))).load()
        assert read is kind.TORCH_CONTIGUOUS_FORMAT
    for other, name in ((kind, "__class__"), (dcp.metadata.Metadata, "__init__")):
        with pytest.raises(pickle.UnpicklingError, match=f"for {name}"):
            sharded_files._IndexUnpickler(io.BytesIO(pickle.dumps(_Written(other, name)))).load()
