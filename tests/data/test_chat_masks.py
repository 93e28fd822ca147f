"""Which part of a chat the assistant writes, of templates without generation marks, as published ones are."""

import datetime
import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from softcache.data.sources import source_settings
from softcache.data.sources.text.chat_mask import assistant_passages
from softcache.data.sources.text.documents import Document, InMemoryDocuments
from softcache.data.sources.text.source import open_text
from softcache.data.tokens import TokenData
from softcache.errors import ConfigError, SourceError, SpecError

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|start|>",
    "<turn>",
    "</turn>",
    "<s>",
    "</s>",
]
LOOP = "{% for m in messages %}"
CHATML = LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As Qwen3: an earlier turn is rendered without its reasoning, the last one with an empty one where it has none.
REASONING = (
    LOOP
    + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}<think>\n{{ parts[0].replace('<think>', '').strip() if parts|length > 1 else '' }}\n</think>\n\n"
    "{% endif %}{{ parts[-1].strip() }}{% if m.tool_calls %}<tool>{{ m.tool_calls[0].function.name }}</tool>{% endif %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
ONE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
TWO = [*ONE, {"role": "user", "content": "More?"}, {"role": "assistant", "content": "Yes."}]
THOUGHT = [
    {**m, "content": f"<think>\nhm\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else m
    for m in TWO
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOLS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "It is 42."},
]


def words_of(template, chat):
    def render(messages, *, prompt=False):
        texts, _ = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            add_generation_prompt=prompt,
            bos_token="<s>",
            eos_token="</s>",
        )
        return texts[0]

    text, passages = assistant_passages(chat, render, special=SPECIAL, key="d")
    return [text[first:last] for first, last in passages]


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        pytest.param(CHATML + PROMPT, TWO, ["Hello!<|im_end|>", "Yes.<|im_end|>"], id="chatml"),
        pytest.param(
            CHATML.replace("<|im_end|>\n", "</s>"), ONE, None, id="a header without a generation prompt"
        ),
        pytest.param(
            LOOP
            + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}"
            "{% endfor %}",
            TWO,
            [" Hello!</s>", " Yes.</s>"],
            id="no header",
        ),
        pytest.param(
            LOOP
            + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}"
            "{% if add_generation_prompt %}<turn>model\n{% endif %}",
            TWO,
            ["Hello!</turn>", "Yes.</turn>"],
            id="another name of the role",
        ),
        pytest.param(
            LOOP + "<|start|>{{ m.role }}<|message|>{{ m.content }}"
            "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
            TWO,
            ["<|message|>Hello!<|end|>", "<|message|>Yes.<|return|>"],
            id="the last turn ends otherwise",
        ),
        pytest.param(
            REASONING + PROMPT,
            TWO,
            ["Hello!<|im_end|>", "<think>\n\n</think>\n\nYes.<|im_end|>"],
            id="reasoning in the last turn only",
        ),
        pytest.param(
            REASONING + PROMPT,
            THOUGHT,
            ["Hello!<|im_end|>", "<think>\nhm\n</think>\n\nYes.<|im_end|>"],
            id="reasoning is left out of earlier turns",
        ),
        pytest.param(
            REASONING + PROMPT.replace("\n{%", "\n<think>\n{%"),
            THOUGHT,
            ["Hello!<|im_end|>", "hm\n</think>\n\nYes.<|im_end|>"],
            id="the prompt opens the reasoning",
        ),
        pytest.param(
            REASONING + PROMPT.replace("\n{%", "\n<think>\n\n</think>\n\n{%"),
            THOUGHT,
            ["Hello!<|im_end|>", "<think>\nhm\n</think>\n\nYes.<|im_end|>"],
            id="the prompt has an empty reasoning",
        ),
        pytest.param(
            REASONING + PROMPT,
            TOOLS,
            ["<tool>f</tool><|im_end|>", "<think>\n\n</think>\n\nIt is 42.<|im_end|>"],
            id="a tool call",
        ),
        pytest.param(
            LOOP + "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            ONE,
            None,
            id="the assistant is left out",
        ),
        pytest.param(
            "{% for m in messages | reverse %}[{{ m.role }}]{{ m.content }}{% endfor %}",
            ONE,
            None,
            id="backwards",
        ),
    ],
)
def test_the_assistants_words_are_found(template, chat, expected):
    if expected is None:
        with pytest.raises(SourceError, match=r"document 'd': the chat template does not show .* message 1"):
            words_of(template, chat)
    else:
        assert words_of(template, chat) == expected


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.mark.parametrize("words", ["a", "assistant", "im_start", "You are", " spaced", "x", "Hi", ""])
@pytest.mark.parametrize("before", ["", SYSTEM], ids=["alone", "after a default of the template"])
def test_a_chat_may_begin_with_the_assistant(words, before):
    """Its words are where they are, and not where the template happens to write the same letters before."""
    chat = [{"role": "assistant", "content": words}, *TWO]
    found = words_of(before + CHATML + PROMPT, chat)
    assert found == [f"{words}<|im_end|>", "Hello!<|im_end|>", "Yes.<|im_end|>"]


