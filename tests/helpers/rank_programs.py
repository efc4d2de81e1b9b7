"""What ranks of the tests run, beside `trainer.worker.run` itself. DeepSpeed is imported in the ranks only."""

from tests.helpers.local_rows import LocalRows
from tests.helpers.ranks import QueueHooks
from trainer.protocol import WorkerSpec


def train_local(spec: WorkerSpec, hooks: QueueHooks) -> None:
    """Train on rows made up in the rank."""
    from trainer.worker import open_rank

    rank = open_rank(spec, hooks, LocalRows(spec))
    from trainer.loop import train

    train(rank)


def train_and_compare_tied(spec: WorkerSpec, hooks: QueueHooks) -> dict[str, object]:
    """Train, then compare the tied matrices of the first and the last stage of each pipeline."""
    import torch
    from torch import distributed as dist

    from trainer.loop import train
    from trainer.worker import open_rank

    rank = open_rank(spec, hooks, LocalRows(spec))
    train(rank)
    (tied,) = [one.parameter for one in rank.engine.parameters if one.name == "embedding.weight"]
    as_bits = (
        tied.detach().contiguous().view(torch.int32 if tied.dtype == torch.float32 else torch.int16).to(torch.int64)
    )
    everywhere = [torch.empty_like(as_bits) for _ in range(spec.world_size)]
    dist.all_gather(everywhere, as_bits)
    return {"equal": all(torch.equal(as_bits, other) for other in everywhere), "elements": as_bits.numel()}


def load_and_save(spec: WorkerSpec, hooks: QueueHooks) -> None:
    """Load a checkpoint and write it elsewhere at once: to `target` of the specification's `config_json`."""
    import json
    from dataclasses import replace

    from trainer.loop import save
    from trainer.worker import open_rank

    rank = open_rank(spec, hooks, LocalRows(spec))
    rank.spec = replace(spec, checkpoints_uri=json.loads(spec.config_json)["target"])
    save(rank, None)
