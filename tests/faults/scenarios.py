"""One function per fault: disturb a run, let it finish, count its rows.

Each takes a Setting and returns details to report with the count. Random choices depend on the seed.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import yaml

from cliper.pipeline.run.lease import LEASE_FILE, Holder
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uris import join
from tests.conftest import ROOT
from tests.faults.place import Count, Expected, Place, brightness_of, count, written
from tests.faults.processes import Driver, workers
from tests.faults.proxy import FlakyProxy
from tests.support.fakes import BROKEN, CLASSES, jpeg, write_corpus

SEGMENTING, WRITING = r"ray::MapWorker.*ShardActor", r"ray::MapBatches\(write_shard\)"
IMAGES_PER_SHARD = 20


@dataclass(frozen=True)
class Setting:
    """Storage, size and Ray of a scenario: `ray` is an address and `root` a process above its workers, or both
    are None and every driver starts its own Ray."""

    place: Place
    images: int
    times: int  # number of faults
    seed: int
    ray: str | None = None
    root: int | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of a disturbed run."""

    count: Count
    detail: dict[str, Any]


def options(setting: Setting, segmenter: str = "steady", **config: Any) -> list[str]:
    """Command-line options of a run over the setting's corpus; one actor unless `config` sets the number."""
    content = {
        "segmenter": segmenter,
        "shard": {"images": IMAGES_PER_SHARD},
        "resources": {"actors": 1, "cpus_per_actor": 1},
    }
    folder = setting.place.folder.parent
    text = yaml.safe_dump(content | config)
    path = folder / f"{setting.place.name}-{abs(hash(text))}.yaml"
    path.write_text(text)
    classes = folder / "classes.txt"
    classes.write_text("\n".join(CLASSES.names) + "\n")
    corpus = f"{setting.place.root}/corpus-{setting.images}"
    command = ["--input", corpus, "--config", str(path), "--classes", str(classes)]
    for name, value in setting.place.options.items():
        command += ["--storage-option", f"{name}={value}"]
    return command


def finished(setting: Setting, run: str, command: list[str], expected: Expected, **detail: Any) -> Outcome:
    """Finish the run with a last, undisturbed driver and count its rows."""
    Driver(setting.place, run, command, setting.ray).finish()
    return Outcome(count(setting.place.open(run), expected), detail)


def driver_killed(setting: Setting) -> Outcome:
    """SIGKILL the driver again and again: while it starts, lists, works or commits; resume each time."""
    expected = brightness_of(setting.place.corpus(setting.images))
    command, at, kills = options(setting), list[int](), 0
    generator = random.Random(setting.seed)
    for _ in range(setting.times):
        driver = Driver(setting.place, "driver-killed", command, setting.ray)
        more = generator.choice([0, 1, 1, 2])
        driver.wait_for_shards((at[-1] if at else 0) + more)
        time.sleep(generator.uniform(0, 8) if more == 0 else generator.uniform(0, 0.3))
        kills += driver.kill()  # a quick driver may have ended by itself
        at.append(driver.shards())
    return finished(setting, "driver-killed", command, expected, kills=kills, shards_at_kills=at)


def machine_killed(setting: Setting) -> Outcome:
    """SIGKILL the driver with its whole Ray, with the embedded model; compare with an undisturbed run."""
    setting.place.corpus(setting.images)
    model = {"backbone": {"model": "embedded:tiny"}, "fusion": {"short_side": 64}, "fgc": None}
    command = options(setting, "cliper", model=model)
    Driver(setting.place, "real-undisturbed", command, setting.ray).finish()
    expected = dict(written(setting.place.open("real-undisturbed")))
    generator, kills = random.Random(setting.seed), 0
    for _ in range(setting.times):
        driver = Driver(setting.place, "real-killed", command, setting.ray)
        driver.wait_for_shards(driver.shards() + 1)
        time.sleep(generator.uniform(0, 0.5))
        kills += driver.kill()
    return finished(setting, "real-killed", command, expected, kills=kills)


