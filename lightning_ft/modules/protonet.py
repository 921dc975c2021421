"""Prototypical networks: a row belongs to the class whose few examples lie nearest on average."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from annotated_types import Ge, Gt
from torch import Tensor, nn

from lightning_ft.engine.embedding import EmbeddingModule, Pooling
from lightning_ft.engine.episodes import Episode, MetaBatch
from lightning_ft.engine.module import DtypePolicy, OptimizerFactory
from lightning_ft.engine.optimizer import Schedule
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.prototypes import Distance, prototype_logits, prototypes
from lightning_ft.models.quantize import Mode


class ProtoNet(EmbeddingModule):
    """Learns embeddings in which a row lies nearest to the mean of its own class's few examples.

    Minimises the mean over tasks of ``- log softmax_k(- d(z, c_k))_y`` over query rows, where z is a row's embedding, c_k the mean
    embedding of the support rows of class k and d the squared distance. Nothing is adapted by gradients: a new task costs one
    forward pass over its examples. Each task counts the same. With the data's `EpisodeData`.

    Args:
        base: the model whose embeddings are learned, for texts. None: see ``net``.
        net: any torch module instead, whose outputs are the embeddings.
        distance: ``euclidean`` (squared, as the paper finds better), or ``cosine``.
        scale: what logits are multiplied by; cosines want 10 or more, since they lie between -1 and 1.
        pooling: of a base's hidden states: their ``mean``, as sentence encoders have it, the ``first`` or the ``last``.
        lr: peak learning rate; None takes what the technique suggests, 2e-5 for a whole base, 1e-3 for a net.
        weight_decay: AdamW's decay of trained matrices.
        warmup_steps: optimizer steps over which the rate rises from zero.
        schedule: how the rate falls after the warm-up.
        optimizer: a factory of another torch optimizer; None is AdamW, fused, betas .9 and .999.
        base_dtype: of frozen weights: ``auto`` takes bfloat16 where the device multiplies it fast, else float32.
        attention: of a base: ``auto``, ``lightning_ft``, ``sdpa`` or ``eager``.
        trust_remote_code: run Python code that the model's repository brings; only for authors you trust.
        revision: branch, tag or commit of a Hugging Face id; None is its main branch.
        quantize: pack the weights of the base's linear layers, which stay frozen then, see `SFT`.

    Logs:
        ``train/loss``, ``train/accuracy``, ``val/loss``, ``val/accuracy`` and their ``..._ci95``, half the width of the 95 %
        interval over episodes.

    Raises:
        Refusal: for arguments out of bounds here; when the run begins for FSDP2, fp16, a technique's dropout, a net that draws
            at random in every mode, or targets that are no classes.

    Example:
        >>> ProtoNet(net=torch.nn.Linear(4, 8)).distance
        'euclidean'

    References:
        Snell et al., 2017, equations 1 and 2, algorithm 1. Proven by loops in float64 in tests/functional and tests/modules.
    """

    def __init__(
        self,
        base: str | None = None,
        *,
        net: nn.Module | None = None,
        distance: Distance = "euclidean",
        scale: Annotated[float, Gt(0)] = 1.0,
        pooling: Pooling = "mean",
        lr: Annotated[float, Gt(0)] | None = None,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        warmup_steps: Annotated[int, Ge(0)] = 0,
        schedule: Schedule = "constant",
        optimizer: OptimizerFactory | None = None,
        base_dtype: DtypePolicy = "float32",
        attention: Literal["auto", "lightning_ft", "sdpa", "eager"] = "auto",
        trust_remote_code: bool = False,
        revision: str | None = None,
        quantize: Mode | None = None,
    ) -> None:
        super().__init__(
            base,
            net=net,
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
            optimizer=optimizer,
            base_dtype=base_dtype,
            attention=attention,
            trust_remote_code=trust_remote_code,
            revision=revision,
            quantize=quantize,
        )
        self.distance = distance
        self.scale = scale
        self.pooling = pooling
        self.check()

    def training_step(self, batch: MetaBatch, batch_idx: int) -> Tensor:
        """One meta-batch: the sum of its tasks' query losses, divided by the window's number of tasks."""
        total, correct = self.accumulated(batch, lambda episode: self.differentiated(*self._task(episode)))
        return self._hand_over("protonet", batch, total, correct)

    def _said(self, episode: Episode) -> Tensor:
        support, query = episode.support, episode.query
        if support.targets.is_floating_point():
            raise Refusal(
                "ProtoNet learns classes, and the targets of these episodes are numbers; use MAML or Reptile."
            )
        classes = int(support.targets.max()) + 1
        centres = prototypes(self.embed(support.inputs), support.targets, classes)
        return prototype_logits(self.embed(query.inputs), centres, distance=self.distance, scale=self.scale)

    def _task(self, episode: Episode) -> tuple[Tensor, Tensor]:
        logits, targets = self._said(episode), episode.query.targets
        return F.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean()

    def _measure_one(self, episode: Episode) -> Tensor:
        with torch.no_grad():
            return torch.stack(self._task(episode))
