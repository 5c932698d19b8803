"""The lock and the journal of an output in a store where answers are lost and objects come and go."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from sparseprune.checkpoint import remote_run
from sparseprune.checkpoint.remote import Facts
from sparseprune.checkpoint.remote_run import Lock, Owner, RemoteJournal
from sparseprune.errors import MachineError

FAR = {"host": "far", "place": "elsewhere", "pid": 7, "start": "1", "token": "other", "renewed": 0}


class Folder:
    """A folder of objects in memory; what is in `wrong` happens once, in place of the method."""

    def __init__(self, **objects: bytes) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {name: (data, 0) for name, data in objects.items()}
        self.count = 0
        self.wrong: dict[str, list[Any]] = {}

    def _instead(self, method: str, *arguments: Any) -> Any:
        what = self.wrong.get(method)
        return what.pop(0)(*arguments) if what else ...

    def _written(self, name: str, data: bytes) -> dict[str, str]:
        self.count += 1
        self.objects[name] = (data, self.count)
        return {"e_tag": str(self.count)}

    def create(self, name: str, data: bytes) -> Any:
        found = self._instead("create", name, data)
        if found is not ...:
            return found
        return None if name in self.objects else self._written(name, data)

    def replace(self, name: str, data: bytes, mark: dict[str, str]) -> Any:
        found = self._instead("replace", name, data)
        if found is not ...:
            return found
        if name in self.objects and {"e_tag": str(self.objects[name][1])} != mark:
            return None
        return self._written(name, data)

    def read(self, name: str) -> Any:
        found = self._instead("read", name)
        if found is not ...:
            return found
        if name not in self.objects:
            return None
        data, count = self.objects[name]
        return data, {"e_tag": str(count)}

    def put(self, name: str, data: bytes) -> Facts:
        self._written(name, data)
        return Facts(len(data), "")

    def below(self, name: str) -> list[str]:
        return [one for one in self.objects if one.startswith(f"{name}/")]

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.objects.pop(name, None)


def lock_in(folder: Folder, periods: tuple[float, float] = (60, 0.1)) -> Lock:
    return Lock(folder, "lock", "s3://b/out", periods)  # type: ignore[arg-type]


def owner(**changes: Any) -> bytes:
    return json.dumps(FAR | changes).encode()


def test_a_lock_that_is_given_back_meanwhile_is_taken() -> None:
    folder = Folder()
    folder.wrong["create"] = [lambda *_: None]
    lock = lock_in(folder)
    lock.acquire(pytest.fail)
    assert "lock" in folder.objects
    lock.release()
    assert not folder.objects


def test_a_lock_whose_answer_was_lost_is_ones_own() -> None:
    folder = Folder()

    def unanswered(name: str, data: bytes) -> None:
        folder._written(name, data)

    folder.wrong["create"] = [unanswered]
    lock = lock_in(folder)
    lock.acquire(pytest.fail)
    assert json.loads(folder.objects["lock"][0])["token"] == lock._owner.token
    lock.release()


def test_a_lock_that_goes_while_one_watches_is_taken() -> None:
    folder = Folder(lock=owner())
    heard: list[str] = []

    def tell(line: str) -> None:
        heard.append(line)
        del folder.objects["lock"]

    lock = lock_in(folder)
    lock.acquire(tell)
    assert "waiting 0.1 s" in heard[0]
    assert json.loads(folder.objects["lock"][0])["host"] == Owner.here().host
    lock.release()


def test_what_is_no_lock_is_taken_over_after_its_silence() -> None:
    folder = Folder(lock=b"not JSON")
    heard: list[str] = []
    lock = lock_in(folder)
    lock.acquire(heard.append)
    assert heard == ["s3://b/out: a run was writing this output; waiting 0.1 s to see whether it still is"]
    lock.release()


def test_renewals_that_fail_or_whose_answers_are_lost_keep_the_lock() -> None:
    folder = Folder()

    def fail(*_: object) -> None:
        raise MachineError("the store answered 503")

    def unanswered(name: str, data: bytes) -> None:
        folder._written(name, data)

    folder.wrong["replace"] = [fail, unanswered]
    lock = lock_in(folder, (0.01, 60))
    lock.acquire(pytest.fail)
    lock.lost.wait(0.3)
    assert not lock.lost.is_set()
    assert not folder.wrong["replace"]
    assert json.loads(folder.objects["lock"][0])["renewed"] > 2
    lock.release()
    assert not folder.objects


def test_a_lock_that_another_one_took_stays_the_other_ones() -> None:
    folder = Folder()
    lock = lock_in(folder, (0.01, 60))
    lock.acquire(pytest.fail)
    folder._written("lock", owner())
    assert lock.lost.wait(10)
    lock.release()
    assert json.loads(folder.objects["lock"][0]) == FAR


def test_a_lock_that_was_never_had_is_not_given_back() -> None:
    folder = Folder(lock=owner())
    lock_in(folder).release()
    assert "lock" in folder.objects


@pytest.mark.parametrize("head", [b"not JSON", b"[]", b'{"format": 99}', b'{"format": 1, "files": 3}'])
def test_what_is_no_journal_is_none(head: bytes) -> None:
    folder = Folder(**{"run/identity": head})
    assert RemoteJournal(folder, "run").read() is None  # type: ignore[arg-type]


def test_a_journal_has_what_was_noted_but_for_what_is_broken_or_gone() -> None:
    folder = Folder()
    journal = RemoteJournal(folder, "run")  # type: ignore[arg-type]
    journal.begin({"the spec": "a"}, ["w", "index"], ["index"])
    journal.append({"w": Facts(3, "e")}, [(b'["key",[1,2]]', ["w"])])
    for _ in range(2):
        journal.append({"x": Facts(1, "e")}, [])
    folder.objects["run/00000001"] = (b"not JSON", 9)
    folder.wrong["read"] = [lambda _: (folder.objects["run/identity"][0], {})]
    found = journal.read()
    assert found is not None
    assert (found.identity, found.last, found.objects) == ({"the spec": "a"}, ["index"], 3)
    assert found.done == {"w": Facts(3, "e"), "x": Facts(1, "e")}
    assert found.notes == {"key": (b'["key",[1,2]]', ("w",))}
    journal.remove(identity=False)
    assert list(folder.objects) == ["run/identity"]
    journal.remove()
    assert not folder.objects


def test_a_process_that_is_gone_is_told_from_one_that_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Owner.here()
    assert not here.is_dead
    monkeypatch.setattr(remote_run, "_start", lambda _: "later")
    assert here.is_dead
    monkeypatch.setattr(remote_run, "_place", lambda: "")
    assert not here.is_dead
