"""DPO and its relatives: learning from pairs of answers, one better than the other."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import track
from torch import Tensor

from lightning_ft.engine.answers import other_rows
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.evaluation import NamedMeans
from lightning_ft.engine.likelihood import Ask
from lightning_ft.engine.module import DtypePolicy, OptimizerFactory
from lightning_ft.engine.optimizer import Schedule
from lightning_ft.engine.policy import PolicyModule
from lightning_ft.engine.precomputed import ReferenceTable, digest, in_turn, keys_of
from lightning_ft.engine.scoring import segment_logps
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.preference import Divergence, Settings, check, needs_reference, parts
from lightning_ft.models.admission import evaluating
from lightning_ft.models.quantize import Mode
from lightning_ft.models.starter import cache_folder
from lightning_ft.objectives import preference

_START = "dpo_reference"
"""Where a checkpoint says which precomputed reference its run compares with."""


class DPO(PolicyModule):
    """Makes better answers likelier and worse ones less likely, without a reward model, by DPO or one of its relatives.

    With r(y) = log p(y) - log q(y), by how much the policy p has moved from the reference q at the answer y, DPO minimises the
    mean of ``- log sigmoid(beta (r(chosen) - r(rejected)))`` over the pairs of each accumulation window on all ranks. Both
    answers go through one forward pass, behind one copy of their prompt where the model was proven to see it; logits exist for
    answer tokens only. Data: `PreferenceData`, whose margins only `RewardModel` looks at.

    Args:
        base: the model to start from: ``starter:smollm2-135m``, a local folder, or a Hugging Face id. It should have learned
            to answer: run `SFT` before.
        losses: which loss, several (``["sigmoid", "sft"]``), or several with weights (``{sigmoid: 0.8, sft: 0.2}``). Against a
            reference: sigmoid (DPO), sigmoid_norm (each answer by its length), hinge, ipo, robust, exo_pair, nca_pair,
            apo_zero, apo_down, sppo_hard, aot, aot_unpaired, discopop. Without: orpo, simpo, cpo, and sft (imitation of the
            chosen answers, a mean over their tokens). orpo and cpo bring their sft loss with them. See docs/techniques/dpo.md.
        beta: how strongly the policy is held to the reference: less lets it go farther. 0.1 is DPO's; ORPO's lambda; SimPO
            wants 2 or more.
        label_smoothing: share of pairs taken to be labelled the wrong way round: sigmoid becomes cDPO with it; exo_pair needs
            it (0.001).
        simpo_gamma: SimPO's target margin; 0.5 is TRL's default, the paper's best are 0.3 to 1.6 with a beta of 2 and more.
        cpo_alpha: weight of the sft loss within cpo; 1 is the paper's and TRL's.
        divergence: what holds the policy to the reference, for losses that look at the difference of two answers alone.
        alpha: of the alpha-divergence, between forward KL (towards 0) and reverse KL (towards 1); 0.5 lies in the middle.
        discopop_tau: temperature of the loss discopop; 0.05 is what its authors found with it.
        reference_policy: what is compared with: the model as it is when the fit begins (``start``), adapters and all; the bare
            ``base``; ``precomputed``: the start again, but each pair is scored once before training and kept on disk, which
            saves the reference's forward pass in every epoch; or ``moving``: the start, drawn after the policy as TR-DPO does.
        moving_steps: optimizer steps after which a moving reference is drawn nearer; 512 is TRL's default.
        moving_share: how far: the reference's weights become this share of the policy's and the rest of their own; 0.6 is TRL's
            default, from the paper. Of LoRA it is the factors that are mixed.
        reference_cache: folder of what was precomputed; None: ``references`` below ``LIGHTNING_FT_CACHE`` or
            ``~/.cache/lightning_ft``.
        dropout: whether the model drops activations while it trains. Off, as in TRL: the reference does not, so rewards would
            be partly noise.
        lr: peak learning rate; None takes a twentieth of what the technique suggests (LoRA 1e-5), or 1e-6 for full training,
            TRL's default.
        weight_decay: AdamW's decay of trained matrices.
        warmup_steps: optimizer steps over which the rate rises from zero; None takes 3 % of all steps.
        schedule: how the rate falls after the warm-up: along a cosine to zero, linearly to zero, or not at all.
        optimizer: a factory of another torch optimizer; None is AdamW, fused, betas .9 and .999.
        base_dtype: of frozen weights: ``auto`` takes bfloat16 where the device multiplies it fast, else float32. What is trained
            is float32 in any case, unless ``pure_bfloat16`` asks for all of it in bfloat16.
        attention: ``auto`` takes this library's packed attention where the model allows it, else transformers' ``sdpa``.
        gradient_checkpointing: recompute activations in backward: one more forward pass for much less memory.
        trust_remote_code: run Python code that the model's repository brings; only for authors you trust.
        revision: branch, tag or commit of a Hugging Face id; None is its main branch.
        quantize: pack the weights of the base's linear layers, which stay frozen then: ``nf4``, ``nf4-dq``, ``fp4`` or ``int8``,
            see `SFT`. None: not at all.

    Logs:
        ``train/loss``, of several losses also each by its name, and under TRL's names, ``train/`` or ``val/`` before them:
        ``rewards/chosen``, ``rewards/rejected`` (beta r), ``rewards/margins``, ``rewards/accuracies`` (share of pairs with a
        margin above 0), ``logps/chosen``, ``logps/rejected``, and ``kl``, the mean of r over all answers: how far the policy
        has gone at the answers in the data, in nats an answer, not the KL divergence itself.

    Raises:
        Refusal: for arguments out of bounds here; for data without pairs, or an encoder-decoder, when the run begins.

    Example:
        >>> DPO("starter:smollm2-135m", losses=["sigmoid", "sft"]).beta
        0.1

    References:
        Rafailov et al., 2023; TR-DPO: Gorbatovski et al., 2024 (Learn your reference model); of the other losses in
        lightning_ft/functional/preference.py. Proven against TRL's DPOTrainer in
        tests/oracles.
    """

    learns_from = "pairs"

    def __init__(
        self,
        base: str,
        *,
        losses: dict[str, float] | list[str] | str = "sigmoid",
        beta: Annotated[float, Gt(0)] = 0.1,
        label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0,
        simpo_gamma: Annotated[float, Ge(0)] = 0.5,
        cpo_alpha: Annotated[float, Ge(0)] = 1.0,
        divergence: Divergence = "reverse_kl",
        alpha: Annotated[float, Gt(0)] = 0.5,
        discopop_tau: Annotated[float, Gt(0)] = 0.05,
        reference_policy: Literal["start", "base", "precomputed", "moving"] = "start",
        moving_steps: Annotated[int, Ge(1)] = 512,
        moving_share: Annotated[float, Gt(0), Le(1)] = 0.6,
        reference_cache: str | None = None,
        dropout: bool = False,
        lr: Annotated[float, Gt(0)] | None = None,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        warmup_steps: Annotated[int, Ge(0)] | None = None,
        schedule: Schedule = "cosine",
        optimizer: OptimizerFactory | None = None,
        base_dtype: DtypePolicy = "auto",
        attention: Literal["auto", "lightning_ft", "sdpa", "eager"] = "auto",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        quantize: Mode | None = None,
    ) -> None:
        super().__init__(
            base,
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
            optimizer=optimizer,
            base_dtype=base_dtype,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            trust_remote_code=trust_remote_code,
            revision=revision,
            quantize=quantize,
        )
        self.losses = losses
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.simpo_gamma = simpo_gamma
        self.cpo_alpha = cpo_alpha
        self.divergence = divergence
        self.alpha = alpha
        self.discopop_tau = discopop_tau
        self.reference_policy = reference_policy
        self.moving_steps = moving_steps
        self.moving_share = moving_share
        self.reference_cache = reference_cache
        self.dropout = dropout
        self.check()
        self._weights = parts(losses, cpo_alpha=cpo_alpha)
        self._settings = Settings(beta, label_smoothing, simpo_gamma, divergence, alpha, discopop_tau)
        check(self._weights, self._settings)
        if not self._compares and reference_policy != "start":
            given = " and ".join(self._weights)
            raise Refusal(
                f"DPO.reference_policy is {reference_policy!r}, but nothing is compared with a reference in {given}; leave it out."
            )
        names = [*self._weights, *_MEASURED, *(["kl"] if self._compares else [])]
        self.evaluation = NamedMeans(names)
        self._start: str | None = None
        self._table: ReferenceTable | None = None

    @property
    def _compares(self) -> bool:
        return needs_reference(self._weights)

    @property
    def _moves(self) -> bool:
        return self._compares and self.reference_policy == "moving"

    @property
    def _precomputes(self) -> bool:
        return self._compares and self.reference_policy == "precomputed"

    # -- steps ----------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Hands one term for each loss to the attachment, which divides it by its window's count."""
        pairs = self._pairs(batch)
        terms = preference.terms(batch, pairs, self._weights, self._settings)
        attachment = Attachment.of(self)
        attachment.terms(terms)
        attachment.observe(preference.measured(pairs, self._weights, self._settings))
        return terms[0].sum

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to what is measured: the losses and what training logs."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Like `validation_step`, logged under ``test/``."""
        self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Log-probability of each answer: ``rows`` (2P,), which come twice, the chosen answer first, and ``logprob`` (2P,)."""
        return {"rows": batch.rows, "logprob": segment_logps(self.view, batch)[0]}

    def good_answers(self, batch: Batch) -> range:
        """Numbers of the segments that are chosen answers: what `GenerationMetrics` compares with."""
        return range(0, 2 * int(batch.counts["pair"]), 2)

    def likelihood(self, batch: Batch, ask: Ask) -> Tensor:
        """What continual learning asks of each pair, (P,): of its chosen answer, see `lightning_ft.engine.likelihood`."""
        return preference.likelihood(self.view, batch, ask)

    def _pairs(self, batch: Batch) -> Any:
        if "pair" not in batch.counts:
            raise other_rows(self)
        reference = self._reference(batch) if self._compares else None
        logps, tokens = segment_logps(self.view, batch)
        return preference.pairs_of(batch, logps, tokens, reference)

    def _reference(self, batch: Batch) -> Tensor:
        """(2P,) by the reference; before the policy's own pass, whose activations should see no weights change."""
        known = batch.columns.get("reference_logps")
        if known is not None:
            return known
        with self.at_reference():
            return segment_logps(self.view, batch)[0]

    def know_reference(self, batch: Batch) -> None:
        """Adds the reference's log-probabilities to pairs that will be trained on again, where the reference does not change."""
        if self._compares and not self._moves and "pair" in batch.counts and "reference_logps" not in batch.columns:
            with self.trainer.precision_plugin.forward_context():
                batch.columns["reference_logps"] = self._reference(batch).detach()

    @property
    def known_reference(self) -> str | None:
        """Which reference `know_reference` asks; None where nothing is compared, or with one that moves."""
        return self.reference_policy if self._compares and not self._moves else None

    def renew_reference(self, batch: Batch) -> None:
        """The same of pairs that an earlier fit has kept, where this one begins: a precomputed reference is the model as it is."""
        if not self._precomputes:
            self.know_reference(batch)
            return
        with torch.no_grad(), evaluating(self.model), self.trainer.precision_plugin.forward_context():
            batch.columns["reference_logps"] = segment_logps(self.view, batch)[0]

    def _evaluate(self, batch: Batch) -> None:
        pairs = self._pairs(batch)
        terms = preference.terms(batch, pairs, self._weights, self._settings)
        measured = preference.measured(pairs, self._weights, self._settings)
        self.evaluation.update({**{term.name: (term.sum, term.count) for term in terms}, **measured})

    def _finished(self, means: dict[str, Any]) -> dict[str, Any]:
        loss = sum(weight * means[name] for name, weight in self._weights.items())
        if len(self._weights) == 1:
            means = {name: mean for name, mean in means.items() if name not in self._weights}
        return {"loss": loss, **means}

    # -- the moving reference ---------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draws a moving reference after the policy, once in ``moving_steps`` optimizer steps.

        Before the next step rather than after the last: a checkpoint of that step is written in between, and a run that resumes
        from it comes by here.
        """
        done = self.trainer.global_step
        begins = batch_idx % self.trainer.accumulate_grad_batches == 0
        if self._moves and begins and done and done % self.moving_steps == 0:
            Attachment.of(self).references.move("moving", self.moving_share)

    # -- the precomputed reference ----------------------------------------------------------------------------------------

    def register(self, attachment: Attachment) -> None:
        """With what `PolicyModule` registers, the name of the start, while it is still there."""
        super().register(attachment)
        if self._moves:
            attachment.references.copied.add("moving")
            if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
                attachment.references.snapshots.pop("moving", None)  # of an earlier fit
        if self._precomputes and self._trainer is not None:
            if getattr(self.datamodule, "continue_from", None) is not None:
                raise Refusal(
                    "DPO.reference_policy precomputed names the start by its weights before TaskStream.continue_from has restored "
                    "them; compare with start (--model.reference_policy start)."
                )
            attachment.edit("hooks", "reference digest", self._take_digest, order=99, again=True)

    def _take_digest(self, module: Any) -> None:
        # Edits run before a checkpoint is restored, so that a resumed run finds the start that the first one had. What is measured
        # after a fit is compared with the start of that fit.
        if self._start is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        config = {
            k: v
            for k, v in self.model.config.to_dict().items()
            if not k.startswith("_") and k != "transformers_version"
        }
        about = {"format": 1, "config": config, "precision": str(self.trainer.precision), "quantize": self.quantize}
        self._start, self._table = digest(self.model, about), None

    @property
    def table(self) -> ReferenceTable:
        """What was precomputed for the start of this run."""
        if self._table is None:
            assert self._start is not None
            folder = Path(self.reference_cache).expanduser() if self.reference_cache else cache_folder() / "references"
            self._table = ReferenceTable(folder / self._start)
        return self._table

    def on_fit_start(self) -> None:
        """Says what is trained; then scores the pairs that the reference has not seen."""
        super().on_fit_start()
        if self._precomputes:
            self._precompute()

    def prepare_data(self) -> None:
        """Tokenises what a later test will read, whose rows the reference must score while it is there."""
        if self._precomputes and self._fits_with_test_rows:
            self.datamodule.tokenise("test")

    @property
    def _fits_with_test_rows(self) -> bool:
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        return (
            fitting and getattr(self.datamodule, "test_path", None) is not None and hasattr(self.datamodule, "tokenise")
        )

    def _precompute(self) -> None:
        data, trainer = self.datamodule, self.trainer
        if not hasattr(data, "in_order"):
            raise Refusal(
                "reference_policy precomputed scores every pair before training; use PreferenceData, or the policy start."
            )
        if self._fits_with_test_rows:
            data.setup("test")
        loaders = list(data.in_order().values())
        count = sum(map(len, loaders))
        ask = in_turn(loaders)
        if trainer.is_global_zero and trainer.progress_bar_callback is not None:
            ask = track(ask, description="the reference's log-probabilities", total=count)  # type: ignore[assignment]
        resumed = trainer.ckpt_path is not None

        def score(batch: Batch) -> Tensor:
            if resumed:
                raise Refusal(
                    f"This run resumes, and {self.table.folder} does not hold the reference's log-probabilities of all its "
                    "rows, and the start is gone; put the folder back, or begin a new fit from the weights (init_from)."
                )
            with torch.no_grad(), evaluating(self.model):
                found: dict[str, Tensor] = trainer.strategy.predict_step(batch.to(self.device), 0)  # type: ignore[assignment]
            return found["logprob"]

        self.table.complete(
            ask, score, rank=trainer.global_rank, ranks=trainer.world_size, writes=trainer.local_rank == 0
        )

    def annotate(self, batch: Batch) -> Batch:
        """Looks the reference's log-probabilities of a batch up; the data module asks while tokens are still in main memory."""
        if self._precomputes and not self.trainer.predicting:
            known = torch.zeros(len(batch.rows), dtype=torch.float32)
            if len(keys := keys_of(batch)):
                known = torch.from_numpy(self.table.values(keys)).reshape(-1)
            batch.columns["reference_logps"] = known
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Names the precomputed reference."""
        super().on_save_checkpoint(checkpoint)
        if self._precomputes:
            checkpoint[_START] = self._start

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on against another reference than the run began with."""
        super().on_load_checkpoint(checkpoint)
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if fitting and self._precomputes and checkpoint.get(_START) != self._start:
            raise Refusal(
                "The checkpoint was written by a run with another start, so its precomputed reference would be another model; give "
                "the same base and init_from, or begin a new fit from its weights."
            )


_MEASURED = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)

__all__ = ["DPO"]
