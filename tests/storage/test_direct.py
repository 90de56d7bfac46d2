"""S3 objects through obstore: chosen where it covers the set-up, and the same to the caller as s3fs."""

import multiprocessing
import pickle
import ssl
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cliper.pipeline.errors import StorageError
from cliper.pipeline.storage import direct, s3
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.direct import DirectS3
from tests.conftest import S3Server
from tests.support.faulty_s3 import FaultyS3, written

KEYS = {"key": "KEY", "secret": "SECRET"}


@pytest.fixture(autouse=True)
def no_aws_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the machine that runs the tests, and no answers of another test."""
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3._settings.cache_clear()


def client(options: dict[str, Any], uri: str = "s3://bucket/key") -> Any:
    return Storage(options).objects(uri)[0]


def settings(options: dict[str, Any], uri: str = "s3://bucket/key") -> s3.StoreSettings:
    found = client(options, uri)
    assert isinstance(found, DirectS3)
    return found.settings


def test_options_are_mapped() -> None:
    plain = settings(KEYS | {"endpoint_url": "http://minio:9000"})
    assert plain.endpoint == "http://minio:9000"
    assert plain.config["endpoint"] == "http://minio:9000"
    assert not plain.config["virtual_hosted_style_request"]
    assert plain.config["region"] == "us-east-1"
    assert plain.client["allow_http"]
    assert settings(KEYS | {"endpoint_url": "http://a:1", "token": "T"}).config["session_token"] == "T"
    assert settings({"endpoint_url": "http://a:1", "anon": True}).config["skip_signature"]
    region = {"client_kwargs": {"region_name": "eu-west-3", "endpoint_url": "http://b:2"}}
    assert settings(KEYS | region).config["region"] == "eu-west-3"
    virtual = {"config_kwargs": {"s3": {"addressing_style": "virtual"}}, "endpoint_url": "https://store.example"}
    assert settings(KEYS | virtual).config["endpoint"] == "https://bucket.store.example"
    assert "SECRET" not in repr(plain)


@pytest.mark.parametrize(
    "options",
    [
        {"version_aware": True},
        {"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}},
        {"config_kwargs": {"proxies": {"http": "http://proxy:1"}}},
        {"config_kwargs": {"s3": {"use_accelerate_endpoint": True}}},
        {"client_kwargs": {"api_version": "2006-03-01"}},
        {"profile": "nosuch", "key": None, "secret": None},
        {"secret": None},
    ],
)
def test_options_without_a_counterpart_are_left_to_s3fs(options: dict[str, Any]) -> None:
    assert not isinstance(client(KEYS | {"endpoint_url": "http://a:1"} | options), DirectS3)


@pytest.mark.parametrize("key", ["a//b", "/a", "a/../b", "./a", "a\nb", "a/./b"])
def test_keys_that_obstore_would_change_are_left_to_s3fs(key: str) -> None:
    assert not isinstance(client(KEYS | {"endpoint_url": "http://a:1"}, f"s3://bucket/{key}"), DirectS3)


def test_a_variable_that_only_obstore_reads_leaves_all_to_s3fs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SERVER_SIDE_ENCRYPTION", "aws:kms")
    assert not isinstance(client(KEYS | {"endpoint_url": "http://a:1"}), DirectS3)


def test_a_profile_gives_keys_and_region(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "AWS_CONFIG_FILE").write_text("[profile lab]\nregion = eu-north-1\n")
    (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text(
        "[lab]\naws_access_key_id = LABKEY\naws_secret_access_key = LABSECRET\n"
    )
    found = settings({"endpoint_url": "http://a:1", "profile": "lab"})
    assert found.config["region"] == "eu-north-1"
    keys = found.credentials()
    assert (keys["access_key_id"], keys["secret_access_key"]) == ("LABKEY", "LABSECRET")
    assert keys["expires_at"] > datetime.now(UTC) + timedelta(minutes=9)
    assert not isinstance(client({"endpoint_url": "http://a:1"}), DirectS3)  # no keys anywhere
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "ENVSECRET")
    s3._settings.cache_clear()
    assert settings({"endpoint_url": "http://a:1"}).credentials()["access_key_id"] == "ENVKEY"


def test_the_region_of_a_bucket_of_aws_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "bucket_region", {"bucket": "ap-south-1"}.get)
    found = settings(KEYS | {"client_kwargs": {"region_name": "us-east-1"}})
    assert found.config["region"] == "ap-south-1"
    assert found.config["virtual_hosted_style_request"]
    assert not isinstance(client(KEYS, "s3://elsewhere/key"), DirectS3)


def test_the_region_stands_in_a_refusal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyS3() as server:
        server.objects["bucket"] = b""
        server.headers = {"x-amz-bucket-region": "eu-west-1"}
        monkeypatch.setattr(s3, "AWS", server.endpoint)
        assert s3.bucket_region("bucket") == "eu-west-1"
        assert s3.bucket_region("forbidden") == "eu-west-1"  # an error of the server
    assert s3.bucket_region("bucket") is None


def test_every_operation_but_listings_goes_through_obstore(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, storage = f"{s3.bucket('direct')}/ä b/c+d%20#?.bin", Storage(s3.options)
    assert isinstance(storage.objects(uri)[0], DirectS3)
    large = bytes(range(256)) * (80 << 10)  # 20 MB: an upload in parts
    monkeypatch.setattr(Storage, "filesystem", None)  # s3fs cannot be reached
    storage.write(uri, b"0123456789")
    assert (storage.read(uri), storage.size(uri)) == (b"0123456789", 10)
    storage.write(uri, large)
    assert storage.read(uri) == large
    assert storage.read_many([uri, uri + "no"], [None, None])[0] == large
    storage.remove(uri)
    with pytest.raises(FileNotFoundError):
        storage.size(uri)


def test_random_reads_fetch_little(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyS3() as server:
        data = written(server, ["bucket/a"], size=3 << 20)["s3://bucket/a"]
        storage = Storage(server.options)
        with storage.open("s3://bucket/a", ahead=False) as handle:
            handle.seek(1000)
            assert handle.read(10) == data[1000:1010]
        assert server.sent < 1000
        with storage.open("s3://bucket/a") as handle:
            assert handle.read() == data


def test_an_empty_object_and_a_range_past_the_end() -> None:
    with FaultyS3() as server:
        server.objects |= {"bucket/empty": b"", "bucket/a": b"12345"}
        storage = Storage(server.options)
        assert storage.read("s3://bucket/empty") == b""
        assert storage.read_range("s3://bucket/a", 3, 99) == b"45"
        assert storage.read_range("s3://bucket/a", 3, 3) == b""
        found = storage.read_many(["s3://bucket/empty", "s3://bucket/a"], [(0, 10), (7, 9)])
        assert found[0] == b""
        assert isinstance(found[1], OSError)


def test_storage_works_in_threads_and_after_pickling() -> None:
    with FaultyS3() as server:
        contents = written(server, [f"bucket/{i}" for i in range(40)])
        storage = pickle.loads(pickle.dumps(Storage(server.options)))
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(storage.read, contents)) == list(contents.values())
        assert storage.read_many(list(contents), [None] * 40) == list(contents.values())


def _read(storage: Storage, uri: str, results: Any) -> None:
    results.put((type(storage.objects(uri)[0]).__name__, storage.read(uri)))


def test_a_forked_process_reads_through_s3fs() -> None:
    """The threads of obstore do not survive a fork, for example into a DataLoader's workers."""
    with FaultyS3() as server:
        [(uri, content)] = written(server, ["bucket/a"]).items()
        storage = Storage(server.options)
        assert storage.read(uri) == content
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        child = context.Process(target=_read, args=(storage, uri, results))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert results.get() == ("S3FileSystem", content)


