"""Rendering: what a page cannot hold is replaced, and a missing package is said."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glu4.pages.template import clean, render


@given(st.text(st.characters(exclude_categories=())))
def test_clean_text_can_be_written_and_has_no_controls(text):
    found = clean(text)
    found.encode("utf-8")
    assert len(found) == len(text)
    assert not any(ord(c) < 32 and c not in "\t\n" for c in found)


def test_ordinary_text_stays_as_it_is():
    text = "A@B1 <b> & “ü” 日本 é\n\t"
    assert clean(text) == text


def test_marks_that_turn_the_direction_of_text_are_replaced():
    assert clean("a\u202eb\u2066") == "a\ufffdb\ufffd"


def test_without_jinja2_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "glu4\[report\]"'):
        render("bench.html.j2")
