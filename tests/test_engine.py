"""The library's own door: settings by name, conversations, threads, closing, and what a notebook shows."""

from __future__ import annotations

import gc
import html
import re
import threading
import weakref
from html.parser import HTMLParser

import pytest

from specextend import SpecExtend
from specextend.config import RetrievalConfig, SpecExtendConfig, TreeConfig, override
from specextend.data.templates import encode_chat, format_chat
from specextend.decoding.html import spans_by_origin
from specextend.decoding.output import Generation, Round
from specextend.engine import default_config
from specextend.errors import ConfigError, InputError

TREE = TreeConfig(12, 4, 0.1)
SPECEXTEND = SpecExtendConfig.specextend(tree=TREE, retrieval=RetrievalConfig(8, 6, 2))
NEW = 24


@pytest.fixture
def engine(make_engine, make_model, perturbed) -> SpecExtend:
    target = make_model("gqa")
    return make_engine(target, perturbed(target, 0.05), SPECEXTEND)


# ---- settings


def test_settings_by_name_change_only_what_they_name():
    config = override(SPECEXTEND, {"draft_cache": "full", "tree": {"nodes": 7}, "retrieval": {"top_k": 9, "sink": 1}})
    assert (config.draft_cache, config.tree, config.retrieval) == (
        "full", TreeConfig(7, 4, 0.1), RetrievalConfig(8, 9, 2, sink=1),
    )  # fmt: skip
    assert override(SPECEXTEND, {}) == SPECEXTEND
    assert override(SPECEXTEND, {"tree": TreeConfig(3)}).tree == TreeConfig(3)


def test_from_pretrained_takes_settings_over_the_default(bundled_engine):
    engine = SpecExtend.from_pretrained("bundled", device="cpu", tree={"nodes": 5}, draft_window=64)
    default = default_config(bundled_engine.models)
    assert default.tree == TreeConfig.priced() and engine.config.tree == TreeConfig(5)
    assert engine.config == override(default, {"tree": {"nodes": 5}, "draft_window": 64})
    changed = SpecExtend.from_pretrained("bundled", config=SPECEXTEND, device="cpu", tree={"nodes": 5})
    assert changed.config == override(SPECEXTEND, {"tree": {"nodes": 5}})


def test_with_config_takes_settings_over_the_engines(engine):
    assert engine.with_config(tree={"nodes": 5}).config == override(SPECEXTEND, {"tree": {"nodes": 5}})
    standard = SpecExtendConfig.standard()
    assert engine.with_config(standard, retrieval={"top_k": 9}).config.retrieval.top_k == 9


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"nodez": 3}, "setting 'nodez' is unknown; there are .*tree"),
        ({"tree": {"nodez": 3}}, "tree setting 'nodez' is unknown; there are .*nodes"),
        ({"tree": {"nodes": 0}}, "nodes is 0"),
        ({"tree": 20}, 'tree is 20; give a mapping like tree={"nodes": 20} or a TreeConfig'),
        ({"nodes": 20}, 'nodes is a setting of the tree; write tree={"nodes": 20}'),
        ({"top_k": 40}, 'top_k is a setting of the retrieval; write retrieval={"top_k": 40}'),
    ],
)
def test_wrong_setting_is_a_line_before_anything_is_loaded(settings, message):
    with pytest.raises(ConfigError, match=message.replace("{", r"\{")) as raised:
        SpecExtend.from_pretrained("no such model", **settings)
    assert "\n" not in str(raised.value)


# ---- conversations


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
]


def test_conversation_without_a_template_is_its_contents_with_blank_lines(bundled_models):
    assert format_chat(MESSAGES, None, bundled_models.tokenizer) == "Be brief.\n\nHello.\n\nYes?\n\nWhy?"


def test_conversation_by_a_fschat_template_has_its_roles(bundled_models):
    text = format_chat(MESSAGES, "vicuna_v1.1", bundled_models.tokenizer)
    assert text == "Be brief. USER: Hello. ASSISTANT: Yes?</s>USER: Why? ASSISTANT:"


