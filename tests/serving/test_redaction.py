"""What is taken out of texts, and what only looks like it."""

import json
import re
import string

import phonenumbers
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from instil.errors import UsageError
from instil.serving.feedback.redaction import Redactor

US, GERMANY, FRANCE = Redactor("US"), Redactor("DE"), Redactor("FR")


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Write to ann.lee+news@mail.example.co.uk, or not.", "Write to [email], or not."),
        ("<a@b.io>; (c_d@e-f.org)!", "<[email]>; ([email])!"),
        ("'o'brien@example.com' said", "'[email]' said"),
        ("mailto:ann%40example.com?subject=x", "mailto:[email]?subject=x"),
        ("[ann@example.com](mailto:ann@example.com)", "[[email]](mailto:[email])"),
        ("ann@example.com(home)", "[email](home)"),
        ("müller@müller.de и почта@пример.рф", "[email] и [email]"),
        ("メールはann@example.comです。", "メールは[email]です。"),
        ("ANN@EXAMPLE.COM.", "[email]."),
        ("_ann@example.com_ ann@example.com.5", "[email]_ [email].5"),
        ("a@b.com@c.com", "[email]@c.com"),
        ("ann＠example.com", "[email]"),
    ],
)
def test_emails(text, redacted):
    assert US.text(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "@ann said @bob: follow @nasa.gov",
        "npm i lodash@4.17.21 react@18.2.0-beta @types/node@20.1",
        "git clone git@github.com:owner/repository.git",
        "loss = X.T@w.mean(0) + A@np.linalg.inv(B)",
        "@app.route('/x')\ndef f(): return this@Main.context",
        "https://mastodon.social/@ann.lee",
        "user@localhost 5@6 a@ @b.com",
    ],
)
def test_what_is_no_email_stays(text):
    assert US.text(text) == text


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Call 415-555-2671.", "Call [phone]."),
        ("(415) 555-2671, 415.555.2671 or 4155552671", "[phone], [phone] or [phone]"),
        ("tel:+1-415-555-2671", "tel:[phone]"),
        ("+44 20 7946 0958 and +49 (0)171 1234567", "[phone] and [phone]"),
        ("at 415 555 2671 2 times", "at [phone] 2 times"),
        ("+1 415 555 2671 12 hours", "[phone] 12 hours"),
        ("2024-11-22 415-555-2671 415-555-2672", "2024-11-22 [phone] [phone]"),
        ("電話は4155552671です", "電話は[phone]です"),
        ("+1 202 555 0143 4111 1111 1111 1111", "[phone] [card]"),
    ],
)
def test_phone_numbers(text, redacted):
    assert US.text(text) == redacted


def test_phone_numbers_of_a_region():
    assert GERMANY.text("0171 1234567, 030/123456, 0049 171 1234567") == "[phone], [phone], [phone]"
    assert FRANCE.text("01 42 68 53 00") == "[phone]"
    assert US.text("0171 1234567, 01 42 68 53 00") == "0171 1234567, 01 42 68 53 00"
    assert GERMANY.text("+1 415 555 2671") == "[phone]"
    with pytest.raises(UsageError, match="--phone-region USA: is no country code"):
        Redactor("USA")


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("4111111111111111", "[card]"),
        ("Visa 4111 1111 1111 1111, Amex 3782-822463-10005", "Visa [card], Amex [card]"),
        ("exp 2025 4111 1111 1111 1111 123", "exp 2025 [card] 123"),
        ("１２ ４１１１１１１１１１１１１１１１", "１２ [card]"),
        ("番号は5555555555554444です", "番号は[card]です"),
        ("4222222222222 6011000990139424 3566002020360505", "[card] [card] [card]"),
    ],
)
def test_cards(text, redacted):
    assert US.text(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "In 1999, 2020 and 2020-2024; 2020 2021 2022 2023.",
        "On 2024-01-15 at 12:30:45.123456, or 01/15/2024, 15.01.2024, 20240115T123045Z",
        "It costs $4,155,552,671.50, 1.000.000,00 EUR, £12 345 678 or 4155552671.50",
        "pi is 3.14159265358979323846, 0.4155552671, -0.4111111111111111 and 6.02214076e23",
        "1700000000 and 1700000000000 and 1700000000000000 are times",
        "ISBN 0-306-40615-2, ISBN-13: 978-0-306-40615-7, ISBN 9780306406157",
        "192.168.100.200, 10.0.0.1, 212.55.50.143:8080, 2001:db8::8a2e:370:7334, 255.255.255.0",
        "d41d8cd98f00b204e9800998ecf8427e 4155552671abcdef 0x4155552671 a4111111111111111b",
        "550e8400-e29b-41d4-a716-446655440000",
        "v1.2.3-20240115, python-3.11.7, build 20231005.1",
        "fib = [0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377]",
        "2 4 8 16 32 64 128 256 512 1024 2048 4096 8192 16384 32768 65536",
        "100 200 300 400 500 600 700 800 900; 1-2-3-4-5-6-7-8-9",
        "for i in range(1000000000): x[i] = 1234567890123",
        "INT_MAX is 2147483647, INT_MIN -2147483648",
        "4111111111111112 is off by one, 41111111111111111111 too long",
    ],
)
@pytest.mark.parametrize("redactor", [US, GERMANY, FRANCE], ids=["US", "DE", "FR"])
def test_numbers_that_are_something_else_stay(text, redactor):
    assert redactor.text(text) == text


