"""The settings of both S3 clients, s3fs and obstore.

`s3_options` holds what the user asked for, as options of s3fs. `store_settings` maps them to obstore; what it does
not map is left to s3fs.
"""

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

CLIENT = {
    # Stalls end in an error that is retried, never in a hang. Seconds without a connection, or without a byte.
    "connect_timeout": 10,
    "read_timeout": 30,
    "retries": {"total_max_attempts": 1},  # retry.py retries; two layers would multiply
    # Stores other than AWS send the whole object's checksum with a byte range, which then cannot match.
    "response_checksum_validation": "when_required",
    "request_checksum_calculation": "when_required",
}


def s3_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in time-outs, retries and the endpoint from the environment around the user's own options."""
    merged = dict(options)
    merged["config_kwargs"] = CLIENT | dict(merged.get("config_kwargs", {}))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        merged.setdefault("endpoint_url", endpoint)
    # Listings must be fresh: a resumed run asks which shards exist.
    return merged | {"use_listings_cache": False}


@dataclass(frozen=True)
class StoreSettings:
    """How obstore reaches one bucket."""

    bucket: str
    endpoint: str | None
    config: Mapping[str, Any] = field(repr=False)  # may hold keys
    client: Mapping[str, Any] = field(repr=False)
    silence: float  # seconds without a byte, after which a request fails
    credentials: Any = field(
        default=None, repr=False
    )  # botocore's, which renew themselves; None: keys of the options, or none

    def store(self, patient: bool = False) -> Any:
        """The obstore client. A `patient` one is for long uploads: its clock for silence runs while sending."""
        return _store(self, patient)

    def __hash__(self) -> int:
        return id(self)


@lru_cache(maxsize=64)
def _store(settings: StoreSettings, patient: bool) -> Any:
    from obstore.store import S3Store

    limit = timedelta(seconds=settings.silence * (10 if patient else 1))
    client: Any = {**settings.client, "read_timeout": limit, "timeout": timedelta(days=1)}
    return S3Store(
        settings.bucket,
        config=dict(settings.config),  # type: ignore[arg-type]
        client_options=client,
        retry_config={"max_retries": 0},  # retry.py retries; two layers would multiply
        credential_provider=settings.credentials,
    )


def store_settings(options: Mapping[str, Any], bucket: str) -> StoreSettings | None:
    """Settings of obstore for options of s3fs (`s3_options`); None for an option or set-up that is not mapped."""
    return _settings(json.dumps(options, sort_keys=True, default=repr), bucket)


_MAPPED = {
    "options": {
        *("key", "secret", "token", "username", "password", "anon", "endpoint_url", "profile", "use_ssl"),
        *("client_kwargs", "config_kwargs", "use_listings_cache", "requester_pays"),
    },
    "client_kwargs": {"region_name", "endpoint_url", "verify", "use_ssl"},
    "config_kwargs": {*CLIENT, "s3", "max_pool_connections"},
    "s3": {"addressing_style"},
}
_OTHER_PROFILE = {"s3", "services", "endpoint_url", "use_fips_endpoint", "use_dualstack_endpoint"}
# Variables that obstore reads and botocore does not, or that change the endpoint.
_OTHER_VARIABLES = {
    *("AWS_ENDPOINT", "AWS_SERVER_SIDE_ENCRYPTION", "AWS_SSE_KMS_KEY_ID", "AWS_SSE_BUCKET_KEY_ENABLED"),
    *("AWS_SSE_CUSTOMER_KEY_BASE64", "AWS_CHECKSUM_ALGORITHM", "AWS_S3_EXPRESS", "AWS_UNSIGNED_PAYLOAD"),
    *("AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT", "AWS_METADATA_ENDPOINT", "AWS_REQUEST_PAYER"),
    *("AWS_DEFAULT_BUCKET_ACL", "AWS_PROXY_URL", "AWS_ALLOW_HTTP", "AWS_ALLOW_INVALID_CERTIFICATES"),
}
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@lru_cache(maxsize=256)
def _settings(content: str, bucket: str) -> StoreSettings | None:
    options = json.loads(content)
    if not _all_mapped(options) or not _BUCKET.fullmatch(bucket) or bucket.endswith(("--x-s3", "-s3alias")):
        return None
    session = _session(options.get("profile"))
    client = options.get("client_kwargs", {})
    endpoint = (client.get("endpoint_url") or options.get("endpoint_url") or "").rstrip("/")
    region = client.get("region_name") or (session and session.get_config_variable("region"))
    if not endpoint:
        region = bucket_region(bucket)  # botocore follows a store that names another region; obstore does not
    keys = _keys(options, session)
    if session is None or keys is None or (not endpoint and not region) or endpoint.count("/") > 2:
        return None
    verify = client.get("verify")
    bundle = verify if isinstance(verify, str) else session.get_config_variable("ca_bundle")
    return StoreSettings(
        bucket,
        endpoint or None,
        keys["config"] | _place(options, bucket, endpoint) | {"region": region or "us-east-1"},
        _transport(options, endpoint, bundle, verify is not False),
        float(options["config_kwargs"]["read_timeout"]),
        keys["credentials"],
    )


