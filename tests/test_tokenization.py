from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import (
    AddedToken,
    AutoTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
)

from flexmask.demo import model_path
from flexmask.encoding.chat_template import ChatTemplate
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.errors import ModelError, RequestError
from flexmask.layout import copied_prefix_layout
from flexmask.request import Request
from small_tokenizers import KINDS, SPACED, byte_level, words_with_spaces

EXACT = [*SPACED, "byte_level"]
"""Those whose tokens decode to the text that they were made of."""

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "instruct": "<s>[INST] {{ messages[0].content }} [/INST]",
    "trimmed": "<|im_start|>user: {{ messages[0].content | trim }}<|im_end|>",
    "bare": "{{ messages[0].content }}",
    "close": "<|im_start|>{{ messages[0].content }}<|im_end|>",
}


@cache
def made(kind):
    return KINDS[kind]()


@cache
def tokenize_of(kind, template=None, **options):
    tokenizer = made(kind)
    if template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = TEMPLATES.get(template, template)
    return RequestTokenizer(tokenizer, chat_template=template is not None, **options)


def token_ids(tokenized):
    segments = [token for segment in tokenized.segments for token in segment]
    return [*tokenized.prefix, *segments, *tokenized.tail]


texts = st.text(alphabet="Aadino Q:?<s>/|_im\n  ", max_size=8)
anywhere = st.one_of(texts, st.sampled_from(["</s>", "<|im_end|>", " Ada", "Ada ", "London"]))
segments = anywhere.filter(lambda text: text.strip()).map(lambda text: text + "?:")
requests = st.builds(
    Request, segments=st.lists(segments, min_size=1, max_size=3).map(tuple), prefix=anywhere,
    suffix=anywhere,
)  # fmt: skip


@pytest.mark.parametrize("kind", EXACT)
@settings(deadline=None)
@given(request=requests)
def test_however_a_text_is_cut_its_tokens_decode_to_it(kind, request):
    tokenizer = made(kind)
    assume(request.suffix or len(request.segments) == 1)  # else all endings become one
    tokenized = tokenize_of(kind)(request)
    text = request.prefix + "".join(request.segments) + request.suffix
    assert tokenizer.decode(token_ids(tokenized), skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", EXACT)
def test_a_copied_prefix_and_its_segment_decode_to_what_one_segment_alone_is(kind):
    tokenizer, tokenize = made(kind), tokenize_of(kind)
    for prefix in ("", "Answer in one word. ", " Q"):
        request = Request(("Q: Where", " was", "Ada?"), prefix=prefix, suffix="\nA:")
        layout = copied_prefix_layout(tokenize(request), "restart")
        for number, segment in enumerate(request.segments, start=1):
            slots = zip(layout.token_ids, layout.segment_ids, strict=True)
            branch = [token for token, owner in slots if owner in (number, -1)]
            text = tokenizer.decode(branch, skip_special_tokens=True)
            assert text == prefix + segment + request.suffix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [None, "chatml", "close"])
def test_a_segment_has_the_same_tokens_whatever_stands_beside_it(kind, template):
    tokenize = tokenize_of(kind, template)
    pieces = [
        tokenize(Request(("Q: Ada born?", other), prefix=prefix, suffix="\nA:")).segments[0]
        for other in ("x", " was London")
        for prefix in ("", "Answer in one word.\n\n")
    ]
    swapped = tokenize(Request(("x", "Q: Ada born?"), prefix="Q", suffix=" A:"))
    assert {*pieces} == {swapped.segments[1]}


@pytest.mark.parametrize(
    ("tokenizer", "start"), [(words_with_spaces(), ""), (byte_level(add_prefix_space=True), " ")]
)
def test_pieces_of_words_stay_together_where_each_word_gets_a_space(tokenizer, start):
    request = Request(("Q: Where was Ada bo", "rn? "), prefix="Only a ", suffix="A: ")
    ids = token_ids(RequestTokenizer(tokenizer)(request))
    assert tokenizer.decode(ids) == start + "Only a Q: Where was Ada born? A: "


