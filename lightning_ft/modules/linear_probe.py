"""The baseline that meta-learning has to beat: logistic regression on the embeddings of a model as it is."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from annotated_types import Gt
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.embedding import EmbeddingModule, Pooling
from lightning_ft.engine.episodes import Episode
from lightning_ft.engine.module import DtypePolicy
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.prototypes import logistic_regression
from lightning_ft.models.quantize import Mode


class LinearProbe(EmbeddingModule):
    """Measures what the embeddings of a model give without any meta-learning, over the same episodes.

    For each episode ``sum - log softmax(W z + b)_y + penalty / 2 ||W||^2`` is minimised over its support rows, to the end, and the
    classifier is measured on its query rows. Nothing of the model is learned: run ``validate`` or ``test``.

    Args:
        base: the model whose embeddings are measured, for texts. None: see ``net``.
        net: any torch module instead, whose outputs are the embeddings.
        penalty: of the weight's squares; 1 is scikit-learn's default.
        normalise: give embeddings length 1 before, which suits sentence encoders.
        pooling: of a base's hidden states: their ``mean``, the ``first`` or the ``last``.
        base_dtype: of the weights: ``auto`` takes bfloat16 where the device multiplies it fast, else float32.
        attention: of a base: ``auto``, ``lightning_ft``, ``sdpa`` or ``eager``.
        trust_remote_code: run Python code that the model's repository brings; only for authors you trust.
        revision: branch, tag or commit of a Hugging Face id; None is its main branch.
        quantize: pack the weights of the base's linear layers, see `SFT`.

    Logs:
        ``val/loss``, ``val/accuracy`` (``test/...``) and their ``..._ci95``.

    Raises:
        Refusal: for arguments out of bounds, and for ``fit``.

    Example:
        >>> LinearProbe(net=torch.nn.Identity()).penalty
        1.0

    References:
        Tian et al., 2020, section 3 (a good embedding may be all that few-shot learning needs). Proven against scikit-learn's
        LogisticRegression in tests/functional.
    """

    def __init__(
        self,
        base: str | None = None,
        *,
        net: nn.Module | None = None,
        penalty: Annotated[float, Gt(0)] = 1.0,
        normalise: bool = True,
        pooling: Pooling = "mean",
        base_dtype: DtypePolicy = "float32",
        attention: Literal["auto", "lightning_ft", "sdpa", "eager"] = "auto",
        trust_remote_code: bool = False,
        revision: str | None = None,
        quantize: Mode | None = None,
    ) -> None:
        super().__init__(
            base,
            net=net,
            lr=None,
            weight_decay=0.0,
            warmup_steps=0,
            schedule="constant",
            optimizer=None,
            base_dtype=base_dtype,
            attention=attention,
            trust_remote_code=trust_remote_code,
            revision=revision,
            quantize=quantize,
        )
        self.penalty = penalty
        self.normalise = normalise
        self.pooling = pooling
        self.check()

    def register(self, attachment: Attachment) -> None:
        """Refuses a fit, in which nothing would be learned."""
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            raise Refusal(
                "LinearProbe learns nothing from episodes, it measures the model as it is; run validate or test."
            )
        super().register(attachment)

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        """Refused."""
        raise Refusal("LinearProbe learns nothing from episodes; run validate or test.")

    def _said(self, episode: Episode) -> Tensor:
        """(N, C) logits in float64."""
        support, query = episode.support, episode.query
        if support.targets.is_floating_point():
            raise Refusal("LinearProbe tells classes apart, and the targets of these episodes are numbers.")
        with torch.no_grad():
            x, q = self.embed(support.inputs), self.embed(query.inputs)
        if self.normalise:
            x, q = F.normalize(x, dim=-1), F.normalize(q, dim=-1)
        classes = int(support.targets.max()) + 1
        weight, bias = logistic_regression(x, support.targets, classes, penalty=self.penalty)
        return q.double() @ weight.t() + bias

    def _measure_one(self, episode: Episode) -> Tensor:
        logits, query = self._said(episode), episode.query
        right = (logits.argmax(-1) == query.targets).double().mean()
        return torch.stack([F.cross_entropy(logits, query.targets), right])
