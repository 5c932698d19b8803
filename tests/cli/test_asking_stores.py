"""How a bucket is asked: a store that fails is asked one thing, one that refuses is asked for its reason."""

import re
from datetime import timedelta

import pytest

from sparseprune.checkpoint import objects
from sparseprune.checkpoint.remote import RemotePath
from tests.stores import front


@pytest.mark.parametrize(
    ("status", "methods", "why"),
    [
        (503, {"HEAD"}, "the store answered 503; run again later"),
        (400, {"HEAD", "GET"}, "the credentials have expired; sign in again, or set AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_refusal_is_asked_for_its_reason_and_a_failure_is_not(
    status: int, methods: set[str], why: str, bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_GIVEN_UP", timedelta())
    with front(s3_server, monkeypatch) as seen:
        seen.instead = lambda *_: (status, b"<Error><Code>ExpiredToken</Code></Error>" * (status < 500))
        with pytest.raises(OSError, match=re.escape(why)):
            RemotePath(f"{bucket}/model").facts()
    assert {one.method for one in seen.asked} == methods
