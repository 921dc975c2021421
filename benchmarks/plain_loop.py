"""A bare PyTorch loop with the same mathematics as this library: what Lightning and the attachment may cost at most.

It shares the layers (packed attention, LoRA, the head) and nothing else: no Lightning, no attachment, no data module.
Frozen weights in the dtype that the CPU multiplies faster, fp32 factors, rows laid end to end, log-probs of scored
tokens only, fused AdamW.
"""

from __future__ import annotations

import os
import warnings
from itertools import accumulate
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.measure import Spec, StepClock, emit, matmul_peak  # noqa: E402
from benchmarks.row_files import read  # noqa: E402
from benchmarks.rows import encode  # noqa: E402


def pack(rows: list[tuple[list[int], list[int]]]) -> tuple[Any, Any, tuple[int, ...], Any, Any]:
    """Ids (1, T), positions (1, T), bounds, scored positions (N,) and their labels (N,) of rows laid end to end."""
    import torch

    bounds = (0, *accumulate(len(ids) for ids, _ in rows))
    ids = torch.tensor([[token for row, _ in rows for token in row]])
    labels = torch.tensor([label for _, row in rows for label in row])
    positions = torch.cat([torch.arange(b - a) for a, b in zip(bounds, bounds[1:], strict=False)])[None]
    targets = (labels != -100).nonzero().flatten()
    return ids, positions, bounds, targets - 1, labels[targets]


def run(spec: Spec) -> dict[str, Any]:
    """Train for ``spec.steps`` steps and print the side's JSON line."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lightning_ft.formats.peft import load_peft_
    from lightning_ft.nn import attention
    from lightning_ft.nn.head import score_tokens

    warnings.filterwarnings("ignore")
    attention.register()
    # A product of moderate size tells which dtype is fast here; the peak proper is measured after the run.
    fast = matmul_peak("bfloat16", 512, 0.1) > matmul_peak("float32", 512, 0.1)
    dtype = torch.bfloat16 if spec.options.get("dtype", "auto") == "bfloat16" or fast else torch.float32
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype, attn_implementation=attention.NAME)
    load_peft_(model, spec.adapter)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec.lr, weight_decay=0.0, fused=True)
    rows = [encode(tokenizer, item) for item in read(spec.rows)]
    unused_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)  # four axes: transformers builds no T x T mask
    clock = StepClock(spec.warmup)
    clock.start()
    for step in range(spec.steps):
        begin = step * spec.batch_size % len(rows)
        ids, positions, bounds, scored, labels = pack(rows[begin : begin + spec.batch_size])
        hidden = model.base_model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=unused_mask,
            segment_bounds=bounds,
            use_cache=False,
        ).last_hidden_state[0]
        loss = -score_tokens(hidden[scored], labels, model.lm_head)["logprob"].sum() / len(labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.step(bounds[-1], loss.item())
    told = {"dtype": str(dtype).removeprefix("torch."), **spec.options}
    return emit("plain", clock, trainable_parameters=sum(p.numel() for p in trained), options=told)


if __name__ == "__main__":
    run(Spec.from_argv())