def test_conversation_by_the_tokenizers_template_has_special_tokens_once(bundled_models):
    tokenizer = bundled_models.tokenizer
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    try:
        ids = encode_chat(MESSAGES[:2], "chat", tokenizer)
        assert tokenizer.decode(ids) == "<s>system: Be brief.\nuser: Hello.\n"
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(InputError, match="refuses these messages .roles must alternate"):
            encode_chat(MESSAGES, "chat", tokenizer)
    finally:
        tokenizer.chat_template = None


def test_chat_is_generate_on_the_conversation(bundled_engine):
    prompt = "Be brief.\n\nHello.\n\nYes?\n\nWhy?"
    assert bundled_engine.chat(MESSAGES, 12).token_ids == bundled_engine.generate(prompt, 12).token_ids


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ([{"role": "user"}], "message 0 must be like"),
        (["hello"], "message 0 must be like"),
        ([MESSAGES[0], {"role": "tool", "content": "x"}], "message 1 has the role 'tool'; roles are system, user"),
        ([{"role": "user", "content": " "}], "messages are empty"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, message, bundled_engine):
    with pytest.raises(InputError, match=message):
        bundled_engine.chat(messages, 4)


def test_prompt_may_be_a_list_of_ids(engine, make_prompt):
    prompt = make_prompt(40)
    assert engine.generate(prompt.tolist(), NEW).token_ids == engine.generate(prompt, NEW).token_ids


# ---- threads


def test_threads_queue_and_each_gets_the_answer_given_alone(engine, make_prompt):
    """Two settings over one cache, generating and streaming at once."""
    engines = [engine, engine.with_config(SpecExtendConfig.standard(tree=TREE))]
    prompts = [make_prompt(30 + 20 * index, seed=index) for index in range(8)]
    expected = [engine.autoregressive(prompt, NEW).text for prompt in prompts]
    answers: list = [None] * 8

    def answer(index: int) -> None:
        one = engines[index % 2]
        streamed = index % 4 < 2
        answers[index] = (
            "".join(one.stream(prompts[index], NEW)) if streamed else one.generate(prompts[index], NEW).text
        )

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == expected


def test_another_thread_waits_until_a_stream_is_closed(engine, make_prompt):
    stream = engine.stream(make_prompt(30), 200)
    next(stream)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (engine.generate(make_prompt(20), 4), done.set()))
    thread.start()
    assert not done.wait(0.3), "a generation began beside a stream"
    stream.close()
    assert done.wait(30)
    thread.join()


