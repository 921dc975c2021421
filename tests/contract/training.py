"""Idle, acts, plain module, composes, dtypes, saves: what a technique does to training."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightning_ft
from lightning_ft.callbacks.lora import LoRA
from lightning_ft.engine.attachment import Attachment
from lightning_ft.nn.registry import base_name, injected_layers
from tests.contract.case import Case, Check, Place, collect, require
from tests.contract.subjects import (
    PlainData,
    PlainStream,
    chat_job,
    differing,
    fit,
    loader,
    rows,
    state,
    subject,
    trainer,
)

CHECKS: list[Check] = []
check = collect(CHECKS)


@check()
def idle(case: Case, place: Place) -> None:
    """With idle values a step is bit-equal to one without it; what starts as identity leaves the first forward as it was."""
    kind = subject(case.cls)
    starts = "model" in case.cls.traits.edits and case.cls.traits.starts_as_identity
    require(starts or case.idle is not None, f"{case.name} has neither idle values nor layers that start at identity.")
    if starts:
        net = kind()
        before = net(rows()[0])
        Attachment.of(net).rebuild([case.build()], seed=0)
        require(torch.equal(net(rows()[0]), before), f"The first forward with {case.name} is not the one without it.")
    if case.idle is not None:
        without, with_it = kind(), kind()
        fit(place.folder, without)
        fit(place.folder, with_it, case.cls(**case.idle))
        different = differing(state(without), state(with_it))
        require(not different, f"{case.name} with idle values has changed {different}.")


@check()
def acts(case: Case, place: Place) -> None:
    """It changes what its traits say and not one other bit, and all that is trainable gets a gradient and moves."""
    kind, edits = subject(case.cls), case.cls.traits.edits
    start, without, with_it = state(kind()), kind(), kind()
    inputs, classes = rows()
    technique = case.build()
    for _ in range(2 if case.cls.traits.continual else 1):  # what keeps earlier tasks has nothing to keep in the first
        fit(place.folder, without)
        fit(place.folder, with_it, technique)
    require(
        torch.equal(rows()[0], inputs) and torch.equal(rows()[1], classes), f"{case.name} has written into the data."
    )
    trained = {n: p for n, p in with_it.named_parameters() if p.requires_grad}
    same_model = set(trained) == {n for n, p in without.named_parameters() if p.requires_grad}
    require(
        same_model != ("model" in edits),
        f"{case.name} says that it edits {sorted(edits)}, but what is trained is {sorted(trained)}.",
    )
    changed = differing(state(without), state(with_it))
    require(bool(changed) == (edits != {"nothing"}), f"{case.name} edits {sorted(edits)}, and changed {changed}.")
    if not case.cls.traits.conditional_gradients:
        idle_parameters = [n for n, p in trained.items() if p.grad is None]
        require(not idle_parameters, f"{case.name}: {idle_parameters} are trainable and got no gradient.")
    moved = False
    for name, parameter in with_it.named_parameters():
        original = start.get(name, start.get(base_name(name, with_it)))
        if name in trained:
            moved = moved or original is None or not torch.equal(parameter, original)
        else:
            require(original is not None, f"{case.name} added {name}, which is not trained.")
            require(torch.equal(parameter, original), f"{case.name} changed the frozen {name}.")
    require(moved, f"Nothing moved in three steps with {case.name}.")


@check()
def plain_module(case: Case, place: Place) -> None:
    """It works from the command line, in Python with our module, and on a user's own module."""
    from tests.contract.arguments import flags

    kind, data_kind = subject(case.cls), PlainStream if "stream" in case.cls.traits.needs else PlainData
    steps = 6 if data_kind is PlainStream else 2  # four are the first task
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--trainer.max_steps={steps}"]
    outcome = place.command(
        "fit",
        f"--model=tests.contract.subjects.{kind.__name__}",
        f"--data=tests.contract.subjects.{data_kind.__name__}",
        f"--trainer.default_root_dir={place.folder}",
        "--trainer.enable_model_summary=false",
        *quiet,
        *flags(case, case.small),
    )
    require(outcome.code == 0, f"{case.name} on a user's module from the command line: {outcome.err}")
    written = torch.load(place.folder / "runs/run/checkpoints/last.ckpt", weights_only=True)
    listed = [technique["class_path"] for technique in written["lightning_ft"]["techniques"]]
    require(
        listed == [f"{case.cls.__module__}.{case.cls.__qualname__}"], f"The command line's checkpoint lists {listed}."
    )
    own = kind()
    trainer(place.folder, case.build(), max_steps=steps).fit(own, data_kind())
    from_file = {n: v for n, v in written["state_dict"].items() if not torch.equal(v, state(own)[n])}
    require(not from_file, f"{case.name} trains otherwise from the command line than in Python: {sorted(from_file)}.")
    module, data = chat_job(place.chat, place.folder, case.cls.traits.needs)
    run = trainer(place.folder, case.build(), max_steps=2)
    run.fit(module, data)
    require(run.global_step == 2, f"{case.name} with our own module made {run.global_step} of 2 steps.")


