"""What a GPU's kernels give: packed attention and the head against a CPU, the rate of matrix products, chunk sizes.

Each function is a part of `benchmarks.gpu`. On a CPU (its ``--dry``) the same is done in small and compares a CPU with itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
BOUNDS = (0, 7, 8, 200, 333, 512)


def gap(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest magnitude."""
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def synchronised(work: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Seconds of one call, the least of several, after a warm-up."""
    import torch

    def rest() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    best = float("inf")
    for n in range(repeats + 2):
        rest()
        begun = time.perf_counter()
        work()
        rest()
        if n >= 2:
            best = min(best, time.perf_counter() - begun)
    return best


def machine(device: str) -> dict[str, Any]:
    """The device and its matrix-product peak."""
    import torch

    from benchmarks.measure import versions

    peaks, size = {}, 8192 if device == "cuda" else 256
    for name in ("bfloat16", "float16", "float32"):
        a = torch.randn(size, size, device=device, dtype=getattr(torch, name))
        peaks[name] = 2 * size**3 / synchronised(lambda a=a: a @ a, device) / 1e12
    told = {"versions": versions(), "matmul_tflops": peaks}
    if device != "cuda":
        return {"gpu": None, **told}
    about = torch.cuda.get_device_properties(0)
    return {
        **told,
        "gpu": about.name,
        "memory_bytes": about.total_memory,
        "capability": f"{about.major}.{about.minor}",
        "cuda": torch.version.cuda,
    }


def packed_attention(device: str) -> dict[str, Any]:
    """Outputs and gradients of packed rows: the device against a CPU, packed against alone, in fp32 and bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_ft.models.causal import CausalLM
    from lightning_ft.nn import attention

    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=512, attn_implementation=attention.NAME)
    base = LlamaForCausalLM(config)
    ids = torch.randint(0, 512, (1, BOUNDS[-1]))
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BOUNDS)])[None]
    weights = torch.randn(1, BOUNDS[-1], SMALL["hidden_size"])
    embedding = base.get_input_embeddings().weight

    def both(where: str, dtype: Any, apart: bool = False) -> tuple[Any, Any]:
        model = CausalLM(base.to(where, dtype))
        base.zero_grad()
        moved, places = ids.to(where), positions.to(where)
        if apart:
            pieces = [model.hidden(moved[:, a:b], places[:, a:b]) for a, b in pairwise(BOUNDS)]
            hidden = torch.cat(pieces, 1)
        else:
            hidden = model.hidden(moved, places, bounds=BOUNDS)
        (hidden * weights.to(where, dtype)).sum().backward()
        return hidden.detach().cpu(), embedding.grad.detach().cpu().clone()

    expected = both("cpu", torch.float32)
    found: dict[str, Any] = {}
    for name, dtype, bound in (("float32", torch.float32, 1e-4), ("bfloat16", torch.bfloat16, 5e-2)):
        packed, apart = both(device, dtype), both(device, dtype, apart=True)
        gaps = {
            "output_vs_cpu": gap(packed[0], expected[0]),
            "gradient_vs_cpu": gap(packed[1], expected[1]),
            "output_vs_alone": gap(packed[0], apart[0]),
            "gradient_vs_alone": gap(packed[1], apart[1]),
        }
        found[name] = gaps
        base.float()
        for what, value in gaps.items():
            if not value < bound:
                raise AssertionError(f"{name}: {what} is {value:.2e}, more than {bound:.0e}: {found}")
    return found


def head(device: str) -> dict[str, Any]:
    """Scores and gradients on the device against a CPU, then seconds and memory by chunk size."""
    import torch
    from torch import nn

    from lightning_ft.nn.head import score_tokens

    torch.manual_seed(0)
    layer = nn.Linear(64, 1000, bias=False)
    hidden, labels = torch.randn(300, 64), torch.randint(0, 1000, (300,))

    def both(where: str, dtype: Any) -> tuple[Any, Any]:
        module = layer.to(where, dtype).requires_grad_(False)
        x = hidden.detach().clone().to(where, dtype).requires_grad_()
        value = score_tokens(x, labels.to(where), module)["logprob"]
        value.sum().backward()
        return value, x.grad

    expected, found = both("cpu", torch.float32), {}
    for name, dtype, bound in (("float32", torch.float32, 1e-4), ("bfloat16", torch.bfloat16, 5e-2)):
        got = both(device, dtype)
        found[name] = {"value": gap(got[0], expected[0]), "gradient": gap(got[1], expected[1])}
        layer.float()
        if not max(found[name].values()) < bound:
            raise AssertionError(f"{name}: more than {bound:.0e} apart: {found}")
    found["chunk_sizes"] = chunk_sizes(device, *((8192, 768, 49_152) if device == "cuda" else (64, 16, 128)))
    return found


def chunk_sizes(device: str, tokens: int, width: int, vocabulary: int) -> dict[int, dict[str, float]]:
    """Seconds, and bytes beyond what was there, of scoring tokens in chunks of each size."""
    import torch
    from torch import nn

    from lightning_ft.nn.head import score_tokens

    wide = nn.Linear(width, vocabulary, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    chunks = {}
    for size in (tokens // 64, tokens // 32, tokens // 16, tokens // 8, tokens // 4, tokens // 2, tokens):
        before = 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()

        def work(size: int = size) -> None:
            score_tokens(x, targets, wide, chunk_size=size)["logprob"].sum().backward()
            x.grad = None

        seconds = synchronised(work, device, 5)
        extra = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
        chunks[size] = {"seconds": seconds, "extra_bytes": extra}
    return chunks
