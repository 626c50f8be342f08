"""Chats: text and mask are those that transformers makes of the same template."""

import json

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken

from mopexec import data
from mopexec.data.chat import Chat
from mopexec.data.tokenizer import read_tokenizer, train_tokenizer
from mopsim.common.errors import MopError

MARKERS = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|message|>", "<|end|>", "<|return|>", "</s>")
PROMPT = r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "ChatML": r"""{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"""
    + PROMPT,
    # the reasoning of the last turn only, empty where there is none
    "Qwen3": r"""{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}
{%- generation %}{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- m.content.split('</think>')[-1].lstrip() + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"""
    + PROMPT,
    # the date, and an end marker of its own for what is not the last message
    "GPT-OSS": r"""{{ '<|start|>system<|message|>' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- for m in messages %}{{ '<|start|>' + m.role }}
{%- if m.role == 'assistant' %}{% generation %}{{ '<|message|>' + m.content }}
{%- if loop.last %}{{ '<|return|>' }}{% endif %}{% endgeneration %}
{%- if not loop.last %}{{ '<|end|>' }}{% endif %}
{%- else %}{{ '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}""",
    "Mistral": r"""{% for m in messages %}
{%- if m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}
{%- elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}""",
}
CHATS = [
    [("user", "two and two?"), ("assistant", "four"), ("user", "and three?"), ("assistant", " seven, é\n")],
    [
        ("user", "why?"),
        ("assistant", "<think>hm</think>so"),
        ("user", "so?"),
        ("assistant", "<think>oh</think>no"),
    ],
    [
        ("user", "assistant"),
        ("assistant", "assistant"),
        ("user", "four"),
        ("assistant", "four"),
        ("user", "?"),
    ],
]


def write_tokenizer(folder, template):
    """A tokenizer's directory as published, its template in the configuration."""
    folder.mkdir()
    tokenizer = train_tokenizer([json.dumps(CHATS)], 300)
    tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in MARKERS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def messages_of(chat):
    return [{"role": role, "content": content} for role, content in chat]


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_mask_are_those_of_transformers(name, tagged, tmp_path):
    """With {% generation %} in the template, and found without it."""
    theirs = transformers.AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "theirs", TEMPLATES[name]))
    untagged = TEMPLATES[name].replace("endgeneration %}", "endif %}").replace("generation %}", "if true %}")
    template = TEMPLATES[name] if tagged else untagged
    ours = write_tokenizer(tmp_path / "ours", template)
    path = tmp_path / "chats.jsonl"
    for chat in map(messages_of, CHATS):
        path.write_text(json.dumps({"messages": chat}) + "\n")
        options = data.DataOptions(source=str(path), tokenizer=str(ours))
        directory = data.prepare(options, 400, tmp_path / "cache")
        ids, counted = (
            np.fromfile(directory / "tokens0.bin", np.uint16),
            np.fromfile(directory / "mask0.bin", np.uint8),
        )
        expected = theirs.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
        assert ids.tolist() == [*expected["input_ids"], theirs.eos_token_id]
        assert counted.tolist() == [*expected["assistant_masks"], 0]
        assert sum(expected["assistant_masks"]) > 0


def test_a_plain_chat_counts_from_its_prompt_on_to_the_documents_end():
    text, answers = Chat().read(messages_of(CHATS[0]), "x:1")
    assert text == "user: two and two?\nassistant: four\nuser: and three?\nassistant:  seven, é\n\n"
    assert [text[start:stop] for start, stop in answers] == [" four\n", "  seven, é\n\n"]
    assert answers[-1][1] == len(text) + 1
    assert Chat().read(messages_of(CHATS[0]), "x:1", answers=False) == (text, None)


def test_a_template_without_a_prompt_counts_the_content_and_its_marker():
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content + eos_token }}\n{% endfor %}"
    text, answers = Chat(template, (("eos_token", "</s>"),)).read(messages_of(CHATS[2][:4]), "x:1")
    assert text.count("<|assistant|>") == 2
    assert [text[start:stop] for start, stop in answers] == ["assistant</s>", "four</s>"]


def test_templates_that_do_not_tell_or_fail_are_one_line():
    chat = messages_of(CHATS[0])
    with pytest.raises(MopError, match="x:1: the chat template does not show where message 2 is"):
        Chat("{{ messages | length }}").read(chat, "x:1")
    wrong = (
        "{{ ''.__class__.__mro__ }}{{ raise_exception('no') }}",
        "{{ 1 // 0 }}",
        "{{ range(999999999) }}",
        "{% if %}",
    )
    for template in wrong:
        with pytest.raises(MopError, match="x:1: the tokenizer's chat template"):
            Chat(template).read(chat, "x:1")
    with pytest.raises(MopError, match=r"x:1: U\+FDD0, U\+FDD1 or U\+FDD2 is in it"):
        Chat().read([{"role": "user", "content": "\ufdd2"}], "x:1")


CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOLS = {
    # content and calls in turn, each where there is one
    "Qwen2.5": r"""{% for m in messages %}{{ '<|im_start|>' + m.role }}
{%- if m.content %}{{ '\n' + m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{{ '\n' + call.function | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}"""
    + PROMPT,
    # of a message that calls, the calls alone
    "Llama": r"""{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if 'tool_calls' in m %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}
{{- '<|im_end|>' }}{% endfor %}"""
    + PROMPT,
}


@pytest.mark.parametrize("first", [{"content": None}, {}, {"content": ""}])
@pytest.mark.parametrize("name", TOOLS)
def test_a_message_that_calls_tools_may_have_no_content(name, first):
    call = {"role": "assistant", "tool_calls": CALLS, **first}
    said = {"role": "assistant", "content": "two", "tool_calls": None}
    chat = [{"role": "user", "content": "1?"}, call, {"role": "tool", "content": "2"}, said]
    text, answers = Chat(TOOLS[name]).read(chat, "x:1")
    wrote = '{"name": "add", "arguments": {"a": 1}}<|im_end|>'
    assert [text[start:stop] for start, stop in answers] == [wrote, "two<|im_end|>"]
    (only,) = Chat(TOOLS[name]).read(chat[:2], "x:1")[1]
    assert text[slice(*only)] == wrote


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "two and"}, {"type": "text", "text": " two?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": [parts[0]]}]
    assert Chat().read(chat, "x:1") == Chat().read(
        messages_of([("user", "two and two?"), ("assistant", "two and")]), "x:1"
    )
    for part in ({"type": "image_url"}, "text", {"type": "text"}):
        with pytest.raises(MopError, match=r"x:1: message 1: its content has .*, only parts of text are"):
            Chat().read([{"role": "user", "content": [part]}], "x:1")
    for content in (None, 5):
        with pytest.raises(MopError, match=f"x:1: message 1: content: {content} is no text"):
            Chat().read([{"role": "assistant", "content": content}], "x:1")


def test_of_several_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    folder = write_tokenizer(tmp_path / "list", named)
    assert read_tokenizer(str(folder), 400).chat.template == "a"
    for number, wrong in enumerate((named[:1], 5, {"default": "a"}, [3])):
        with pytest.raises(MopError, match="chat_template: is neither a template nor a list of"):
            read_tokenizer(str(write_tokenizer(tmp_path / str(number), wrong)), 400)
    (folder / "chat_template.jinja").write_text("c")
    assert read_tokenizer(str(folder), 400).chat.template == "c"