def workers_killed(setting: Setting) -> Outcome:
    """SIGKILL the segmenting actor, and every third time the task that is writing a shard, under one driver.

    `times` kills in total; a process that ended before the signal is not counted.
    """
    expected = brightness_of(setting.place.corpus(setting.images))
    driver = Driver(setting.place, "workers-killed", options(setting), setting.ray)
    killed = {SEGMENTING: 0, WRITING: 0}
    generator = random.Random(setting.seed)
    while sum(killed.values()) < setting.times and driver.process.poll() is None:
        title = WRITING if sum(killed.values()) % 3 == 2 else SEGMENTING
        driver.wait_for_shards(driver.shards() + 1)
        time.sleep(generator.uniform(0, 0.2))
        found = driver.wait_for(partial(workers, setting.root or driver.process.pid, title))
        killed[title] += _kill(found or [])
    driver.finish()
    detail = {"actors_killed": killed[SEGMENTING], "writers_killed": killed[WRITING]}
    return Outcome(count(setting.place.open("workers-killed"), expected), detail)


def _kill(pids: list[int]) -> int:
    for pid in pids[:1]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return 0
    return len(pids[:1])


def node_lost(setting: Setting) -> Outcome:
    """Lose a node of a cluster of three, and add one, again and again under one driver."""
    from ray._private.worker import global_worker
    from ray.cluster_utils import Cluster
    from ray.experimental.internal_kv import _initialize_internal_kv

    expected = brightness_of(setting.place.corpus(setting.images))
    known = {"PYTHONPATH": str(ROOT)}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "env_vars": known}
    )
    nodes = [cluster.add_node(num_cpus=2, env_vars=known) for _ in range(2)]
    try:
        two = {"actors": 2, "cpus_per_actor": 1}
        driver = Driver(setting.place, "node-lost", options(setting, resources=two), cluster.address)
        for _ in range(setting.times):
            driver.wait_for_shards(driver.shards() + 2)
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
            driver.wait_for_shards(driver.shards() + 1)
            nodes.append(cluster.add_node(num_cpus=2, env_vars=known))
        driver.finish()
    finally:
        cluster.shutdown()
        if global_worker.connected:  # to another Ray, whose store of keys the shutdown has taken from this process
            _initialize_internal_kv(global_worker.gcs_client)
    return Outcome(count(setting.place.open("node-lost"), expected), {"nodes_lost": setting.times})


def flaky_storage(setting: Setting) -> Outcome:
    """A proxy breaks 10% of all requests to the S3 server, each in one of five ways."""
    expected = brightness_of(setting.place.corpus(setting.images))
    with FlakyProxy(setting.place.options["endpoint_url"], rate=0.1, seed=setting.seed) as proxy:
        command = options(setting, "brightness")
        command += ["--storage-option", f"endpoint_url={proxy.endpoint}"]  # the last one counts
        command += ["--storage-option", "config_kwargs={read_timeout: 3}"]
        Driver(setting.place, "flaky", command, setting.ray).finish()
        detail = {"requests": proxy.requests, "broken": sum(proxy.injected.values()), **proxy.injected}
    return Outcome(count(setting.place.open("flaky"), expected), detail)


