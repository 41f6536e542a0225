"""`MoeLensCallback` for Lightning.

trainer = Trainer(..., callbacks=[MoeLensCallback("traces/run1")])
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moe_lens_hooks.integrations.training import TrainingRecording


class MoeLensCallback(Callback):  # type: ignore[misc]  # untyped where it is not installed
    """Records `trainer.fit`, and logs numbers of its routing with the module's own.

    Step n of the trace is Lightning's global step n, with all batches whose gradients it sums; a
    validation after it is recorded in step n too, with phase "eval", and that of the sanity check
    in step 0. What is logged is of the last optimizer step and of this process alone. A fit that
    goes on from a checkpoint goes on with the trace.

    Args:
        path: Folder of the trace, one for each fit; every process records its rank.
        scalars: Log `rec.scalars()` every `log_every_n_steps`: all (True), none, or those with
            these names, as `("load_max_over_mean", "entropy")`.
        options: As for `moe_lens.record`; `on_breach` and `on_write_error` are "warn" here.

    Raises:
        NoMoELayers, UnsupportedRouter, TraceError: When the fit begins.
    """

    def __init__(
        self, path: str | Path, *, scalars: bool | Collection[str] = True, **options: Any
    ) -> None:
        self._training = TrainingRecording(path, scalars, options)
        self._begun: int | None = None
        """Global step at which the training step that is open has begun."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before the sanity check, in which a compiled module is compiled.
        self._training.open(pl_module, resumed=trainer.ckpt_path is not None)
        self._begun = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._begun is None:
            self._begun = trainer.global_step
            self._training.begin(self._begun)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self._begun:
            return  # its gradients are added to those of the next batch
        self._begun = None
        self._training.end()
        if trainer._logger_connector.should_update_logs:
            scalars = self._training.scalars()
            pl_module.log_dict(scalars, on_step=True, on_epoch=False, batch_size=1)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training.wait(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._begun = None  # a step that waits for more batches goes on after the validation
            self._training.end()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._training.close(exception)
