"""Secrets are removed from messages and logs."""

import pytest

from scfm_core.secrets import scrub


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "my_secret", "DbPassword", "AZURE_CREDENTIAL"])
def test_a_value_becomes_its_variable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "4711-hush")
    assert scrub("it is 4711-hush, and 4711-hush again") == f"it is ${name}, and ${name} again"


def test_other_text_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "x")  # too short: it may be part of ordinary words
    monkeypatch.setenv("MY_PATH", "/data/shards")
    monkeypatch.setenv("EMPTY_TOKEN", "")
    assert scrub("fax: /data/shards") == "fax: /data/shards"


@pytest.mark.parametrize(("first", "second"), [("4711-hush", "4711-hush-hush"), ("4711-hush-hush", "4711-hush")])
def test_one_secret_begins_with_another(monkeypatch: pytest.MonkeyPatch, first: str, second: str) -> None:
    monkeypatch.setenv("FIRST_TOKEN", first)
    monkeypatch.setenv("SECOND_TOKEN", second)
    assert "hush" not in scrub("4711-hush-hush")


@pytest.mark.parametrize(
    ("address", "scrubbed"),
    [
        ("see https://me:pass@host/a/b.tar, twice", "see https://host/a/b.tar, twice"),
        ("https://host/b.tar?X-Signature=abc#part", "https://host/b.tar"),
        ("https://host/b.tar#part", "https://host/b.tar"),
        ("s3://bucket/b.tar", "s3://bucket/b.tar"),
        ("why? me@host", "why? me@host"),
    ],
)
def test_addresses_lose_user_query_and_fragment(address: str, scrubbed: str) -> None:
    assert scrub(address) == scrubbed