def _all_mapped(options: Mapping[str, Any]) -> bool:
    """Whether every option and variable has a counterpart in obstore."""
    client, config = options.get("client_kwargs") or {}, options.get("config_kwargs") or {}
    given = {"options": options, "client_kwargs": client, "config_kwargs": config, "s3": config.get("s3") or {}}
    return (
        all(set(values) <= _MAPPED[name] for name, values in given.items())
        and options.get("use_ssl", True)
        and client.get("use_ssl", True)
        and not _OTHER_VARIABLES & os.environ.keys()
    )


def _session(profile: str | None) -> Any:
    """botocore's session, which finds region and credentials as s3fs does; None if its set-up is not mapped."""
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        session = Session(profile=profile)
        return None if _OTHER_PROFILE & session.get_scoped_config().keys() else session
    except BotoCoreError:  # no such profile: s3fs reports it
        return None


def _keys(options: Mapping[str, Any], session: Any) -> dict[str, Any] | None:
    """Credentials as obstore takes them: anonymous, keys, or botocore's; None if there are none."""
    from botocore.exceptions import BotoCoreError

    if options.get("anon"):
        return {"config": {"skip_signature": True}, "credentials": None}
    key, secret = (options.get(a) or options.get(b) for a, b in (("key", "username"), ("secret", "password")))
    if key and secret:
        config = {"access_key_id": key, "secret_access_key": secret, "skip_signature": False}
        return {
            "config": config | ({"session_token": t} if (t := options.get("token")) else {}),
            "credentials": None,
        }
    if key or secret or session is None:
        return None
    try:
        found = session.get_credentials()
    except BotoCoreError:
        return None
    return None if found is None else {"config": {"skip_signature": False}, "credentials": _Credentials(found)}


class _Credentials:
    """botocore's credentials (profile, role, instance) for obstore, which asks again after five minutes."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def __call__(self) -> dict[str, Any]:
        """Current keys; botocore renews them at least ten minutes before they expire."""
        now = self.found.get_frozen_credentials()
        keys = {"access_key_id": now.access_key, "secret_access_key": now.secret_key, "token": now.token}
        return keys | {"expires_at": datetime.now(UTC) + timedelta(minutes=10)}


def _place(options: Mapping[str, Any], bucket: str, endpoint: str) -> dict[str, Any]:
    """Endpoint and addressing style; as botocore, buckets are in the path of another endpoint than AWS's."""
    style = (options["config_kwargs"].get("s3") or {}).get("addressing_style")
    virtual = style == "virtual" if endpoint else style != "path" and "." not in bucket
    place: dict[str, Any] = {
        "virtual_hosted_style_request": virtual,
        "conditional_put": "etag",
        "disable_bulk_delete": True,
    }
    if options.get("requester_pays"):
        place["request_payer"] = True
    if endpoint:
        scheme, _, host = endpoint.partition("://")
        place["endpoint"] = f"{scheme}://{bucket}.{host}" if virtual else endpoint
    return place


def _transport(options: Mapping[str, Any], endpoint: str, bundle: str | None, verify: bool) -> dict[str, Any]:
    """Time-outs and certificates. A bundle is trusted in addition to the system's certificates."""
    transport: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=options["config_kwargs"]["connect_timeout"]),
        "allow_http": endpoint.startswith("http://"),
        "allow_invalid_certificates": not verify,
    }
    if not endpoint.startswith("http://") and verify:
        import certifi

        transport["root_certificate"] = Path(bundle or certifi.where()).read_bytes()
    return transport


AWS = "https://s3.amazonaws.com"


def bucket_region(bucket: str) -> str | None:
    """The region of a bucket of AWS, which its answers to anyone name; None if there is no such answer."""
    request = urllib.request.Request(f"{AWS}/{bucket}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.headers.get("x-amz-bucket-region")
    except urllib.error.HTTPError as error:  # also a refusal and a redirection name it
        return error.headers.get("x-amz-bucket-region")
    except OSError:
        return None