def test_reasoning_of_a_chat_that_begins_with_the_assistant():
    alone = [{"role": "assistant", "content": "<think>\nhm\n</think>\n\nt"}]
    assert words_of(REASONING + PROMPT, alone) == ["<think>\nhm\n</think>\n\nt<|im_end|>"]
    left_out = LOOP + "<|im_start|>{{ m.role }}<|im_end|>{% endfor %}"
    with pytest.raises(SourceError, match=r"does not show .* message 0"):
        words_of(left_out, alone)


@pytest.mark.parametrize(
    "chat",
    [TWO, THOUGHT, TOOLS, [{"role": "assistant", "content": "a"}, *TWO]],
    ids=["two turns", "reasoning", "tools", "the assistant begins"],
)
@pytest.mark.parametrize(
    "name", ["llama3", "qwen2_5", "qwen3_vl", "gemma3", "glm4moe", "gptoss", "lfm2_v2", "phi3"]
)
def test_they_are_those_that_trl_marks_in_its_templates(name, chat):
    """TRL's training templates count a turn's header or last white space to the assistant, too; words are the same."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    folder = Path(spec.origin).parent / "chat_templates"
    training = (folder / f"{name}_training.jinja").read_text()
    try:
        texts, (passages,) = render_jinja_template(
            conversations=[chat],
            chat_template=training,
            return_assistant_tokens_mask=True,
            bos_token="<s>",
            eos_token="</s>",
        )
    except Exception as error:
        pytest.skip(f"this template has no such chats: {error}")
    theirs = "".join(texts[0][first:last] for first, last in passages)
    ours = words_of((folder / f"{name}.jinja").read_text(), chat)
    for word in ours:
        assert word.strip() in theirs


# -- from the config to the rows ------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path):
    """Opens rows of chats with a tokenizer of one token per character, and special tokens."""

    def open_(rows, *, template=CHATML + PROMPT, **given):
        alphabet = {chr(n): n for n in range(128)}
        backend = Tokenizer(models.BPE(vocab={**alphabet}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        backend.decoder = decoders.Fuse()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=SPECIAL
        )
        tokenizer.chat_template = template
        tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        table = {"modality": "text", "name": "hf", "path": str(tmp_path / "rows.jsonl"), "eval_share": 1e-9}
        table |= {"tokenizer": str(tmp_path / "tokenizer"), "data_dir": str(tmp_path / "data")}
        source = open_text(source_settings(table | given), split="train")
        return source, tokenizer

    return open_


def learned(opened_source, sample=0):
    source, tokenizer = opened_source
    return tokenizer.decode(TokenData(source).load([sample]).targets)


def text_of(opened_source, sample=0):
    source, tokenizer = opened_source
    return tokenizer.decode(source.sample(sample).tokens)


def test_a_published_template_needs_no_marks(opened):
    found = opened([{"messages": TWO}], messages_column="messages")
    assert learned(found) == "Hello!<|im_end|>Yes.<|im_end|>"
    assert text_of(found).startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!")


def test_sharegpt_is_read(opened):
    chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    found = opened([{"conversations": chat}], messages_column="conversations")
    assert text_of(found) == text_of(opened([{"messages": ONE}], messages_column="messages"))
    with pytest.raises(SourceError, match="a message is from 'alien'; expected one of human, user"):
        opened([{"c": [{"from": "alien", "value": "x"}]}], messages_column="c")
    dates = [{"role": role, "content": "2020-01-02"} for role in ("user", "assistant")]
    with pytest.raises(
        SourceError, match=r"content of a message is a datetime, .*expected text; write .* parquet"
    ):
        opened([{"messages": dates}], messages_column="messages")


def test_of_a_prompt_and_its_completion_the_completion_is_learned(opened):
    columns = {"prompt_column": "prompt", "completion_column": "completion"}
    found = opened([{"prompt": "1+1=", "completion": "2"}], **columns)
    assert (text_of(found), learned(found)) == ("1+1=2<|im_end|>", "2<|im_end|>")
    found = opened([{"prompt": TWO[:3], "completion": TWO[3:]}], **columns)
    assert learned(found) == "Yes.<|im_end|>", "the answer in the prompt is given"
    with pytest.raises(ValueError, match=r"source\.prompt_column and source\.completion_column: give both"):
        opened([], prompt_column="prompt")


def test_a_prompt_that_is_rendered_otherwise_before_its_completion_is_refused(opened):
    """Its own answers would be counted by characters that are not there."""
    columns = {"prompt_column": "prompt", "completion_column": "completion"}
    rows = [{"prompt": TWO[:3], "completion": TWO[3:]}]
    marked = REASONING.replace("{% if loop.last %}", "{% generation %}{% if loop.last %}").replace(
        "{% else %}{{ m.content }}", "{% endgeneration %}{% else %}{{ m.content }}"
    )
    assert learned(opened(rows, template=marked, **columns)).endswith("Yes.")
    counted = "{{ messages | length }}" + marked
    with pytest.raises(
        SourceError, match="renders its 3 messages of prompt otherwise once the completion follows"
    ):
        opened(rows, template=counted, **columns)
    assert learned(opened(rows, template=REASONING + PROMPT, **columns)).endswith("Yes.<|im_end|>")


def chats_of_the_users(split):
    return InMemoryDocuments("chats", [Document(f"{split}/{n}", messages=TWO) for n in range(2)])


def test_chats_of_a_custom_source_keep_their_prompts(tmp_path, opened):
    opened([{"messages": ONE}], messages_column="messages")  # saves the tokenizer
    table = {"modality": "text", "name": f"{__name__}:chats_of_the_users", "data_dir": str(tmp_path / "data")}
    table |= {"tokenizer": str(tmp_path / "tokenizer"), "seq_len": 200}
    with pytest.raises(SourceError, match=r'source\.packing = "packed" would cut its answer from its prompt'):
        open_text(source_settings(table), split="train")
    template = tmp_path / "mine.jinja"
    digests = []
    for name in ("im_start", "start"):
        template.write_text((CHATML + PROMPT).replace("im_start", name))
        given = table | {"packing": "best_fit", "chat_template": str(template)}
        digests.append(open_text(source_settings(given), split="train").digest)
    assert len(set(digests)) == 2, "a table of another template was used"


def test_what_of_a_document_is_given_is_part_of_its_digest():
    one, other = (InMemoryDocuments("d", [Document("k", "1+1=2", num_given=n)]) for n in (2, 4))
    assert one.digest != other.digest


def test_keys_of_chats_are_refused_by_a_source_without_them():
    table = {"modality": "text", "name": "stdlib", "tokenizer": "bpe", "tools": "tools.json"}
    with pytest.raises(ValueError, match=r"source\.tools: for chats only, which this source does not have"):
        source_settings(table)


def test_a_template_of_the_users_is_used(opened, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML.replace("im_start", "start") + PROMPT.replace("im_start", "start"))
    found = opened([{"messages": ONE}], messages_column="messages", chat_template=str(path))
    assert text_of(found).startswith("<|start|>user")
    with pytest.raises(SourceError, match=r"source\.chat_template 'nowhere\.jinja': cannot be read"):
        opened([{"messages": ONE}], messages_column="messages", chat_template="nowhere.jinja")


def test_template_arguments_and_tools_reach_the_template(opened, tmp_path):
    template = (
        "{{ tone }}{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>{% endfor %}" + CHATML + PROMPT
    )
    (tmp_path / "tools.json").write_text(json.dumps([CALL]))
    rows = [{"messages": ONE, "tools": json.dumps([{"type": "function", "function": {"name": "g"}}])}]
    given = {"template": template, "messages_column": "messages", "template_args": {"tone": "kind"}}
    assert text_of(opened(rows, **given, tools=str(tmp_path / "tools.json"))).startswith("kind<tool>f</tool>")
    assert text_of(opened(rows, **given, tools_column="tools")).startswith("kind<tool>g</tool>")
    digests = {opened(rows, **given | {"template_args": {"tone": t}})[0].digest for t in ("kind", "rude")}
    assert len(digests) == 2
    with pytest.raises(
        SpecError, match=r"source\.template_args: has 'tools', which each chat sets by itself"
    ):
        opened(rows, **given | {"template_args": {"tools": []}})


def test_the_date_in_a_template_is_the_same_on_every_day(opened):
    """As in Llama 3.2's: the tokens would be those of the day on which they were made."""
    asked = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    given = {"template": asked + "{{ date_string }}" + CHATML + PROMPT, "messages_column": "messages"}
    rows = [{"messages": ONE}]
    assert text_of(opened(rows, **given)).startswith("26 Jul 2024<|im_start|>")
    every = "%d %-d %m %B %b %A %a %Y %y %H:%M:%S %j %x"
    template = "  {% if true %}\n{{ strftime_now('" + every + "') }}\n {% endif %}\n" + CHATML + PROMPT
    expected = datetime.date(2024, 7, 26).strftime(every) + "\n<|im_start|>"
    assert text_of(opened(rows, **given | {"template": template})).startswith(expected)
    named = opened(rows, **given, template_args={"date_string": "01 Jan 2026"})
    assert text_of(named).startswith("01 Jan 2026<|im_start|>")


def test_a_chat_is_never_continued_without_its_prompt(opened):
    rows = [
        {"messages": [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y" * 50}]}
        for n in (5, 40, 200)
    ]
    source, tokenizer = opened(rows, messages_column="messages", seq_len=100, shuffle_documents=False)
    assert [tokenizer.decode(source.sample(n).tokens).count("user") for n in range(len(source))] == [1, 1]
    account = source.account
    assert (account["documents"], account["truncated"], account["dropped"]) == (2, 1, 1)
    for n in range(len(source)):
        sample = source.sample(n)
        for segment in range(sample.segments.max() + 1):
            assert tokenizer.decode(sample.tokens[sample.segments == segment]).startswith("<|im_start|>user")
    with pytest.raises(ValueError, match=r'source\.packing: "packed" would cut answers from their prompts'):
        opened(rows, messages_column="messages", packing="packed")


def test_what_is_for_chats_is_refused_for_texts(opened):
    with pytest.raises((ConfigError, ValueError), match=r"source\.tools_column: for chats only"):
        opened([{"text": "x"}], tools_column="tools")
