import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsl_d2.hashtags import normalize_hashtag


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("#BrownBear", "brownbear"),
        ("#brown_bear", "brownbear"),
        ("brown bear", "brownbear"),
        ("Brown-Bear", "brownbear"),
        ("＃ＢｒｏｗｎＢｅａｒ", "brownbear"),
        ("  #brownbear\n", "brownbear"),
        ("adam's_apple", "adamsapple"),
        ("9/11", "911"),
        ("Straße", "strasse"),
        ("CAFE\u0301", "caf\u00e9"),  # a combining accent composes with its letter
        ("#犬", "犬"),
        ("#❤️🐻", ""),
        ("#", ""),
        ("", ""),
    ],
)
def test_spellings_of_a_hashtag_become_one_key(text, key):
    assert normalize_hashtag(text) == key


@given(st.text())
def test_normalizing_a_key_does_not_change_it(text):
    key = normalize_hashtag(text)
    assert normalize_hashtag(key) == key
    assert key == "" or key.isalnum()


@given(st.text(alphabet=st.characters(codec="ascii")))
def test_the_short_cut_for_ascii_agrees_with_the_general_rule(text):
    # "ſ" (long s) folds to "s" and sends the text through the general rule.
    assert normalize_hashtag(text + "ſ") == normalize_hashtag(text) + "s"


def test_what_is_no_string_is_refused_by_type_and_value():
    with pytest.raises(TypeError, match=r"must be a string, got int: 42"):
        normalize_hashtag(42)  # type: ignore[arg-type]
