"""SmolLM2-135M on two ranks: its answers improve by fine-tuning and by adapters, and the export says what it says."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_service.config import DataConfig
from serve.config import ServeConfig
from serve.engine.messages import EngineRequest
from serve.engine.sequence import SamplingParams
from serve.weights import build_engine
from tests.helpers.ranks import specs_of
from tests.helpers.real_models import smollm2_folder
from tests.helpers.row_service import RowService, served
from tests.ranks.conftest import GLOBAL_BATCH, SEED, Case, Lab, commit_all
from trainer.adapters import base_of
from trainer.config import LoraConfig, ModelConfig
from trainer.export import export_checkpoint
from trainer.tasks.facts import TaskFacts

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

STEPS = 6
SEQ_LEN = 64
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RowService]:
    """Short chats whose answers have a manner of their own."""
    folder = tmp_path_factory.mktemp("chats")
    draw = random.Random(4)
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(80):
            wind, knots = draw.choice(["north", "south", "east", "west"]), draw.randint(2, 40)
            chat = [
                {"role": "user", "content": f"Report {number}: the wind is {wind} at {knots} knots."},
                {
                    "role": "assistant",
                    "content": f"Aye. Wind {wind}, {knots} knots; jib {'up' if knots < 25 else 'down'}.",
                },
            ]
            file.write(json.dumps({"messages": chat}) + "\n")
    config = DataConfig.model_validate(
        {
            "sources": [{"path": str(folder / "chats.jsonl"), "messages": "messages"}],
            "tokenizer": {"path": str(smollm2_folder())},
            "rows": "document",
            "seq_len": SEQ_LEN,
            "split": {"eval": 0.2},
        }
    )
    with served(config, folder / "dataset", GLOBAL_BATCH, SEED) as service:
        yield service


@pytest.mark.parametrize(
    ("case", "lora", "lr"),
    [(Case(2, 1, zero=2), None, 1e-4), (Case(1, 2), LoraConfig(rank=8, alpha=16.0), 2e-3)],
    ids=["sft", "lora"],
)
def test_smollm2_learns_answers_on_two_ranks(
    lab: Lab, chats: RowService, case: Case, lora: LoraConfig | None, lr: float, tmp_path: Path
) -> None:
    spec = lab.changed(
        case,
        tmp_path / "checkpoints",
        task="sft",
        lora=lora,
        steps=STEPS,
        micro_batch=2,
        optimizer={"lr": lr, "grad_clip": 1.0},
        schedule={"name": "constant", "warmup_steps": 0},
        checkpoint={"every": STEPS},
        collective_timeout_s=600.0,
    )
    folder = str(smollm2_folder())
    spec = replace(
        spec,
        data=chats.access,
        seq_len=SEQ_LEN,
        vocab_size=chats.manifest.vocab_size,
        model=ModelConfig.model_validate({"from": folder}),
        facts=TaskFacts(loss_masks=chats.manifest.loss_masks),
        base=base_of(folder) if lora else None,
    )
    outcome = lab.server.run(lab.program, specs_of(spec), deadline_s=1200.0)
    commit_all(spec, outcome)
    before, after = outcome.evals[0], outcome.evals[STEPS]
    assert after.loss < 0.7 * before.loss
    assert after.metrics["token_accuracy"] > before.metrics["token_accuracy"]
    assert after.tokens == before.tokens > 100

    export_checkpoint(spec.checkpoints_uri, STEPS, str(tmp_path / "export"), str(chats.dataset / "tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Report 99: the wind is west at 7 knots."}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    core, served_tokenizer = build_engine(str(tmp_path / "export"), ServeConfig(), "cpu")
    core.add(EngineRequest("one", (ids,), 1, SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)))
    ours: list[int] = []
    while core.has_work:
        for _, delta in core.step():
            ours.extend(delta.tokens)
    expected = theirs.generate(
        torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(ids) :].tolist()
    assert ours == expected
    assert "Aye" in tokenizer.decode(ours)
    assert list(served_tokenizer.encode(prompt)) == list(ids)