def test_what_an_observer_raises_ends_the_generation_and_the_turn(engine, make_prompt):
    def stop(output, round_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(make_prompt(30), NEW, on_round=stop)
    assert engine.generate(make_prompt(30), NEW).new_tokens == NEW


# ---- closing


def test_closed_engine_says_so_and_gives_its_memory_back(make_model, make_engine, make_prompt):
    engine = make_engine(make_model("gqa"), make_model("gqa"), SPECEXTEND)
    result = engine.generate(make_prompt(100), NEW)
    assert engine.cache_bytes > 0
    cache, models = weakref.ref(engine._cache), weakref.ref(engine.models)
    engine.close()
    engine.close()
    assert cache() is None and models() is None and engine.cache_bytes == 0
    assert result.text and len(result._repr_html_()) > len(result.text), "a result outlives its engine"
    prompt = make_prompt(10)
    for call in (
        lambda: engine.generate(prompt, 4),
        lambda: engine.autoregressive(prompt, 4),
        lambda: next(engine.stream(prompt, 4)),
        lambda: engine.chat(MESSAGES, 4),
        lambda: engine.encode("hello"),
        lambda: engine.with_config(SPECEXTEND),
        lambda: engine.limit,
    ):
        with pytest.raises(InputError, match="this engine is closed; make another"):
            call()


def test_closing_waits_for_other_threads_and_ends_an_own_stream(make_model, make_engine, make_prompt):
    engine = make_engine(make_model("gqa"), make_model("gqa"), SPECEXTEND)
    begun, answers = threading.Event(), []
    thread = threading.Thread(
        target=lambda: answers.append(engine.generate(make_prompt(30), 60, on_round=lambda *_: begun.set()).new_tokens)
    )
    thread.start()
    begun.wait(30)
    engine.close()
    thread.join(30)
    assert answers == [60]
    with make_engine(make_model("gqa"), make_model("gqa"), SPECEXTEND) as engine:
        stream = engine.stream(make_prompt(30), 60)
        next(stream)
    with pytest.raises(InputError, match="engine is closed"):
        next(stream)


def test_engine_of_another_setting_outlives_a_closed_one(make_model, make_engine, make_prompt):
    engine = make_engine(make_model("gqa"), make_model("gqa"), SPECEXTEND)
    other = engine.with_config(SpecExtendConfig.standard(tree=TREE))
    expected = engine.generate(make_prompt(50), NEW).token_ids
    engine.close()
    gc.collect()
    assert other.generate(make_prompt(50), NEW).token_ids == expected


# ---- in a notebook


class _Marked(HTMLParser):
    """The page's text, and what of it is underlined."""

    def __init__(self):
        super().__init__()
        self.text, self.underlined, self._open = "", [], False

    def handle_starttag(self, tag, attributes):
        self._open = tag == "span" and "underline" in dict(attributes)["style"]
        assert not self._open or "color" in dict(attributes)["style"]

    def handle_endtag(self, tag):
        self._open = False

    def handle_data(self, data):
        self.text += data
        if self._open:
            self.underlined.append(data)


def read(generation: Generation) -> _Marked:
    page = _Marked()
    page.feed(generation._repr_html_())
    return page


def test_notebook_shows_the_text_with_accepted_tokens_marked_and_figures(bundled_engine):
    result = bundled_engine.generate("The king said that", 40)
    page = read(result)
    assert page.text.startswith(result.text)
    assert re.search(r"40 tokens \(length\) after 5; \d\.\d\d draft tokens accepted per round", page.text)
    decode = bundled_engine.models.tokenizer.decode
    begin, expected = 1, []
    for one in result.rounds:
        drafted = result.token_ids[begin : begin + one.accepted]
        expected.append(decode(drafted))
        begin += len(one.tokens)
    assert page.underlined == [*filter(None, expected), "accepted draft tokens"]  # the last is the legend


def test_notebook_text_is_escaped_and_cut_at_a_stop_string():
    pieces = ["<b>", "&amp;", "<script>", "ab", "STOP"]
    rounds = [Round([1, 2], 1, 1, {}), Round([3, 4], 1, 1, {})]
    whole = "".join(pieces)
    generation = Generation(
        1,
        [0, 1, 2, 3, 4],
        whole[:-4],
        "stop",
        rounds,
        {"target": 1.0},
        decode=lambda ids: "".join(pieces[i] for i in ids),
    )
    page = generation._repr_html_()
    assert "<script>" not in page and html.escape("<b>&amp;<script>") in re.sub("<.*?>", "", page)
    assert read(generation).text.startswith("<b>&amp;<script>ab5 tokens (stop)")
    assert "STOP" not in page


def test_character_of_several_tokens_is_whole_in_one_span():
    octets = "aéz".encode() + "🙂".encode()
    rounds = [Round([1, 2], 2, 1, {}), Round([3, 4, 5], 2, 2, {}), Round([6, 7], 1, 1, {})]

    def decode(ids):
        return bytes(octets[i] for i in ids).decode(errors="replace")

    spans = list(spans_by_origin(list(range(8)), rounds, decode))
    assert spans == [("a", False), ("", True), ("é", False), ("z", True), ("", False), ("", True), ("🙂", False)]
