"""One process of `benchmarks.training`: trains and prints seconds a step as one line of JSON.

    python -m benchmarks.parts.train_process ours|bare|deepspeed|trainer SPEC.json

Every kind trains the same shape on rows of the same size, with torch's fused AdamW, clipping and as many micro-batches.
The first steps are left out: allocators and kernels warm up in them.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.helpers.made_rows import MadeRows
from trainer.protocol import NoHooks, Report, StepReport, WorkerSpec

WARM_UP = 2
"""Steps that are not counted."""


class _Steps(NoHooks):
    """Keeps the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def report(self, report: Report) -> None:
        if isinstance(report, StepReport):
            self.seconds.append(report.step_s)


def ours(spec: WorkerSpec) -> list[float]:
    """A rank as every run has it, without a data service in between; on the reporting rank, else empty."""
    from trainer import worker
    from trainer.loop import train

    hooks = _Steps()
    rank = worker.open_rank(spec, hooks, MadeRows(spec.train.global_batch, spec.seq_len, spec.vocab_size))
    train(rank)
    return hooks.seconds


def _micro_batches(spec: WorkerSpec, device: Any) -> Iterator[list[Any]]:
    """The steps' token blocks, int64 [micro_batch, T + 1] each."""
    import torch

    rows = MadeRows(spec.train.global_batch, spec.seq_len, spec.vocab_size)
    size = _micro_batch(spec)
    for batch in rows.stream("train", 0, spec.train.steps, (0, spec.train.global_batch)):
        tokens = torch.from_numpy(batch.tokens).to(device).long()
        yield [tokens[at : at + size] for at in range(0, len(tokens), size)]


def _micro_batch(spec: WorkerSpec) -> int:
    assert spec.train.micro_batch != "auto", "the benchmark states it"
    return spec.train.micro_batch


def _model(spec: WorkerSpec, device: Any) -> Any:
    import torch

    from trainer.architecture import TransformerConfig
    from trainer.model import Transformer

    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    model = Transformer(TransformerConfig.from_section(spec.model, spec.vocab_size, spec.seq_len)).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def _timed(spec: WorkerSpec, device: Any, step: Callable[[list[Any]], Any]) -> list[float]:
    import torch

    seconds = []
    for blocks in _micro_batches(spec, device):
        began = time.perf_counter()
        float(step(blocks))  # the loss is looked at in each step, as every trainer does
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds


def bare(spec: WorkerSpec) -> list[float]:
    """A loop in plain torch with the same numerics: fp32 masters, accumulation and loss, the same loss kernel."""
    import torch

    from trainer.losses import projected_cross_entropy

    device = torch.device(spec.device)
    model = _model(spec, device)
    half = spec.train.precision == "bf16"
    masters = [parameter.detach().clone() for parameter in model.parameters()] if half else list(model.parameters())
    if half:
        model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(masters, lr=spec.train.optimizer.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(blocks: list[Any]) -> Any:
        total = torch.zeros((), device=device)
        count = sum(block[:, 1:].numel() for block in blocks)
        for block in blocks:
            weights = torch.full((len(block),), 1.0 / count, device=device)
            loss = projected_cross_entropy(
                model.outputs(block[:, :-1].contiguous()), block[:, 1:].contiguous(), weights
            )
            loss.backward()
            total += loss.detach()
            if half:
                for master, parameter in zip(masters, model.parameters(), strict=True):
                    gradient = parameter.grad.float()
                    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                    parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if half:
            with torch.no_grad():
                for master, parameter in zip(masters, model.parameters(), strict=True):
                    parameter.copy_(master)
        return total

    return _timed(spec, device, step)


def deepspeed(spec: WorkerSpec) -> list[float]:
    """Plain DeepSpeed with ZeRO 1 as its guide shows it: the model gives logits, torch the loss."""
    import deepspeed as library
    import torch
    from torch.nn import functional

    from trainer.process_group import open_process_group

    device = torch.device(spec.device)
    model = _model(spec, device)
    master = (spec.master_addr, spec.master_port)
    open_process_group(spec.rank, 1, spec.local_rank, master, spec.device, spec.interface, 300.0)
    size = _micro_batch(spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.train.optimizer.lr, fused=True)
    engine, *_ = library.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": spec.train.global_batch,
            "train_micro_batch_size_per_gpu": size,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": spec.train.precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
        },
        dist_init_required=False,
    )

    def step(blocks: list[Any]) -> Any:
        total = torch.zeros((), device=device)
        for block in blocks:
            logits = engine(block[:, :-1].contiguous())
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), block[:, 1:].flatten())
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(blocks)
        return total

    return _timed(spec, device, step)


def trainer(spec: WorkerSpec) -> list[float]:
    """The Hugging Face Trainer on the same shape (its own Llama), with fused AdamW; needs `accelerate`."""
    import tempfile

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from trainer.architecture import TransformerConfig

    torch.set_num_threads(spec.threads)
    shape = TransformerConfig.from_section(spec.model, spec.vocab_size, spec.seq_len)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            max_position_embeddings=spec.seq_len,
            tie_word_embeddings=shape.tie_embeddings,
            attn_implementation="sdpa",
        )
    )
    rows = MadeRows(spec.train.global_batch, spec.seq_len - 1, spec.vocab_size)
    slots = (0, spec.train.global_batch)
    blocks = [batch.tokens.astype("int64") for batch in rows.stream("train", 0, spec.train.steps, slots)]
    data = [{"input_ids": row, "labels": row} for block in blocks for row in block]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    size = _micro_batch(spec)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=spec.train.steps,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=spec.train.global_batch // size,
            learning_rate=spec.train.optimizer.lr,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            bf16=spec.train.precision == "bf16",
            use_cpu=spec.device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    return seconds


KINDS: dict[str, Callable[[WorkerSpec], list[float]]] = {
    "ours": ours,
    "bare": bare,
    "deepspeed": deepspeed,
    "trainer": trainer,
}


def main() -> None:
    """Train one kind; a library that is not installed is said as such."""
    kind, file = sys.argv[1:]
    try:
        seconds = KINDS[kind](WorkerSpec.from_json(Path(file).read_text(encoding="utf-8")))[WARM_UP:]
    except ImportError as error:
        print(json.dumps({"missing": str(error).splitlines()[0]}))
    else:
        print(json.dumps({"step_s": statistics.median(seconds) if seconds else None}))
    sys.stdout.flush()
    os._exit(0)  # communication libraries can hang in Python's shutdown


if __name__ == "__main__":
    main()
