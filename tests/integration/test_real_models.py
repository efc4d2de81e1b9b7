"""Real weights: the logits and the greedy text of `transformers`, in both directions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from serve.config import ServeConfig
from serve.engine.messages import EngineRequest
from serve.engine.sequence import SamplingParams
from serve.weights import build_engine
from tests.helpers.real_models import minilm_folder, smollm2_folder
from trainer.hf import build_from_hf, open_weights, read_config, save_hf
from trainer.model import Transformer

pytestmark = pytest.mark.long

PROMPTS = ("The capital of France is", "Once upon a time, a sailor", "def add(a, b):\n    ")


def test_smollm2_has_the_logits_and_the_greedy_text_of_transformers(tmp_path: Path) -> None:
    folder = smollm2_folder()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = build_from_hf(str(folder), "cpu", torch.float32)
    assert ours.config.num_parameters == theirs.num_parameters()
    save_hf(str(tmp_path), ours.config, ours.named_parameters(), str(folder))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in PROMPTS]
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            expected = theirs(tokens).logits
            assert float((ours(tokens) - expected).abs().max()) < 1e-4
            assert torch.equal(exported(tokens).logits, expected)
    core, served = build_engine(str(tmp_path), ServeConfig(), "cpu")
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    core.add(EngineRequest("all", tuple(prompts), 1, greedy))
    texts: dict[int, list[int]] = {}
    while core.has_work:
        for _, delta in core.step():
            texts.setdefault(delta.index, []).extend(delta.tokens)
    for number, prompt in enumerate(prompts):
        assert list(served.encode(PROMPTS[number])) == list(prompt)
        generated = theirs.generate(  # type: ignore[operator]
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert texts[number] == generated
    assert "Paris" in tokenizer.decode(texts[0])


def test_minilm_has_the_hidden_states_of_transformers() -> None:
    """A real folder of a bare encoder: no prefix in its names, no head."""
    folder = str(minilm_folder())
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    config = read_config(folder)
    assert (config.family, config.d_model, config.num_layers, config.causal) == ("bert", 384, 6, False)
    config = replace(config, num_labels=3, tie_embeddings=False)
    weights = open_weights(folder, config)
    ours = Transformer(config).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
            else:
                parameter.fill_(0.01)
        text = AutoTokenizer.from_pretrained(folder)(
            ["the wind fell", "she reads a very long story about the sea"], padding=True, return_tensors="pt"
        )
        found = theirs(**text)
        pooled = ours.head.classifier(found.pooler_output)
        doc_ids = 1 - text["attention_mask"]
        assert float((ours(text["input_ids"], None, doc_ids) - pooled).abs().max()) < 1e-4