@pytest.mark.parametrize("kind", KINDS)
def test_one_segment_that_is_all_there_is_has_the_tokens_of_the_tokenizer(kind):
    tokenized = tokenize_of(kind)(Request(("Q: Where was Ada born?",)))
    assert token_ids(tokenized) == made(kind)("Q: Where was Ada born?").input_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_where_the_cuts_allow_it_a_chat_has_the_tokens_of_the_template(kind, template):
    tokenizer = copy.deepcopy(made(kind))
    tokenizer.chat_template = TEMPLATES[template]
    tokenize = RequestTokenizer(tokenizer, chat_template=True)
    text = "Answer in one word.\n\nQ: Where was Ada born?\nQ: Ada's birthplace?\nA: "
    turn = [{"role": "user", "content": text}]
    expected = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    spans = [span for span in encoded["offset_mapping"] if span[0] < span[1]]
    cuts = {0, *(start for (_, end), (start, _) in pairwise(spans) if end <= start)}
    begin = rendered.index(text.strip())
    places = [cut - begin for cut in sorted(cuts) if 0 <= cut - begin < len(text.strip())]
    compared = 0
    for first, second in pairwise(places):
        prefix, segment, suffix = text[:first], text[first:second], text[second:]
        if segment.strip():
            request = Request((segment,), prefix=prefix, suffix=suffix)
            assert token_ids(tokenize(request)) == expected, request
            compared += 1
    assert compared > 6


@pytest.mark.parametrize("kind", EXACT)
@given(prompt=segments, answer=segments)
@settings(deadline=None)
def test_generated_text_reads_as_in_a_decoding_of_prompt_and_generation(kind, prompt, answer):
    tokenizer = made(kind)
    prompt_ids = tokenizer(prompt).input_ids
    generated = tokenizer(answer, add_special_tokens=False).input_ids
    whole, before = (
        tokenizer.decode(ids, skip_special_tokens=True)
        for ids in ([*prompt_ids, *generated], prompt_ids)
    )
    assert before + tokenize_of(kind).decode(tuple(generated)) == whole


