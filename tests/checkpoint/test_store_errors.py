"""What an object store says when it fails, as a clause that says what to do."""

import errno
import re

import pytest

from sparseprune.checkpoint.objects import _HOW_TO_SIGN_IN, store_errors

exceptions = pytest.importorskip("obstore.exceptions")
_ANSWER = "Generic S3 error: Error performing GET http://s in 2ms - Server returned non-2xx status code: "
_XML = "<Error><Code>{}</Code><Message>{}.</Message></Error>"


def _answer(status: int, code: str = "", says: str = "") -> str:
    return f"{_ANSWER}{status} It: {_XML.format(code, says) if code else ''}\n\nDebug source:\nnot shown 400"


SAID = {
    "no credentials": (
        exceptions.GenericError(f"{_ANSWER[:30]} GET http://169.254.169.254/latest/api/token: timed out"),
        errno.EACCES,
        f"no credentials were found; {_HOW_TO_SIGN_IN['s3']}",
    ),
    "permission denied": (
        exceptions.PermissionDeniedError(_answer(403, "AccessDenied", "not you")),
        errno.EACCES,
        "permission denied: not you; ask for the right to list and read this bucket",
    ),
    "changed": (
        exceptions.PreconditionError(_answer(412, "PreconditionFailed")),
        errno.ESTALE,
        "it changed while it was read",
    ),
    "no bucket": (
        FileNotFoundError(_answer(404, "NoSuchBucket", "none")),
        errno.ENOENT,
        "there is no bucket s3://b; give an existing one",
    ),
    "no object": (FileNotFoundError(_answer(404, "NoSuchKey")), errno.ENOENT, "No such file or directory"),
    "no name": (
        ValueError("path has an empty segment\nand more"),
        errno.EINVAL,
        "this is no name of an object: path has an empty segment",
    ),
    "another region": (
        exceptions.GenericError(_answer(301, "PermanentRedirect")),
        errno.EREMOTEIO,
        "the bucket is in another region; set AWS_REGION to that of the bucket",
    ),
    "too busy": (
        exceptions.GenericError(_answer(503, "SlowDown", "less, please")),
        errno.EREMOTEIO,
        "the store answered 503: less, please; run again later",
    ),
    "no answer": (
        exceptions.GenericError("Generic S3 error: HTTP error: error sending request"),
        errno.EREMOTEIO,
        "the store cannot be reached; check the network and the endpoint",
    ),
    "something else": (
        exceptions.GenericError("Generic S3 error: a surprise\n\nDebug source:\nmore"),
        errno.EREMOTEIO,
        "Generic S3 error: a surprise; run again later",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_says_what_failed_and_what_to_do(name: str) -> None:
    error, number, clause = SAID[name]
    with pytest.raises(OSError, match=re.escape(clause)) as said, store_errors("s3://b", "a/key"):
        raise error
    assert (said.value.errno, said.value.strerror, said.value.filename) == (number, clause, "s3://b/a/key")
    assert said.value.__cause__ is error


def test_an_error_that_has_its_number_stays() -> None:
    error = FileNotFoundError(errno.ENOENT, "none", "here")
    with pytest.raises(FileNotFoundError) as said, store_errors("s3://b", ""):
        raise error
    assert said.value is error