@check()
def composes(case: Case, place: Place) -> None:
    """Beside LoRA and a second instance (of another name, or another LoRA), the order of callbacks does not matter."""
    kind = subject(case.cls)
    second = {**(case.second or case.small), "name": "second"}
    outcomes: list[tuple[str, dict[str, Tensor]]] = []
    for order in itertools.permutations(range(3)):
        twin = LoRA(3, name="another") if case.cls.traits.alone else case.cls(**second)
        techniques = [case.build(), twin, LoRA(2, name="beside")]
        net = kind()
        fit(place.folder, net, *(techniques[i] for i in order))
        require(injected_layers(net, "beside"), f"LoRA beside {case.name} was not injected.")
        outcomes.append((str([techniques[i] for i in order]), state(net)))
    first = outcomes[0]
    for name, other in outcomes[1:]:
        different = differing(first[1], other)
        require(not different, f"{different} depend on the order of callbacks: {first[0]} against {name}.")


@check(fits=lambda traits: "model" in traits.edits)
def dtypes(case: Case, place: Place) -> None:
    """bf16 in, bf16 out, state in fp32; neither the default dtype nor the default device is assumed."""
    kind = subject(case.cls)
    net = kind("bfloat16")
    before = {id(p) for p in net.parameters()}
    fit(place.folder, net, case.build())
    out = net(rows(torch.bfloat16)[0])
    require(out.dtype == torch.bfloat16, f"With {case.name} a bf16 net gives {out.dtype}.")
    for name, parameter in net.named_parameters():
        if id(parameter) not in before:
            require(parameter.dtype == torch.float32, f"{case.name} keeps {name} in {parameter.dtype}, not in fp32.")
    net = kind()
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            Attachment.of(net).rebuild([case.build()], seed=0)
    finally:
        torch.set_default_dtype(dtype)
    for name, parameter in net.named_parameters():
        require(parameter.device.type == "cpu", f"{case.name} puts {name} on the default device, not the model's.")
        require(parameter.dtype == torch.float32, f"{case.name} takes the default dtype for {name}: {parameter.dtype}.")


@check()
def saves(case: Case, place: Place) -> None:
    """State of plain types alone; loading it gives equal state, key by key, for `load` and for a resumed fit."""
    kind = subject(case.cls)
    net, technique = kind(), case.build()
    keep = ModelCheckpoint(place.folder / "files", save_last=True, save_top_k=0)
    fit(place.folder, net, technique, keep, enable_checkpointing=True)
    file = place.folder / "files" / "last.ckpt"
    saved = torch.load(file, weights_only=True)  # refuses what is not plain
    resumed, again = kind(), case.build()
    run = trainer(place.folder, again, enable_checkpointing=True)
    run.fit(resumed, loader(), loader(), ckpt_path=file)
    different = differing(state(net), state(resumed))
    require(not different, f"A resumed fit starts from other values of {different} under {case.name}.")
    states = (_plain(technique.state_dict()), _plain(again.state_dict()))
    require(states[0] == states[1], f"{case.name}'s state comes back as {states[1]}, not {states[0]}.")
    held = _plain(saved["callbacks"].get(technique.state_key, {}))
    require(held == states[0], f"The file holds {held} of {case.name}, whose state is {states[0]}.")
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    kept = sorted(frozen & set(saved["state_dict"]))
    require(not kept, f"The file holds {kept}, which {case.name} does not train.")
    loaded = lightning_ft.load(file, module=kind())
    different = differing(state(net), state(loaded))
    require(not different, f"lightning_ft.load gives other values of {different} under {case.name}.")


def _plain(value: Any) -> Any:
    """With tensors as lists, so that two states compare."""
    if isinstance(value, Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