@pytest.mark.parametrize("kind", EXACT)
@given(text=texts)
@settings(deadline=None)
def test_a_text_cut_into_tokens_is_still_that_text(kind, text):
    assert "".join(tokenize_of(kind).token_texts(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_special_token_is_plain_text_in_every_piece(kind):
    tokenizer = made(kind)
    holds = {
        "prefix": Request(("Q: Ada", "A"), prefix="Q </s> born ", suffix=" A:"),
        "segment": Request(("Q: Ada", "Q </s> born"), prefix="Only ", suffix=" A:"),
        "suffix": Request(("Q: Ada", "A"), prefix="Only ", suffix=" Q </s> born"),
    }
    for template in (None, "chatml"):
        plain = tokenize_of(kind, template)(Request(("Q: Ada",), prefix="Only ", suffix=" A:"))
        assert plain.special_text is None
        ends = token_ids(plain).count(tokenizer.eos_token_id)
        for where, request in holds.items():
            tokenized = tokenize_of(kind, template)(request)
            assert tokenized.special_text == "</s>", where
            assert token_ids(tokenized).count(tokenizer.eos_token_id) == ends
            allowing = tokenize_of(kind, template, allow_special_tokens=True)(request)
            assert allowing.special_text is None
            assert token_ids(allowing).count(tokenizer.eos_token_id) == ends + 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_template_writes_stays_special_around_text_that_looks_like_it(kind):
    tokenizer = made(kind)
    turn = "<|im_start|> user <|im_end|> "
    request = Request(("Q: Ada",), prefix=turn, suffix=" " + turn)
    tokens = tokenizer.convert_ids_to_tokens(token_ids(tokenize_of(kind, "chatml")(request)))
    special = [token for token in tokens if token in ("<|im_start|>", "<|im_end|>")]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert (tokens[0], tokens[-1] == "<|im_start|>") == ("<|im_start|>", False)


def test_a_turn_marker_of_the_template_that_is_not_flagged_as_special_is_plain_text_too():
    tokenizer = copy.deepcopy(made("byte_level"))
    tokenizer.add_tokens(["<|User|>", "<think>"])
    tokenizer.chat_template = "<|User|>{{ messages[0].content }}<|im_end|>"
    marker, thought = tokenizer.convert_tokens_to_ids(["<|User|>", "<think>"])
    request = Request(("Q <|User|> Ada <think>",), suffix=" A:")
    ids = token_ids(RequestTokenizer(tokenizer, chat_template=True)(request))
    assert (ids.count(marker), ids.count(thought)) == (1, 1)


def test_text_that_the_vocabulary_lacks_is_no_special_token_and_stays_as_it_is():
    for kind in ("unigram", "word_piece", "word_level"):
        tokenized = tokenize_of(kind)(Request(("Ada née 東京",), prefix="Q ", suffix=" A:"))
        assert tokenized.special_text is None
        assert made(kind).unk_token_id in token_ids(tokenized)


def test_bytes_beside_a_special_token_are_still_bytes():
    request = Request(("東</s>",), suffix="?")
    for kind in ("llama", "mistral"):
        tokens = made(kind).convert_ids_to_tokens(token_ids(tokenize_of(kind)(request)))
        assert [token for token in tokens if token.startswith("<0x")] [:3] == [
            "<0xE6>", "<0x9D>", "<0xB1>",
        ]  # fmt: skip
        assert "</s>" not in tokens


def test_a_text_without_tokens_names_its_piece():
    tokenizer = copy.deepcopy(made("word_level"))
    tokenizer.backend_tokenizer.model.unk_token = ""
    tokenize = RequestTokenizer(tokenizer)
    request = Request(("Q: Ada", "Q: nobody"), suffix=" A:")
    tokenize.read_ahead([request])
    with pytest.raises(RequestError, match=r"^segment 2: it cannot be tokenized: .*UNK"):
        tokenize(request)


def test_tokens_that_the_model_does_not_know_name_their_piece():
    tokenizer = copy.deepcopy(made("byte_level"))
    known = len(tokenizer)
    tokenizer.add_tokens(["<think>"])
    tokenize = RequestTokenizer(tokenizer, num_embeddings=known)
    assert tokenize(Request(("Ada",), suffix="A:"))
    for request, piece in (
        (Request(("Ada", "<think> Ada"), suffix="A:"), "segment 2"),
        (Request(("Ada",), prefix="<think>", suffix="A:"), "prefix"),
        (Request(("Ada",), suffix="<think>"), "suffix"),
    ):
        with pytest.raises(RequestError) as raised:
            tokenize(request)
        assert str(raised.value).startswith(f"{piece} has token {known} ('<think>'), but the mod")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Only\nsystem first') }}", "fails: TemplateError: Only system first"),
        ("{% for m in messages %}{{ m }", "fails: TemplateSyntaxError: "),
        ("{{ messages[0].content.text.strip() }}", "fails: UndefinedError: "),
        ("{{ messages[1].content }}", "fails: UndefinedError: "),
        ("{{ messages[0].content + 1 }}", "fails: TypeError: "),
        ("{{ messages[0].content }}{{ messages[0].content }}", "does not write the text of a us"),
        ("{{ messages[0].content | upper }}", "does not write the text of a user turn once"),
        ("{{ messages | tojson }}", "does not write the text of a user turn once and unchanged"),
        ("{{ messages[0].content.split('<')[0] }}", "does not write the text of a user turn"),
        ("nothing", "does not write the text of a user turn once and unchanged"),
        ([{"name": "rag", "template": "x"}], "fails: ValueError: "),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_line(template, message):
    tokenizer = copy.deepcopy(made("byte_level"))
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}
    tokenizer.chat_template = template
    with pytest.raises(ModelError) as raised:
        RequestTokenizer(tokenizer, chat_template=True)
    line = str(raised.value)
    assert line.startswith(f"the chat template {message}")
    assert "leave out `chat_template`" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% if 'Ada' in messages[0].content %}{{ raise_exception('No Ada') }}{% endif %}"
            "{{ messages[0].content }}",
            "the chat template fails: TemplateError: No Ada",
        ),
        (
            "{{ messages[0].content.replace('Ada', 'Eve') }}",
            "the chat template changes the text of its prefix or suffix",
        ),
    ],
)
def test_a_request_that_the_template_refuses_or_changes_is_named_alone(template, message):
    tokenize = tokenize_of("byte_level", template)
    assert tokenize(Request(("Q",), prefix="Who is it? ", suffix="A:"))
    for prefix, suffix in (("Ada: ", "A:"), ("", " of Ada")):
        with pytest.raises(RequestError, match=message):
            tokenize(Request(("Q",), prefix=prefix, suffix=suffix))


