"""Train an adapter with the Hugging Face Trainer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import peft
import torch
import transformers
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from deployfa.adapter import Adapter
from deployfa.data import Row
from deployfa.errors import InputError
from deployfa.training.base import Base, load_base, quiet
from deployfa.training.capture import capture, head_only
from deployfa.training.examples import Progress, Score, examples_of
from deployfa.training.frozen_statistics import freeze_statistics
from deployfa.training.options import FitOptions
from deployfa.training.picture_steps import image_steps
from deployfa.training.tuners import LoRFAConfig, VeFAConfig

__all__ = ["Trained", "fit"]


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, the adapter in it (``None`` for full fine-tuning), its scores per domain, the time it took."""

    model: nn.Module
    adapter: Adapter | None
    scores: dict[str, Score]
    seconds: float
    trainable_parameters: int


def fit(
    base_name: str | Path,
    task: str,
    train: Sequence[Row],
    domains: Mapping[str, Sequence[Row]],
    labels: Sequence[str],
    options: FitOptions,
    *,
    folder: Path,
    work: Path,
    resume: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train ``options.method`` on ``train`` and score every domain.

    ``folder`` holds the files of the preprocessor; checkpoints go to ``work`` once an epoch, and ``resume`` goes on
    from the last of them.  The same seed on the same CPU gives the same adapter, bit for bit, resumed or not.
    """
    started = time.monotonic()
    device = _device(options)
    transformers.set_seed(options.seed)
    base = load_base(base_name, task, labels=labels or None, seed=options.seed)
    # texts cannot be longer than the positions that the model knows
    options = msgspec.structs.replace(
        options, precision=_precision(options, device), max_length=min(options.max_length, base.max_length)
    )
    examples = examples_of(base, folder, labels, options)
    model = _with_adapter(base, options)
    if options.method != "full":
        freeze_statistics(model)
    trainer = transformers.Trainer(
        model=model,
        args=_arguments(options, work, device, by_length=examples.by_length),
        train_dataset=examples.dataset(train),
        data_collator=examples.collate,
        callbacks=[_Report(progress)] if progress else None,
    )
    # our callback is the only voice
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    with quiet():
        last = _last_checkpoint(work) if resume else None
        outcome = trainer.train(resume_from_checkpoint=last)
    model.eval()
    _check_finite(model, options)
    seconds = time.monotonic() - started
    scores: dict[str, Score] = {}
    with torch.autocast(device, torch.bfloat16, enabled=options.precision == "bf16"):
        for name, domain in domains.items():
            scores[name] = examples.score(model, domain, label=name, progress=progress)
    summary: dict[str, Any] = {
        "rows": len(train),
        "loss": round(float(outcome.training_loss), 6),
        "seconds": round(seconds, 1),
        "device": device,
        "options": msgspec.to_builtins(options),
        "scores": {name: msgspec.to_builtins(value) for name, value in scores.items()},
    }
    if base.does.kind == "image":
        # an adapter is only as good as its pictures are prepared
        summary["pictures"] = msgspec.json.decode(msgspec.json.encode(image_steps(base.model, folder)))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapter = _capture(model, base, labels, options, summary)
    return Trained(model, adapter, scores, round(seconds, 1), trainable)


def _check_finite(model: nn.Module, options: FitOptions) -> None:
    """Raise ``InputError`` if the training has diverged: what it found is no adapter."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"the training went to NaN or infinity (in '{name}'); pass a lower --lr than {options.learning_rate:g}"
            )


def _with_adapter(base: Base, options: FitOptions) -> nn.Module:
    if options.method == "full":
        return base.model
    if options.method == "head":
        if not base.fresh_modules:
            raise InputError("the base model brings its own head, so --method head has nothing to train; use vefa")
        base.model.requires_grad_(False)
        for path in base.fresh_modules:
            base.model.get_submodule(path).requires_grad_(True)
        return base.model
    common: dict[str, Any] = {"target_modules": options.sites, "modules_to_save": list(base.fresh_modules) or None}
    bias = "shift" if options.shift else "none"
    config: peft.PeftConfig
    if options.method == "vefa":
        config = VeFAConfig(**common, bias=bias, share_input=options.share_input)
    elif options.method == "lorfa":
        config = LoRFAConfig(
            **common, bias=bias, share_input=options.share_input, r=options.rank, alpha=options.scaled_alpha
        )
    else:
        config = peft.LoraConfig(**common, r=options.rank, lora_alpha=options.scaled_alpha)  # type: ignore[arg-type]
    try:
        with quiet():
            return peft.get_peft_model(base.model, config)
    except NoMatchingPeftModuleError as error:
        raise InputError(
            f"{base.architecture} has no layer that is called as the sites say ({options.sites}); pass the --recipe of "
            "its kind, or none for every linear layer"
        ) from error


def _capture(
    model: nn.Module, base: Base, labels: Sequence[str], options: FitOptions, summary: dict[str, Any]
) -> Adapter | None:
    if options.method == "full":
        return None
    if isinstance(model, peft.PeftModel):
        return capture(model, base_name=base.name, task=base.task, labels=labels, training=summary)
    return head_only(model, base.fresh_modules, base_name=base.name, task=base.task, labels=labels, training=summary)


def _arguments(options: FitOptions, work: Path, device: str, *, by_length: bool) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(work),
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        weight_decay=0.0,
        train_sampling_strategy="group_by_length" if by_length else "random",
        seed=options.seed,
        data_seed=options.seed,
        bf16=options.precision == "bf16",
        use_cpu=device == "cpu",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
    )


class _Report(transformers.TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress("training", state.global_step, state.max_steps)


def _last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that is whole: the Trainer writes ``trainer_state.json`` last, so a kill before it leaves a
    folder that cannot be resumed from."""
    for folder in sorted(work.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            msgspec.json.decode((folder / "trainer_state.json").read_bytes())
        except (OSError, msgspec.DecodeError):
            continue
        return str(folder)
    return None


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _device(options: FitOptions) -> str:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is visible to PyTorch; use --device auto or cpu")
    return "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"


def _precision(options: FitOptions, device: str) -> Literal["fp32", "bf16"]:
    """What ``auto`` means here: emulated bf16 is slower than fp32, native bf16 about twice as fast."""
    if options.precision != "auto":
        return options.precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"
