# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/fph watch, against a libvirt that is made up."""

import json
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Tuple

import libvirt
import pytest

from livefph import connection, show
from livefph.watch import Sample, expected_seconds, from_job, from_qmp

from livemig import fake_libvirt
from livemig.fake_libvirt import DENIED, GIB, GONE, MIB, FakeHost, InTurn, error

# Fixtures
host = fake_libvirt.host_fixture
fph = fake_libvirt.fph_fixture


def moment(second: float, remaining: int, **more: Any) -> Sample:
    """A sample of the first round of a guest of 1 GiB, half of which is skipped."""
    sample = Sample(second, "active", GIB, remaining * MIB, 1, round=1, skipped=GIB // 2)
    return replace(sample, **more)


SEEN = [moment(1, 512), moment(2, 412), moment(3, 312)]
ENDS: Dict[str, Tuple[List[Sample], Any]] = {
    "one look is none": (SEEN[:1], None),
    "100 MiB a second": (SEEN, 3.12),
    "half of that is dirtied again": ([*SEEN[:2], moment(3, 312, dirty_rate=50 * MIB)], 6.24),
    "all of that is": ([*SEEN[:2], moment(3, 312, dirty_rate=100 * MIB)], None),
    "the guest was asked only then": ([moment(1, 1024, skipped=0), *SEEN[1:]], 3.12),
    "nothing was sent at first": ([moment(0, 1024, sent=0), *SEEN], 3.12),
    "a round has begun": ([*SEEN, moment(4, 60, round=2)], 0.6),
    "two rounds": ([*SEEN, moment(4, 60, round=2), moment(5, 20, round=2)], 0.25),
    "it became slower": ([moment(-9, 1500), *SEEN], 3.12),
    "it stands": ([*SEEN[:1], moment(9, 512)], None),
    "time stands": (SEEN[:1] * 2, None),
}


@pytest.mark.parametrize("samples, seconds", ENDS.values(), ids=ENDS)
def test_expected_end(samples: List[Sample], seconds: Any) -> None:
    """The end is where the latest progress leads, less what is dirtied; or it is not in sight."""
    assert expected_seconds(samples) == (seconds and pytest.approx(seconds))


RAM = {"mbps": 800, "dirty-pages-rate": 256, "page-size": 4096, "dirty-sync-count": 2}
SKIPPED = {
    "free-page-hint": {"skipped-bytes": 400 * MIB, "redirtied-bytes": 10 * MIB},
    "absent-pages": {"absent-bytes": 110 * MIB},
}


def info(status: str, second: float, remaining: int, **more: Any) -> Dict[str, Any]:
    """An answer to query-migrate."""
    ram = {"total": GIB, "remaining": remaining * MIB, "transferred": 5 * MIB, **RAM}
    return {"status": status, "total-time": int(second * 1000), "ram": ram, **SKIPPED, **more}


def test_samples_mean_the_same_from_qemu_and_from_libvirt() -> None:
    """Bytes, and bytes per second; only QEMU knows what was skipped."""
    sample = from_qmp(info("active", 1.5, 100))
    assert sample == Sample(1.5, "active", GIB, 100 * MIB, 5 * MIB, 1e8, MIB, 2, 500 * MIB)
    names = "total remaining processed bps dirty_rate page_size iteration".split()
    values = (GIB, 100 * MIB, 5 * MIB, int(1e8), 256, 4096, 2)
    job = {f"memory_{name}": value for name, value in zip(names, values)}
    assert from_job({"time_elapsed": 1500, **job}) == replace(sample, skipped=None)


@pytest.fixture
def watched(host: FakeHost, fph: Any, tmp_path: Path) -> Any:
    """Watches a domain "a" whose QEMU answers so in turn.

    Returns the exit status, the JSON that was written, the output and the errors.
    """

    def watch(answers: List[Any], *options: str, **state: Any) -> Tuple[int, Any, Any, Any]:
        vars(host.add("a").qemu(query_migrate=InTurn(answers))).update(state)
        base = str(tmp_path / "seen")
        status, out, err = fph("watch", "a", "--interval", "0", "-o", base, *options)
        return status, json.loads(Path(base + ".json").read_text("utf-8")), out, err

    return watch


COMPLETED = {"operation": 5, "time_elapsed": 3000, "downtime": 30, "memory_processed": 9 * MIB}


def test_watch_to_the_end(watched: Any, tmp_path: Path) -> None:
    """What was seen is written and drawn; QEMU is gone, and libvirt knows the end."""
    looks = [info("active", 1, 500), info("active", 2, 100), info("active", 2.5, 50)]
    end = {"type": 3, **COMPLETED}
    status, record, out, err = watched([{}, *looks, GONE], "--wait", "9", completed=end)
    assert (status, err) == (0, [])
    assert "end in 0.3 s" in out[-3] and "skipped 500 MiB" in out[-3] and "80 % sent" in out[-3]
    assert out[-2] == (
        "a: completed in 3.0 s, of that 30 ms downtime, 9 MiB sent, 500 MiB of 1.0 GiB skipped"
    )
    assert [s["remaining"] for s in record["samples"]] == [500 * MIB, 100 * MIB, 50 * MIB, 0]
    assert record["skipped"] == 500 * MIB and record["status"] == "completed"
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")


def test_watch_a_migration_that_fails(watched: Any) -> None:
    """QEMU lives on and says why; the status of an earlier migration is not this one's."""
    old = info("cancelled", 7, 7)
    failed = {**info("failed", 2, 300), "error-desc": "Unable to write to socket"}
    answers = [old, old, info("active", 1, 500), failed]
    status, record, out, err = watched(answers, "--wait", "9")
    assert (status, err) == (1, [])
    assert out[-2].startswith("a: failed in 2.0 s")
    assert out[-2].endswith(": Unable to write to socket")
    assert [s["status"] for s in record["samples"]] == ["active", "failed"]


def test_watch_keeps_what_was_seen_when_the_connection_is_lost(
    host: FakeHost, watched: Any, tmp_path: Path
) -> None:
    """The connection breaks half way: one line, and the files have what was seen until then."""
    answers = [info("active", 1, 500), info("active", 2, 400), host.cut]
    status, record, _, err = watched(answers)
    assert status == 3
    assert err == ["fph: a: the connection to qemu:///fake was lost: client socket is closed"]
    assert record["status"] == "lost" and len(record["samples"]) == 2
    assert (tmp_path / "seen.png").exists()


def test_watching_can_be_ended(host: FakeHost, watched: Any) -> None:
    """Ctrl-C ends the watching, not the migration; what was seen is kept."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    answers = [info("active", 1, 500), info("active", 2, 400), interrupt]
    status, record, out, err = watched(answers)
    assert (status, err) == (130, ["fph: interrupted"])
    assert out[-2].endswith("it goes on, and was not watched to its end")
    assert len(record["samples"]) == 2
    assert {request["execute"] for request in host.domains["a"].asked} == {"query-migrate"}


def test_watch_through_a_read_only_connection(watched: Any) -> None:
    """libvirt's own figures are followed, without what was skipped."""
    job = {"type": 2, "operation": 5, "memory_total": GIB, "time_elapsed": 100}
    jobs = [{"type": 0}, {**job, "memory_remaining": 7}, {"type": 0}]
    end = {"type": 3, **COMPLETED}
    options = ("--readonly", "--wait", "9")
    status, record, out, err = watched([DENIED], *options, jobs=jobs, completed=end)
    assert (status, err) == (0, [])
    assert record["samples"][0]["remaining"] == 7 and record["skipped"] is None
    assert "skipped" not in out[-2]


def test_event_is_heard_when_no_look_was_in_time(host: FakeHost, watched: Any) -> None:
    """Events say what was skipped and how it ended, where both was over between two looks.

    The domain was transient, so that libvirt knows nothing of it any more.
    """

    def over() -> Any:
        data = {"free-page-hint": {"skipped-bytes": MIB}, "absent-pages": {"absent-bytes": MIB}}
        host.listeners["MIGRATION_FREE_PAGES"](None, None, None, 0, 0, json.dumps(data), None)
        host.listeners["end"](None, None, dict(COMPLETED), None)
        return error(libvirt.VIR_ERR_NO_DOMAIN, "Domain not found")

    status, record, out, err = watched([{}, over], "--wait", "9")
    assert status == 0 and record["skipped"] == 2 * MIB
    assert any(line.endswith("sent, 2 MiB skipped") for line in out)
    assert err == ["fph: a: no picture: the migration was over before it was looked at twice"]


def test_progress_fits_the_terminal() -> None:
    """The bar has what was sent, is left, and skipped; less is said where there is less room."""
    sample = moment(1, 256, rate=100 * MIB, expected=2.5)
    assert show.filled(sample, 8) == "##..////"
    assert show.filled(replace(sample, total=0), 8) == "." * 8
    record = show.Record("a", "active", samples=[sample])
    line = show.progress(record, 1000)
    assert " 50 % sent" in line and "end in 2.5 s" in line
    for rate, words in (0, "end not known"), (MIB, "end not in sight"):
        record.samples = [replace(sample, expected=None, dirty_rate=rate)]
        assert words in show.progress(record, 1000)
    record.samples = [sample]
    for width in 40, 60, 80:
        shorter = show.progress(record, width)
        assert len(shorter) < width and line.startswith(shorter)
        # Nothing is cut in the middle but what is longer than the terminal is wide.
        assert width == 40 or line[len(shorter) :].startswith("  ")


def serve(path: Path, *answers: Any) -> None:
    """Be QEMU's end of a QMP socket, for one client; what is written after each line, in turn."""
    server = socket.create_server(str(path), family=socket.AF_UNIX)

    def answer_all() -> None:
        with server, server.accept()[0] as client, client.makefile("rw") as stream:
            for answer in answers:
                for message in answer if isinstance(answer, list) else [answer]:
                    stream.write(json.dumps(message) + "\n")
                stream.flush()
                stream.readline()

    threading.Thread(target=answer_all, daemon=True).start()


GREETING = {"QMP": {"version": {}, "capabilities": []}}
EMPTY: Dict[str, Any] = {"return": {}}


def test_watch_a_qemu_without_libvirt(host: FakeHost, fph: Any, tmp_path: Path) -> None:
    """A QEMU's own socket is watched, with the events in between, to the migration's end."""
    event = {"event": "MIGRATION_FREE_PAGES", "data": {"free-page-hint": {"state": "ended"}}}
    seen = [{"return": info("active", 1, 300)}, {"return": info("active", 2, 200)}]
    over = {"return": info("completed", 3, 0, downtime=20)}
    path = tmp_path / "qmp"
    serve(path, GREETING, EMPTY, EMPTY, [event, seen[0]], seen[1], over)
    status, out, err = fph("watch", "--qmp", str(path), "--interval", "0", "--wait", "9")
    assert (status, err) == (0, [])
    assert out[0] == f"{path}  waits for a migration"
    assert " 61 % sent  end in 2.0 s" in out[-2]
    assert out[-1].startswith(f"{path}: completed in 3.0 s, of that 20 ms downtime")
    assert not host.defined


def test_watch_a_qemu_that_ends(fph: Any, tmp_path: Path) -> None:
    """QEMU is gone in the middle: that is said, and that it is not known how it ended."""
    path = tmp_path / "qmp"
    serve(path, GREETING, EMPTY, {"return": info("active", 1, 300)})
    status, out, err = fph("watch", "--qmp", str(path), "--interval", "0")
    assert (status, err) == (1, [])
    assert out[-1].startswith(f"{path}: gone, ") and out[-1].endswith(": QEMU has ended")


def test_sockets_that_are_no_monitor(
    fph: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket that says something else, or nothing, is named in one line."""
    monkeypatch.setattr(connection, "QMP_SECONDS", 0.2)
    for name, answers, line in (
        ("other", [{"hello": 1}], "this is no QMP socket"),
        ("silent", [[]], "no answer; is somebody connected to it?"),
        ("closed", [], "QEMU has ended"),
    ):
        serve(tmp_path / name, *answers)
        status, out, err = fph("watch", "--qmp", str(tmp_path / name))
        assert (status, out) == (1 if name == "closed" else 3, [])
        assert err == [f"fph: {tmp_path / name}: {line}"]
