"""Speed and memory on the large random Llama beside others: SFT and DPO beside TRL + PEFT, rollouts, generation.

Each name of `PARTS` is a part of `benchmarks.gpu`; sides that are to be compared stand beside one another and run alone on the GPU.
Rows are word problems of reasoning-gym in bytes; all sides train on the same tokens from the same factors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Spec
from benchmarks.row_files import written

BATCH = {"sft": 16, "dpo": 8}
SETTINGS = {
    "padded": {"precision": "bf16-base-plain", "layout": "padded"},
    "packed": {"precision": "bf16-base-plain", "layout": "packed"},
}
"""Those of TRL's grid that can lead on a GPU without flash-attn, which its own packing asks for."""


def prepared(folder: Path, name: str) -> Path:
    """Folder of rows and factors, made by the first part that needs them."""
    from benchmarks.pairs import facts, long_pairs
    from benchmarks.random_model import byte_tokenizer
    from benchmarks.rows import long_rows, write_adapter

    place = folder / name
    if (place / "ready").exists():
        return place
    place.mkdir(exist_ok=True)
    tokenizer = byte_tokenizer()
    rows = long_rows(tokenizer) if name == "sft" else long_pairs()
    written(place / "rows.jsonl", rows)
    if name == "dpo":
        (place / "tokens.json").write_text(json.dumps(facts(tokenizer, rows, folder / "large")["tokens"]))
    write_adapter(folder / "large", place / "adapter")
    (place / "ready").touch()
    return place


def spec(folder: Path, device: str, steps: int, name: str, options: dict[str, Any]) -> Spec:
    """What a side is to do."""
    place = prepared(folder, name)
    tokens = {"tokens": json.loads((place / "tokens.json").read_text())} if name == "dpo" else {}
    return Spec(
        model=str(folder / "large"),
        rows=str(place / "rows.jsonl"),
        adapter=str(place / "adapter"),
        batch_size=BATCH[name] if device == "cuda" else 2,
        steps=steps + 2,
        warmup=3,
        device=device,
        options={**options, **tokens},
    )


def sft(folder: Path, device: str, steps: int, side: str, options: dict[str, Any]) -> dict[str, Any]:
    """One side of SFT with LoRA."""
    from benchmarks import our_side, trl_side

    return (our_side if side == "ours" else trl_side).run(spec(folder, device, steps, "sft", options))


def dpo(folder: Path, device: str, steps: int, side: str, options: dict[str, Any]) -> dict[str, Any]:
    """One side of DPO with LoRA."""
    from benchmarks import dpo_ours, dpo_trl

    given = spec(folder, device, steps, "dpo", options)
    found = (dpo_ours if side == "ours" else dpo_trl).run(given)
    timed = found["step_seconds"][found["warmup"] :]
    return {**found, "pairs_per_second": given.batch_size * len(timed) / sum(timed)}


def grpo(folder: Path, device: str, steps: int) -> dict[str, Any]:
    """Rounds of four prompts with eight answers of 64 tokens: seconds of writing and of learning."""
    from benchmarks import grpo_ours

    rows = [{"prompt": [{"role": "user", "content": f"Count to {n}."}]} for n in range(64)]
    prompts = written(folder / "prompts.jsonl", rows)
    given = spec(folder, device, steps, "sft", {"new_tokens": 64 if device == "cuda" else 4})
    given.rows, given.steps, given.warmup = prompts, 4, 1
    return grpo_ours.run(given)


def generation(folder: Path, device: str, steps: int) -> dict[str, Any]:
    """Tokens/s of drawing answers with a cache: by the adapter, merged, and by transformers' own ``generate``."""
    import torch

    import lightning_ft
    from benchmarks.gpu_fits import bare_trainer
    from lightning_ft.engine.sampling import sample
    from lightning_ft.models.causal import CausalLM
    from lightning_ft.nn.merging import merged_copy

    rows, new = (32, 128) if device == "cuda" else (2, 4)
    module = lightning_ft.SFT(str(folder / "large"), lr=1e-4, base_dtype="bfloat16")
    data = lightning_ft.SFTData(
        str(folder / "rows.jsonl"), batch_size=4, max_length=None, cache_dir=str(folder / "generation_cache")
    )
    bare_trainer(folder, device, [lightning_ft.LoRA(8)], max_steps=2).fit(module, data)
    module.to(device).eval()
    prompts = [[3 + (7 * n + k) % 250 for k in range(64)] for n in range(rows)]
    found: dict[str, Any] = {"rows": rows, "new_tokens": new}

    def clock(work: Callable[[], int]) -> dict[str, float]:
        best = 0.0
        for _ in range(2):
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            tokens = work()
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, tokens / (time.perf_counter() - begun))
        return {
            "tokens_per_second": best,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        }

    def ours(model: Any) -> int:
        drawn = sample(CausalLM(model), prompts, seeds=[[n] for n in range(rows)], max_new_tokens=new)
        return sum(len(one.ids) for each in drawn for one in each)

    found["adapter"] = clock(lambda: ours(module.model))
    merged = merged_copy(module.model)
    found["merged"] = clock(lambda: ours(merged))
    ids = torch.tensor(prompts, device=device)

    def theirs() -> int:
        with torch.no_grad():
            whole = merged.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )
        return rows * (whole.shape[1] - ids.shape[1])

    found["transformers"] = clock(theirs)
    return found


def _of(kind: Callable[..., dict[str, Any]], side: str, options: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    return lambda folder, device, steps: kind(folder, device, steps, side, options)


PARTS: dict[str, Callable[[Path, str, int], dict[str, Any]]] = {
    "1 B: SFT, ours": _of(sft, "ours", {}),
    "1 B: SFT, TRL padded": _of(sft, "trl", SETTINGS["padded"]),
    "1 B: DPO, ours": _of(dpo, "ours", {}),
    "1 B: DPO, TRL": _of(dpo, "trl", {"precision": "bf16-base-plain"}),
    "1 B: DPO, ours, prompts apart": _of(dpo, "ours", {"share_prompts": False}),
    "1 B: generation": generation,
    "1 B: GRPO rounds": grpo,
    "1 B: SFT, TRL packed": _of(sft, "trl", SETTINGS["packed"]),
    "1 B: SFT, ours again": _of(sft, "ours", {}),
    "1 B: DPO, ours again": _of(dpo, "ours", {}),
}
