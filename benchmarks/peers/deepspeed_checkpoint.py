"""DeepSpeed's own checkpoints, for `benchmarks.checkpoint`: save, conversion to the universal format, load.

    python -m benchmarks.peers.deepspeed_checkpoint save|load SPEC.json FOLDER       (one process for each rank)
    python -m benchmarks.peers.deepspeed_checkpoint convert SPEC.json FOLDER

The same model, ZeRO 1 and torch's AdamW as ours, in fp32. Conversion uses as many worker processes as the machine has
processors. Timers begin behind imports and the building of the engine, as they do for ours. Prints one line of JSON.
"""

import hashlib
import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from trainer.protocol import WorkerSpec

TAG, UNIVERSAL = "step", "step_universal"


def _engine(spec: WorkerSpec, universal: bool) -> Any:
    import deepspeed
    import torch

    from trainer.model import Transformer, TransformerConfig
    from trainer.process_group import open_process_group

    torch.set_num_threads(spec.threads)
    master = (spec.master_addr, spec.master_port)
    open_process_group(spec.rank, spec.world_size, spec.local_rank, master, spec.device, spec.interface, 300.0)
    torch.manual_seed(spec.seed)
    model = Transformer(TransformerConfig.from_section(spec.model, spec.vocab_size, spec.seq_len))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "checkpoint": {"load_universal": universal},
        },
        dist_init_required=False,
    )
    return engine


def _one_step(engine: Any, spec: WorkerSpec) -> None:
    """Optimizer state that is not zero."""
    import torch

    tokens = torch.randint(0, spec.vocab_size, (1, 16), device=engine.device)
    positions = torch.arange(16, device=engine.device)[None]
    engine.backward(engine(tokens, positions).float().square().mean())
    engine.step()


def _digest(engine: Any) -> str:
    found = hashlib.blake2b(digest_size=8)
    for _, parameter in sorted(engine.module.named_parameters()):
        found.update(parameter.detach().cpu().contiguous().view(-1).numpy().data)
    return found.hexdigest()


def main(action: str, spec: WorkerSpec, folder: str) -> dict[str, Any]:
    """Do one of the three, timed."""
    from trainer import worker

    worker.preload(spec.device)
    if action == "convert":
        from deepspeed.checkpoint import ds_to_universal

        began = time.perf_counter()
        ds_to_universal.main(
            Namespace(
                input_folder=f"{folder}/{TAG}",
                output_folder=f"{folder}/{UNIVERSAL}",
                num_extract_workers=os.cpu_count(),
                num_merge_workers=os.cpu_count(),
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )
        return {"seconds": time.perf_counter() - began}
    engine = _engine(spec, universal=action == "load")
    from torch import distributed as dist

    if action == "save":
        _one_step(engine, spec)
        dist.barrier()
        began = time.perf_counter()
        engine.save_checkpoint(folder, tag=TAG, client_state={"universal_checkpoint_info": {}})
    else:
        dist.barrier()
        began = time.perf_counter()
        engine.load_checkpoint(folder, tag=UNIVERSAL)
    return {"seconds": time.perf_counter() - began, "weights": _digest(engine)}


if __name__ == "__main__":
    specification = WorkerSpec.from_json(Path(sys.argv[2]).read_text(encoding="utf-8"))
    sys.stdout.write(json.dumps(main(sys.argv[1], specification, sys.argv[3])) + "\n")
    sys.stdout.flush()
    os._exit(0)
