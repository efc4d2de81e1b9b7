"""What a run shows while it trains: samples, memory and traces, on meshes of every kind."""

import functools
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.rank_programs import train_traced
from tests.helpers.ranks import specs_of
from tests.ranks.conftest import SEED, SEQ_LEN, Case, Lab
from trainer.initialise import initial_tensor
from trainer.model import Transformer, TransformerConfig
from trainer.protocol import SampleWishes

PROMPTS = ((5, 6, 7, 8), (9, 10), (11,) * 7)
NEW = 5


def greedy(config: TransformerConfig, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """What the model writes with its initial weights, alone and one token at a time."""
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(initial_tensor(name, tuple(parameter.shape), SEED, config))
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(torch.tensor([tokens]))
            tokens.append(int(logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize("case", [Case(1, 1), Case(2, 1, zero=3), Case(1, 2)], ids=str)
def test_samples_are_the_greedy_text_of_the_weights(lab: Lab, tmp_path: Path, case: Case) -> None:
    wishes = SampleWishes(PROMPTS, count=0, prompt_tokens=4, max_tokens=NEW)
    spec = replace(lab.spec(case, tmp_path / "checkpoints", steps=4), samples=wishes)
    outcome = lab.server.run(functools.partial(train_traced, uri=str(tmp_path / "traces")), specs_of(spec))
    config = TransformerConfig.from_section(spec.model, spec.vocab_size, SEQ_LEN)
    samples = outcome.evals[0].samples
    assert [sample.prompt for sample in samples] == list(PROMPTS)
    assert [sample.continuation for sample in samples] == [greedy(config, prompt) for prompt in PROMPTS]
    assert len(outcome.evals[4].samples) == len(PROMPTS)

    assert all(report.memory_bytes > 2**26 for report in outcome.steps.values())
    assert all(report.flops_per_token > 6 * config.num_parameters * 0.9 for report in outcome.ready)
    for rank in range(case.dp * case.pp):
        trace = json.loads(gzip.decompress((tmp_path / f"traces/rank_{rank:05d}.json.gz").read_bytes()))
        names = [event.get("name") for event in trace["traceEvents"]]
        assert "aten::embedding" in names or rank % case.pp
        updates = sum(name == "Optimizer.step#AdamW.step" for name in names)
        assert updates, names
        assert updates % 2 == 0, updates  # two steps, one update for each of DeepSpeed's groups


def test_without_prompts_held_out_rows_are_continued(lab: Lab, tmp_path: Path) -> None:
    wishes = SampleWishes((), count=2, prompt_tokens=6, max_tokens=NEW)
    spec = replace(lab.spec(Case(2, 1), tmp_path, steps=4), samples=wishes)
    samples = lab.run(spec).evals[4].samples
    assert [len(sample.prompt) for sample in samples] == [6, 6]
    assert [len(sample.continuation) for sample in samples] == [NEW, NEW]