def slow_store(setting: Setting) -> Outcome:
    """A store sends a byte a second: of all images, which stops the run; then of one, which is a failed row."""
    contents = setting.place.corpus(setting.images)
    slow = sorted(contents)[setting.images // 2]
    patience = {"actors": 1, "cpus_per_actor": 1, "load_seconds": 8, "load_rate": 100_000}
    command, upstream = options(setting, "brightness", resources=patience), setting.place.options["endpoint_url"]
    with FlakyProxy(upstream, 0.0, setting.seed, slow=f"corpus-{setting.images}/") as proxy:
        through = [*command, "--storage-option", f"endpoint_url={proxy.endpoint}"]  # the last one counts
        text = Driver(setting.place, "slow", through, setting.ray).finish(2)
        assert "the store delivers less than 100 kB/s; the same command continues" in text, text
        assert "Traceback" not in text, text
        of_all = proxy.trickled
    with FlakyProxy(upstream, 0.0, setting.seed, slow=slow) as proxy:
        through = [*command, "--storage-option", f"endpoint_url={proxy.endpoint}"]
        Driver(setting.place, "slow", through, setting.ray).finish()
        detail = {"trickled": of_all, "then_trickled": proxy.trickled}
    expected = dict(brightness_of(contents)) | {slow: ("failed", "unreadable")}
    return Outcome(count(setting.place.open("slow"), expected), detail)


POISON: dict[str, tuple[str, str]] = {  # expected (status, error_type) of each kind
    "segfault": ("poison", "poison"),
    "exit": ("poison", "poison"),
    "abort": ("poison", "poison"),
    "sigkill": ("poison", "poison"),
    "sigbus": ("poison", "poison"),
    "hang": ("poison", "poison"),
    "memory": ("failed", "out_of_memory"),
    "raise": ("failed", "RuntimeError"),
    "oversized": ("failed", "oversized"),
    "corrupt": ("failed", "corrupt"),
    "not_an_image": ("failed", "not_an_image"),
    "empty": ("failed", "empty"),
}


def poison_images(setting: Setting) -> Outcome:
    """Images that kill, hang, raise or cannot be decoded, `times` kinds of them, among good ones."""
    kinds = list(POISON)[: setting.times]
    bad = {f"poison/{kind}-1.jpg": BROKEN.get(kind, jpeg(1)) for kind in kinds}
    contents = setting.place.corpus(setting.images, bad)
    expected = dict(brightness_of({name: data for name, data in contents.items() if name not in bad}))
    expected |= {name: POISON[name.partition("/")[2].rpartition("-")[0]] for name in bad}
    resources = {"actors": 1, "cpus_per_actor": 1, "image_seconds": 5}  # a busy machine may take over 1 s
    Driver(setting.place, "poison", options(setting, "harmful", resources=resources), setting.ray).finish()
    return Outcome(count(setting.place.open("poison"), expected), {"bad_images": len(bad)})


def two_drivers(setting: Setting) -> Outcome:
    """Start two drivers at once: one works, the other is refused with the reason."""
    expected = brightness_of(setting.place.corpus(setting.images))
    drivers = [Driver(setting.place, "two-drivers", options(setting), setting.ray) for _ in range(2)]
    codes = sorted(driver.process.wait(600) for driver in drivers)
    assert codes == [0, 2], drivers[0].text()
    return Outcome(count(setting.place.open("two-drivers"), expected), {"exit_codes": codes})


def foreign_lease(setting: Setting) -> Outcome:
    """Drivers that died on other machines with clocks that were decades off: their leases expire as well."""
    expected = brightness_of(setting.place.corpus(setting.images))
    command = options(setting)
    for year in (1970, 2999):
        driver = Driver(setting.place, "foreign-lease", command, setting.ray)
        driver.wait_for_shards(driver.shards() + 1)
        driver.kill()
        run = setting.place.open("foreign-lease")
        when = f"{year}-01-01T00:00:00.000+00:00"
        dead = replace(Holder.me(3.0), machine="another boot", host="elsewhere", since=when, renewed=when)
        run.storage.write(join(run.uri, LEASE_FILE), dead.encode())
    outcome = finished(setting, "foreign-lease", command, expected)
    log = driver.text()
    assert all(f"elsewhere, since {year}" in log for year in (1970, 2999)), log
    return outcome


def changed_settings(setting: Setting) -> Outcome:
    """Kill a run, try to resume it with other settings (refused), then with its own."""
    expected = brightness_of(setting.place.corpus(setting.images))
    command = options(setting)
    driver = Driver(setting.place, "changed", command, setting.ray)
    driver.wait_for_shards(1)
    driver.kill()
    other = options(setting, max_pixels=1000)
    assert "max_pixels was 100000000, is now 1000" in Driver(setting.place, "changed", other, setting.ray).finish(
        2
    )
    return finished(setting, "changed", command, expected)


def corpus_grows(setting: Setting) -> Outcome:
    """New and replaced files, then `--extend` with its driver killed, again and again.

    Every second file is replaced by one of the same size if there is room. The last command finishes: every image
    once, with the mask of its last content.
    """
    storage, generator, kills = Storage(setting.place.options), random.Random(setting.seed), 0
    corpus = f"{setting.place.root}/corpus-growing"
    contents = write_corpus(setting.place.folder / "corpus-growing", setting.images)
    command = options(setting)
    command[command.index("--input") + 1] = corpus
    Driver(setting.place, "grows", command, setting.ray).finish()
    command += ["--extend", "--relabel", "changed", "--relabel", "touched"]
    same_size = 0
    for day in range(setting.times):
        news = {f"day-{day}/{i:03d}.jpg": jpeg(1000 * day + i) for i in range(2 * IMAGES_PER_SHARD)}
        other = generator.sample(sorted(contents), 10)
        for place, name in enumerate(other):
            size = len(contents[name]) + (place % 2) * 5000
            news[name] = jpeg(generator.randrange(10**6)).ljust(size, b"\0")
            same_size += len(news[name]) == len(contents[name])
        for name, data in news.items():
            storage.write(f"{corpus}/{name}", data)
        contents |= news
        driver = Driver(setting.place, "grows", command, setting.ray)
        more = generator.choice([0, 1, 1, 2])
        driver.wait_for_shards(driver.shards() + more)
        time.sleep(generator.uniform(0, 8) if more == 0 else generator.uniform(0, 0.3))
        kills += driver.kill()
    detail = {"extensions": setting.times, "kills": kills, "replaced_same_size": same_size}
    return finished(setting, "grows", command, brightness_of(contents), **detail)


def corpus_changes(setting: Setting) -> Outcome:
    """Files are replaced while the run is at work: each is labeled as it was, or is a failed row, `changed`."""
    storage, corpus = Storage(setting.place.options), f"{setting.place.root}/corpus-changing"
    contents = write_corpus(setting.place.folder / "corpus-changing", setting.images)
    command = options(setting)
    command[command.index("--input") + 1] = corpus
    driver = Driver(setting.place, "changes", command, setting.ray)
    driver.wait_for_shards(1)
    replaced = sorted(contents)[-2 * IMAGES_PER_SHARD :]
    for place, name in enumerate(replaced):  # every second one by a file of the same size
        data = jpeg(77) + contents[name]
        storage.write(f"{corpus}/{name}", data[: len(contents[name])] if place % 2 else data)
    driver.finish()
    expected, run = dict(brightness_of(contents)), setting.place.open("changes")
    failed = {name for name, found in written(run) if found == ("failed", "changed")} & set(replaced)
    expected |= dict.fromkeys(failed, ("failed", "changed"))
    return Outcome(count(run, expected), {"replaced": len(replaced), "failed_as_changed": len(failed)})


def disk_full(setting: Setting) -> Outcome:
    """The run folder's disk first has room for about half of the labels, later for all. Needs root to mount."""
    expected = brightness_of(setting.place.corpus(setting.images))
    folder = setting.place.folder / "disk-full"
    folder.mkdir()
    size = f"size={96 + setting.images // 4}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)
    try:
        command = options(setting, "brightness")
        text = Driver(setting.place, "disk-full/run", command, setting.ray).finish(2)
        assert "Traceback" not in text, text
        full = len(list((folder / "run" / "labels").glob("shard-*.parquet")))
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        outcome = finished(setting, "disk-full/run", command, expected, shards_when_full=full)
    finally:
        subprocess.run(["umount", folder], check=True)
    return outcome


SCENARIOS: dict[str, Callable[[Setting], Outcome]] = {
    "driver killed": driver_killed,
    "machine killed, embedded model": machine_killed,
    "actor or writer killed": workers_killed,
    "node lost and added": node_lost,
    "poison images": poison_images,
    "two drivers at once": two_drivers,
    "dead driver elsewhere, clocks off": foreign_lease,
    "resumed with other settings": changed_settings,
    "10% of requests broken": flaky_storage,
    "slow store": slow_store,
    "disk full": disk_full,
    "corpus grows, driver killed": corpus_grows,
    "corpus changes under the run": corpus_changes,
}
ONLY_AT = {"10% of requests broken": "s3", "slow store": "s3", "disk full": "local"}  # the others happen at both
