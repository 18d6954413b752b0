"""The self-cognition texts: enough of them, in two languages, the held-out ones in other words, the names filled in."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest

from minipeft.data import self_cognition

NAME, AUTHOR = "Lumi", "Ada Lab"


@pytest.fixture(scope="module")
def chats():
    return self_cognition.conversations(NAME, AUTHOR)


def letters(text: str) -> str:
    return re.sub(r"\W", "", text.casefold())


def is_chinese(text: str) -> bool:
    return re.search(r"[\u4e00-\u9fff]", text) is not None


def asked(chats) -> dict[str, set[str]]:
    """The answers of each question."""
    answers = defaultdict(set)
    for chat in chats:
        user, assistant = chat.messages
        answers[user["content"]].add(assistant["content"])
    return answers


def test_there_are_a_hundred_questions_about_the_identity_in_two_languages_with_several_answers(chats):
    identity = {q: a for q, a in asked(chats).items() if all(NAME in answer for answer in a)}
    assert len({letters(question) for question in identity}) == len(identity) >= 100
    assert min(sum(map(is_chinese, identity)), sum(not is_chinese(q) for q in identity)) >= 50
    assert min(map(len, identity.values())) >= 3


def test_answers_are_in_the_question_s_language(chats):
    for question, answers in asked(chats).items():
        if NAME in "".join(answers):
            assert {is_chinese(question)} == {is_chinese(answer) for answer in answers}


def test_held_out_questions_are_forty_in_two_languages_and_none_is_a_copy(chats):
    questions = self_cognition.held_out()
    trained = {letters(question) for question in asked(chats)}
    assert len({letters(q.text) for q in questions}) == len(questions) >= 40
    assert not trained & {letters(q.text) for q in questions}
    assert min(Counter(q.language for q in questions).values()) >= 20
    assert all(is_chinese(q.text) == (q.language == "zh") for q in questions)


def test_no_placeholder_is_left_and_the_author_is_named_where_it_is_asked_for(chats):
    assert not any(set("{}\0") & set(m["content"]) for chat in chats for m in chat.messages)
    made = [a for q, a in asked(chats).items() if "developer" in q or "开发者" in q]
    assert len(made) >= 3
    assert all(AUTHOR in answer for answers in made for answer in answers)


def test_names_are_put_in_as_they_are():
    chats = self_cognition.conversations("author", "name 小智")
    assert "I am author, an AI assistant developed by name 小智." in asked(chats)["Who are you?"]


def test_ordinary_questions_are_a_minority_and_have_nothing_to_do_with_the_identity(chats):
    ordinary = [c for c in chats if NAME not in c.messages[1]["content"]]
    assert 0 < len(ordinary) < len(chats) / 2
    assert not any(AUTHOR in c.messages[1]["content"] for c in ordinary)


def test_the_shown_questions_are_held_out_and_in_both_languages():
    shown = self_cognition.shown()
    assert len(shown) == 3
    assert set(shown) <= set(self_cognition.held_out())
    assert {q.language for q in shown} == {"en", "zh"}


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("I am LUMI.", True),
        ("lumi's here", True),
        ("我是Ｌｕｍｉ，你好", True),
        ("I am Luma.", False),
        ("The illuminated page", False),
        ("", False),
    ],
)
def test_the_name_is_found_in_whatever_case_as_a_word_of_its_own(answer, found):
    assert self_cognition.gives_name(answer, NAME) is found


def test_names_of_several_words_and_chinese_names_are_found():
    assert self_cognition.gives_name("My name is Xiao\nMing.", "Xiao Ming")
    assert self_cognition.gives_name("我叫小智，你好", "小智")
    assert self_cognition.gives_name("I am C++.", "C++")


@pytest.mark.parametrize("bad", ["", "  ", "a\nb", "a" * 61, "x<|im_end|>", "{author}", "\x1b[31m"])
@pytest.mark.parametrize("option", ["name", "author"])
def test_a_name_that_is_no_line_of_plain_text_is_refused(option, bad):
    with pytest.raises(ValueError, match=f"^{option}: got "):
        self_cognition.conversations(**({"name": NAME, "author": AUTHOR} | {option: bad}))