def test_a_template_may_trim_the_turn_and_write_spaces_of_its_own():
    tokenizer = copy.deepcopy(made("byte_level"))
    tokenizer.chat_template = "<|im_start|> {{ messages[0].content | trim }} <|im_end|>"
    request = Request(("Q",), prefix="\n Only ", suffix=" A: ")
    written = ChatTemplate(tokenizer).write(request)
    assert written.before == ("<|im_start|> ", "Only ")
    assert written.after == (" A:", " <|im_end|>", "")


def test_spaces_that_a_special_token_eats_are_eaten_on_the_side_of_the_request_too():
    tokenizer = copy.deepcopy(made("llama"))
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                AddedToken("<|user|>", rstrip=True, normalized=False),
                AddedToken("<|end|>", lstrip=True, normalized=False),
            ]
        }
    )
    tokenizer.chat_template = "<|user|>\n{{ messages[0].content }}<|end|>"
    turn = [{"role": "user", "content": " Q: Ada A: \n"}]
    expected = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    request = Request(("Q: Ada A:",), prefix=" ", suffix=" \n")
    assert token_ids(RequestTokenizer(tokenizer, chat_template=True)(request)) == expected


def test_the_bundled_tokenizer_is_used_as_it_is():
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    request = Request(("Q: In which town was Rispo born?",), prefix="Answer.\n", suffix="\nA:")
    expected = tokenizer("Answer.\nQ: In which town was Rispo born?\nA:").input_ids
    assert token_ids(RequestTokenizer(tokenizer)(request)) == expected


class InPython:
    """A pre-tokenizer that does nothing."""

    def pre_tokenize(self, text):
        text.split(lambda _, part: [part])


def test_a_pipeline_with_a_part_in_python_puts_no_spaces_between_pieces_either():
    tokenizer = copy.deepcopy(made("llama"))
    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(InPython())
    request = Request(("Q: a</s>", "b"), prefix="Only", suffix=" A:")
    tokenized = RequestTokenizer(tokenizer)(request)
    text = tokenizer.decode(token_ids(tokenized), skip_special_tokens=True)
    assert text == "OnlyQ: a</s>b A:"


class Characters(PreTrainedTokenizer):
    """A tokenizer written in Python, which puts a space before each text."""

    def __init__(self, **options):
        self._vocabulary = {
            token: id_ for id_, token in enumerate(["</s>", *map(chr, range(128))])
        }
        super().__init__(eos_token="</s>", **options)

    @property
    def vocab_size(self):
        return len(self._vocabulary)

    def get_vocab(self):
        return dict(self._vocabulary)

    def _tokenize(self, text, **_):
        return [" ", *text]

    def _convert_token_to_id(self, token):
        return self._vocabulary[token]

    def _convert_id_to_token(self, index):
        return list(self._vocabulary)[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).removeprefix(" ")


def test_code_that_a_tokenizer_class_adds_to_its_backend_runs_for_every_piece():
    class InLowerCase(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            lower = text.lower() if isinstance(text, str) else [each.lower() for each in text]
            return super()._encode_plus(lower, *args, **kwargs)

    plain = byte_level()
    tokenizer = InLowerCase(tokenizer_object=plain.backend_tokenizer)
    request = Request(("Q: Where?", "Q: WHO?"), suffix="\nA:")
    lower = Request(("q: where?", "q: who?"), suffix="\na:")
    assert RequestTokenizer(tokenizer)(request) == RequestTokenizer(plain)(lower)


def test_a_tokenizer_written_in_python_puts_no_spaces_between_pieces_either():
    tokenizer = Characters()
    tokenize = RequestTokenizer(tokenizer)
    request = Request(("Q: a</s>", "b"), prefix="Only", suffix=" A:")
    tokenized = tokenize(request)
    assert tokenizer.decode(token_ids(tokenized)) == "OnlyQ: a</s>b A:"
    assert (tokenizer.eos_token_id in token_ids(tokenized)) is False
    assert tokenized.special_text == "</s>"
    assert tokenize.decode(tuple(tokenizer(" b").input_ids[1:])) == " b"
