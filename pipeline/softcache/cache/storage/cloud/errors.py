"""What a bucket's errors mean, in one message: which object, the server's answer, what to do next."""

from __future__ import annotations

import re
from typing import NamedTuple

from softcache.errors import CacheNotFoundError, SoftcacheError, StorageError

__all__ = ["PROVIDERS", "Provider", "is_range_error", "is_transient", "translate_error"]


class Provider(NamedTuple):
    """Whose bucket a scheme names, and the environment that leads to it.

    Attributes:
        name: of obstore's class.
        prefix: of its environment variables.
        credentials: where they are looked for.
        endpoint: the variable that names another server.
    """

    name: str
    prefix: str
    credentials: str
    endpoint: str


PROVIDERS = {
    "s3": Provider(
        "S3Store",
        "AWS",
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN if they are temporary), or the machine's role",
        "AWS_ENDPOINT_URL",
    ),
    "gs": Provider(
        "GCSStore",
        "GOOGLE",
        "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT, or the machine's service account",
        "GOOGLE_BASE_URL",
    ),
    "az": Provider(
        "AzureStore",
        "AZURE",
        "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or the machine's identity",
        "AZURE_STORAGE_ENDPOINT",
    ),
}

_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist", "InvalidBucketName")
_NO_CREDENTIALS = (
    "169.254.169.254",
    "Error performing token request",
    "Account must be specified",
    "MissingAccessKeyId",
    "MissingSecretAccessKey",
    "metadata.google.internal",
)
_EXPIRED = (
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "RequestExpired",
    "AuthorizationHeaderMalformed",
)
_REFUSED = re.compile(r"\b(401 Unauthorized|403 Forbidden)\b")
_STATUS = re.compile(r"Server returned (?:non-2xx status code|error response): (\d{3} [^:\n]*)")


_NO_PATH = "object with invalid path"
"""What the client gives of a listing that holds a key like `a//b` or `a/../b`."""


def is_transient(error: Exception) -> bool:
    """Whether another try may go well: no answer, half of one, or a server that is busy or has two writers at once (409)."""
    text = str(error)
    if isinstance(error, FileNotFoundError | ValueError) or _REFUSED.search(text) or "builder error" in text:
        return False
    if any(sign in text for sign in (*_NO_BUCKET, *_NO_CREDENTIALS, _NO_PATH)):
        return False
    status = _STATUS.search(text)
    return status is None or status[1][0] == "5" or status[1].startswith(("408", "409", "429"))


def is_range_error(error: Exception) -> bool:
    """Whether a range was asked for that begins behind the object's end."""
    return "416 Range Not Satisfiable" in str(error)


def translate_error(error: Exception, *, url: str, path: str, doing: str, tried: str = "") -> SoftcacheError:
    """Returns the error to raise for one of obstore's.

    Args:
        url: of the root.
        path: of the object, "" for the root itself.
        doing: what could not be done, such as "read".
        tried: how often, and for how long.
    """
    scheme, rest = url.split("://", 1)
    provider, bucket = PROVIDERS[scheme], f"{scheme}://{rest.split('/')[0]}"
    where, text = f"{url}/{path}" if path else url, str(error)
    answer = _answer(text)
    if any(sign in text for sign in _NO_BUCKET):
        return StorageError(
            f"{where}: cannot be {doing}: there is no bucket {bucket} ({answer}); create it, or correct the URL or "
            f"{provider.endpoint}"
        )
    if any(sign in text for sign in _NO_CREDENTIALS):
        return StorageError(
            f"{where}: cannot be {doing}: no credentials were found ({answer}); set {provider.credentials}"
        )
    if isinstance(error, FileNotFoundError):
        return CacheNotFoundError(f"{where}: missing; restore it, or run the stage that writes it")
    if _REFUSED.search(text) or type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return StorageError(
            f"{where}: cannot be {doing}: the server refused ({answer}); check {provider.credentials}, and that they may "
            f"list, read, write and delete in {bucket}"
        )
    # S3 answers 400 where a token has expired, to HEAD without a word of why.
    if answer == "400 Bad Request" or any(sign in text for sign in _EXPIRED):
        return StorageError(
            f"{where}: cannot be {doing}: the server refused the request ({answer}): the token has expired, or the region "
            f"is another; renew {provider.credentials}, check the region and {provider.endpoint}, then rerun: what is "
            "finished is kept"
        )
    if _NO_PATH in text:
        key = re.search(r'Path "([^"]*)"?', text)
        return StorageError(
            f"{where}: cannot be {doing}: there is an object whose key is no path, "
            f"{(key[1] if key else answer)!r} (an empty part, as in a//b, a dot, or a control character); rename or delete "
            "it, or choose another prefix"
        )
    if "builder error" in text:
        return StorageError(
            f"{where}: cannot be {doing}: the endpoint is plain http://, which is off; set "
            f"{provider.prefix}_ALLOW_HTTP=true if the network is trusted"
        )
    if is_transient(error):
        return StorageError(
            f"{where}: cannot be {doing}: {answer}{tried}; check the network and {provider.endpoint}, then rerun: what is "
            "finished is kept"
        )
    return StorageError(f"{where}: cannot be {doing}: {answer}")


def _answer(text: str) -> str:
    """Returns the answer of the server or the network, in one short line."""
    status, code = _STATUS.search(text), re.search(r"<Code>([^<]*)</Code>", text)
    if status is not None:
        return f"{status[1].strip()}{', ' + code[1] if code else ''}"
    if code is not None:
        return code[1]
    first = text.split("\n", 1)[0]
    return "no answer: " + first.rsplit("HTTP error: ", 1)[1] if "HTTP error: " in first else first