around = st.text(st.characters(exclude_categories=["Nd", "Cs"], exclude_characters="@＠+%"), max_size=30)
names = st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)
emails = st.builds(
    "{}@{}.{}".format,
    st.lists(names, min_size=1, max_size=3).flatmap(
        lambda parts: st.sampled_from("._+-'").map(lambda by: by.join(parts))
    ),
    st.lists(names, min_size=1, max_size=3).flatmap(lambda parts: st.sampled_from(".-").map(lambda by: by.join(parts))),
    st.sampled_from(["com", "org", "de", "museum", "io", "co.uk", "рф"]),
)


@given(around, emails, around)
def test_no_email_survives(before, email, after):
    assume(email.split("@")[0] not in ("git", "this", "super"))
    found = US.text(f"{before} {email} {after}")
    assert email not in found
    assert found == f"{US.text(before)} [email] {US.text(after)}"


@st.composite
def card_numbers(draw):
    """Numbers of the usual networks, with the digit at the end that makes them add up."""
    start, length = draw(
        st.sampled_from([("4", 16), ("4", 13), ("51", 16), ("2221", 16), ("34", 15), ("36", 14), ("62", 19)])
    )
    digits = start + "".join(draw(st.lists(st.sampled_from(string.digits), min_size=19, max_size=19)))
    digits = digits[: length - 1]
    total = sum(int(d) if at % 2 else sum(divmod(2 * int(d), 10)) for at, d in enumerate(reversed(digits)))
    digits += str(-total % 10)
    sizes = {13: (4, 3, 3, 3), 14: (4, 6, 4), 15: (4, 6, 5), 16: (4, 4, 4, 4), 19: (4, 4, 4, 4, 3)}[length]
    by = draw(st.sampled_from(["", " ", "-"]))
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return by.join(digits[end - size : end] for size, end in zip(sizes, ends, strict=True))


@given(around, card_numbers(), around, st.sampled_from(["", "12 ", "2025 "]), st.sampled_from(["", " 123"]))
def test_no_card_number_survives(before, number, after, left, right):
    found = US.text(f"{before} {left}{number}{right} {after}")
    assert number not in found
    assert f" {left}[card]" in found
    if not right:  # else the number and what follows may add up to a longer one
        assert f" {left}[card] " in found


@given(around, card_numbers(), st.integers(1, 9), around)
def test_a_number_that_does_not_add_up_is_no_card(before, number, more, after):
    assume(not re.fullmatch(r"[\d -]{23}", number))  # its first 16 digits may add up by themselves
    wrong = number[:-1] + str((int(number[-1]) + more) % 10)
    assert "[card]" not in US.text(f"{before} {wrong} {after}")


REGIONS = [
    region for region in ("US", "GB", "DE", "FR", "IN", "BR", "JP", "NG", "AU") if phonenumbers.example_number(region)
]


@given(around, st.sampled_from(REGIONS), st.sampled_from([0, 1, 2, 3]), around)
def test_no_phone_number_survives(before, region, way, after):
    """Example numbers of many countries: as called from abroad, whatever the region, and as called within it."""
    number = phonenumbers.example_number_for_type(region, phonenumbers.PhoneNumberType.MOBILE)
    text = phonenumbers.format_number(number, way)
    redactor = Redactor(region) if way == phonenumbers.PhoneNumberFormat.NATIONAL else FRANCE
    found = redactor.text(f"{before} {text} {after}")
    assert str(number.national_number) not in re.sub(r"\D", "", found)
    assert "[phone]" in found


@given(st.text())
def test_a_text_without_digits_and_signs_stays(text):
    text = re.sub(r"[\d@＠]|%40", "", text)
    assert US.text(text) == text


@given(st.text(alphabet="@.ab1 4+-()%'", max_size=60))
def test_any_text_is_taken(text):
    found = US.text(text)
    assert found.count("[") - found.count("[email]") - found.count("[card]") - found.count("[phone]") == 0


def test_json_values():
    arguments = json.dumps({"to": "ann@example.com", "card": 4111111111111111, "n": 7, "ok": True})
    held = {
        "tool_calls": [{"function": {"name": "send", "arguments": arguments}}],
        "ann@example.com": ["415-555-2671", 4111111111111111, None],
        "arguments": "not JSON: ann@example.com",
    }
    found = US.value(held)
    assert json.loads(found["tool_calls"][0]["function"]["arguments"]) == {
        "to": "[email]",
        "card": "[card]",
        "n": 7,
        "ok": True,
    }
    assert found["[email]"] == ["[phone]", 4111111111111111, None], "a number stays that is no argument of a call"
    assert found["arguments"] == "not JSON: [email]"
    spaced = '{"n":  1,"t":"\\u00e4"}'
    assert US.value({"arguments": spaced}) == {"arguments": spaced}, "what holds nothing is as it was, to the space"
    assert US.value({"arguments": '"\\u0061nn\\u0040example.com"'}) == {"arguments": '"[email]"'}


@pytest.mark.parametrize(
    "text", ["a'" * 50_000, "@a.b" * 25_000, "a@" + "b." * 50_000, "a@b." + "c" * 100_000, "4" * 100_000]
)
def test_long_runs_take_no_long_time(text):
    """Each of them takes a moment; a search that went back and forth would take minutes."""
    import time

    begin = time.process_time()
    US.text(text)
    assert time.process_time() - begin < 10