def test_a_private_certificate_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = _certificate(tmp_path)
    with FaultyS3() as server:
        [(uri, content)] = written(server, ["bucket/a"]).items()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.encrypt(context)
        options = server.options | {
            "endpoint_url": server.endpoint.replace("http://127.0.0.1", "https://localhost")
        }
        monkeypatch.setattr("cliper.pipeline.storage.retry.FIRST_PAUSE", 0.002)
        with pytest.raises(StorageError, match="check the endpoint"):
            Storage(options).read(uri)
        trusted = options | {"client_kwargs": {"verify": str(certificate)}}
        assert isinstance(client(trusted), DirectS3)
        assert Storage(trusted).read(uri) == content
        s3._settings.cache_clear()
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        assert Storage(options).read(uri) == content


def _certificate(folder: Path) -> Path:
    """A self-signed certificate for localhost with its key, as one PEM file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / "localhost.pem"
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return file


def test_a_store_that_does_not_mark_ranges_is_read_through_s3fs(s3: S3Server) -> None:
    """rclone answers a range with status 200."""
    uri, storage = f"{s3.bucket('ranges')}/a", Storage(s3.options)
    storage.write(uri, b"0123456789")
    assert storage.read_range(uri, 2, 5) == b"234"
    assert s3.endpoint in direct._UNMARKED_RANGES
    assert storage.read_many([uri], [(2, 5)]) == [b"234"]
