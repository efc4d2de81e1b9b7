"""Chats: the tokens of `transformers.apply_chat_template`, and the words of the assistant as labels."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_service.chat import ChatError, ChatRenderer, ChatTemplate, load_renderer, messages_of, read_chat_template
from data_service.config import TokenizerTrainConfig
from data_service.errors import ConfigError
from data_service.tokenizer import TokenizerFiles, read_tokenizer, train_tokenizer, write_tokenizer

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] + eos_token }}
{% endif %}
{% endfor %}
"""
BLOCKS = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' }}
{% if message.role == 'assistant' %}
{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{% else %}
{{ message.content + '<|im_end|>' }}
{% endif %}
{{ '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "blocks": BLOCKS}
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "blocks": "<|im_end|>"}
CHATS = [
    [("user", "What is 1 + 1?"), ("assistant", "It is 2.\n\n  Two.")],
    [("user", " 你好🙂 "), ("assistant", "你好！ 🙂🙂"), ("user", "a\tb"), ("assistant", "x" * 50 + " é\u0301")],
    [("user", "q"), ("assistant", "<think> no tag of ours </think>"), ("user", "{{ messages }}"), ("assistant", "b ")],
]


def chat(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def texts() -> list[str]:
    return [content for turns in CHATS for _, content in turns] + ["assistant user system Be kind. INST"] * 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of another maker, with all control tokens."""
    folder = tmp_path_factory.mktemp("base")
    files = train_tokenizer(TokenizerTrainConfig(vocab_size=400, min_frequency=1), texts)
    tokenizer = Tokenizer.from_str(dict(files.files)["tokenizer.json"].decode())
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def files_with(base: Path, folder: Path, template: object, end: str = "</s>") -> TokenizerFiles:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    config = {"eos_token": end, "bos_token": {"content": "<s>"}, "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return read_tokenizer(str(folder))


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_transformers(base: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    files = files_with(base, tmp_path / "read", TEMPLATES[name])
    write_tokenizer(str(tmp_path / "written"), files)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "written"))
    assert theirs.chat_template == TEMPLATES[name]
    for folder in ("read", "written"):
        ours = ChatRenderer(read_tokenizer(str(tmp_path / folder)))
        for turns in CHATS:
            wanted = theirs.apply_chat_template(chat(turns), tokenize=True, return_dict=False)
            ids, mask = ours.encode(chat(turns))
            assert ids[: len(wanted)] == wanted
            assert ids[len(wanted) :] == ([] if wanted[-1] == files.eos_id else [files.eos_id])
            assert len(mask) == len(ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_the_assistants_words_and_the_end_of_its_turn(base: Path, tmp_path: Path, name: str) -> None:
    files = files_with(base, tmp_path, TEMPLATES[name])
    tokenizer = Tokenizer.from_str(dict(files.files)["tokenizer.json"].decode())
    for turns in CHATS:
        ids, mask = ChatRenderer(files).encode(chat(turns))
        edges = np.flatnonzero(np.diff([False, *mask, False])).reshape(-1, 2)
        said = [tokenizer.decode(ids[first:last], skip_special_tokens=False) for first, last in edges]
        answers = [content for role, content in turns if role == "assistant"]
        if name == "llama3":
            answers = [answer.strip() for answer in answers]
        if name == "mistral":
            answers = [f" {answer}" for answer in answers]
        assert said == [answer + ENDS[name] for answer in answers]


def test_generation_blocks_mask_what_transformers_masks(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(str(tmp_path / "written"), files_with(base, tmp_path, BLOCKS))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "written"))
    turns = CHATS[0] + CHATS[2]
    wanted = theirs.apply_chat_template(chat(turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = load_renderer(str(tmp_path / "written"), "x").encode(chat(turns))
    assert ids[:-1] == wanted["input_ids"]
    assert mask == [*map(bool, wanted["assistant_masks"]), False]


def test_the_end_of_a_turn_behind_a_generation_block_is_learned_too(base: Path, tmp_path: Path) -> None:
    inside = ChatRenderer(files_with(base, tmp_path / "a", BLOCKS))
    without = BLOCKS.replace(" + '<|im_end|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|im_end|>' -}}")
    assert without != BLOCKS
    behind = ChatRenderer(files_with(base, tmp_path / "b", without))
    assert inside.encode(chat(CHATS[1])) == behind.encode(chat(CHATS[1]))


def test_a_turn_that_no_token_ends_is_ended_by_the_end_token(base: Path, tmp_path: Path) -> None:
    plain = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    files = files_with(base, tmp_path, plain)
    ids, mask = ChatRenderer(files).encode(chat(CHATS[0]))
    tokenizer = Tokenizer.from_str(dict(files.files)["tokenizer.json"].decode())
    said = tokenizer.decode([i for i, counts in zip(ids, mask, strict=True) if counts], skip_special_tokens=False)
    assert said.strip() in ("It is 2.\n\n  Two.", "It is 2.\n\n  Two.</s>")
    bare = plain.replace("\n\n{% endfor", "{% endfor")
    ids, mask = ChatRenderer(files_with(base, tmp_path / "bare", bare)).encode(chat(CHATS[0]))
    assert (ids[-1], mask[-1]) == (files.eos_id, True)


def test_where_the_template_comes_from(base: Path, tmp_path: Path) -> None:
    assert files_with(base, tmp_path, None).chat_template is None
    assert files_with(base, tmp_path, CHATML).chat_template == CHATML
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": MISTRAL}]
    assert files_with(base, tmp_path, several).chat_template == MISTRAL
    (tmp_path / "chat_template.jinja").write_text(BLOCKS)
    files = read_tokenizer(str(tmp_path))
    assert files.chat_template == BLOCKS
    (tmp_path / "other.jinja").write_text(LLAMA3)
    other = files.with_chat_template(read_chat_template(str(tmp_path / "other.jinja")))
    assert other.chat_template == LLAMA3
    assert other.digest != files.digest
    with pytest.raises(ConfigError, match=r"data\.chat_template=.*absent.* cannot be read"):
        read_chat_template(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"no chat template.*data\.chat_template"):
        ChatRenderer(files_with(base, tmp_path / "none", None))


def test_chats_of_a_trained_tokenizer_have_its_templates_marks_as_tokens() -> None:
    files = train_tokenizer(TokenizerTrainConfig(vocab_size=400), texts, CHATML)
    assert files.control_tokens == ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
    renderer = ChatRenderer(files)
    encoded = renderer.encode_chats([json.dumps(chat(turns)) for turns in CHATS])
    single = [renderer.encode(chat(turns)) for turns in CHATS]
    assert encoded.tokens.tolist() == [token for ids, _ in single for token in ids]
    assert encoded.answers.tolist() == [counts for _, mask in single for counts in mask]
    assert encoded.lengths.tolist() == [len(ids) for ids, _ in single]
    assert encoded.tokens.dtype == files.token_dtype
    before = ChatTemplate.to_train(CHATML)
    assert [before.render(chat(turns)) for turns in CHATS] == [renderer.template.render(chat(turns)) for turns in CHATS]


@pytest.mark.parametrize(
    ("template", "turns", "reason"),
    [
        (CHATML, [("user", "hello")], "no answer"),
        (CHATML, [("user", "do <|im_end|> now"), ("assistant", "a")], r"control token: .*<\|im_end\|>"),
        (CHATML, [("user", "a\ufdd0"), ("assistant", "a")], "noncharacter"),
        (MISTRAL, [("user", "a"), ("user", "b"), ("assistant", "c")], "chat template: .*must alternate"),
        (BLOCKS.replace("message.content + '<|im_end|>' }}{% end", "'' }}{% end"), CHATS[0], "no answer: the template"),
        (CHATML, [("user", "a"), ("assistant", "b")] * 501, "over-long: more than 1000 messages"),
    ],
)
def test_a_chat_that_cannot_be_used_tells_why(template: str, turns: list[tuple[str, str]], reason: str) -> None:
    template = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"}, SPECIALS)
    with pytest.raises(ChatError, match=reason):
        template.render(chat(turns))


@pytest.mark.parametrize("text", ["", "{}", "[]", '["a"]', '[{"role": "user"}]', '[{"role": "user", "content": 1}]'])
def test_what_is_no_chat_is_refused(text: str) -> None:
    with pytest.raises(ChatError, match="broken chat"):
        messages_of(text)


def test_a_template_that_rewrites_earlier_turns_is_refused_or_asks_for_blocks() -> None:
    ends_once = "{% for m in messages %}{{ m.role + m.content }}{% if loop.last %}</s>{% endif %}{% endfor %}"
    with pytest.raises(ConfigError, match=r"message 2 changes how.*generation"):
        ChatTemplate(ends_once, {}, SPECIALS)
    # As Qwen 3: an answer is written otherwise once another turn follows it.
    last_thinks = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = ChatTemplate(last_thinks, {}, SPECIALS)
    assert template.render(chat(CHATS[0])).text.endswith("<think></think>It is 2.\n\n  Two.<|im_end|>")
    with pytest.raises(ChatError, match="message 2 changes how"):
        template.render(chat(CHATS[1]))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__.__class__ }}",
        "{% set ns = namespace() %}{{ ns.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
    ],
)
def test_templates_run_in_a_sandbox(template: str) -> None:
    with pytest.raises((ChatError, ConfigError)) as caught:
        ChatTemplate(template).render(chat(CHATS[0]))
    assert any(word in str(caught.value) for word in ("SecurityError", "UndefinedError", "no answer"))


def test_a_broken_template_is_named() -> None:
    with pytest.raises(ConfigError, match=r"chat template was asked for.*data\.chat_template"):
        ChatTemplate("{% for %}")


def test_the_day_is_the_same_every_day() -> None:
    template = ChatTemplate(CHATML + "{{ strftime_now('%d %b %Y') }}{% generation %}a{% endgeneration %}")
    assert "26 Jul 2024" in template.render(chat(CHATS[0])).text
